"""Sheets: pictures side by side with their captions below, for eyes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 8
_TEXT = 12  # font size in pixels


def picture(image: Tensor, at_least: int = 0) -> Image.Image:
    """(3, H, W) uint8 -> a PIL picture, enlarged by a whole factor to `at_least` pixels a side or a
    little under.
    """
    array = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    drawn = Image.fromarray(array)
    factor = max(1, round(at_least / max(drawn.size)))
    return drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)


def sheet(
    images: Sequence[Tensor], captions: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """Pictures (3, H, W) uint8 in rows of `columns`, each enlarged to about `side` pixels over its
    caption.
    """
    drawn = [picture(image, side) for image in images]
    cell = max(d.width for d in drawn)
    columns = min(columns, len(drawn))
    font = ImageFont.load_default(_TEXT)
    texts = [wrap(caption, cell, font) for caption in captions]
    line = _TEXT + 4
    rows = [range(i, min(i + columns, len(drawn))) for i in range(0, len(drawn), columns)]
    heights = [cell + line * max(len(texts[i]) for i in row) + 2 * _MARGIN for row in rows]
    canvas = Image.new(
        "RGB", (columns * (cell + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white"
    )
    pen = ImageDraw.Draw(canvas)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (cell + _MARGIN)
            canvas.paste(drawn[i], (left, top))
            for number, text in enumerate(texts[i]):
                pen.text((left, top + cell + 4 + number * line), text, fill="black", font=font)
        top += height
    return canvas


def wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """`text` in lines that are at most `width` pixels wide.

    At most four, the last cut with an ellipsis.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 4:
        lines = [*lines[:3], lines[3] + " …"]
    return lines
