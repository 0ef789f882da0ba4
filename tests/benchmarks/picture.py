"""How long one picture takes through Triton, beside diffusers on the same machine in the same run.

make bench
"""

import statistics
import time
from collections.abc import Callable

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import StableDiffusion3Pipeline

from export.checkpoint import checkpoint_folder
from mmdit.artifact import Layout
from mmdit.contract import Precision
from mmdit.errors import run_command
from serve.client import Client
from serve.launcher import Ports, running

PROMPT = "a large red circle on the left and a small blue cross on the right on a white background"
STEPS = 20
RUNS = 7


def seconds(generate: Callable[[int], object]) -> float:
    """The median of RUNS pictures, after one that does not count; their seeds differ."""
    generate(0)
    taken = []
    for seed in range(1, RUNS + 1):
        begin = time.perf_counter()
        generate(seed)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def main() -> None:
    """Time the miniature's 128×128 picture at 20 steps with guidance, three ways."""
    layout = Layout("miniature")
    results = {}
    for precision in (Precision.FP16, Precision.FP8):
        ports = Ports.free()
        log = layout.root / "triton" / f"bench-{precision.value}.log"
        with (
            running(layout.repository("cpu", precision), ports, log),
            Client(f"localhost:{ports.grpc}") as client,
        ):
            results[f"Triton, ONNX Runtime, {precision.value.upper()}"] = seconds(
                lambda seed, client=client: client.generate(PROMPT, seed=seed, steps=STEPS)
            )
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint_folder("miniature"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    peer = seconds(
        lambda seed: pipeline(
            PROMPT,
            height=128,
            width=128,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
        )
    )
    results["diffusers, PyTorch, FP32"] = peer
    print(
        f"one 128x128 picture, {STEPS} steps, guidance; median of {RUNS}, {torch.get_num_threads()} threads"
    )
    for name, taken in results.items():
        print(f"  {name:<28} {taken:6.2f} s   {taken / peer:5.2f} of diffusers")


if __name__ == "__main__":
    run_command(main)
