"""Checkpoint → one FP16 ONNX file per component, with the contract's names and dynamic dims."""

from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import torch
from torch import nn

from export.modules import load_module
from export.remedies import Remedies, apply_remedies
from export.tracing import traced
from export.weights import save
from mmdit.contract import Signature
from mmdit.errors import CheckpointError
from mmdit.progress import Progress

ONNX_FILE = "model.onnx"


def write_onnx(
    component: str, signature: Signature, checkpoint: Path, remedies: Remedies, folder: Path
) -> dict[str, Any]:
    """Trace a component's module in FP16, its remedies applied, and write `model.onnx` into `folder`.

    Returns findings: the weights' range. Raises CheckpointError when weights are missing or not finite in
    FP16.
    """
    with Progress(f"onnx {component}", total=3, unit="of load, trace, save") as progress:
        module = load_module(component, checkpoint, torch.float16)
        check_finite(component, module)
        apply_remedies(component, module, remedies)
        progress.advance()
        graph = traced(module, signature)
        progress.advance()
        return {"weights": save(graph, folder / ONNX_FILE, f"onnx {component}")}


def check_finite(component: str, module: nn.Module) -> None:
    """Raise CheckpointError naming the first weight that FP16 cannot hold."""
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight.half()).all():
            raise CheckpointError(
                f"{component}: {name} has values that are not finite in FP16 (largest is 65504)"
            )
