"""How long TensorRT's kernels took, kept from build to build for each GPU model and TensorRT version.

A cache saves time and nothing else: one that TensorRT refuses, because it is damaged or of another version
or device, is left aside with a warning and made anew.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import Any


class TimingCache:
    """The cache of one GPU model and TensorRT version, in a file that appears whole."""

    def __init__(self, folder: Path, gpu: str, version: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{gpu.replace(' ', '-').lower()}-{version}.cache"

    def load(self, config: Any) -> bool:
        """Give the timings to a builder's configuration; False when TensorRT refused them."""
        kept = self.file.read_bytes() if self.file.exists() else b""
        cache = config.create_timing_cache(kept)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
        print(
            f"warning: TensorRT refused the timing cache {self.file}: it is damaged or of another version, "
            "and is made anew",
            file=sys.stderr,
        )
        self.file.unlink(missing_ok=True)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return False

    def save(self, config: Any) -> None:
        """Keep the timings of a build, with those that another build has kept meanwhile."""
        timings = config.get_timing_cache()
        if timings is None:
            return
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        lock = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.file.exists():
                others = config.create_timing_cache(self.file.read_bytes())
                if others is not None:
                    timings.combine(others, ignore_mismatch=False)
            partial.write_bytes(timings.serialize())
            partial.rename(self.file)
        except OSError as error:  # a full disk, say: the engine is none the worse
            print(f"warning: the timing cache {self.file} was not kept: {error}", file=sys.stderr)
        finally:
            partial.unlink(missing_ok=True)
            os.close(lock)
