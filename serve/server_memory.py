"""The memory that a server needs beyond its engines, in bytes: shared memory, and Triton's CUDA pool.

Triton's Python backend hands every tensor over in shared memory, in one region for each model process,
which starts at 1 MiB, grows and never shrinks. Docker gives a container 64 MB of it unless told otherwise;
a region that cannot grow breaks the request. The context of a row of SD3.5 is [333, 4096] in FP16, 2.7 MB,
so a few dozen requests are more than that.

The outputs of TensorRT models inside an ensemble lie in a CUDA pool of Triton's, 64 MiB by default. What
does not fit goes through pinned memory instead, slower and without a word.
"""

from collections.abc import Iterable
from math import prod

import numpy as np

from engines.runtimes import runtime as engines_in
from mmdit.contract import TEXT_ENCODERS, Signature, Tensor, components, dims_at, served_models
from mmdit.family import Family
from mmdit.shapes import ShapeSet, SizeRange

MIB = 1 << 20
_GUIDED = 2  # rows of a request with guidance
_SPARE = 1.25  # for what an allocator wastes between blocks of different sizes
_DEFAULT_POOL = 64 * MIB


def shared_memory(
    family: Family, shapes: ShapeSet, runtime: str, requests: int, streams: int, prompts: int
) -> int:
    """Bytes of /dev/shm with `requests` in the denoiser and `streams` streamed at once, at their fullest, and
    `prompts` bytes of text that wait to be encoded.

    Of each model process what it may hold at one time:

    - `prompt_encoder`: one prompt's row from each encoder and what it joins them to.
    - `text_encoder`: the prompts of all its requests; of one request its rows, and what it joins them to.
    - `denoiser`: the inputs of every request that it has admitted (rows × context most of all), the tensors
      of one `mmdit` call, and the answers of the pictures that this call finishes.
    - `picture`: one picture, decoded and as bytes.
    - `text_to_image_stream`: for each stream the answers of the models that it calls, and what it sends them.
    - with ONNX Runtime, where the engines are Python models too: the tensors of one call of each.
    """
    engines, served = components(family, shapes), served_models(family)
    largest = shapes.hull.max

    def of(tensors: Iterable[Tensor]) -> int:
        """Tensors of one request with guidance, at the largest size; its text alone has two rows."""
        return sum(
            _bytes(tensor, largest, _GUIDED if tensor.name in ("context", "pooled") else 1)
            for tensor in tensors
        )

    def call(signature: Signature) -> int:
        """Tensors of one call of an engine, at the rows and the size that make it largest."""
        return max(
            each_rows * sum(_bytes(tensor, each.max, 1) for tensor in (*signature.inputs, *signature.outputs))
            for each in shapes.ranges
            for each_rows in (min(each.max_rows, signature.max_rows),)
        )

    text, denoiser, picture = served["text_encoder"], served["denoiser"], served["picture"]
    encoded = sum(call(engines[name]) for name in TEXT_ENCODERS)
    regions = [
        encoded + of(text.outputs),
        prompts + 2 * of(text.outputs),
        requests * of(denoiser.inputs) + call(engines["mmdit"]) + shapes.max_rows * of(denoiser.outputs),
        of((*picture.inputs, *picture.outputs)),
        streams
        * (
            of(text.outputs)
            + of((*denoiser.inputs, *denoiser.outputs))
            + call(engines["vae_decoder"])
            + of((*picture.inputs, *picture.outputs))
        ),
    ]
    if engines_in(runtime).python_backend:
        regions += [call(signature) for signature in engines.values()]
    return sum(MIB + _rounded(int(_SPARE * region)) for region in regions)


def cuda_pool(family: Family, shapes: ShapeSet) -> int:
    """Bytes of `--cuda-memory-pool-byte-size` for the pictures between `vae_decoder` and `picture`.

    All that one `mmdit` call can finish, and as many of the call before that still wait. The other tensors
    of the ensemble come from Python models, whose outputs are in CPU memory.
    """
    (image,) = components(family, shapes)["vae_decoder"].outputs

    def finished(each: SizeRange) -> int:
        return each.max_rows * _bytes(image, each.max, 1)

    return max(_DEFAULT_POOL, 2 * _rounded(max(map(finished, shapes.ranges))))


def _bytes(tensor: Tensor, size: tuple[int, int], rows: int) -> int:
    """A tensor's bytes at a size in pixels; `rows` are those of a leading `r`, or of a call."""
    leading = [dim for dim in tensor.dims if dim == "r"]
    rest = Tensor(tensor.name, tensor.dtype, tensor.dims[len(leading) :])
    return rows * prod(dims_at(rest, size)) * np.dtype(tensor.dtype.numpy).itemsize


def _rounded(size: int) -> int:
    return -(-size // MIB) * MIB
