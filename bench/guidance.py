"""What guidance in a part of the steps does to the miniature's pictures, read back, and what it saves.

    python -m bench.guidance [--out FOLDER]

A step without guidance takes one row of the MMDiT instead of two, half of its FLOPs. The pictures are those
of held-out captions through Triton in FP16, 20 steps; the reader says what they show.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench import pages
from miniature.tasks import Task, scores, tasks
from mmdit.artifact import Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.progress import Progress
from quality.metrics import similarity
from serve.client import Client
from serve.inside.admission import guided_steps
from serve.launcher import running
from serve.ports import Ports

STEPS = 20
CAPTIONS = 16
AT_ONCE = 4
SHOWN = 5  # captions in the picture
# The first is what the others are compared with; (1, 1) has no guidance at any step.
INTERVALS = (
    *((0.0, 1.0), (0.0, 0.8), (0.0, 0.6), (0.0, 0.4)),
    *((0.2, 1.0), (0.2, 0.8), (0.4, 1.0), (1.0, 1.0)),
)
STRIP = ((0.0, 1.0), (0.0, 0.6), (0.0, 0.4), (0.2, 1.0), (0.2, 0.8), (1.0, 1.0))


def flops(start: float, end: float, steps: int = STEPS) -> float:
    """The MMDiT's FLOPs with guidance in the interval, as a share of guidance everywhere."""
    first, last = guided_steps(start, end, steps)
    return (steps + last - first) / (2 * steps)


def main() -> None:
    """Make the pictures, score them, write the page's table and chart."""
    given = pages.arguments("What guidance in a part of the steps does.").parse_args()
    work = tasks(SHOWN + 1 if given.quick else CAPTIONS)
    made: dict[tuple[float, float], list[Any]] = {}
    layout = Layout("miniature")
    ports = Ports.free()
    with (
        running(layout.repository("cpu", Precision.FP16), ports, layout.root / "triton/guidance.log"),
        Client(f"localhost:{ports.grpc}") as client,
        Progress("guidance", len(INTERVALS) * len(work), unit="pictures") as bar,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        for start, end in INTERVALS:

            def picture(task: Task, start: float = start, end: float = end) -> Any:
                image = client.generate(
                    task.caption, seed=task.seed, steps=STEPS, guidance_start=start, guidance_end=end
                ).image
                bar.advance()
                return image

            made[start, end] = list(pool.map(picture, work))
    parts = {"guidance": page_part(made, work), "machine": pages.machine()}
    page = pages.fill(given.out, "guidance.md", parts)
    chart(made, work, given.out / "guidance.png")
    print(shown(page))


def page_part(made: dict[tuple[float, float], list[Any]], work: list[Task]) -> str:
    """The table: FLOPs, what is right in the pictures, and how far they are from full guidance."""
    whole = made[INTERVALS[0]]
    rows = []
    for (start, end), pictures in made.items():
        found = scores(pictures, work)
        alike = np.mean([similarity(one, other) for one, other in zip(pictures, whole, strict=True)])
        right = [f"{100 * found[what]:.1f} %" for what in ("colour", "shape", "both_places")]
        rows.append((named(start, end), f"{flops(start, end):.2f}", *right, f"{alike:.3f}"))
    heads = ["guided steps", "FLOPs", "right colour", "right shape", "both places", "SSIM"]
    return pages.table(heads, rows)


def named(start: float, end: float) -> str:
    """An interval in words."""
    if start == end:
        return "none"
    return "all" if (start, end) == (0, 1) else f"{start:g} to {end:g}"


def chart(made: dict[tuple[float, float], list[Any]], work: list[Task], path: Path) -> None:
    """A row of pictures for each interval of the strip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.75 * SHOWN + 2.2, 1.75 * len(STRIP)), layout="constrained")
    axes = figure.subplots(len(STRIP), SHOWN)
    for row, interval in zip(axes, STRIP, strict=True):
        found = scores(made[interval], work)
        right = np.mean([found["colour"], found["shape"]])
        for axis, image in zip(row, made[interval], strict=False):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(
            f"{named(*interval)}\n{flops(*interval):.2f} of the FLOPs\n{100 * right:.0f} % right",
            rotation=0,
            ha="right",
            va="center",
            labelpad=12,
        )
    figure.suptitle(f"Guidance in a part of the {STEPS} steps", fontsize=13)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_command(main)
