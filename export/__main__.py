"""Checkpoint → ONNX → FP8 ONNX.

    python -m export onnx --model stabilityai/stable-diffusion-3.5-large
    python -m export fp8 --model stabilityai/stable-diffusion-3.5-large
    python -m export fp8 --policy policy.toml --calibration calibration.json
    python -m export sensitivity --budget 0.99

Each part is remade only when what it was made from has changed.
"""

import argparse
from pathlib import Path

from export.stages import Export
from mmdit.artifact import BUILD
from mmdit.errors import run_command
from mmdit.family import DEFAULTS


def main() -> int:
    """Parse the arguments and run one stage."""
    arguments = _parsed()
    export = Export(arguments.model, arguments.build, arguments.variant, arguments.t5_tokens)
    if arguments.stage == "onnx":
        export.onnx()
    elif arguments.stage == "fp8":
        given = {
            name: getattr(arguments, f"calibration_{name}")
            for name in ("prompts", "steps", "batch", "sizes")
            if getattr(arguments, f"calibration_{name}") is not None
        }
        export.fp8(
            policy=arguments.policy, target=arguments.target, calibration=arguments.calibration, **given
        )
    return 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export", description="Checkpoint to ONNX, and the MMDiT to FP8 ONNX."
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model",
        default="miniature",
        help="miniature, a folder in diffusers format, or a hub id (default: %(default)s)",
    )
    common.add_argument(
        "--variant", choices=sorted(DEFAULTS), help="overrides what the checkpoint's configs tell"
    )
    common.add_argument(
        "--t5-tokens",
        type=int,
        default=256,
        help="length to which T5 pads every prompt; it changes the picture (default: %(default)s)",
    )
    common.add_argument("--build", type=Path, default=BUILD, help="where artifacts go")
    stages.add_parser(
        "onnx", parents=[common], help="scan for what FP16 cannot hold; one FP16 ONNX file per component"
    )
    fp8 = stages.add_parser(
        "fp8", parents=[common], help="calibrate; the MMDiT's FP8 ONNX file and its audit"
    )
    fp8.add_argument("--policy", type=Path, metavar="FILE", help="rules that go before export/policy.toml's")
    fp8.add_argument(
        "--target",
        default="auto",
        help="whose entry of the policy's attention table holds (default: the table's default)",
    )
    fp8.add_argument(
        "--calibration", type=Path, metavar="FILE", help="a saved calibration.json: nothing is run"
    )
    fp8.add_argument(
        "--calibration-prompts", type=int, metavar="N", help="prompts to calibrate with (default: 128)"
    )
    fp8.add_argument(
        "--calibration-steps", type=int, metavar="N", help="steps of each trajectory (default: 8)"
    )
    fp8.add_argument("--calibration-batch", type=int, metavar="N", help="prompts at a time (default: 16)")
    fp8.add_argument(
        "--calibration-size",
        dest="calibration_sizes",
        type=_size,
        action="append",
        metavar="HxW",
        help="in pixels; may be given several times (default: the model's own size)",
    )
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected height x width, as 128x96") from None


if __name__ == "__main__":
    run_command(main)
