"""Engines → Triton repository → running server → client.

python -m serve package --model miniature --target cpu --precision fp8
python -m serve launch --model miniature
python -m serve generate "a large red circle on a white background" --out picture.png
python -m serve demo --model miniature
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit.artifact import BUILD, Layout, read_manifest, shown
from mmdit.contract import Precision
from mmdit.errors import ServerError, run_command
from mmdit.progress import Progress as ProgressBar
from mmdit.target import find_gpu, has_fp8, resolve, tensorrt_version

if TYPE_CHECKING:
    from serve.client import Picture

DEMO_PROMPTS = (  # of scenes that the miniature's training never saw
    "a large cyan triangle in the centre on a black background",
    "a small violet triangle on the right side on a white background",
    "a large blue plus sign left of a large green disc on a brown background",
    "on a white background, a small red cross on the left and a large yellow disc on the right",
    "a small cyan circle to the left of a large green triangle in front of a brown background",
    "there is a big red plus sign above a large yellow disc on a gray background",
    "a big blue triangle at the bottom and a small violet disc at the top in front of a pink background",
    "a picture of a small green plus sign to the left of a little blue disc on a white background",
)
DEMO_SEED = 1


def main() -> int:
    """Parse the arguments and run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Package engines for Triton, serve them, ask for pictures."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="miniature", help="default: %(default)s")
    model.add_argument(
        "--target",
        default="auto",
        help="auto, hopper, ada, cpu, or several GPUs, as in hopper,ada (default: %(default)s)",
    )
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
    request.add_argument("--guidance-start", type=float, help="fraction of the steps; default: 0")
    request.add_argument("--guidance-end", type=float, help="fraction of the steps; default: 1")
    request.add_argument("--height", type=int, help="pixels; default: the model's")
    request.add_argument("--width", type=int, help="pixels; default: the model's")

    packaging = argparse.ArgumentParser(add_help=False)
    packaging.add_argument(
        "--accept-quality",
        action="store_true",
        help="package FP8 engines whose quality gate failed or was not run; the manifest says so",
    )
    packaging.add_argument(
        "--step-times",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what calls take by their rows, as `make gpu-check` writes it for a size; may be repeated. The "
        "scheduler then shares calls of about that size only where it pays",
    )
    packaging.add_argument(
        "--cache-pictures",
        action="store_true",
        help="answer a request that was answered before from the cache; a seed is then required",
    )

    serving = argparse.ArgumentParser(add_help=False)
    serving.add_argument(
        "--grace-seconds",
        type=float,
        default=30,
        help="what runs gets to finish once Ctrl-C or SIGTERM came (default: %(default)g)",
    )
    serving.add_argument(
        "--cache",
        default="local",
        help="of responses: local, local:MIB or redis://HOST:PORT (default: %(default)s, 256 MiB)",
    )

    commands.add_parser("package", parents=[model, packaging], help="write the Triton model repository")
    commands.add_parser(
        "launch", parents=[model, ports, serving], help="start the server and wait for Ctrl-C"
    )
    generate = commands.add_parser("generate", parents=[request], help="ask a running server for a picture")
    generate.add_argument("prompt")
    generate.add_argument("--url", default="localhost:8001", help="gRPC (default: %(default)s)")
    generate.add_argument("--timeout", type=float, help="seconds; default: wait without end")
    generate.add_argument(
        "--priority-level", type=int, help="1 goes before 2 before 3; default: the server's"
    )
    generate.add_argument("--out", type=Path, default=Path("picture.png"), help="default: %(default)s")
    demo = commands.add_parser(
        "demo", parents=[model, packaging, request], help="serve on free ports, make a grid of pictures, stop"
    )
    demo.add_argument("--prompt", action="append", help="default: eight scenes; may be given several times")
    demo.add_argument("--out", type=Path, help="default: build/<model>/demo.png")
    arguments = parser.parse_args()

    if arguments.command == "generate":
        return _generate(arguments.url, arguments.prompt, arguments, arguments.out)

    layout = Layout(arguments.model, arguments.build)
    if arguments.command == "demo":
        arguments.out = arguments.out or layout.root / "demo.png"
        _check_png(arguments.out)
    targets = _targets(arguments.target, arguments.precision)
    repository = _repository(layout, targets)
    if arguments.command in ("package", "demo"):
        _package(layout, targets, repository, arguments)
    if arguments.command == "launch":
        from serve.launcher import serve
        from serve.ports import Ports
        from serve.response_cache import ResponseCache

        chosen = Ports(arguments.grpc_port, arguments.http_port, arguments.metrics_port, arguments.host)
        cache = ResponseCache.parse(arguments.cache)
        log = layout.root / "triton" / "server.log"
        return serve(repository, chosen, log, cache=cache, grace=arguments.grace_seconds)
    if arguments.command == "demo":
        from serve.launcher import running
        from serve.ports import Ports

        free = Ports.free()
        with running(repository, free, layout.root / "triton" / "demo.log"):
            return _grid(f"localhost:{free.grpc}", arguments.prompt or DEMO_PROMPTS, arguments)
    return 0


def _targets(names: str, precision: Precision) -> dict[str, Precision]:
    """Targets by name and the precision that each one's engines have, as the engines stage decided."""
    if names == "auto":  # another name's engines may have been built on another machine
        names = resolve(names, find_gpu(), tensorrt_version())[0].name
    return {name: precision if has_fp8(name) else Precision.FP16 for name in sorted(set(names.split(",")))}


def _repository(layout: Layout, targets: dict[str, Precision]) -> Path:
    fp8 = Precision.FP8 in targets.values()
    return layout.repository("-".join(targets), Precision.FP8 if fp8 else Precision.FP16)


def _package(
    layout: Layout, targets: dict[str, Precision], repository: Path, arguments: argparse.Namespace
) -> None:
    from mmdit.step_times import read
    from serve.engine_set import Engines
    from serve.repository import package
    from serve.timing import measured_elsewhere

    engines = [Engines(layout, target, precision) for target, precision in targets.items()]
    times = [read(path) for path in arguments.step_times]
    reason = package(
        engines,
        repository,
        accept_quality=arguments.accept_quality,
        step_times=times,
        cache_pictures=arguments.cache_pictures,
    )
    print(f"repository: {'up to date' if reason is None else f'written ({reason})'}: {shown(repository)}")
    manifest = read_manifest(repository)
    if plans := manifest.settings["plans"]:
        megabytes = manifest.findings["shared_memory_bytes"] >> 20
        print(f"shared memory: up to {megabytes} MiB; a container is started with --shm-size={megabytes}m")
        for warning in measured_elsewhere(times, plans):
            print(f"warning: {warning}", file=sys.stderr)
    for target, quality in manifest.settings["quality"].items():
        if quality["verdict"] == "accepted":
            print(f"warning: FP8 for {target} accepted although {quality['reason']}", file=sys.stderr)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    guidance = ("guidance_scale", "guidance_start", "guidance_end")
    names = ("negative_prompt", "seed", "steps", *guidance, "height", "width")
    return {name: getattr(arguments, name) for name in names}


def _note_truncation(prompt: str, picture: "Picture") -> None:
    if picture.truncated:
        told = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
        print(f"note: {told!r} is longer than an encoder reads; its end was left out", file=sys.stderr)


def _check_png(out: Path) -> None:
    if out.is_dir() or out.suffix.lower() != ".png":
        raise ServerError(f"OUT={shown(out)}: expected a file name that ends in .png")


def _grid(url: str, prompts: Sequence[str], arguments: argparse.Namespace) -> int:
    """All prompts at once: the step scheduler puts their rows into shared calls."""
    from serve.client import Client, Picture
    from serve.grid import grid

    options = _options(arguments)
    seed = DEMO_SEED if options.pop("seed") is None else arguments.seed
    with (
        Client(url) as client,
        ThreadPoolExecutor(len(prompts)) as pool,
        ProgressBar("pictures", len(prompts), together=True) as bar,
    ):

        def generate(number: int) -> Picture:
            picture = client.generate(prompts[number], seed=seed + number, **options)
            bar.advance()
            return picture

        pictures = list(pool.map(generate, range(len(prompts))))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    grid([picture.image for picture in pictures], prompts).save(arguments.out)
    for prompt, picture in zip(prompts, pictures, strict=True):
        _note_truncation(prompt, picture)
    print(f"{shown(arguments.out)}: {len(prompts)} pictures, seeds from {seed}")
    return 0


def _generate(url: str, prompt: str, arguments: argparse.Namespace, out: Path) -> int:
    from serve.client import Client, Picture

    _check_png(out)
    options = _options(arguments) | {
        "timeout": arguments.timeout,
        "priority_level": arguments.priority_level,
    }
    bar: ProgressBar | None = None
    with Client(url) as client, ExitStack() as stack:
        for update in client.stream(prompt, **options):
            if isinstance(update, Picture):
                picture = update
            elif bar is None:
                bar = ProgressBar("denoising", update.steps, "steps")
                bar.start_at(update.step)
                stack.enter_context(bar)
            else:
                bar.update(update.step)
    picture.save(out)
    _note_truncation(prompt, picture)
    height, width, _ = picture.image.shape
    print(f"{shown(out)}: {width}x{height}, seed {picture.seed}")
    return 0


if __name__ == "__main__":
    run_command(main)
