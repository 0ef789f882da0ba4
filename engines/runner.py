"""An engine's folder to a function that runs it: named arrays in, named arrays out.

For what needs an engine's answers without a server, such as the quality gate.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from engines.runtimes import Run, runtime
from mmdit.artifact import require
from mmdit.errors import ArtifactError


def runner(folder: Path) -> AbstractContextManager[Run]:
    """Load the engine in `folder` and give its function; leaving gives its memory back.

    Inputs and outputs are the contract's, rows first. Raises ArtifactError when there is no engine,
    EngineError when it cannot be loaded, or does not take the inputs.
    """
    manifest = require(folder, "make engines")
    if manifest.kind != "engine":
        raise ArtifactError(f"{folder} holds a {manifest.kind}, expected an engine: run `make engines` again")
    return runtime(manifest.settings["runtime"]).functions.open(folder, manifest)
