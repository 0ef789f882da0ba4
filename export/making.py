"""One artifact of the export: remade when its manifest differs, otherwise said to be up to date."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdit.artifact import Manifest, shown, whole
from mmdit.code import code_of
from mmdit.errors import QuantizationError, first_line


def make(
    label: str, folder: Path, manifest: Manifest, write: Callable[[Path], dict[str, Any] | None]
) -> None:
    """Make one artifact, or say that it is up to date.

    `write` fills a folder and gives the manifest's findings. Its code becomes part of the manifest. Raises
    QuantizationError when the GPU's memory does not suffice.
    """
    manifest.code = code_of(write)
    reason = manifest.reason_to_rebuild(folder)
    if reason is None:
        print(f"{label}: up to date")
        return
    print(f"{label}: making it ({reason})", flush=True)
    try:
        with whole(folder, manifest) as partial:
            manifest.findings = write(partial) or {}
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise QuantizationError(
            f"{label}: the GPU's memory does not suffice ({first_line(error)}): run fewer prompts at a "
            "time (--scan-batch 1, --calibration-batch 1), or on the CPU (CUDA_VISIBLE_DEVICES=)"
        ) from None
    print(f"{label}: {shown(folder)}", flush=True)
