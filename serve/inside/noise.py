"""The initial noise that diffusers draws for a seed, in numpy.

Equals `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` in FP32 within 1e-6 for 16
values or more. torch fills from an MT19937 generator's 24-bit uniforms and turns each block of 16 into
normals with Box–Muller, its first eight uniforms as radii, its last eight as angles (torch,
aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`).
"""

import numpy as np
import numpy.typing as npt

_BLOCK = 16


def noise_from_seed(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Normals of `shape`, FP32. As in torch, only the seed's lower 32 bits count.

    Raises ValueError for fewer than 16 values, which torch draws in another way.
    """
    count = int(np.prod(shape))
    if count < _BLOCK:
        raise ValueError(f"noise of shape {shape} has {count} values, expected {_BLOCK} or more")
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    uniforms = _uniforms(generator, count)
    whole = count // _BLOCK * _BLOCK
    normals = uniforms.copy()
    normals[:whole] = _box_muller(uniforms[:whole])
    if whole < count:  # torch draws the last block anew, over the end
        normals[-_BLOCK:] = _box_muller(_uniforms(generator, _BLOCK))
    return normals.reshape(shape)


def _uniforms(generator: np.random.RandomState, count: int) -> npt.NDArray[np.float32]:
    bits = generator.randint(0, 2**32, count, dtype=np.uint32) & 0xFFFFFF
    return (bits.astype(np.float64) * 2.0**-24).astype(np.float32)


def _box_muller(uniforms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    # torch rounds the angle to FP32 before it takes sine and cosine; at 6 that is worth 2e-7
    angle = (np.float32(2 * np.pi) * blocks[:, 1]).astype(np.float64)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normals.reshape(-1).astype(np.float32)
