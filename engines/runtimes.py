"""The runtimes that an engine can be built for: each is a row here and a package of five functions.

To add one, write a package with the functions of `Functions`, and add its row. A target (`mmdit/target.py`)
names its runtime; no other code compares the name. A package imports its library inside functions only, so
that reading the table loads nothing heavy.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy.typing as npt

from mmdit.artifact import Manifest
from mmdit.errors import EngineError

if TYPE_CHECKING:
    from engines.engine import Build
    from engines.source import Source

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]
FUNCTIONS = ("build", "open", "check", "triton_config", "loadable")


@dataclass(frozen=True)
class ModelFiles:
    """What Triton needs to serve the engines of one model, beyond `config.pbtxt`.

    `files` are a component's: name in the model's version folder → the file to put there. `settings` are the
    content of its `settings.json`, where it has one. `linked` files may be hard links. `plans` say, for each
    engine that is bound to a GPU, what `loadable` must know; they go into the repository's manifest.
    """

    files: dict[str, dict[str, Path]]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    linked: bool = False
    plans: list[dict[str, Any]] = field(default_factory=list)


class Functions(Protocol):
    """The five functions of a runtime's package."""

    def build(self, source: "Source", folder: Path, job: "Build") -> dict[str, Any]:
        """Write a component's engine into the empty `folder`; returns findings. Raises EngineError."""

    def open(self, folder: Path, manifest: Manifest) -> AbstractContextManager[Run]:
        """Load the engine in `folder`: a function from named arrays to named arrays, rows first.

        Leaving the context gives the memory back. Raises EngineError, as does the function.
        """

    def check(self, found: Sequence["Source"], job: "Build") -> dict[str, dict[str, Any]]:
        """Check all that can be known before the build; returns findings by component.

        Raises ArtifactError, ContractError or EngineError for what would fail later.
        """

    def triton_config(
        self, configs: Mapping[str, Any], folders: Mapping[str, Mapping[str, Path]], model: str
    ) -> ModelFiles:
        """Set the runtime's part of each component's config (backend, instances, files); returns the files.

        `configs` are Triton's protobufs by component; `folders` are the engines' by component and target.
        Raises ArtifactError for an engine that is damaged, RepositoryError for one that Triton cannot serve.
        """

    def loadable(
        self, repository: Path, manifest: Manifest, version: Callable[[], str]
    ) -> tuple[list[str], dict[str, str]]:
        """The server's options and environment, once it is sure that it can load the engines here.

        `version` gives the server's version of the runtime. Raises ServerError or ArtifactError.
        """


@dataclass(frozen=True)
class Runtime:
    """A row: the facts about a runtime that other code asks for.

    - `file` is an engine's file in its folder; `tools` are the distributions whose versions it depends on.
    - `has_options`: the builder's options (`--workspace-gib`, …) change the engine.
    - `bound_to_gpu`: an engine runs on one compute capability, by which Triton chooses among several.
    - `python_backend`: Triton runs it in a Python model, which gets the rows of a call one by one, through
      shared memory.
    - `emulates_fp8`: FP8 is computed in a wider type, so that it costs time and saves none.
    """

    name: str
    package: str
    file: str
    tools: tuple[str, ...]
    has_options: bool = False
    bound_to_gpu: bool = False
    python_backend: bool = False
    emulates_fp8: bool = False

    @property
    def functions(self) -> Functions:
        """The package, imported now. Raises EngineError when it is missing, or lacks a function."""
        try:
            package = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            raise EngineError(f"runtime {self.name!r}: {error}: its row names the package") from error
        lacks = [name for name in FUNCTIONS if not callable(getattr(package, name, None))]
        if lacks:
            raise EngineError(
                f"runtime {self.name!r}: {self.package} lacks {', '.join(lacks)}; a runtime's package has "
                f"{', '.join(FUNCTIONS)}"
            )
        return cast(Functions, package)

    @property
    def folder(self) -> Path:
        """The folder of the package."""
        (folder,) = importlib.import_module(self.package).__path__
        return Path(folder)


RUNTIMES = {
    row.name: row
    for row in (
        Runtime(
            "tensorrt",
            package="engines.tensorrt",
            file="model.plan",
            tools=("polygraphy",),
            has_options=True,
            bound_to_gpu=True,
        ),
        Runtime(
            "onnxruntime",
            package="engines.onnxruntime",
            file="model.onnx",
            tools=("onnx", "onnxruntime"),
            python_backend=True,
            emulates_fp8=True,
        ),
    )
}


def runtime(name: str) -> Runtime:
    """The row of that name; raises EngineError for a name that no row has."""
    if name not in RUNTIMES:
        raise EngineError(f"runtime {name!r} is unknown: expected one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def check_runtimes() -> None:
    """Raise EngineError, at a command's start, for the first row whose package lacks a function."""
    for row in RUNTIMES.values():
        _ = row.functions
