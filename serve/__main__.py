"""Engines → Triton repository → running server → client.

python -m serve package --model miniature --target cpu --precision fp8
python -m serve launch --model miniature
python -m serve generate "a red square on a blue background" --out picture.png
"""

import argparse
import sys
from pathlib import Path

from mmdit.artifact import BUILD, Layout, shown
from mmdit.contract import Precision
from mmdit.errors import ServerError, run_command
from mmdit.progress import Progress as ProgressBar
from mmdit.target import find_gpu, has_fp8, resolve, tensorrt_version

DEMO_PROMPT = "a red square on a blue background"
DEMO_SEED = 1


def main() -> int:
    """Parse the arguments and run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Package engines for Triton, serve them, ask for pictures."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="miniature", help="default: %(default)s")
    model.add_argument("--target", default="auto", help="auto, hopper, ada, cpu (default: %(default)s)")
    model.add_argument("--precision", type=Precision, default=Precision.FP8, help="fp8 (default) or fp16")
    model.add_argument("--build", type=Path, default=BUILD, help="where artifacts lie")

    ports = argparse.ArgumentParser(add_help=False)
    ports.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all; default: this machine only")
    ports.add_argument("--grpc-port", type=int, default=8001, help="default: %(default)s")
    ports.add_argument("--http-port", type=int, default=8000, help="default: %(default)s")
    ports.add_argument("--metrics-port", type=int, default=8002, help="default: %(default)s")

    request = argparse.ArgumentParser(add_help=False)
    request.add_argument("--negative-prompt", help="what the picture should not show")
    request.add_argument("--seed", type=int, help="default: a random one, which is printed")
    request.add_argument("--steps", type=int, help="default: the model's")
    request.add_argument("--guidance-scale", type=float, help="default: the model's; 1 or less: none")
    request.add_argument("--height", type=int, help="pixels; default: the model's")
    request.add_argument("--width", type=int, help="pixels; default: the model's")

    commands.add_parser("package", parents=[model], help="write the Triton model repository")
    commands.add_parser("launch", parents=[model, ports], help="start the server and wait for Ctrl-C")
    generate = commands.add_parser("generate", parents=[request], help="ask a running server for a picture")
    generate.add_argument("prompt")
    generate.add_argument("--url", default="localhost:8001", help="gRPC (default: %(default)s)")
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="default: %(default)s")
    demo = commands.add_parser(
        "demo", parents=[model, request], help="serve on free ports, make one picture, stop"
    )
    demo.add_argument("--prompt", default=DEMO_PROMPT, help="default: %(default)s")
    demo.add_argument("--out", type=Path, help="default: build/<model>/demo.png")
    arguments = parser.parse_args()

    if arguments.command == "generate":
        return _generate(arguments.url, arguments.prompt, arguments, arguments.out)

    layout = Layout(arguments.model, arguments.build)
    target, precision = _target(arguments.target, arguments.precision)
    repository = layout.repository(target, precision)
    if arguments.command in ("package", "demo"):
        _package(layout, target, precision, repository)
    if arguments.command == "launch":
        from serve.launcher import Ports, serve

        chosen = Ports(arguments.grpc_port, arguments.http_port, arguments.metrics_port, arguments.host)
        return serve(repository, chosen, layout.root / "triton" / "server.log")
    if arguments.command == "demo":
        from serve.launcher import Ports, running

        free = Ports.free()
        with running(repository, free, layout.root / "triton" / "demo.log"):
            out = arguments.out or layout.root / "demo.png"
            if arguments.seed is None:
                arguments.seed = DEMO_SEED
            return _generate(f"localhost:{free.grpc}", arguments.prompt, arguments, out)
    return 0


def _target(name: str, precision: Precision) -> tuple[str, Precision]:
    """The name of a target and the precision that its engines have, as the engines stage decided."""
    if name == "auto":  # another name's engines may have been built on another machine
        name = resolve(name, find_gpu(), tensorrt_version())[0].name
    return name, precision if has_fp8(name) else Precision.FP16


def _package(layout: Layout, target: str, precision: Precision, repository: Path) -> None:
    from serve.repository import Engines, package

    reason = package(Engines(layout, target, precision), target, precision, repository)
    print(f"repository: {'up to date' if reason is None else f'written ({reason})'}: {shown(repository)}")


def _generate(url: str, prompt: str, arguments: argparse.Namespace, out: Path) -> int:
    from serve.client import Client, Picture

    options = {
        name: getattr(arguments, name)
        for name in ("negative_prompt", "seed", "steps", "guidance_scale", "height", "width")
    }
    if out.is_dir() or out.suffix.lower() != ".png":
        raise ServerError(f"OUT={shown(out)}: expected a file name that ends in .png")
    bar: ProgressBar | None = None
    with Client(url) as client:
        for update in client.stream(prompt, **options):
            if isinstance(update, Picture):
                picture = update
                continue
            if bar is None:
                bar = ProgressBar("denoising", update.steps, "steps").__enter__()
            bar.update(update.step)
    if bar is not None:
        bar.__exit__(None, None, None)
    picture.save(out)
    if picture.truncated:
        print("note: the prompt is longer than an encoder reads; its end was left out", file=sys.stderr)
    height, width, _ = picture.image.shape
    print(f"{shown(out)}: {width}x{height}, seed {picture.seed}")
    return 0


if __name__ == "__main__":
    run_command(main)
