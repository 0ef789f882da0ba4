"""One model's engines for one target, as they are packaged together."""

from engines.runtimes import Runtime, runtime
from mmdit.artifact import Layout, require
from mmdit.contract import COMPONENTS, Precision, Signature, components
from mmdit.errors import RepositoryError
from mmdit.family import Family
from mmdit.shapes import ShapeSet


class Engines:
    """The engines of one model for one target, checked to belong together."""

    def __init__(self, layout: Layout, target: str, precision: Precision) -> None:
        """`precision` is the MMDiT's.

        Raises ArtifactError for an engine that is missing, RepositoryError for engines that do not fit.
        """
        make = f"make engines MODEL={layout.model} TARGET={target} PRECISION={precision.value}"
        self.layout, self.target, self.precision = layout, target, precision
        precisions = {name: Precision.FP16 for name in COMPONENTS} | {"mmdit": precision}
        self.folders = {name: layout.engine(target, name, precisions[name]) for name in COMPONENTS}
        self.manifests = {name: require(folder, make) for name, folder in self.folders.items()}
        self.tokenizers, self.preview = layout.tokenizers, layout.preview
        onnx = f"make onnx MODEL={layout.model}"
        exported = {folder.name: require(folder, onnx) for folder in (layout.tokenizers, layout.preview)}
        parts = self.manifests | exported
        for field in ("checkpoint", "family", "shapes", "runtime"):
            values = {
                name: manifest.checkpoint if field == "checkpoint" else manifest.settings[field]
                for name, manifest in parts.items()
                if field in ("checkpoint", "family") or name in self.manifests
            }
            common = values["mmdit"]
            others = [name for name, value in values.items() if value != common]
            if others:
                raise RepositoryError(
                    f"{', '.join(others)}: made from another {field} than the mmdit engine in "
                    f"{self.folders['mmdit']}; engines of different models cannot be served together, run "
                    f"`{make}`"
                )
        mmdit = self.manifests["mmdit"]
        self.checkpoint = mmdit.checkpoint
        self.family = Family.model_validate(mmdit.settings["family"])
        self.shapes = ShapeSet.model_validate(mmdit.settings["shapes"])
        self.runtime: Runtime = runtime(mmdit.settings["runtime"])
        self.profiles = {name: each.settings["profiles"] for name, each in self.manifests.items()}
        self.signatures: dict[str, Signature] = components(self.family, self.shapes)

    def files(self, *, by_folder: bool = False) -> dict[str, str]:
        """`<component>/<file>` → SHA-256, or `<engine folder>/<file>`, which tells the precision."""
        return {
            f"{self.folders[name].name if by_folder else name}/{file}": value
            for name, manifest in self.manifests.items()
            for file, value in manifest.files.items()
        }
