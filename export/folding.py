"""A power of two folded into a residual stream: FP16 holds the stream, and FP32 computes the same bits.

Everything that adds to the stream (embeddings, the last linear or convolution of every branch) is scaled
by 2^-k, and the epsilon of every norm that reads it by 2^-2k. A norm divides by the stream's own size, so
what leaves it is unchanged; a power of two changes exponents only, so it is unchanged to the last bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.remedies import LARGEST_POWER

SMALLEST_NORMAL = 2.0**-14  # of FP16; below it, values lose digits


@dataclass(frozen=True)
class Stream:
    """A residual stream: the weights that write to it, and the norms that read it.

    `output` says that the component's first output is the stream itself.
    """

    weights: dict[str, Tensor]
    norms: list[nn.Module]
    output: bool = False


def streams(component: str, module: nn.Module) -> dict[str, Stream]:
    """The residual streams of a component's module (of `export.modules.load_module`), by name."""
    return _STREAMS[component](module)


def fold(module: nn.Module, stream: Stream, power: int) -> None:
    """Scale a stream of `module` by 2^-power, in place.

    A stream that is an output is multiplied back, so the outputs are what they were.
    """
    with torch.no_grad():
        for weight in stream.weights.values():
            weight.mul_(2.0**-power)
    for norm in stream.norms:
        name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"  # T5's norm has its own
        setattr(norm, name, getattr(norm, name) * 4.0**-power)
    if stream.output:
        module.register_forward_hook(lambda _, __, output: (output[0] * 2.0**power, *output[1:]))


def sunk_weights(stream: Stream) -> dict[str, list[float]]:
    """Weight → for each power from 1, the share of its values that a fold takes from FP16's normal range.

    The range ends at 2^-14; what is below has lost digits without a fold.
    """
    shares = {}
    for name, weight in stream.weights.items():
        binades_above = torch.frexp(weight.float()).exponent[weight != 0] + 13  # 2^-14 is 0.5 · 2^-13
        binades_above = binades_above[(binades_above >= 0) & (binades_above < LARGEST_POWER)]
        counts = torch.bincount(binades_above, minlength=LARGEST_POWER)
        shares[name] = (counts.cumsum(0) / max(weight.numel(), 1)).tolist()
    return shares


def _stream(
    module: nn.Module,
    writers: Iterable[nn.Module | Tensor | None],
    norms: Iterable[nn.Module],
    output: bool = False,
) -> Stream:
    names = {id(weight): name for name, weight in (*module.named_parameters(), *module.named_buffers())}
    weights: dict[str, Tensor] = {}
    for writer in writers:
        own = writer.parameters() if isinstance(writer, nn.Module) else [writer]
        weights |= {names[id(weight)]: weight for weight in own if weight is not None}
    return Stream(weights, list(norms), output)


def _clip(module: nn.Module) -> dict[str, Stream]:
    model = module.model.text_model
    layers = model.encoder.layers
    writers = [model.embeddings, *(m for layer in layers for m in (layer.self_attn.out_proj, layer.mlp.fc2))]
    norms = [*(m for layer in layers for m in (layer.layer_norm1, layer.layer_norm2)), model.final_layer_norm]
    return {"hidden": _stream(module, writers, norms, output=True)}


def _t5(module: nn.Module) -> dict[str, Stream]:
    encoder = module.encoder
    layers = [layer for block in encoder.block for layer in block.layer]
    writers = [
        layer.SelfAttention.o if hasattr(layer, "SelfAttention") else layer.DenseReluDense.wo
        for layer in layers
    ]
    norms = [*(layer.layer_norm for layer in layers), encoder.final_layer_norm]
    return {"hidden": _stream(module, [encoder.embed_tokens, *writers], norms)}


def _mmdit(module: nn.Module) -> dict[str, Stream]:
    model = module.model
    image: list[nn.Module | Tensor | None] = [model.pos_embed.proj, model.pos_embed.pos_embed]
    context: list[nn.Module | Tensor | None] = [model.context_embedder]
    image_norms, context_norms = [model.norm_out.norm], []
    for block in model.transformer_blocks:
        image += [block.attn.to_out[0], block.ff.net[2]]
        image_norms += [block.norm1.norm, block.norm2]
        if block.attn2 is not None:
            image.append(block.attn2.to_out[0])
        context_norms.append(block.norm1_context.norm)
        if not block.context_pre_only:  # the last block reads the context's stream and leaves it
            context += [block.attn.to_add_out, block.ff_context.net[2]]
            context_norms.append(block.norm2_context)
    return {
        "image": _stream(module, image, image_norms),
        "context": _stream(module, context, context_norms),
    }


def _vae_decoder(module: nn.Module) -> dict[str, Stream]:
    decoder = module.model.decoder
    writers: list[nn.Module | Tensor | None] = [decoder.conv_in]
    norms = [decoder.conv_norm_out]
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            writers.append(resnet.conv2)
            norms.append(resnet.norm1)
            if resnet.conv_shortcut is not None:  # its weight meets the stream, which is scaled already
                writers.append(resnet.conv_shortcut.bias)
        for attention in getattr(block, "attentions", ()):
            if attention is not None:
                writers.append(attention.to_out[0])
                norms.append(attention.group_norm)
        for upsampler in getattr(block, "upsamplers", None) or ():
            writers.append(upsampler.conv.bias)
    return {"hidden": _stream(module, writers, norms)}


_STREAMS: dict[str, Callable[[nn.Module], dict[str, Stream]]] = {
    "clip_l": _clip,
    "clip_g": _clip,
    "t5": _t5,
    "mmdit": _mmdit,
    "vae_decoder": _vae_decoder,
}
