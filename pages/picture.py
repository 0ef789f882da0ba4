"""Pictures inside a page."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_PIXELS = 448  # of a picture on the page: larger ones are made smaller


def data_uri(picture: NDArray[np.uint8]) -> str:
    """[height, width, 3] as the `src` of an `<img>`: PNG, or JPEG where it was made smaller."""
    image, stream = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    if max(image.size) <= _PIXELS:
        image.save(stream, format="PNG", optimize=True)
        return encoded(stream.getvalue(), "png")
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
    image.save(stream, format="JPEG", quality=90)
    return encoded(stream.getvalue(), "jpeg")


def encoded(content: bytes, kind: str) -> str:
    """An image file's bytes as a data URI; `kind` such as `png` or `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
