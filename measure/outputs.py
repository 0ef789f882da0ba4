"""One model's components run four ways: the plan, ONNX Runtime, torch in FP16 and in FP32, each alone.

`python -m measure.outputs '<Job as JSON>'` prints a comparison of each output, as measure/accuracy.py judges.
The text encoders come first: the MMDiT's context is what they made of one random prompt.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from engines.onnxruntime.session import session
from engines.runner import runner
from engines.runtimes import Array, Run
from engines.source import Source, sources
from measure.accuracy import Comparison, compared
from mmdit.artifact import Layout
from mmdit.contract import TEXT_ENCODERS, Precision, Signature, components
from mmdit.errors import run_command
from mmdit.family import Family
from mmdit.samples import random_inputs
from mmdit.shapes import ShapeSet


class Job(BaseModel):
    """A model's engines for a target: all of them in FP16, or the FP8 MMDiT alone."""

    model_config = ConfigDict(frozen=True)

    model: str
    build: Path
    target: str
    precision: Precision


def main() -> None:
    """Compare the engines of the job that the command line gives."""
    for comparison in comparisons(Job.model_validate_json(sys.argv[1])):
        print(comparison.model_dump_json(), flush=True)


def comparisons(job: Job) -> Iterator[Comparison]:
    """Each output of each component; raises EngineError where one cannot be run."""
    from export.checkpoint import checkpoint_folder
    from serve.inside.text import join

    layout = Layout(job.model, job.build)
    found, family = sources(layout, job.model, job.precision)
    checkpoint = checkpoint_folder(job.model)
    rng = np.random.default_rng(0)
    hidden: dict[str, Array] = {}
    pooled: dict[str, Array] = {}
    for source in found:
        judged = source.precision is job.precision
        if not judged and source.component not in TEXT_ENCODERS:
            continue
        folder = layout.engine(job.target, source.component, source.precision)
        signature, shapes = _contract(folder, source.component, family)
        context = None if source.component in TEXT_ENCODERS else join(hidden, pooled, family.context_dim)
        inputs = _inputs(source.component, signature, shapes, context, rng)
        ways = {name: run(inputs) for name, run in _ways(source, folder, checkpoint, signature, judged)}
        if source.component in TEXT_ENCODERS:
            hidden[source.component] = ways["onnxruntime"]["hidden"]
            if "pooled" in ways["onnxruntime"]:
                pooled[source.component] = ways["onnxruntime"]["pooled"]
        if judged:
            yield from compared(source.component, job.precision, **ways)


def _contract(folder: Path, component: str, family: Family) -> tuple[Signature, ShapeSet]:
    from mmdit.artifact import require

    shapes = ShapeSet.model_validate(require(folder, "make engines").settings["shapes"])
    return components(family, shapes)[component], shapes


def _inputs(
    component: str,
    signature: Signature,
    shapes: ShapeSet,
    text: tuple[Array, Array] | None,
    rng: np.random.Generator,
) -> dict[str, Array]:
    """One row of random latents or ids at the size that the first profile is for, as many rows as it has."""
    first = shapes.ranges[0]
    rows = first.opt_rows if signature.max_rows > 1 else 1
    inputs = random_inputs(signature, rows, first.opt, rng)
    if component == "mmdit" and text is not None:
        inputs["context"], inputs["pooled"] = (np.stack([each] * rows) for each in text)
    return inputs


def _ways(
    source: Source, folder: Path, checkpoint: Path, signature: Signature, judged: bool
) -> Iterator[tuple[str, Run]]:
    """Each way's function, gone when the next one is asked for; ONNX Runtime's alone if it is not judged."""
    from quality.reference import reference

    loaded = [session(source.onnx, source.component, source.precision)]
    names = [tensor.name for tensor in signature.outputs]
    yield "onnxruntime", lambda inputs: dict(zip(names, loaded[0].run(names, inputs), strict=True))
    loaded.clear()
    if not judged:
        return
    with runner(folder) as run:
        yield "plan", run
    with reference(source.component, checkpoint, signature) as run:
        yield "torch_fp32", run
    with _torch_fp16(source.component, checkpoint, signature) as run:
        yield "torch_fp16", run


@contextlib.contextmanager
def _torch_fp16(component: str, checkpoint: Path, signature: Signature) -> Iterator[Run]:
    import torch

    from export.modules import load_module

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: list[Any] = [load_module(component, checkpoint, torch.float16).to(device)]

    @torch.no_grad()
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        given = [torch.from_numpy(inputs[tensor.name]).to(device) for tensor in signature.inputs]
        results = loaded[0](*given)
        results = results if isinstance(results, tuple) else (results,)
        return {
            tensor.name: result.cpu().numpy()
            for tensor, result in zip(signature.outputs, results, strict=True)
        }

    try:
        yield run
    finally:
        loaded.clear()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_command(main)
