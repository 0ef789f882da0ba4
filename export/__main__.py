"""Checkpoint → ONNX → FP8 ONNX.

    python -m export onnx --model stabilityai/stable-diffusion-3.5-large
    python -m export fp8 --model stabilityai/stable-diffusion-3.5-large
    python -m export fp8 --policy policy.toml --calibration calibration.json
    python -m export sensitivity --budget 0.99

Each part is remade only when what it was made from has changed.
"""

import argparse
from pathlib import Path
from typing import Any

from export.groups import BY
from export.prompts import SCAN
from export.stages import Export
from mmdit.artifact import BUILD
from mmdit.errors import run_command
from mmdit.family import DEFAULTS


def main() -> int:
    """Parse the arguments and run one stage."""
    arguments = _parsed()
    export = Export(arguments.model, arguments.build, arguments.variant, arguments.t5_tokens)
    if arguments.stage == "onnx":
        export.onnx(**_given(arguments, "scan"))
    elif arguments.stage == "fp8":
        export.fp8(
            policy=arguments.policy,
            target=arguments.target,
            calibration=arguments.calibration,
            **_given(arguments, "calibration"),
        )
    else:
        export.sensitivity(
            by=arguments.by,
            budget=arguments.budget,
            pictures=arguments.pictures,
            steps=arguments.steps,
            policy=arguments.policy,
            target=arguments.target,
            **_given(arguments, "calibration"),
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
    onnx = stages.add_parser(
        "onnx", parents=[common], help="scan for what FP16 cannot hold; one FP16 ONNX file per component"
    )
    _add_settings(onnx, "scan", prompts=SCAN["prompts"], steps=SCAN["steps"], batch=SCAN["batch"])
    fp8 = stages.add_parser(
        "fp8", parents=[common], help="calibrate; the MMDiT's FP8 ONNX file and its audit"
    )
    sensitivity = stages.add_parser(
        "sensitivity",
        parents=[common],
        help="rank groups of layers by what FP8 does to them; propose a policy for a budget",
    )
    for parser_of_stage in (fp8, sensitivity):
        _add_policy(parser_of_stage)
        _add_settings(parser_of_stage, "calibration", prompts=128, steps=8, batch=16)
    sensitivity.add_argument(
        "--by", choices=BY, default="role", help="what a group is (default: %(default)s)"
    )
    sensitivity.add_argument(
        "--budget",
        type=float,
        metavar="SSIM",
        help="propose the policy with the most FLOPs in FP8 that reaches it",
    )
    sensitivity.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="to measure SSIM with (default: %(default)s)"
    )
    sensitivity.add_argument("--steps", type=int, metavar="N", help="of each picture (default: the model's)")
    fp8.add_argument(
        "--calibration", type=Path, metavar="FILE", help="a saved calibration.json: nothing is run"
    )
    return parser.parse_args()


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="rules that go before export/policy.toml's"
    )
    parser.add_argument(
        "--target",
        default="auto",
        help="whose entry of the policy's attention table holds (default: this machine's)",
    )


def _add_settings(
    parser: argparse.ArgumentParser, what: str, *, prompts: int, steps: int, batch: int
) -> None:
    group = parser.add_argument_group(what)
    group.add_argument(
        f"--{what}-prompts", type=int, metavar="N", help=f"prompts to run (default: {prompts})"
    )
    group.add_argument(
        f"--{what}-steps", type=int, metavar="N", help=f"steps of each trajectory (default: {steps})"
    )
    group.add_argument(f"--{what}-batch", type=int, metavar="N", help=f"prompts at a time (default: {batch})")
    group.add_argument(
        f"--{what}-size",
        dest=f"{what}_sizes",
        type=_size,
        action="append",
        metavar="HxW",
        help="in pixels; may be given several times (default: the model's own size)",
    )


def _given(arguments: argparse.Namespace, what: str) -> dict[str, Any]:
    found = {name: getattr(arguments, f"{what}_{name}") for name in ("prompts", "steps", "batch", "sizes")}
    return {name: value for name, value in found.items() if value is not None}


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected height x width, as 128x96") from None


if __name__ == "__main__":
    run_command(main)
