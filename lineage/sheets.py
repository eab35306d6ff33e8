"""Sheets: pictures side by side with captions below, and the files that they are saved to."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lineage.errors import UserError
from lineage.files import check_output, write_bytes
from lineage.fonts import SIZE, Lettering, clusters

_MARGIN = 10
_LINE = SIZE + 4  # pixels from one line of text to the next
_MAX_LINES = 5  # of a caption; a longer one ends in an ellipsis


def picture(image: Tensor, side: int = 0) -> Image.Image:
    """A PIL picture of (3, H, W) uint8, enlarged by a whole factor to about `side` pixels a side,
    and never made smaller.
    """
    pil = Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))
    factor = max(1, round(side / max(pil.size)))
    return pil.resize((pil.width * factor, pil.height * factor), Image.Resampling.NEAREST)


def sheet(
    images: Sequence[Tensor], captions: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """Pictures (3, H, W) uint8 in rows of `columns`, each enlarged to about `side` pixels above its
    caption.
    """
    pictures = [picture(image, side) for image in images]
    cell = max(side, *(p.width for p in pictures))
    columns = min(columns, len(pictures))
    letterings = [Lettering(caption) for caption in captions]
    texts = [wrap(lettering, cell) for lettering in letterings]
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    heights = [cell + _LINE * max(len(texts[i]) for i in row) + 2 * _MARGIN for row in rows]
    size = (columns * (cell + _MARGIN) + _MARGIN, sum(heights) + _MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (cell + _MARGIN)
            canvas.paste(pictures[i], (left + (cell - pictures[i].width) // 2, top))
            for number, text in enumerate(texts[i]):
                letterings[i].draw(draw, left, top + cell + 4 + number * _LINE, text)
        top += height
    return canvas


def rows_sheet(rows: Sequence[Sequence[tuple[str, Tensor]]], side: int = 128) -> Image.Image:
    """Rows of (label, picture (3, H, W) uint8); the rows may differ in length."""
    columns = max(map(len, rows))
    blank = ("", torch.full_like(rows[0][0][1], 255))
    cells = [cell for row in rows for cell in [*row, *[blank] * (columns - len(row))]]
    return sheet([image for _, image in cells], [label for label, _ in cells], columns, side)


def wrap(lettering: Lettering, width: int) -> list[str]:
    """A caption in lines no wider than `width` pixels; wider words are broken."""
    lines = [""]
    for word in lettering.text.split():
        joined = f"{lines[-1]} {word}".strip()
        if lettering.length(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for cluster in clusters(word):
            if lettering.length(lines[-1] + cluster) > width:
                lines.append("")
            lines[-1] += cluster
            if len(lines) > _MAX_LINES + 2:  # the first may be empty, and the last is not shown
                break
        if len(lines) > _MAX_LINES + 2:
            break
    lines = [line for line in lines if line] or [""]
    if len(lines) <= _MAX_LINES:
        return lines
    last = clusters(lines[_MAX_LINES - 1])
    while last and lettering.length("".join(last) + "...") > width:
        last.pop()
    return [*lines[: _MAX_LINES - 1], "".join(last).rstrip() + "..."]


# --- picture files -------------------------------------------------------------------------------


def data_url(image: Image.Image) -> str:
    """A picture as a data URL of a PNG, for a page that is one file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def check_picture(path: Path) -> None:
    """Check that a picture can be written to `path`, before the work whose result it shows.

    Raises:
        UserError: its ending is not one of a picture, or the file cannot be written.
    """
    check_output(path)
    probe = Image.new("RGB", (300, 2))
    try:
        with Image.open(io.BytesIO(_encoded(probe, path))) as reopened:
            same_size = reopened.size == probe.size  # icons are made smaller
    except Exception:  # of many kinds: unknown endings, formats without writer or without colours
        same_size = False
    if not same_size:
        raise UserError(
            f"{path} does not end like a picture file that can be written; try "
            f"{path.with_suffix('.png')}."
        )


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture, all of it or nothing, in the format of the path's ending.

    Raises:
        UserError: the file cannot be written, or its format has no room for so large a picture.
    """
    try:
        data = _encoded(image, path)
    except Exception as error:  # of many kinds: each format has its own limits
        raise UserError(
            f"A sheet of {image.width:,} x {image.height:,} pixels does not fit into "
            f"{path} ({error}): write it to {path.with_suffix('.png')}, or draw "
            "fewer pictures."
        ) from error
    write_bytes(path, data)


def _encoded(image: Image.Image, path: Path) -> bytes:
    Image.preinit()  # PNG, JPEG and a few more; to import all formats takes longer than to draw
    suffix = path.suffix.lower()
    file = io.BytesIO()
    image.save(file, Image.EXTENSION.get(suffix) or Image.registered_extensions()[suffix])
    return file.getvalue()
