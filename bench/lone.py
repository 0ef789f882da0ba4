"""How long one picture takes a lone client, beside the same files without a server, and beside diffusers.

    python -m bench.lone [--out FOLDER]

The miniature's 128×128 picture at 20 steps with guidance; all ways take turns in one run. Without a server:
the same ONNX files in sessions with the same options, and the server's own arithmetic, in one process.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from bench import pages
from bench.requests import SIZE, STEPS, prompt_of
from engines.onnxruntime.session import session
from export.checkpoint import checkpoint_folder
from mmdit.artifact import Layout, read_manifest, shown
from mmdit.contract import COMPONENTS, TEXT_ENCODERS, Precision
from mmdit.errors import run_command
from mmdit.progress import Progress
from serve.client import Client
from serve.inside.admission import request_from
from serve.inside.denoise import vae_latent
from serve.inside.limits import Limits
from serve.inside.pixels import pixels_from
from serve.inside.text import PromptTokenizers, join
from serve.launcher import running
from serve.ports import Ports

BAR = 0.15  # of the end-to-end time


class Direct:
    """A packaged repository's ONNX files, run one after the other in this process."""

    def __init__(self, layout: Layout, precision: Precision) -> None:
        repository = layout.repository("cpu", precision)
        self._sessions = {
            name: session(
                repository / name / "1" / "model.onnx",
                name,
                precision if name == "mmdit" else Precision.FP16,
            )
            for name in COMPONENTS
        }
        settings = read_manifest(repository).settings
        self._limits = Limits.from_settings(settings | {"pixels_per_latent": 8}, max_steps=200)
        self._width = settings["family"]["context_dim"]
        self._tokenizers = PromptTokenizers(
            repository / "prompt_encoder" / "1" / "tokenizers_json", TEXT_ENCODERS
        )
        self._negative = self._encode("")  # which the server has in its cache

    def _run(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = [tensor.name for tensor in self._sessions[name].get_outputs()]
        return dict(zip(outputs, self._sessions[name].run(outputs, inputs), strict=True))

    def _encode(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        ids, _ = self._tokenizers(prompt)
        found = {name: self._run(name, input_ids=ids[name]) for name in TEXT_ENCODERS}
        hidden = {name: each["hidden"] for name, each in found.items()}
        pooled = {name: each["pooled"] for name, each in found.items() if "pooled" in each}
        return join(hidden, pooled, self._width)

    def generate(self, prompt: str, seed: int) -> np.ndarray:
        """UINT8 [H, W, 3], as the server makes it."""
        texts = (self._negative, self._encode(prompt))
        context, pooled = (np.stack(each) for each in zip(*texts, strict=True))
        given = {"seed": np.array([seed]), "steps": np.array([STEPS])}
        state = request_from({"context": context, "pooled": pooled} | given, self._limits).state
        while not state.finished:
            latent, timestep = state.engine_inputs()
            found = self._run("mmdit", latent=latent, timestep=timestep, context=context, pooled=pooled)
            state.advance(found["velocity"])
        latent = vae_latent(state.latents, self._limits)
        return pixels_from(self._run("vae_decoder", latent=latent)["image"])


def diffusers_pipeline() -> Callable[[str, int], object]:
    """diffusers on the same checkpoint in FP32, which is its fastest on a CPU."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint_folder("miniature"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return lambda prompt, seed: pipeline(
        prompt,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
    )


def taken_in_turns(
    ways: Mapping[str, Callable[[str, int], object]], count: int, made: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of `count` pictures each way, in turns, after one that does not count; `made` after each."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(count + 1):
        for name, make in ways.items():
            begin = time.perf_counter()
            make(prompt_of(number), number)
            if number:
                taken[name].append(time.perf_counter() - begin)
            made()
    return taken


def main() -> None:
    """Measure, print, write the page's part."""
    given = pages.arguments("A lone client's picture.").parse_args()
    layout = Layout("miniature")
    with ExitStack() as stack:
        ways: dict[str, Callable[[str, int], object]] = {"diffusers, PyTorch, FP32": diffusers_pipeline()}
        without: dict[str, str] = {}  # a way through the server → the same files without one
        for precision in (Precision.FP16, Precision.FP8):
            ports = Ports.free()
            log = layout.root / "triton" / f"bench-{precision.value}.log"
            stack.enter_context(running(layout.repository("cpu", precision), ports, log))
            client = stack.enter_context(Client(f"localhost:{ports.grpc}"))

            def served(prompt: str, seed: int, client: Client = client) -> object:
                return client.generate(prompt, seed=seed, steps=STEPS)

            def streamed(prompt: str, seed: int, client: Client = client) -> object:
                return list(client.stream(prompt, seed=seed, steps=STEPS))

            name = precision.value.upper()
            direct, through = f"ONNX Runtime, no server, {name}", f"Triton, ONNX Runtime, {name}"
            ways |= {
                direct: Direct(layout, precision).generate,
                through: served,
                f"{through}, streamed": streamed,
            }
            without |= {through: direct, f"{through}, streamed": direct}
        count = 3 if given.quick else 15
        bar = stack.enter_context(Progress("pictures", (count + 1) * len(ways)))
        taken = taken_in_turns(ways, count, bar.advance)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    peer = medians["diffusers, PyTorch, FP32"]
    rows = []
    for name, seconds in medians.items():
        share = f"{1 - medians[without[name]] / seconds:.0%}" if name in without else "—"
        rows.append((name, f"{seconds:.2f} s", f"{seconds / peer:.2f}", share))
    part = pages.table(
        ["a picture", "median", "over diffusers", f"server's share (target: ≤ {BAR:.0%})"], rows
    )
    page = pages.fill(given.out, "serving.md", {"lone": part, "machine": pages.machine()})
    print(shown(page))


if __name__ == "__main__":
    run_command(main)
