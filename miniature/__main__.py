"""`python -m miniature`: trains the miniature, writes its checkpoint, reads and scores pictures.

python -m miniature train                             75 minutes of training, from where it stopped
python -m miniature write --output miniature/checkpoint
python -m miniature read picture.png
python -m miniature evaluate                          the served pictures of 200 held-out captions
"""

import argparse
from pathlib import Path

from mmdit.artifact import BUILD, shown
from mmdit.errors import MmditError, run_command

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoint"
FOLDER = ROOT.parent / "training"  # not below build, which `make clean` removes: it is hours of work


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and run one command; `--help` does not load torch."""
    parser = argparse.ArgumentParser(
        prog="python -m miniature",
        description="Make the miniature, a tiny Stable Diffusion 3.5 that draws simple scenes, and score it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the training's state lies (default: %(default)s)"
    )

    train = commands.add_parser("train", parents=[training], help="train the VAE, then the MMDiT; resumes")
    train.add_argument(
        "--minutes", type=float, default=75.0, help="stop after so many (default: %(default)s)"
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    train.add_argument("--vae-steps", type=int, default=2400, help="length of the VAE's training")
    train.add_argument("--steps", type=int, default=4400, help="length of the MMDiT's training")
    train.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with the weights of this miniature: its VAE as it is, the others trained on",
    )

    writer = commands.add_parser("write", parents=[training], help="write the checkpoint in diffusers format")
    writer.add_argument(
        "--output",
        type=Path,
        default=CHECKPOINT,
        metavar="FOLDER",
        help="a miniature that lies there unchanged is replaced (default: miniature/checkpoint)",
    )

    reader = commands.add_parser("read", help="tell what pictures show")
    reader.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")

    scorer = commands.add_parser("evaluate", help="score served pictures, and write a page with them")
    scorer.add_argument("--captions", type=int, default=200, help="default: %(default)s")
    scorer.add_argument("--target", default="auto", help="auto, hopper, ada, cpu (default: %(default)s)")
    scorer.add_argument("--build", type=Path, default=BUILD, help="where the repositories lie")
    scorer.add_argument("--out", type=Path, help="default: build/miniature/evaluation")
    options = parser.parse_args(arguments)

    if options.command == "train":
        return _train(options)
    if options.command == "write":
        from miniature.run import write

        size = write(options.folder, options.output)
        print(f"{shown(options.output)}: {size / 1e6:.1f} MB")
        return 0
    if options.command == "read":
        return _read(options.pictures)
    from miniature.evaluation import evaluate

    out = options.out or options.build / "miniature" / "evaluation"
    evaluate(options.build, out, CHECKPOINT, target=options.target, captions=options.captions)
    return 0


def _train(options: argparse.Namespace) -> int:
    for name, low, high in (("seed", 0, 2**32 - 1), ("vae_steps", 1, 10**6), ("steps", 1, 10**6)):
        if not low <= getattr(options, name) <= high:
            flag = name.replace("_", "-")
            raise MmditError(f"--{flag} {getattr(options, name)} is out of range: expected {low} to {high}")
    if not options.minutes > 0:
        raise MmditError(f"--minutes {options.minutes:g} is out of range: expected more than 0")
    from miniature.run import train

    done = train(
        options.folder,
        seed=options.seed,
        minutes=options.minutes,
        vae_steps=options.vae_steps,
        steps=options.steps,
        start=options.start,
    )
    print(f"{shown(options.folder)}: " + ("done" if done else "not done; the same command goes on"))
    return 0


def _read(paths: list[Path]) -> int:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from miniature.reader import read

    for path in paths:
        try:
            with Image.open(path) as image:
                picture = np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise MmditError(f"{path} is not there") from None
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
            raise MmditError(f"{path} is no whole picture: expected a PNG") from None
        print(f"{path}: {read(picture).told()}")
    return 0


if __name__ == "__main__":
    run_command(main)
