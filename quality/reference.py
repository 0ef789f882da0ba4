"""The FP32 reference: the checkpoint's own torch modules, run as the engines are."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import export.quiet  # noqa: F401  isort: skip
import numpy as np
import torch
from torch import nn

from engines.runtimes import Array, Run
from export.modules import load_module
from mmdit.contract import Signature

_SPARE = 6 << 30  # bytes of GPU memory for activations: two rows of 4,429 tokens in FP32, and the libraries


@contextlib.contextmanager
def reference(component: str, checkpoint: Path, signature: Signature) -> Iterator[Run]:
    """Load a component's module in FP32 and yield its function; leaving gives its memory back.

    It runs on the GPU when there is one. Where FP32 weights do not fit into its memory they are kept in 16
    bits and widened a layer at a time, which is exact for a checkpoint of 16 bits; else it stays on the CPU.
    """
    torch.backends.cudnn.allow_tf32 = False  # the default: convolutions with FP16's mantissa
    loaded = [load_module(component, checkpoint, torch.float32)]  # emptied at the end: callers keep `run`
    device = _placed(loaded[0], component)
    outputs = [tensor.name for tensor in signature.outputs]

    @torch.no_grad()
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        given = [_tensor(inputs[tensor.name], device) for tensor in signature.inputs]
        results: Any = loaded[0](*given)
        results = results if isinstance(results, tuple) else (results,)
        return {name: result.cpu().numpy() for name, result in zip(outputs, results, strict=True)}

    try:
        yield run
    finally:
        loaded.clear()
        if device != "cpu":
            torch.cuda.empty_cache()


def _tensor(array: Array, device: str) -> torch.Tensor:
    wide = array.astype(np.float32) if array.dtype == np.float16 else array
    return torch.from_numpy(np.ascontiguousarray(wide)).to(device)


def _placed(module: nn.Module, component: str) -> str:
    """Move a module to where it fits; "cuda" or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    weights = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    if weights + _SPARE <= free:
        module.to("cuda")
        return "cuda"
    if component == "mmdit" and weights // 2 + _SPARE <= free and _fits_in_bfloat16(module):
        module.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        module.to("cuda")
        return "cuda"
    return "cpu"


def _fits_in_bfloat16(module: nn.Module) -> bool:
    """Whether every weight is a BF16 number, as those of a BF16 checkpoint are."""
    return all(torch.equal(weight, weight.bfloat16().float()) for weight in module.parameters())
