"""An engine for ONNX Runtime: the ONNX file itself, once it has been held against the contract."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.checks.bounds import check_bounds
from engines.checks.graph import check_graph
from engines.engine import Build
from engines.onnxruntime.session import session
from engines.source import Source, check_unchanged
from mmdit.contract import components


def check_graphs(found: Sequence[Source], job: Build) -> None:
    """Raise ArtifactError for an ONNX file that changed, EngineError for one that breaks the contract."""
    signatures = components(job.family, job.shapes)
    for source in found:
        check_unchanged(source)
        check_graph(source.onnx, source.component, signatures[source.component])


def onnxruntime_from_onnx(source: Source, folder: Path, job: Build) -> dict[str, Any]:
    """Copy a component's ONNX files into `folder`, load them, and check them at the bounds of every profile.

    Copies, not hard links: onnx refuses external weights that have several names, and the links
    would spoil the original too. Returns findings. Raises EngineError when ONNX Runtime cannot load
    the graph, or it does not keep the contract there.
    """
    signature = components(job.family, job.shapes)[source.component]
    for name in source.files:
        shutil.copyfile(source.folder / name, folder / name)
    start = time.monotonic()
    loaded = session(folder / source.onnx.name, source.component, source.precision)
    seconds = round(time.monotonic() - start, 3)
    return {
        "engine_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "seconds_to_load": seconds,
        **check_bounds(source, signature, job.shapes, loaded),
    }
