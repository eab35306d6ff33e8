"""Sheets: pictures side by side with their captions below, for eyes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 10
_TEXT = 13  # font size in pixels
_LINES = 5  # of a caption; a longer one ends in an ellipsis


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
    cell = max(side, *(d.width for d in drawn))
    columns = min(columns, len(drawn))
    font = ImageFont.load_default(_TEXT)
    texts = [wrap(caption, font, cell) for caption in captions]
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
            canvas.paste(drawn[i], (left + (cell - drawn[i].width) // 2, top))
            for number, text in enumerate(texts[i]):
                pen.text((left, top + cell + 4 + number * line), text, fill="black", font=font)
        top += height
    return canvas


def rows_sheet(rows: Sequence[Sequence[tuple[str, Tensor]]], side: int = 128) -> Image.Image:
    """Pictures (3, H, W) uint8 with their names, as rows that may differ in length."""
    columns = max(map(len, rows))
    blank = torch.full_like(rows[0][0][1], 255)
    filled = [[*row, *[("", blank)] * (columns - len(row))] for row in rows]
    flat = [cell for row in filled for cell in row]
    return sheet([image for _, image in flat], [name for name, _ in flat], columns, side)


def wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = _LINES
) -> list[str]:
    """A caption in lines no wider than `width` pixels; words that are wider are broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line for line in lines if line] or [""]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "..."]
