"""The stages of one checkpoint's export, each an artifact that is remade only when it must be.

Heavy libraries are loaded only for what must be remade.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from export.budget import check_budget
from export.checkpoint import checkpoint_files, checkpoint_folder
from export.decisions import decided, policy_digest, remedied
from export.making import make
from export.policy import (
    AttentionPrecision,
    Rule,
    calibration_digest,
    read_policy,
)
from export.prompts import PROMPTS, SCAN, CalibrationSettings, calibrated_for
from export.remedies import Remedies
from mmdit.artifact import (
    BUILD,
    Layout,
    Manifest,
    code_digest,
    digest,
    fingerprint,
    require,
    sha256,
    shown,
    versions,
)
from mmdit.contract import COMPONENTS, Precision, Signature, components
from mmdit.errors import ArtifactError
from mmdit.family import Family, family_from_checkpoint
from mmdit.shapes import shape_set

_TOOLS = ("torch", "diffusers", "transformers", "onnx")
# Modules that no artifact but a page, the sensitivity study or the preview's matrix comes from.
_NOT_MAKING = (
    *("__main__", "budget", "candidates", "comparison", "decisions", "groups"),
    *("making", "measurements", "projection_from_vae", "sensitivity", "sensitivity_chart", "stages"),
    "switches",
)
_FP8_TOOLS = (*_TOOLS, "nvidia-modelopt")


class Export:
    """The export of one checkpoint."""

    def __init__(
        self, model: str, build: Path = BUILD, variant: str | None = None, t5_tokens: int = 256
    ) -> None:
        """Find the checkpoint, read its family, hash its files.

        Raises CheckpointError or ContractError.
        """
        self.layout = Layout(model, build)
        self.checkpoint = checkpoint_folder(model)
        self.family: Family = family_from_checkpoint(
            self.checkpoint, name=self.layout.name, variant=variant, t5_tokens=t5_tokens
        )
        self.signatures: dict[str, Signature] = components(self.family, shape_set(self.family))
        files = checkpoint_files(self.checkpoint)
        self.hashes = {part: fingerprint(paths, self.checkpoint) for part, paths in files.items()}
        self.fingerprint = digest(self.hashes)

    def scan(self, **given: Any) -> dict[str, Remedies]:
        """Find what FP16 cannot hold; returns each component's remedies."""
        settings = CalibrationSettings.for_family(self.family, **{**SCAN, **given})

        def write(folder: Path) -> dict[str, Any]:
            from export.scan import read_remedies, write_scan

            write_scan(self.family, self.checkpoint, settings, folder)
            found = read_remedies(folder)
            return {"remedies": {name: each.model_dump(mode="json") for name, each in found.items()}}

        make(
            "scan",
            self.layout.scan,
            self._manifest("scan", self._all_inputs(), _TOOLS, **settings.model_dump(mode="json")),
            write,
        )
        return self.remedies

    @cached_property
    def remedies(self) -> dict[str, Remedies]:
        """Component → its remedies, from the scan."""
        found = require(self.layout.scan, f"make onnx MODEL={self.layout.model}").findings["remedies"]
        return {name: Remedies.model_validate(each) for name, each in found.items()}

    def onnx(self, **given: Any) -> None:
        """Make the tokenizers, an FP16 ONNX file per component, and the preview's matrix.

        `given` are the scan's settings.
        """

        def write_tokenizers(folder: Path) -> None:
            from export.tokenizers_from_checkpoint import write_tokenizers

            write_tokenizers(self.family, self.checkpoint, folder)

        make(
            "tokenizers",
            self.layout.tokenizers,
            self._manifest("tokenizers", self.hashes["pipeline"], ("transformers", "tokenizers")),
            write_tokenizers,
        )
        self.scan(**given)
        for component in COMPONENTS:
            remedies = self.remedies[component]

            def write_component(
                folder: Path, component: str = component, remedies: Remedies = remedies
            ) -> dict[str, Any]:
                from export.onnx_from_checkpoint import write_onnx

                return write_onnx(component, self.signatures[component], self.checkpoint, remedies, folder)

            make(
                f"onnx {component}",
                self.layout.onnx(component),
                self._manifest(
                    "onnx",
                    self.hashes[component],
                    _TOOLS,
                    component=component,
                    remedies=remedies.model_dump(mode="json"),
                ),
                write_component,
            )

        def write_projection(folder: Path) -> dict[str, Any]:
            from export.projection_from_vae import write_projection

            return write_projection(self.family, self.checkpoint, folder)

        make(
            "preview",
            self.layout.preview,
            self._manifest(
                "preview",
                self.hashes["vae_decoder"],
                _TOOLS,
                projection=sha256(Path(__file__).with_name("projection_from_vae.py")),
            ),
            write_projection,
        )

    def fp8(
        self,
        *,
        policy: Path | None = None,
        target: str = "auto",
        calibration: Path | None = None,
        **given: Any,
    ) -> None:
        """Calibrate, or take the saved `calibration`, and make the MMDiT's FP8 ONNX file and its audit.

        `policy` is a file of rules that go before the project's; `given` are calibration settings.
        """
        onnx = self.layout.onnx("mmdit")
        command = f"make onnx MODEL={self.layout.model}"
        if require(onnx, command).checkpoint != self.fingerprint:
            raise ArtifactError(f"{onnx} was made from another checkpoint: run `{command}` first")
        decisions, attention = decided(self.checkpoint, self.remedies["mmdit"], policy, target)
        remedies = self.remedies | {"mmdit": remedied(self.remedies["mmdit"], decisions)}
        self._calibrate(decisions, attention, remedies["mmdit"], calibration, given)
        calibration_files = require(self.layout.calibration, "make fp8").files
        folder = self.layout.onnx("mmdit", Precision.FP8)

        def write_fp8(partial: Path) -> dict[str, Any]:
            from export.audit import write_audit
            from export.calibration import CALIBRATION_FILE, read_calibration
            from export.fp8_from_calibration import quantized_module, write_fp8_onnx

            saved = self.layout.calibration / CALIBRATION_FILE
            ranges = read_calibration(saved, self._calibrated_for(decisions, attention)).amax
            module = quantized_module(self.checkpoint, decisions, attention, remedies["mmdit"], ranges)
            weights = write_fp8_onnx(module, self.signatures["mmdit"], partial)
            return weights | write_audit(partial, self.family, decisions, attention, remedies)

        make(
            "onnx-fp8 mmdit",
            folder,
            self._manifest(
                "onnx",
                {**self.hashes["mmdit"], **calibration_files},
                _FP8_TOOLS,
                component="mmdit",
                policy=policy_digest(decisions),
                attention=attention.value,
                attention_by_target={
                    name: each.value for name, each in read_policy(policy).attention.items()
                },
                remedies={name: each.model_dump(mode="json") for name, each in remedies.items()},
            ),
            write_fp8,
        )
        found = require(folder, "make fp8").findings
        print(
            f"  {found['fp8_layers']} layers in FP8, {found['fp8_weight_layers']} with FP8 weights, "
            f"{found['fp16_layers']} in FP16, {found['fp32_layers']} in FP32\n"
            f"  FP8 runs {found['linear_flops_in_fp8']:.1%} of the linear FLOPs and "
            f"{found['all_flops_in_fp8']:.1%} of all; "
            f"weights take {found['weight_bytes'] / found['weight_bytes_fp16']:.1%} of FP16's bytes\n"
            f"  each layer: {shown(folder / 'audit.html')}"
        )

    def sensitivity(
        self,
        *,
        by: str = "role",
        budget: float | None = None,
        pictures: int = 8,
        steps: int | None = None,
        policy: Path | None = None,
        target: str = "auto",
        **given: Any,
    ) -> None:
        """Rank groups of layers by what FP8 does to them; with a budget, propose a policy that reaches it.

        `given` are calibration settings: how the ranges are found.
        """
        if budget is not None:
            check_budget(budget)
        decisions, attention = decided(self.checkpoint, self.remedies["mmdit"], policy, target)
        settings = CalibrationSettings.for_family(self.family, **given)
        remedies = remedied(self.remedies["mmdit"], decisions)

        def write(folder: Path) -> dict[str, Any]:
            from export.sensitivity import study

            return study(
                self.family,
                self.checkpoint,
                self.fingerprint,
                decisions,
                attention,
                remedies,
                settings,
                folder,
                by=by,
                budget=budget,
                pictures=pictures,
                steps=steps,
            )

        make(
            "sensitivity",
            self.layout.sensitivity,
            self._manifest(
                "sensitivity",
                self._all_inputs(),
                _FP8_TOOLS,
                policy=policy_digest(decisions),
                attention=attention.value,
                remedies=remedies.model_dump(mode="json"),
                by=by,
                budget=budget,
                pictures=pictures,
                steps=steps,
                calibration=settings.model_dump(mode="json"),
            ),
            write,
        )

    def _calibrated_for(self, decisions: dict[str, Rule], attention: AttentionPrecision) -> dict[str, Any]:
        return calibrated_for(self.fingerprint, calibration_digest(decisions, attention), self.family)

    def _calibrate(
        self,
        decisions: dict[str, Rule],
        attention: AttentionPrecision,
        remedies: Remedies,
        saved: Path | None,
        given: dict[str, Any],
    ) -> None:
        folder = self.layout.calibration
        settings = CalibrationSettings.for_family(self.family, **given)

        def write(partial: Path) -> None:
            from export.calibration import CALIBRATION_FILE, read_calibration, write_calibration

            if saved is not None:
                read_calibration(saved, made_for)
                (partial / CALIBRATION_FILE).write_bytes(saved.read_bytes())
                return
            write_calibration(
                self.family, self.checkpoint, made_for, decisions, attention, remedies, settings, partial
            )

        made_for = self._calibrated_for(decisions, attention)
        policy = made_for["policy"]
        if saved is not None:
            if not saved.is_file():
                raise ArtifactError(f"CALIBRATION={saved} is no file: give a saved calibration.json")
            manifest = self._manifest("calibration", {saved.name: sha256(saved)}, (), policy=policy)
        else:
            manifest = self._manifest(
                "calibration",
                self._all_inputs(),
                _FP8_TOOLS,
                policy=policy,
                remedies=remedies.model_dump(mode="json"),
                **settings.model_dump(mode="json"),
            )
        make("calibration", folder, manifest, write)

    def _all_inputs(self) -> dict[str, str]:
        """Every file of the checkpoint, and the prompts."""
        files = {name: value for part in self.hashes.values() for name, value in part.items()}
        return {**files, PROMPTS.name: sha256(PROMPTS)}

    def _manifest(
        self, kind: str, made_from: dict[str, str], tools: tuple[str, ...], **settings: Any
    ) -> Manifest:
        return Manifest(
            kind=kind,
            checkpoint=self.fingerprint,
            made_from=made_from,
            settings={
                "family": self.family.model_dump(mode="json"),
                "code": code_digest(Path(__file__).parent, without=_NOT_MAKING),
                **settings,
            },
            versions=versions(*tools),
        )
