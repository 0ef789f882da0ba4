"""Speed and memory on this machine's GPU.

python -m measure reference                                  torch alone: a floor for TensorRT to beat
python -m measure reference --model medium --variant compile-bf16
python -m measure check --model … --target hopper            TensorRT's engines, judged, compared and timed
"""

import argparse
import shlex
import sys
from pathlib import Path

from measure.check_page import BEFOREHAND
from measure.geometry import MODELS, VARIANTS
from measure.reference import Asked, reference
from mmdit.artifact import BUILD, MEASUREMENTS, shown
from mmdit.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command."""
    arguments = _parsed(argv)
    command = " ".join(["python -m measure", *(sys.argv[1:] if argv is None else argv)])
    if arguments.command == "check":
        from measure import check

        gate = [(name, getattr(arguments, name)) for name in ("profile", "prompts", "count")]
        calibration = ["--calibration", str(arguments.calibration)] if arguments.calibration else []
        asked = check.Asked(
            model=arguments.model,
            target=arguments.target,
            build=arguments.build,
            policy=arguments.policy,
            shapes=arguments.shapes,
            onnx=arguments.onnx_options,
            fp8=[*arguments.fp8_options, *calibration],
            engines=arguments.engine_options,
            gate=[word for name, value in gate if value for word in (f"--{name}", value)],
            rows=arguments.rows,
            minutes=arguments.minutes,
            folder=arguments.out,
        )
        check.check(asked, command)
        return 0
    toy_size, own_size = (64, 64), (1024, 1024)
    reference(
        Asked(
            models=arguments.model or MODELS,
            variants=arguments.variant or VARIANTS,
            sizes=arguments.size or [toy_size if arguments.toy else own_size],
            rows=arguments.rows,
            device=arguments.device,
            toy=arguments.toy,
            again=arguments.again,
            minutes=arguments.minutes,
            folder=arguments.out,
        ),
        command,
    )
    return 0


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m measure", description="Measure speed and memory on this machine's GPU."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rows", type=_rows, default=(1, 2, 4, 8), metavar="N,N", help="default: 1,2,4,8")
    common.add_argument(
        "--minutes",
        type=float,
        default=9.5,
        metavar="N",
        help="the most that each variant in torch may take; nothing else obeys it (default: %(default)g)",
    )
    common.add_argument(
        "--out", type=Path, default=MEASUREMENTS, metavar="DIR", help=f"default: {shown(MEASUREMENTS)}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser(
        "reference",
        parents=[common],
        help="the MMDiT in torch, with random weights",
        description="Milliseconds per step and memory of the MMDiT in torch: eager and compiled, in FP16, "
        "BF16 and ModelOpt's FP8. What is finished is kept; a second run goes on from there.",
    )
    own.add_argument("--model", action="append", choices=MODELS, help="may be repeated (default: both)")
    own.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated (default: all)")
    own.add_argument(
        "--size", action="append", type=_size, metavar="HxW", help="may be repeated (default: 1024x1024)"
    )
    own.add_argument("--again", action="store_true", help="measure what was measured before too")
    own.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the command")
    own.add_argument("--toy", action="store_true", help="a tiny geometry, to try the command")
    check = commands.add_parser(
        "check",
        parents=[common],
        help="a model's TensorRT engines, in FP16 and FP8, beside torch",
        description="Everything about a model's engines that only a GPU can tell. " + BEFOREHAND,
        epilog="Needs a GPU, TensorRT and a CUDA build of torch. Ends with status 2 when an engine could not "
        "be made, run or compared or is too far from its ONNX file; the gate's verdict on FP8 is only told.",
    )
    check.add_argument("--model", default="miniature", help="default: %(default)s")
    check.add_argument("--target", default="auto", help="auto, hopper, ada (default: %(default)s)")
    check.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="where artifacts lie")
    check.add_argument("--shapes", metavar="NAME", help="the shape set (default: the model's own size)")
    check.add_argument("--policy", type=Path, metavar="FILE", help="rules before export/policy.toml's")
    for name, stage in (("onnx", "export onnx"), ("fp8", "export fp8"), ("engine", "engines build")):
        check.add_argument(
            f"--{name}-options",
            type=shlex.split,
            default=[],
            metavar="'…'",
            help=f"more of `python -m {stage}`, as the deployed engines were made, in one word after =",
        )
    check.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a saved calibration.json; it is of one policy: the other FP8 variant will fail, and be told",
    )
    check.add_argument("--profile", help="of the gate")
    check.add_argument("--prompts", metavar="FILE", help="of the gate")
    check.add_argument("--count", metavar="N", help="pictures of the gate")
    arguments = parser.parse_args(argv)
    if arguments.command == "reference":
        on_cpu = arguments.device == "cpu"
        if on_cpu != arguments.toy or (arguments.toy and arguments.out == MEASUREMENTS):
            parser.error("--device cpu, --toy and --out belong together: what a CPU takes is not measured")
    return arguments


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        size = int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: expected height x width, as 768x1024"
        ) from None
    if min(size) < 16 or size[0] % 16 or size[1] % 16:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive multiples of 16")
    return size


def _rows(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError:
        rows = (0,)
    if rows[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1, as 1,2,4,8")
    return rows


if __name__ == "__main__":
    run_command(main)
