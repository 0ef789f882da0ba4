"""The ways to run the MMDiT in torch that are measured: eager and compiled, in FP16, BF16 and FP8.

FP8 is ModelOpt's own: its real quantization stores the linears' weights of all blocks as E4M3 and multiplies
with `torch._scaled_mm`, one scale for a tensor; everything else stays FP16.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}
_TEXT_TOKENS = 77 + 256
_E4M3 = {"num_bits": (4, 3), "axis": None}
# ModelOpt compiles its product anew for every shape of a bias, torch a model for every number of rows: with
# torch's own limit of 8, what comes later is not compiled at all.
_COMPILATIONS = 256


def dtype_of(variant: str) -> torch.dtype:
    """The type of the activations and of all weights that are not E4M3."""
    return _DTYPES[precision_of(variant)]


def precision_of(variant: str) -> str:
    """fp16, bf16 or fp8."""
    return variant.partition("-")[2]


def transformer(config: dict[str, Any], weights: Path | None, dtype: torch.dtype, device: str) -> nn.Module:
    """diffusers' transformer with the weights in a folder, or of `config` with random ones, on `device`."""
    from diffusers import SD3Transformer2DModel

    if weights is not None:
        loaded = SD3Transformer2DModel.from_pretrained(weights, dtype=dtype, local_files_only=True)
        return loaded.to(device).eval().requires_grad_(False)
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if "norm" in name and tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(0, 0.02)
    return model


def random_inputs(
    config: Any, rows: int, size: tuple[int, int], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The arguments of one call at `size` = (height, width) in pixels, with 333 tokens of text."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=device).to(dtype)

    return {
        "hidden_states": normal(config["in_channels"], size[0] // 8, size[1] // 8),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": normal(_TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": normal(config["pooled_projection_dim"]),
        "return_dict": False,
    }


def prepared(model: nn.Module, variant: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """`model`, of the variant's dtype already, as the variant runs it; FP8's ranges are those of `inputs`."""
    torch._dynamo.config.recompile_limit = _COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = _COMPILATIONS
    if precision_of(variant) == "fp8":
        _store_as_fp8(model, inputs)
    if not variant.startswith("compile"):
        return model
    # A model for each number of rows: what torch compiles for all of them is slower. On a CPU, where nothing
    # is measured, the graph is captured and not compiled: that takes a minute and a C++ compiler.
    device = next(model.parameters()).device.type
    return torch.compile(model, dynamic=False, backend="inductor" if device == "cuda" else "eager")


def _store_as_fp8(model: nn.Module, inputs: dict[str, Any]) -> None:
    import modelopt.torch.quantization as mtq
    from diffusers.models.attention_processor import Attention

    if Attention in mtq.nn.QuantModuleRegistry:
        mtq.unregister(Attention)  # ModelOpt's patches torch.nn.functional in each call, and breaks the graph
    entries = [{"quantizer_name": "*", "enable": False}] + [
        {"quantizer_name": f"*{which}_quantizer", "cfg": _E4M3, "enable": True}
        for which in ("weight", "input")
    ]
    blocks = model.transformer_blocks
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(
            blocks, {"quant_cfg": entries, "algorithm": "max"}, forward_loop=lambda _: model(**inputs)
        )
        mtq.compress(blocks)


def not_real_fp8(model: nn.Module) -> list[str]:
    """The FP8 layers that did not run as an FP8 product, after a call: ModelOpt falls back with a warning.

    On a CPU these are all: their weights are widened, and the products are 16-bit.
    """
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "_use_real_quant_gemm", False)
        and getattr(module, "_real_quant_gemm_impl", None) is None
    ]


def flops(config: dict[str, Any], size: tuple[int, int]) -> dict[str, int]:
    """FLOPs of one row, by torch's counter on the meta device: of "linears" and of "attention"'s products."""
    from diffusers import SD3Transformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    inputs = random_inputs(config, 1, size, torch.float32, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in counts.items() if "bmm" in op or "attention" in op)
    return {"linears": sum(counts.values()) - attention, "attention": attention}
