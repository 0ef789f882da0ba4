"""The ONNX files that engines are made from, one for each component, all of one checkpoint."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mmdit.artifact import Layout, Manifest, digest, require, sha256
from mmdit.contract import COMPONENTS, Precision
from mmdit.errors import ArtifactError
from mmdit.family import Family

MODEL = "model.onnx"


@dataclass(frozen=True)
class Source:
    """A component's ONNX folder and its manifest; `precision` is FP8 for an FP8 MMDiT only."""

    component: str
    precision: Precision
    folder: Path
    manifest: Manifest

    @property
    def onnx(self) -> Path:
        """The ONNX file; its external weights, if any, lie beside it."""
        return self.folder / MODEL

    @property
    def files(self) -> dict[str, str]:
        """The ONNX file and its external weights, with their SHA-256."""
        files = self.manifest.files
        return {name: digest for name, digest in files.items() if name.startswith(MODEL)}

    @property
    def made_from(self) -> dict[str, str]:
        """What an engine is made from: these files and, of an FP8 one, the calibration behind them."""
        calibrated = {k: v for k, v in self.manifest.made_from.items() if k == "calibration.json"}
        return self.files | calibrated


def sources(layout: Layout, model: str, precision: Precision) -> tuple[list[Source], Family]:
    """Every component's ONNX file, and the family that they share.

    Raises ArtifactError when one is missing, or was made from another model than the rest.
    """
    found = []
    for component in COMPONENTS:
        own = precision if component == "mmdit" else Precision.FP16
        folder = layout.onnx(component, own)
        made_by = f"make {'fp8' if own is Precision.FP8 else 'onnx'} MODEL={model}"
        source = Source(component, own, folder, require(folder, made_by))
        gone = [name for name in {MODEL: "", **source.files} if not (folder / name).is_file()]
        if source.manifest.kind != "onnx" or gone:
            what = f"lacks {gone[0]}" if gone else f"is of kind {source.manifest.kind!r}, not 'onnx'"
            raise ArtifactError(f"{folder} {what}: run `{made_by}` again")
        found.append(source)
    _check_one_model(found, model)
    try:
        return found, Family.model_validate(found[0].manifest.settings["family"])
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"{found[0].folder}: its manifest holds no family that can be read "
            f"({str(error).splitlines()[0]}): run `make onnx MODEL={model}` again"
        ) from None


def check_unchanged(source: Source) -> None:
    """Raise ArtifactError when an ONNX file is not the one that its manifest, and so the audit, speaks of."""
    changed = [name for name, digest in source.files.items() if sha256(source.folder / name) != digest]
    if changed:
        stage = "make fp8" if source.precision is Precision.FP8 else "make onnx"
        paths = ", ".join(str(source.folder / name) for name in changed)
        raise ArtifactError(
            f"{source.component}: {paths} changed since its manifest was written: run `{stage}` again"
        )


def _check_one_model(found: list[Source], model: str) -> None:
    models = {
        source.component: (
            source.manifest.checkpoint,
            digest(source.manifest.settings.get("family")),
        )
        for source in found
    }
    usual, _ = Counter(models.values()).most_common(1)[0]
    strangers = [source for source in found if models[source.component] != usual]
    if strangers:
        named = ", ".join(f"{source.component} in {source.folder}" for source in strangers)
        rest = ", ".join(component for component in models if models[component] == usual)
        what = (
            "another checkpoint"
            if any(models[source.component][0] != usual[0] for source in strangers)
            else "another family (its t5_tokens or another setting differs)"
        )
        raise ArtifactError(
            f"{named}: made from {what} than {rest}; run `make onnx` and `make fp8` with MODEL={model} again"
        )


def check_attention(source: Source, target: str) -> None:
    """Raise ArtifactError for an FP8 file whose attention is not what its policy has for `target`."""
    table = source.manifest.settings.get("attention_by_target")
    if table is None:
        return
    wanted = table.get(target, table.get("default", "fp16"))
    found = source.manifest.settings["attention"]
    if found != wanted:
        raise ArtifactError(
            f"{source.folder}: attention's products are {found}, but the policy has {wanted} for {target}: "
            f"run `make fp8 TARGET={target}` with the same POLICY"
        )
