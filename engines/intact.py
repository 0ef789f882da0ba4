"""Whether files are still those that a manifest names."""

from collections.abc import Mapping
from pathlib import Path

from mmdit.artifact import fingerprint, shown
from mmdit.errors import ArtifactError


def check_whole(
    folder: Path, files: Mapping[str, str], sizes: Mapping[str, int | None], way_out: str
) -> None:
    """Raise ArtifactError naming the first of `files` (path below `folder` → SHA-256) that is another.

    Those whose size in bytes is known are looked at first, since hashing gigabytes takes its time.
    """
    for name in files:
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{shown(path)} is gone: {way_out}")
        size, expected = path.stat().st_size, sizes.get(name)
        if expected not in (None, size):
            raise ArtifactError(f"{shown(path)} has {size:,} bytes, expected {expected:,}: {way_out}")
    for name, found in fingerprint([folder / name for name in files], folder).items():
        if found != files[name]:
            raise ArtifactError(f"{shown(folder / name)} changed after it was written: {way_out}")
