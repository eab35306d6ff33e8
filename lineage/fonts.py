"""Fonts for text in pictures: every script that a font of this machine has, and no empty boxes.

Pillow's own font has ASCII and little else. Other text is written in DejaVu Sans, which comes with
Matplotlib and has Latin, Cyrillic, Greek, Arabic and Hebrew; then in the fonts of the system, which
are looked for only if a character is still missing. A character that no font has is escaped.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

from lineage.characters import escaped, plain

SIZE = 13  # pixels
MAX_LENGTH = 4000  # characters of a text; more than a caption below a picture has room for

MAX_MARKS = 4  # of one letter, one above the other; more would cover the picture


@dataclass(frozen=True)
class Font:
    """A font, and the characters that it has."""

    face: ImageFont.FreeTypeFont
    codes: frozenset[int]

    def has(self, text: str) -> bool:
        """Whether it can write all of `text`."""
        hides = self.face.layout_engine == ImageFont.Layout.RAQM  # the other draws a box
        return all(ord(char) in self.codes or (hides and _is_invisible(char)) for char in text)


class Lettering:
    """How one text is written: in one font if that has all of it, else in several.

    Attributes:
        text: The text as it is written, in words with one blank between them.
    """

    def __init__(self, text: str) -> None:
        words = unicodedata.normalize("NFC", text[:MAX_LENGTH]).split()
        self.text = _few_marks(" ".join(map(plain, words)))
        self._fonts = _fonts_for(self.text)
        self.text = "".join(c if self._has(c) else escaped(c) for c in self.text)
        whole = [font for font in self._fonts if font.has(self.text)]
        self._fonts = whole[:1] or self._fonts

    def _has(self, char: str) -> bool:
        return any(font.has(char) for font in self._fonts)

    def length(self, text: str) -> float:
        """Width of a part of the text in pixels."""
        return sum(font.face.getlength(run) for font, run in self._runs(text))

    def draw(self, canvas: ImageDraw.ImageDraw, left: float, top: float, text: str) -> None:
        """Write a part of the text in black, all runs on one line."""
        baseline = top + _pillows_font().face.getmetrics()[0]
        for font, run in self._runs(text):
            canvas.text((left, baseline), run, fill="black", font=font.face, anchor="ls")
            left += font.face.getlength(run)

    def _runs(self, text: str) -> list[tuple[Font, str]]:
        """Neighbours of one font each; blanks stay in the font before them."""
        pieces: list[tuple[int, str]] = []
        for cluster in clusters(text):
            before = pieces[-1][0] if pieces else 0
            number = before if cluster.isspace() else self._number(cluster)
            pieces.append((number, cluster))
        return [
            (self._fonts[number], "".join(cluster for _, cluster in group))
            for number, group in groupby(pieces, key=lambda piece: piece[0])
        ]

    def _number(self, cluster: str) -> int:
        """The first font that has all of it, or at least its first character."""
        for part in (cluster, cluster[0]):
            for number, font in enumerate(self._fonts):
                if font.has(part):
                    return number
        return 0


def _few_marks(text: str) -> str:
    """The text with no more than `MAX_MARKS` marks on a letter."""
    limited, number = [], 0
    for char in text:
        number = number + 1 if unicodedata.combining(char) else 0
        if number <= MAX_MARKS:
            limited.append(char)
    return "".join(limited)


def clusters(text: str) -> list[str]:
    """Letters, each with the marks that belong to it."""
    parts: list[str] = []
    for char in text:
        if parts and (_joins(char) or parts[-1].endswith("\N{ZERO WIDTH JOINER}")):
            parts[-1] += char
        else:
            parts.append(char)
    return parts


def _joins(char: str) -> bool:
    is_skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    return unicodedata.category(char).startswith("M") or _is_invisible(char) or is_skin_tone


def _is_invisible(char: str) -> bool:
    """Joiners and variation selectors, which a font need not have."""
    return unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"


# --- the fonts of this machine --------------------------------------------------------------------


def _fonts_for(text: str) -> list[Font]:
    """Fonts that together have as much of a text as there is, in the order they are tried in."""
    fonts = [_pillows_font()]
    if not fonts[0].has(text):
        fonts.append(_dejavu())
        if missing := {ord(char) for char in text if not any(font.has(char) for font in fonts)}:
            fonts += _system_fonts(missing)
    return fonts


@functools.cache
def _pillows_font() -> Font:
    """The font that Pillow holds. What it lacks is drawn like U+FFFF: as an empty box."""
    face = ImageFont.load_default(SIZE)
    assert isinstance(face, ImageFont.FreeTypeFont)
    box = bytes(face.getmask("\uffff"))
    candidates = [*range(32, 384), *map(ord, "‘’“”‹›…™⁄ﬁﬂ")]
    return Font(face, frozenset(c for c in candidates if bytes(face.getmask(chr(c))) != box))


@functools.cache
def _dejavu() -> Font:
    import matplotlib

    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return Font(ImageFont.truetype(path, SIZE), _codes(path))


def _codes(path: str) -> frozenset[int]:
    """Numbers of the characters that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _system_codes() -> dict[str, frozenset[int]]:
    """Path -> characters of the upright font of each family, nearest to the usual weight."""
    from matplotlib import font_manager, get_data_path

    families: dict[str, tuple[int, str]] = {}
    for entry in font_manager.fontManager.ttflist:
        name = entry.name.replace(" ", "").lower()
        is_boxes = "lastresort" in name or "blank" in name
        if entry.style == "normal" and not is_boxes and not entry.fname.startswith(get_data_path()):
            weight = entry.weight if isinstance(entry.weight, int) else 400
            one = (abs(weight - 400), entry.fname)
            families[name] = min(one, families.get(name, one))
    return {families[name][1]: _codes(families[name][1]) for name in sorted(families)}


def _system_fonts(missing: set[int]) -> list[Font]:
    """Fonts of the system that have as many of these characters as there are, in few fonts."""
    fonts = []
    codes = dict(_system_codes())
    while codes:
        path = max(codes, key=lambda path: len(missing & codes[path]))
        has = codes.pop(path)
        if not missing & has:
            break
        face = _face(path)
        if face is not None and any(face.getmask(chr(c)).getbbox() for c in missing & has):
            fonts.append(Font(face, has))
            missing = missing - has
    return fonts


@functools.cache
def _face(path: str) -> ImageFont.FreeTypeFont | None:
    """None for a font of another kind, as of colour pictures in one size."""
    try:
        return ImageFont.truetype(path, SIZE)
    except OSError:
        return None
