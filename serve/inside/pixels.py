"""The VAE's output to the pixels of a picture."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RequestError
from .fields import floats


def pixels_from(decoded: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """UINT8 [H, W, 3] from the VAE's first row, [rows, 3, H, W] in about [-1, 1], rounded as diffusers does.

    Raises ArithmeticError for values that are not finite, which would be a black picture, and RequestError
    for what is no picture.
    """
    floats({"decoded": decoded}, "decoded", 4)
    if decoded.shape[1] != 3:
        raise RequestError(f"decoded has {decoded.shape[1]} channels: expected 3")
    image = decoded[0].astype(np.float32)
    if not np.isfinite(image).all():
        raise ArithmeticError("the VAE's picture has values that are not finite: an engine overflowed")
    unit = np.clip(image / 2 + 0.5, 0, 1)
    return np.round(unit * 255).astype(np.uint8).transpose(1, 2, 0)
