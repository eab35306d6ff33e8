"""Emoji of fonts with gradients (COLR of version 1), such as Windows 11's Segoe and Noto-COLRv1.

FreeType, which draws all other fonts of `emoji`, leaves these to its caller. HarfBuzz draws them:
`uharfbuzz`, which `lineage-t2i[emoji]` installs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lineage.characters import plain
from lineage.errors import UserError

SIDE = 256
"""Side of a drawing in pixels."""

USUAL = "\U0001f600"
"""The most usual emoji, a grinning face: the drawings of no other are enlarged beyond it."""

Glyph = tuple[int, int, int]
"""Number of a glyph in the font, and its place x, y in font units."""


def has_gradients(font: Path) -> bool:
    """Whether a font has a table COLR of version 1 or more."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(font, fontNumber=0, lazy=True) as file:
            return "COLR" in file and int.from_bytes(file.reader["COLR"][:2], "big") >= 1
    except Exception:  # fontTools raises errors of many kinds for damaged fonts
        return False


class GradientFace:
    """A font that HarfBuzz draws.

    Attributes:
        parts: What the pixels depend on besides the font.

    Raises:
        UserError: `uharfbuzz` is not installed, or too old to draw.
    """

    def __init__(self, font: Path) -> None:
        try:
            import uharfbuzz
            from uharfbuzz import RasterPaint  # noqa: F401 - of version 0.54
        except ImportError as error:
            raise UserError(
                f"{plain(font)} has gradients (COLR of version 1), which need uharfbuzz: "
                "pip install 'lineage-t2i[emoji]'."
            ) from error
        self._library = uharfbuzz
        self._font = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(font))))
        left, bottom, right, top = self._box(self._shaped(USUAL)[0])
        self._least = max(right - left, top - bottom)  # so that a small square stays small
        self.parts: tuple[object, ...] = ("harfbuzz", uharfbuzz.version_string(), SIDE)

    def width(self, emoji: str) -> float:
        """Advance width of an emoji in font units."""
        return self._shaped(emoji)[1]

    def draw(self, emoji: str) -> NDArray[np.uint8]:
        """An emoji in the middle of a white square, (SIDE, SIDE, 3)."""
        library, (glyphs, _) = self._library, self._shaped(emoji)
        left, bottom, right, top = self._box(glyphs)
        scale = SIDE / max(right - left, top - bottom, self._least)
        paint = library.RasterPaint()
        paint.background = library.Color(255, 255, 255, 255)
        paint.extents = library.RasterExtents(0, 0, SIDE, SIDE)
        for glyph, x, y in glyphs:
            to_x = SIDE / 2 + scale * (x - (left + right) / 2)
            to_y = SIDE / 2 + scale * (y - (bottom + top) / 2)
            paint.transform = (scale, 0, 0, scale, to_x, to_y)
            paint.paint_glyph(self._font, glyph)
        bgra = np.frombuffer(paint.render().buffer, np.uint8).reshape(SIDE, SIDE, 4)
        return np.ascontiguousarray(bgra[::-1, :, 2::-1])  # the lowest row is the first

    def _shaped(self, emoji: str) -> tuple[list[Glyph], float]:
        """Glyphs of an emoji, and the width of all."""
        buffer = self._library.Buffer()
        buffer.add_str(emoji)
        buffer.guess_segment_properties()
        self._library.shape(self._font, buffer)
        glyphs, pen = [], 0
        for info, place in zip(buffer.glyph_infos, buffer.glyph_positions, strict=True):
            glyphs.append((info.codepoint, pen + place.x_offset, place.y_offset))
            pen += place.x_advance
        return glyphs, float(pen)

    def _box(self, glyphs: list[Glyph]) -> tuple[int, int, int, int]:
        """Left, bottom, right and top of what the glyphs draw, in font units."""
        boxes = []
        for glyph, x, y in glyphs:
            extents = self._font.get_glyph_extents(glyph)
            if extents is not None and extents.width and extents.height:
                left, top = x + extents.x_bearing, y + extents.y_bearing
                boxes.append((left, top + extents.height, left + extents.width, top))
        lefts, bottoms, rights, tops = zip(*boxes or [(0, 0, 1, 1)], strict=True)
        return min(lefts), min(bottoms), max(rights), max(tops)
