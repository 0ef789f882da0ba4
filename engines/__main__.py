"""Build one engine for each component: `python -m engines --model miniature --target auto`.

Reads `build/<model>/onnx*`, writes `build/<model>/engines/<target>`. Prints what it reuses, what it
builds and why, and where the engines lie.
"""

import argparse
import sys
from pathlib import Path

from engines.engine import Build, engine
from engines.options import Options
from engines.source import check_attention, sources
from mmdit import target as targets
from mmdit.artifact import BUILD, MANIFEST, Layout, shown
from mmdit.contract import Precision
from mmdit.errors import run_command
from mmdit.shapes import shape_set


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, build what is not up to date, print the table of engines."""
    arguments = _parsed(argv)
    precision = Precision(arguments.precision)
    gpu, tensorrt = targets.find_gpu(), targets.tensorrt_version()
    target, why = targets.resolve(arguments.target, gpu, tensorrt)
    print(f"target {target.name}: {why}")
    for warning in target.warnings(precision):
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.check:
        return
    if not target.fp8:
        precision = Precision.FP16

    layout = Layout(arguments.model, arguments.build)
    found, family = sources(layout, arguments.model, precision)
    for source in found:
        check_attention(source, target.name)
    build = Build(
        layout=layout,
        family=family,
        shapes=shape_set(family, arguments.shapes),
        target=target,
        options=Options(arguments.workspace_gib, arguments.optimization_level),
        gpu=gpu,
        tensorrt=tensorrt,
    )
    if target.missing:
        raise targets.TargetError(f"target {target.name!r} cannot be built here: {target.missing}")
    rows = [("component", "precision", "runtime", "size", "path")]
    for source in found:
        file = engine(source, build)
        sizes = [path.stat().st_size for path in file.parent.iterdir() if path.name != MANIFEST]
        megabytes = f"{sum(sizes) / 1e6:,.1f} MB"
        rows.append((source.component, source.precision.value, target.runtime, megabytes, shown(file)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engines",
        description="Build one engine for each component of a model, for a GPU target or the CPU.",
    )
    parser.add_argument(
        "--model", default="miniature", help="a checkpoint's folder or hub id (default: miniature)"
    )
    parser.add_argument(
        "--target",
        default="auto",
        metavar="auto|hopper|ada|cpu",
        help="what to build for; a compute capability such as sm86 names any other GPU "
        "(default: this machine's GPU where TensorRT is installed, else cpu)",
    )
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FP8.value,
        help="of the MMDiT; the other components are FP16 (default: fp8)",
    )
    parser.add_argument(
        "--check", action="store_true", help="only tell whether this machine can build for the target"
    )
    parser.add_argument(
        "--shapes", metavar="NAME", help="the shape set served (default: the model's own size)"
    )
    parser.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="where artifacts lie")
    parser.add_argument(
        "--workspace-gib",
        type=_positive,
        metavar="N",
        help="the most scratch memory that TensorRT may use (default: all of the GPU's)",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        metavar="N",
        help="TensorRT's effort from 0 to 5 (default: TensorRT's own, 3)",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


if __name__ == "__main__":
    run_command(main)
