"""ONNX → one engine for each component and GPU target.

python -m engines build --model miniature --target auto
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
from mmdit.shapes import NAMES, shape_set


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one command."""
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
        prog="python -m engines", description="ONNX to one engine for each component and GPU target."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "--model", default="miniature", help="a checkpoint's folder or hub id (default: miniature)"
    )
    chosen.add_argument(
        "--target",
        default="auto",
        metavar="auto|hopper|ada|cpu",
        help="what to build for; a compute capability such as sm86 names any other GPU "
        "(default: this machine's GPU where TensorRT is installed, else cpu)",
    )
    chosen.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FP8.value,
        help="of the MMDiT; the other components are FP16 (default: fp8)",
    )
    chosen.add_argument(
        "--shapes",
        metavar="NAME",
        help=f"the sizes served: {', '.join(NAMES)} (default: the model's own size)",
    )
    chosen.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="where artifacts lie")

    build = commands.add_parser(
        "build",
        parents=[chosen],
        help="check all that can be checked, then build one engine for each component",
        description="Check the ONNX files, the profiles and the memory, then build one engine for each "
        "component. Without the target's GPU or TensorRT it stops before the build and says how to go on.",
    )
    build.add_argument(
        "--check", action="store_true", help="only tell what the target is, and what is missing to build it"
    )
    build.add_argument(
        "--workspace-gib",
        type=_positive,
        metavar="N",
        help="the most scratch memory that TensorRT may use (default: all of the GPU's)",
    )
    build.add_argument(
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
