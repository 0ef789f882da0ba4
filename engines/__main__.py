"""ONNX → one engine for each component and GPU target.

python -m engines build --model miniature --target auto
python -m engines refit --model miniature --target hopper
python -m engines forecast
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from engines.engine import Build, engine, up_to_date
from engines.runtimes import check_runtimes, runtime
from engines.source import Source, check_attention, sources
from engines.table import table
from engines.tensorrt.options import Options
from engines.tensorrt.refit import refit
from mmdit import target as targets
from mmdit.artifact import BUILD, MANIFEST, Layout, shown
from mmdit.contract import Precision
from mmdit.errors import ContractError, TargetError, run_command
from mmdit.shapes import NAMES, shape_set


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one command."""
    arguments = _parsed(argv)
    check_runtimes()
    if arguments.command == "forecast":
        _forecast(arguments.model, arguments.build)
        return
    precision = Precision(arguments.precision)
    gpu, tensorrt = targets.find_gpu(), targets.tensorrt_version()
    target, why = targets.resolve(arguments.target, gpu, tensorrt)
    print(f"target {target.name}: {why}")
    for warning in target.warnings(precision):
        print(f"warning: {warning}", file=sys.stderr)
    building = arguments.command == "build"
    if building and arguments.check:
        if arguments.shapes not in (None, *NAMES):
            raise ContractError(
                f"shape set {arguments.shapes!r} is unknown: expected one of {', '.join(NAMES)}"
            )
        if target.missing and arguments.check == "here":
            raise TargetError(
                f"target {target.name!r} cannot be built here: {target.missing}; `make engines "
                f"TARGET={target.name}` does everything up to the build, TARGET=cpu works here"
            )
        return
    if not target.fp8:
        precision = Precision.FP16
    layout = Layout(arguments.model, arguments.build)
    found, family = sources(layout, arguments.model, precision)
    build = Build(
        layout=layout,
        family=family,
        shapes=shape_set(family, arguments.shapes if building else None),
        target=target,
        options=_options(arguments) if building else Options(),
        gpu=gpu,
        tensorrt=tensorrt,
    )
    rows = _built(found, build) if building else _refitted(found, build, precision)
    print(table(("component", "precision", "runtime", "size", "path"), rows))


def _built(found: list[Source], build: Build) -> list[tuple[str, ...]]:
    """Check, then build what is not up to date; rows of a table. Raises TargetError if it cannot be built."""
    for source in found:
        check_attention(source, build.target.name)
    prepared: dict[str, Any] = {}
    if not all(up_to_date(source, build) for source in found):
        prepared = runtime(build.target.runtime).functions.check(found, build)
    if build.target.missing:
        raise TargetError(
            f"target {build.target.name!r} cannot be built here: {build.target.missing}; everything before "
            "the build passed"
        )
    return [_row(source, build, engine(source, build, prepared.get(source.component))) for source in found]


def _refitted(found: list[Source], build: Build, precision: Precision) -> list[tuple[str, ...]]:
    """The same for stripped plans, with FP16's MMDiT if there is one: the gate compares FP8 with it."""
    if precision is Precision.FP8:
        fp16, _ = sources(build.layout, build.layout.model, Precision.FP16)
        mmdit = next(source for source in fp16 if source.component == "mmdit")
        if build.layout.engine(build.target.name, "mmdit", Precision.FP16).is_dir():
            found = [*found, mmdit]
    return [_row(source, build, refit(source, build)) for source in found]


def _row(source: Source, build: Build, file: Path) -> tuple[str, ...]:
    sizes = [path.stat().st_size for path in file.parent.iterdir() if path.name != MANIFEST]
    megabytes = f"{sum(sizes) / 1e6:,.1f} MB"
    return source.component, source.precision.value, build.target.runtime, megabytes, shown(file)


def _forecast(model: str | None, build: Path) -> None:
    from engines.forecast.model_costs import published
    from engines.forecast.page import costs_of, forecast

    print(forecast([costs_of(Layout(model, build))] if model else published()))


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
        metavar="auto|hopper|ada|cpu|smXX",
        help="what to build for; a compute capability such as sm86 names any other GPU "
        "(default: this machine's GPU where TensorRT is installed, else cpu)",
    )
    chosen.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FP8.value,
        help="of the MMDiT; the other components are FP16 (default: fp8)",
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
        "--shapes",
        metavar="NAME",
        help=f"the sizes served, and the rows of a call: {', '.join(NAMES)} (default: the model's own size; "
        "docs/engines.md has a table)",
    )
    build.add_argument(
        "--check",
        choices=("known", "here"),
        help="only say what the target is; refuse one that is not known, or cannot be built here",
    )
    options = build.add_argument_group("of TensorRT's builder")
    options.add_argument(
        "--workspace-gib",
        type=_positive,
        metavar="N",
        help="the most scratch memory that TensorRT may use (default: all of the GPU's)",
    )
    options.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        metavar="N",
        help="its effort from 0 to 5 (default: TensorRT's own, 3)",
    )
    options.add_argument(
        "--no-tf32", action="store_true", help="compute FP32 islands in FP32, not in TF32: slower"
    )
    options.add_argument(
        "--strip",
        action="store_true",
        help="plans without weights, a few per cent of their size, for object storage; `refit` adds them",
    )
    options.add_argument(
        "--weight-streaming",
        action="store_true",
        help="keep weights in the machine's memory for a GPU with too little; Triton sets no "
        "budget for it, so that such plans are not packaged",
    )
    options.add_argument(
        "--version-compatible",
        action="store_true",
        help="plans that later versions of the same major TensorRT load too, somewhat slower",
    )
    forecast = commands.add_parser(
        "forecast",
        help="what fits which GPU, and how fast it could be: computed, of SD3.5 Medium and Large or a model",
        description="Tables computed from ONNX graphs, not measured: memory for building and serving on each "
        "known GPU, where the FLOPs are, lower bounds per step, the ceiling of FP8's gain.",
    )
    forecast.add_argument("--model", help="whose ONNX files to read (default: SD3.5's published geometry)")
    forecast.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="where artifacts lie")
    commands.add_parser(
        "refit",
        parents=[chosen],
        help="put the weights back into stripped plans, on the GPU's machine",
        description="Make the full plans of stripped ones and the ONNX files that they were built from, on a "
        "machine with the target's GPU and the TensorRT that built them.",
    )
    return parser.parse_args(argv)


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        workspace_gib=arguments.workspace_gib,
        optimization_level=arguments.optimization_level,
        tf32=not arguments.no_tf32,
        strip=arguments.strip,
        weight_streaming=arguments.weight_streaming,
        version_compatible=arguments.version_compatible,
    )


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


if __name__ == "__main__":
    run_command(main)
