"""What is judged: one target's engines in both precisions, and the FP32 modules that they were made from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engines.runner import runner
from engines.runtimes import Run
from mmdit.artifact import Layout, digest, require
from mmdit.contract import COMPONENTS, Precision, components
from mmdit.errors import ArtifactError
from mmdit.family import VAE_SCALE, Family
from mmdit.shapes import ShapeSet
from quality.trajectory import Executor
from serve.inside.limits import Limits

_MOST_STEPS = 1000
_SMALL = 256  # pixels: up to here the FP32 reference takes as many rows at a time as the engines
_REFERENCE_ROWS = 2  # at real sizes one request's rows fill a GPU, and more would only take memory


class Subject:
    """The engines of a target, checked to belong together; says how each precision is executed."""

    def __init__(self, layout: Layout, target: str) -> None:
        """Raises ArtifactError for an engine that is missing or was made from something else."""
        self.layout, self.target = layout, target
        self.folders = {name: layout.engine(target, name, Precision.FP16) for name in COMPONENTS}
        self.folders["mmdit-fp8"] = layout.engine(target, "mmdit", Precision.FP8)
        make = f"make gate MODEL={layout.model} TARGET={target}"
        self.manifests = {name: require(folder, make) for name, folder in self.folders.items()}
        self.tokenizers = require(layout.tokenizers, make)
        fp8 = self.manifests["mmdit-fp8"]
        for name, manifest in self.manifests.items():
            for field in ("family", "shapes", "runtime", "checkpoint"):
                values = [
                    each.checkpoint if field == "checkpoint" else each.settings[field]
                    for each in (manifest, fp8)
                ]
                if values[0] != values[1]:
                    raise ArtifactError(
                        f"{self.folders[name]} was made from another {field} than "
                        f"{self.folders['mmdit-fp8']}: run `{make}`"
                    )
        self.checkpoint = fp8.checkpoint
        self.runtime: str = fp8.settings["runtime"]
        self.family = Family.model_validate(fp8.settings["family"])
        self.shapes = ShapeSet.model_validate(fp8.settings["shapes"])
        self.limits = Limits.from_settings(
            {
                "family": self.family.model_dump(),
                "shapes": self.shapes.model_dump(),
                "pixels_per_latent": VAE_SCALE,
            },
            _MOST_STEPS,
        )

    @property
    def is_miniature(self) -> bool:
        """Whether the model is the miniature, whose pictures a program can read."""
        model = self.layout.model
        return model == "miniature" or (Path(model) / "miniature.json").is_file()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels: what the first size range is tuned for."""
        return self.shapes.ranges[0].opt

    @property
    def files(self) -> dict[str, str]:
        """Every file that makes the pictures, with its SHA-256, as `<engine folder>/<file>`."""
        folders = {name: self.folders[name].name for name in self.manifests}
        return {
            f"{folders[name]}/{file}": value
            for name, manifest in self.manifests.items()
            for file, value in manifest.files.items()
        } | {f"tokenizers/{file}": value for file, value in self.tokenizers.files.items()}

    @property
    def bytes(self) -> dict[str, int]:
        """The size of each engine's files, by the name of its folder."""
        return {
            self.folders[name].name: sum((self.folders[name] / file).stat().st_size for file in each.files)
            for name, each in self.manifests.items()
        }

    def engines(self, precision: Precision) -> Executor:
        """The engines with the MMDiT of a precision."""

        def opened(component: str) -> Any:
            fp8 = component == "mmdit" and precision is Precision.FP8
            return runner(self.folders["mmdit-fp8" if fp8 else component])

        return Executor(precision.value, np.float16, opened, self.limits.max_rows(*self.size))

    def reference(self) -> Executor:
        """The checkpoint's modules in FP32; raises ArtifactError when it is not the engines' checkpoint."""
        from export.checkpoint import checkpoint_folder, checkpoint_hashes

        checkpoint = checkpoint_folder(self.layout.model)
        if digest(checkpoint_hashes(checkpoint)) != self.checkpoint:
            raise ArtifactError(
                f"{checkpoint} has changed since the engines were made from it: run "
                f"`make engines MODEL={self.layout.model} TARGET={self.target}`"
            )
        signatures = components(self.family, self.shapes)

        @contextlib.contextmanager
        def opened(component: str) -> Iterator[Run]:
            from quality.reference import reference

            with reference(component, checkpoint, signatures[component]) as run:
                yield run

        small = max(self.size) <= _SMALL
        rows = self.limits.max_rows(*self.size) if small else _REFERENCE_ROWS
        return Executor("fp32", np.float32, opened, rows)
