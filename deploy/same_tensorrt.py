"""Ends with status 2 unless the TensorRT that builds engines here is the one that Triton loads them with.

Run while the build image is made: `python -m deploy.same_tensorrt 11.4.0.106`.
"""

import sys
from pathlib import Path

from mmdit.errors import ServerError, run_command
from serve.installation import find_installation


def main() -> None:
    """Compare the version given with that of the server on this machine."""
    builder = sys.argv[1]
    server = find_installation(Path("build/triton")).tensorrt_version()
    if not f"{builder}.".startswith(f"{server}."):
        raise ServerError(
            f"TENSORRT={builder} builds plans that this image's TensorRT {server} does not load"
        )
    print(f"TensorRT {builder} builds what this image's {server} loads")


if __name__ == "__main__":
    run_command(main)
