"""The tensor contract: the one table of tensor names, dtypes and dims.

ONNX export, dynamic axes, TensorRT profiles, Triton configs, the ensemble's maps and the client derive
from it. A dim is a number, or a letter that varies: `h`, `w` are the latent's height and width, `H`, `W`
the picture's (8 h, 8 w), `r` the rows of a request (2 with guidance, else 1). A leading batch
dimension, *rows*, stands before the dims of every component's tensor.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from mmdit.family import CLIP_TOKENS, VAE_SCALE, Family
from mmdit.shapes import ShapeSet, Size


class Dtype(Enum):
    """An element type; the value is Triton's name for it."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    BYTES = "BYTES"

    @property
    def numpy(self) -> type:
        """The numpy type that holds it."""
        return _NUMPY[self]

    @property
    def triton(self) -> str:
        """The name that `config.pbtxt` gives it."""
        return "TYPE_STRING" if self is Dtype.BYTES else f"TYPE_{self.value}"


_NUMPY: dict[Dtype, type] = {
    Dtype.BOOL: np.bool_,
    Dtype.UINT8: np.uint8,
    Dtype.INT32: np.int32,
    Dtype.INT64: np.int64,
    Dtype.FP16: np.float16,
    Dtype.FP32: np.float32,
    Dtype.BYTES: np.object_,
}


class Precision(Enum):
    """The precision of the MMDiT; the other components are FP16 always."""

    FP16 = "fp16"
    FP8 = "fp8"


@dataclass(frozen=True)
class Tensor:
    """A named tensor; `dims` without the leading rows."""

    name: str
    dtype: Dtype
    dims: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """A component's or a served model's tensors; `max_rows` 0 means that no rows dimension leads."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_rows: int = 0


TEXT_ENCODERS = ("clip_l", "clip_g", "t5")
COMPONENTS = (*TEXT_ENCODERS, "mmdit", "vae_decoder")


def components(family: Family, shapes: ShapeSet) -> dict[str, Signature]:
    """Component → its engine's signature."""
    latent: tuple[int | str, ...] = (family.latent_channels, "h", "w")

    def clip(dim: int, pooled: int) -> Signature:
        return Signature(
            inputs=(Tensor("input_ids", Dtype.INT64, (CLIP_TOKENS,)),),
            outputs=(
                Tensor("hidden", Dtype.FP16, (CLIP_TOKENS, dim)),
                Tensor("pooled", Dtype.FP16, (pooled,)),
            ),
            max_rows=1,
        )

    return {
        "clip_l": clip(family.clip_l_dim, family.clip_l_pooled),
        "clip_g": clip(family.clip_g_dim, family.clip_g_pooled),
        "t5": Signature(
            inputs=(Tensor("input_ids", Dtype.INT64, (family.t5_tokens,)),),
            outputs=(Tensor("hidden", Dtype.FP16, (family.t5_tokens, family.t5_dim)),),
            max_rows=1,
        ),
        "mmdit": Signature(
            inputs=(
                Tensor("latent", Dtype.FP16, latent),
                Tensor("timestep", Dtype.FP32, (1,)),
                Tensor("context", Dtype.FP16, (family.context_tokens, family.context_dim)),
                Tensor("pooled", Dtype.FP16, (family.pooled_dim,)),
            ),
            outputs=(Tensor("velocity", Dtype.FP16, latent),),
            max_rows=shapes.max_rows,
        ),
        "vae_decoder": Signature(
            inputs=(Tensor("latent", Dtype.FP16, latent),),
            outputs=(Tensor("image", Dtype.FP16, (3, "H", "W")),),
            max_rows=1,
        ),
    }


Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input → its smallest, usual and largest shape, rows first


def bounds(signature: Signature, shapes: ShapeSet) -> list[tuple[tuple[int, Size], ...]]:
    """Of each of a component's optimization profiles the smallest, usual and largest (rows, size).

    One for each size range, in the same order. A component that takes one row at a time has one over all
    sizes: several contexts would cost more memory than the sizes that it reserves and nobody serves.
    """
    return [
        ((each.min_rows, each.min), (each.opt_rows, each.opt), (each.max_rows, each.max))
        for each in ((shapes.hull,) if signature.max_rows == 1 else shapes.ranges)
    ]


def profiles(signature: Signature, shapes: ShapeSet) -> list[Profile]:
    """The same as the shapes of its inputs."""
    return [
        {
            tensor.name: tuple((rows, *dims_at(tensor, size)) for rows, size in bound)  # type: ignore[misc]
            for tensor in signature.inputs
        }
        for bound in bounds(signature, shapes)
    ]


def dims_at(tensor: Tensor, size: Size) -> tuple[int, ...]:
    """A tensor's dims, without rows, for a picture of `size` = (height, width) in pixels."""
    height, width = size
    values = {"h": height // VAE_SCALE, "w": width // VAE_SCALE, "H": height, "W": width}
    return tuple(values[dim] if isinstance(dim, str) else dim for dim in tensor.dims)


def dims_vary(signature: Signature) -> bool:
    """Whether a component's dims depend on the picture's size."""
    return any(isinstance(dim, str) for tensor in signature.inputs for dim in tensor.dims)


def served_models(family: Family, *, cache_pictures: bool = False) -> dict[str, Signature]:
    """Served model → its signature, for the Triton models that are not engines.

    With `cache_pictures` the response cache answers `text_to_image`: then a request must bring its `seed`, or
    all that have none would get one picture.
    """

    def one(name: str, dtype: Dtype, optional: bool = True) -> Tensor:
        return Tensor(name, dtype, (1,), optional)

    latents = Tensor("latents", Dtype.FP32, (family.latent_channels, "h", "w"))
    prompt = one("prompt", Dtype.BYTES, optional=False)
    negative_prompt = one("negative_prompt", Dtype.BYTES)
    guidance_scale = one("guidance_scale", Dtype.FP32)
    context = Tensor("context", Dtype.FP16, ("r", family.context_tokens, family.context_dim))
    pooled = Tensor("pooled", Dtype.FP16, ("r", family.pooled_dim))
    vae_latent = Tensor("vae_latent", Dtype.FP16, ("r", family.latent_channels, "h", "w"))
    # Not `seed`: an ensemble's input and output may not share a name (Triton 2.51: "expected a single
    # response, got 2").
    used_seed = one("used_seed", Dtype.INT64, optional=False)
    deadline = one("deadline", Dtype.INT64)  # of the time-out, which Triton gives anew to each model
    truncated = one("truncated", Dtype.BOOL, optional=False)
    image = Tensor("image", Dtype.UINT8, ("H", "W", 3))
    initial = (
        one("seed", Dtype.INT64),
        one("steps", Dtype.INT32),
        guidance_scale,
        one("guidance_start", Dtype.FP32),
        one("guidance_end", Dtype.FP32),
        one("height", Dtype.INT32),
        one("width", Dtype.INT32),
        Tensor("latents", latents.dtype, latents.dims, optional=True),
    )
    request = (prompt, negative_prompt, *initial)
    kept = (prompt, negative_prompt, one("seed", Dtype.INT64, optional=not cache_pictures), *initial[1:])
    return {
        "prompt_encoder": Signature(
            inputs=(prompt, one("generation", Dtype.INT64)),
            outputs=(context, pooled, truncated),
        ),
        "text_encoder": Signature(
            inputs=(prompt, negative_prompt, guidance_scale),
            outputs=(context, pooled, truncated, deadline),
        ),
        "denoiser": Signature(
            inputs=(
                context,
                pooled,
                *initial,
                one("begin", Dtype.INT32),
                one("end", Dtype.INT32),
                one("arrival", Dtype.INT64),
                deadline,
            ),
            outputs=(latents, vae_latent, used_seed),
        ),
        "picture": Signature(
            inputs=(Tensor("decoded", Dtype.FP16, ("r", 3, "H", "W")),),
            outputs=(image,),
        ),
        "text_to_image": Signature(inputs=kept, outputs=(image, used_seed, truncated)),
        "text_to_image_stream": Signature(
            inputs=(
                *request,
                one("progress_every", Dtype.INT32),
                one("preview_every", Dtype.INT32),
                one("preview_with_vae", Dtype.BOOL),
            ),
            outputs=(
                one("step", Dtype.INT32, optional=False),
                one("steps", Dtype.INT32, optional=False),
                one("sigma", Dtype.FP32, optional=False),
                Tensor("preview", image.dtype, image.dims),
                image,
                used_seed,
                truncated,
            ),
        ),
    }


# The steps of the `text_to_image` ensemble: (model, {its input: ensemble tensor}, {its output: …}).
# A name on the right that is no input or output of `text_to_image` is an intermediate tensor.
def ensemble_steps(family: Family) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """The linear chain behind `text_to_image`; requests' tensors keep their names."""
    served = served_models(family)
    public = {tensor.name for tensor in served["text_to_image"].inputs}

    def same(tensors: tuple[Tensor, ...], only: set[str]) -> dict[str, str]:
        return {tensor.name: tensor.name for tensor in tensors if tensor.name in only}

    return [
        (
            "text_encoder",
            same(served["text_encoder"].inputs, public),
            same(served["text_encoder"].outputs, {"context", "pooled", "truncated", "deadline"}),
        ),
        (
            "denoiser",
            same(served["denoiser"].inputs, public | {"context", "pooled", "deadline"}),
            {"vae_latent": "vae_latent", "used_seed": "used_seed"},
        ),
        ("vae_decoder", {"latent": "vae_latent"}, {"image": "decoded"}),
        ("picture", {"decoded": "decoded"}, {"image": "image"}),
    ]
