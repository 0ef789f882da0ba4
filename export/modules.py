"""The torch modules that are traced: each component of the contract around its part of the checkpoint.

They own what the graph must look like where the libraries' own forward would put something into it
that does not belong there.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import export.quiet  # noqa: F401  isort: skip
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPTextModelWithProjection, T5EncoderModel

from export.positions import separate_positions
from mmdit.contract import TEXT_ENCODERS
from mmdit.errors import CheckpointError, first_line
from mmdit.family import PARTS


class ClipTextEncoder(nn.Module):
    """`input_ids` [rows, 77] → `hidden` [rows, 77, D] of the penultimate layer, `pooled` [rows, P]."""

    def __init__(self, model: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


class T5TextEncoder(nn.Module):
    """`input_ids` [rows, S] → `hidden` [rows, S, D], without an attention mask as in SD3.

    Runs the blocks' layers itself: transformers' T5Block clamps FP16 infinities with `isinf(...).any()`
    over the whole batch, which would hide overflow in the engine and make each row depend on the others.
    """

    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.encoder.embed_tokens(input_ids)
        position_bias = None  # made by the first layer, shared by the others
        for block in self.encoder.block:
            attention, feed_forward = block.layer
            hidden, position_bias, _ = attention(hidden, position_bias=position_bias)
            hidden = feed_forward(hidden)
        return self.encoder.final_layer_norm(hidden)


class Mmdit(nn.Module):
    """One evaluation of the velocity; `timestep` [rows, 1] is sigma × 1000, each row its own."""

    def __init__(self, model: SD3Transformer2DModel) -> None:
        super().__init__()
        self.model = model
        separate_positions(model.pos_embed)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return self.model(
            hidden_states=latent,
            timestep=timestep.squeeze(1),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


class VaeDecoder(nn.Module):
    """`latent` [rows, C, h, w], already scaled and shifted → `image` [rows, 3, 8h, 8w] in about [-1, 1]."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent, return_dict=False)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    quantizers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """Attention over [rows, heads, tokens, head size], written out as TensorRT fuses it.

    The scale stands before the first product (which also keeps the scores in FP16's range), and there
    are no casts: MatMul, Softmax, MatMul in one dtype. `quantizers` are those of the products' operands,
    by name: q, k, v and s for the softmax. k is transposed before it is quantized, so that the dequantized
    one feeds the product.
    """
    # `int`: a constant in the graph, not one computed from the shape in every call
    scale = int(query.shape[-1]) ** -0.5 if scale is None else scale
    if scale != 1.0:
        query = query * scale
    key = key.transpose(-2, -1)
    if quantizers is not None:
        query, key, value = quantizers["q"](query), quantizers["k"](key), quantizers["v"](value)
    scores = query @ key
    if bias is not None:
        scores = scores + bias
    if causal:
        tokens = int(query.shape[-2])
        lowest = torch.finfo(scores.dtype).min
        scores = scores + torch.full((tokens, tokens), lowest, dtype=scores.dtype, device=scores.device).triu(
            1
        )
    weights = scores.softmax(-1)
    return (weights if quantizers is None else quantizers["s"](weights)) @ value


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    output = attention(query, key, value, scale=scaling, bias=position_bias, causal=is_causal)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("mmdit_trt", _transformers_attention)


@contextlib.contextmanager
def explicit_attention(quantizers: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Iterator[None]:
    """Let diffusers' models call `attention` in place of torch's fused one, as when a graph is traced."""

    def replacement(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        return attention(
            query, key, value, scale=scale, bias=attn_mask, causal=is_causal, quantizers=quantizers
        )

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", replacement):
        yield


_LOADERS: dict[str, tuple[Any, Any]] = {
    "clip_l": (ClipTextEncoder, CLIPTextModelWithProjection),
    "clip_g": (ClipTextEncoder, CLIPTextModelWithProjection),
    "t5": (T5TextEncoder, T5EncoderModel),
    "mmdit": (Mmdit, SD3Transformer2DModel),
    "vae_decoder": (VaeDecoder, AutoencoderKL),
}


def load_module(component: str, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    """A component's module in evaluation mode, with its weights from the checkpoint's safetensors.

    Raises CheckpointError when the weights do not fit the part's config: the libraries would draw a
    missing one at random.
    """
    wrapper, library_class = _LOADERS[component]
    own_attention = {"attn_implementation": "mmdit_trt"} if component in TEXT_ENCODERS else {}
    part = checkpoint / PARTS[component]
    try:
        model, found = library_class.from_pretrained(
            part,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **own_attention,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{part}: the weights do not fit config.json ({first_line(error)}): download it again"
        ) from None
    # Of tensors that an index lists and no shard has, diffusers says nothing, and leaves them without data.
    empty = {name for name, weight in model.named_parameters() if weight.is_meta}
    if missing := sorted({*found["missing_keys"], *empty}):
        raise CheckpointError(
            f"{part}: the weights lack {missing[0]} ({len(missing)} missing in all): download it again"
        )
    # `eval` on the wrapper: the exporter restores the wrapper's mode, and with it dropout. `to` once
    # more: transformers keeps some layers in FP32.
    return wrapper(model).to(dtype).eval().requires_grad_(False)


def load_fp32(component: str, checkpoint: Path) -> nn.Module:
    """A component's module that computes in FP32, under `fp32_linears`, with the weights that its engine has.

    The linears' weights stay in FP16 and are cast one at a time: SD3.5 Large takes 16 GB so, and not 32.
    Raises CheckpointError as `load_module` does.
    """
    torch.backends.cudnn.allow_tf32 = False  # the default: convolutions with FP16's mantissa
    module = load_module(component, checkpoint, torch.float16)
    for path, part in module.named_modules():
        # T5 casts what it multiplies with `wo` to the type of its weights
        if not isinstance(part, nn.Linear) or path.endswith(".wo"):
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.is_floating_point():
                        tensor = tensor.float()
                        store[name] = (
                            nn.Parameter(tensor, requires_grad=False) if store is part._parameters else tensor
                        )
    return module


@contextlib.contextmanager
def fp32_linears() -> Iterator[None]:
    """Let linears compute in the type of their input, whatever the type of their weights."""
    plain = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    with mock.patch("torch.nn.functional.linear", linear):
        yield
