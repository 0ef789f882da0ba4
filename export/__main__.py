"""Checkpoint → ONNX → FP8 ONNX.

    python -m export onnx --model stabilityai/stable-diffusion-3.5-large
    python -m export fp8 --model stabilityai/stable-diffusion-3.5-large

Each part is remade only when what it was made from has changed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    whole,
)
from mmdit.contract import COMPONENTS, Precision, Signature, components
from mmdit.errors import ArtifactError, run_command
from mmdit.family import DEFAULTS, Family, family_from_checkpoint
from mmdit.shapes import shape_set

_TOOLS = ("torch", "diffusers", "transformers", "onnx")
_FP8_TOOLS = (*_TOOLS, "nvidia-modelopt")


def main() -> int:
    """Parse the arguments and run one stage."""
    parser = argparse.ArgumentParser(
        prog="python -m export", description="Checkpoint to ONNX, and the MMDiT to FP8 ONNX."
    )
    parser.add_argument("stage", choices=("onnx", "fp8"), help="what to make")
    parser.add_argument(
        "--model",
        default="miniature",
        help="miniature, a folder in diffusers format, or a hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--variant", choices=sorted(DEFAULTS), help="overrides what the checkpoint's configs tell"
    )
    parser.add_argument(
        "--t5-tokens",
        type=int,
        default=256,
        help="length to which T5 pads every prompt; it changes the picture (default: %(default)s)",
    )
    parser.add_argument("--calibration-prompts", type=int, help="prompts to calibrate with (default: 128)")
    parser.add_argument(
        "--calibration-steps", type=int, help="steps of each calibration trajectory (default: 8)"
    )
    parser.add_argument("--calibration-batch", type=int, help="prompts at a time (default: 16)")
    parser.add_argument("--build", type=Path, default=BUILD, help="where artifacts go")
    arguments = parser.parse_args()

    export = Export(arguments.model, arguments.build, arguments.variant, arguments.t5_tokens)
    if arguments.stage == "onnx":
        export.onnx()
    else:
        export.fp8(
            prompts=arguments.calibration_prompts,
            steps=arguments.calibration_steps,
            batch=arguments.calibration_batch,
        )
    return 0


class Export:
    """The export of one checkpoint; heavy libraries are loaded only for what must be remade."""

    def __init__(
        self, model: str, build: Path = BUILD, variant: str | None = None, t5_tokens: int = 256
    ) -> None:
        """Find the checkpoint, read its family, hash its files.

        Raises CheckpointError or ContractError.
        """
        from export.checkpoint import checkpoint_files, checkpoint_folder

        self.layout = Layout(model, build)
        self.checkpoint = checkpoint_folder(model)
        self.family: Family = family_from_checkpoint(
            self.checkpoint, name=self.layout.name, variant=variant, t5_tokens=t5_tokens
        )
        self.signatures: dict[str, Signature] = components(self.family, shape_set(self.family))
        files = checkpoint_files(self.checkpoint)
        self.hashes = {part: fingerprint(paths, self.checkpoint) for part, paths in files.items()}
        self.fingerprint = digest(self.hashes)

    def onnx(self) -> None:
        """Make the tokenizers and one FP16 ONNX file per component."""

        def write_tokenizers(folder: Path) -> None:
            from export.tokenizers_from_checkpoint import write_tokenizers

            write_tokenizers(self.family, self.checkpoint, folder)

        self._make(
            "tokenizers",
            self.layout.tokenizers,
            self._manifest("tokenizers", self.hashes["pipeline"], ("transformers", "tokenizers")),
            write_tokenizers,
        )
        for component in COMPONENTS:

            def write_component(folder: Path, component: str = component) -> None:
                from export.onnx_from_checkpoint import write_onnx

                write_onnx(component, self.signatures[component], self.checkpoint, folder)

            self._make(
                f"onnx {component}",
                self.layout.onnx(component),
                self._manifest("onnx", self.hashes[component], _TOOLS, component=component),
                write_component,
            )

    def fp8(self, **calibration: int | None) -> None:
        """Calibrate, and make the MMDiT's FP8 ONNX file."""
        onnx = self.layout.onnx("mmdit")
        command = f"make onnx MODEL={self.layout.model}"
        if require(onnx, command).checkpoint != self.fingerprint:
            raise ArtifactError(f"{onnx} was made from another checkpoint: run `{command}` first")
        from export.prompts import PROMPTS, CalibrationSettings

        settings = CalibrationSettings.for_family(self.family, **calibration)
        inputs = {**self._all_hashes(), PROMPTS.name: sha256(PROMPTS)}

        def write_ranges(folder: Path) -> None:
            from export.calibration import write_calibration

            write_calibration(self.family, self.checkpoint, settings, folder)

        self._make(
            "calibration",
            self.layout.calibration,
            self._manifest("calibration", inputs, _FP8_TOOLS, **settings.model_dump()),
            write_ranges,
        )
        calibration_files = require(self.layout.calibration, "make fp8").files

        def write_fp8(folder: Path) -> dict[str, float]:
            from export.calibration import read_ranges
            from export.fp8_from_calibration import write_fp8_onnx

            ranges = read_ranges(self.layout.calibration)
            signature = self.signatures["mmdit"]
            return write_fp8_onnx(self.family, signature, self.checkpoint, ranges, folder)

        folder = self.layout.onnx("mmdit", Precision.FP8)
        self._make(
            "onnx-fp8 mmdit",
            folder,
            self._manifest(
                "onnx",
                {**self.hashes["mmdit"], **calibration_files},
                _FP8_TOOLS,
                component="mmdit",
            ),
            write_fp8,
        )
        found = require(folder, "make fp8").findings
        print(
            f"  {found['fp8_layers']} layers in FP8, {found['fp8_weight_layers']} with FP8 weights, "
            f"{found['fp16_layers']} in FP16; FP8 weights under "
            f"{found['block_linear_flops_on_fp8_weights']:.1%} of the blocks' linear FLOPs; linear "
            f"weights take {found['linear_weight_bytes_against_fp16']:.1%} of FP16's bytes\n"
            f"  each layer: {shown(folder / 'layers.json')}"
        )

    def _all_hashes(self) -> dict[str, str]:
        return {name: value for part in self.hashes.values() for name, value in part.items()}

    def _manifest(
        self, kind: str, made_from: dict[str, str], tools: tuple[str, ...], **settings: Any
    ) -> Manifest:
        return Manifest(
            kind=kind,
            checkpoint=self.fingerprint,
            made_from=made_from,
            settings={
                "family": self.family.model_dump(mode="json"),
                "code": code_digest(Path(__file__).parent),
                **settings,
            },
            versions=versions(*tools),
        )

    def _make(
        self,
        label: str,
        folder: Path,
        manifest: Manifest,
        write: Callable[[Path], dict[str, float] | None],
    ) -> None:
        """Make one artifact, or say that it is up to date."""
        reason = manifest.reason_to_rebuild(folder)
        if reason is None:
            print(f"{label}: up to date")
            return
        print(f"{label}: making it ({reason})", flush=True)
        with whole(folder, manifest) as partial:
            manifest.findings = write(partial) or {}
        print(f"{label}: {shown(folder)}", flush=True)


if __name__ == "__main__":
    run_command(main)
