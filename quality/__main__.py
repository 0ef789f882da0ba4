"""What FP8 costs in pictures, judged and shown.

python -m quality gate --model miniature --target cpu      FP8 against FP16, with a verdict
python -m quality report --model miniature --target cpu    one page about it, build/<model>/report/index.html
"""

import argparse
from pathlib import Path

from mmdit.artifact import BUILD, Layout
from mmdit.errors import QuantizationError, run_command
from mmdit.target import find_gpu, has_fp8, resolve, tensorrt_version


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run one command; a failed gate ends with exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m quality", description="Judge a model's FP8 engines by their pictures."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="miniature", help="default: %(default)s")
    model.add_argument("--target", default="auto", help="auto, hopper, ada, cpu (default: %(default)s)")
    model.add_argument("--build", type=Path, default=BUILD, help="where artifacts lie")
    judge = commands.add_parser("gate", parents=[model], help="FP8 against FP16, with a verdict")
    judge.add_argument("--profile", help="thresholds (default: miniature for it, sd35 otherwise)")
    judge.add_argument(
        "--prompts", type=Path, metavar="FILE", help="tab-separated: prompt, negative_prompt, with a header"
    )
    judge.add_argument("--count", type=int, help="pictures (default: 16 for the miniature, else 32)")
    judge.add_argument("--steps", type=int, help="default: the model's")
    judge.add_argument(
        "--report-only", action="store_true", help="exit status 0 also when the gate fails: only look"
    )
    commands.add_parser("report", parents=[model], help="write one page about the gate, with its pictures")
    arguments = parser.parse_args(argv)

    layout = Layout(arguments.model, arguments.build)
    target = arguments.target
    if target == "auto":
        target = resolve(target, find_gpu(), tensorrt_version())[0].name
    if not has_fp8(target):
        print(f"{arguments.command}: nothing to judge: {target} has no FP8")
        return 0
    if arguments.command == "report":
        from quality.report import report

        report(layout, target)
        return 0
    from quality.gate import Asked, gate
    from quality.subject import Subject

    asked = Asked(arguments.profile, arguments.prompts, arguments.count, arguments.steps)
    verdict = gate(Subject(layout, target), asked)
    if not verdict.passed and not arguments.report_only:
        raise QuantizationError(
            f"the FP8 engines of {layout.name} for {target} failed the gate: {'; '.join(verdict.failures)}. "
            f"Look at them: `make report MODEL={layout.model} TARGET={target}`"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
