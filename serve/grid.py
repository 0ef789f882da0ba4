"""Several pictures and their prompts as one picture."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_COLUMNS = 4
_MARGIN = 12
_FONT_SIZE = 14
_LINES = 4


def grid(pictures: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str]) -> Image.Image:
    """UINT8 [H, W, 3] pictures of one size in rows of four, each above its caption.

    Small pictures are enlarged, so that a caption has room; a caption that is too long is cut.
    """
    height, width, _ = pictures[0].shape
    scale = max(1, round(256 / width))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 4
    cell = (width + _MARGIN, height + _LINES * line + _MARGIN)
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = _MARGIN + number % columns * cell[0]
        y = _MARGIN + number // columns * cell[1]
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for index, text in enumerate(_wrapped(caption, width, font)[:_LINES]):
            draw.text((x, y + height + 4 + index * line), text, fill="black", font=font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
