"""A plan's speed, memory and layers on this GPU: `python -m measure.plan '<Job as JSON>'`.

Written against TensorRT's own bindings, the same names in 10.13 and 11.4. Prints a line of JSON for each
point that was timed, and one with the memory and the layers.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from engines.tensorrt.failures import explained
from engines.tensorrt.plan_from_onnx import PLAN
from measure.inspector import summary
from measure.timing import timed
from mmdit.artifact import require
from mmdit.errors import run_command

Shapes = dict[str, tuple[int, ...]]
Profile = dict[str, list[list[int]]]
_TORCH = {"HALF": "float16", "FLOAT": "float32", "INT64": "int64"}


class Job(BaseModel):
    """The engine in `folder`, at each profile's usual shapes, and there with `rows` that one takes.

    The inspector's whole text is written to `layers`.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    rows: tuple[int, ...]
    layers: Path
    device: str = "cuda"


def main() -> None:
    """Measure the plan of the job that the command line gives."""
    for line in measured(Job.model_validate_json(sys.argv[1])):
        print(json.dumps(line), flush=True)


def points(profiles: list[Profile], rows: tuple[int, ...]) -> list[tuple[int, Shapes]]:
    """What is timed: (profile's number, inputs' shapes), each shape once, in the first that takes it."""
    wanted: list[Shapes] = []
    for table in profiles:
        usual = {name: tuple(bound[1]) for name, bound in table.items()}
        wanted += [usual, *({name: (count, *shape[1:]) for name, shape in usual.items()} for count in rows)]
    found: dict[str, tuple[int, Shapes]] = {}
    for shapes in wanted:
        number = next((n for n, table in enumerate(profiles) if _takes(table, shapes)), None)
        if number is not None:
            found.setdefault(json.dumps(shapes), (number, shapes))
    return list(found.values())


def _takes(profile: Profile, shapes: Shapes) -> bool:
    return all(
        low <= size <= high
        for name, shape in shapes.items()
        for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
    )


def measured(job: Job) -> Iterator[dict[str, Any]]:
    """Load the plan and time each of its points. Raises EngineError when it cannot be loaded or run."""
    import torch

    manifest = require(job.folder, "make engines")
    component, plan = manifest.settings["component"], job.folder / PLAN
    before = _free(job.device)
    with explained(component, f"cannot load {plan}"):
        import tensorrt as trt
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes

        engine = EngineFromBytes(BytesFromPath(str(plan)))()
        context = engine.create_execution_context()
        if context is None:
            raise RuntimeError("no memory for an execution context")
    stream = torch.cuda.Stream() if job.device == "cuda" else None
    for profile, shapes in points(manifest.settings["profiles"], job.rows):
        with explained(component, f"cannot run {plan}"), torch.cuda.stream(stream):
            yield _point(trt, engine, context, stream, profile, shapes)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # else dims stay open
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    job.layers.parent.mkdir(parents=True, exist_ok=True)
    job.layers.write_text(text, encoding="utf-8")
    yield {
        "summary": summary(text).model_dump(),
        "plan_bytes": plan.stat().st_size,
        "gpu_bytes": before - _free(job.device),
        "tensorrt": trt.__version__,
    }


def _point(trt: Any, engine: Any, context: Any, stream: Any, profile: int, shapes: Shapes) -> dict[str, Any]:
    import torch

    device, handle = ("cuda", stream.cuda_stream) if stream is not None else ("cpu", 0)
    _check(context.set_optimization_profile_async(profile, handle), f"profile {profile}")
    for name, shape in shapes.items():
        _check(context.set_input_shape(name, shape), f"{name} {list(shape)}")
    held = {}  # as long as the context has their addresses
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        dtype = getattr(torch, _TORCH[engine.get_tensor_dtype(name).name])
        # Not zeros: they cost a GPU less power. Ids and timesteps are in range.
        held[name] = torch.rand(tuple(context.get_tensor_shape(name)), device=device).to(dtype)
        _check(context.set_tensor_address(name, held[name].data_ptr()), f"the address of {name}")

    def call() -> None:
        _check(context.execute_async_v3(handle), "the call")

    point = {"profile": profile, "shapes": shapes, "milliseconds": asdict(timed(call, device))}
    if stream is not None:
        point["graph"] = _with_graph(call, stream)
    return point


def _with_graph(call: Any, stream: Any) -> dict[str, Any]:
    """The same from a CUDA graph; an engine that must wait for the host cannot be captured, and says why."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        return {"error": " ".join(str(error).split())[:300]}
    return asdict(timed(graph.replay, "cuda"))


def _check(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"it refused {what}")


def _free(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else 0


if __name__ == "__main__":
    run_command(main)
