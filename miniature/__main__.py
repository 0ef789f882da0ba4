"""`python -m miniature`: writes the miniature's checkpoint; `--help` does not load torch."""

import argparse
from pathlib import Path

from mmdit.errors import MmditError, run_command


def main(arguments: list[str] | None = None) -> int:
    """Make the checkpoint, print where it is and its size; raise MmditError for a bad request."""
    parser = argparse.ArgumentParser(
        prog="python -m miniature",
        description="Make the miniature: a tiny Stable Diffusion 3.5 with random weights.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the checkpoint's folder; a miniature that lies there unchanged is replaced",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**32:
        raise MmditError(f"--seed {options.seed} is out of range: expected 0 to {2**32 - 1}")

    from miniature.checkpoint import write_checkpoint

    size = write_checkpoint(options.output, seed=options.seed)
    print(f"{options.output}: {size / 1e6:.1f} MB (seed {options.seed})")
    return 0


if __name__ == "__main__":
    run_command(main)
