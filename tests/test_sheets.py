"""Sheets: every picture is in its place, the rest is white, and captions are in real letters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lineage import fonts
from lineage.fonts import SIZE, Lettering, clusters
from lineage.sheets import rows_sheet, sheet, wrap

MARGIN, LINE = 10, 17


def flat(colour: int, side: int = 8) -> Tensor:
    return torch.full((3, side, side), colour, dtype=torch.uint8)


@pytest.mark.parametrize("side", [40, 64])
def test_rows_lie_below_each_other(side: int) -> None:
    """The longest row defines the width of the sheet; the others end in white."""
    rows = [
        [("one", flat(10)), ("two", flat(60))],
        [("", flat(110)), ("a", flat(160)), ("b", flat(200))],
        [("last", flat(220))],
    ]
    sheet = np.asarray(rows_sheet(rows, side))
    step, top = side + MARGIN, MARGIN
    assert sheet.shape == (MARGIN + 3 * (side + LINE + 2 * MARGIN), 3 * step + MARGIN, 3)
    for row in rows:
        for column in range(3):
            left = MARGIN + column * step
            cell = sheet[top : top + side, left : left + side]
            colour = int(row[column][1][0, 0, 0]) if column < len(row) else 255
            assert (cell == colour).all(), (top, column)
            label = column < len(row) and row[column][0]
            below = sheet[top + side : top + side + LINE, left : left + side]
            assert (below < 128).any() == bool(label)
        top += side + LINE + 2 * MARGIN


def test_a_single_picture_is_a_sheet() -> None:
    sheet = np.asarray(rows_sheet([[("only", flat(0, 32))]], 32))
    assert (sheet[10:42, 10:42] == 0).all() and sheet.shape[1] == 32 + 2 * MARGIN


# --- captions -------------------------------------------------------------------------------------

WIDTH = 128
LATIN = ["a red circle", "A dog’s “ball”, and more…", "~" * 90, "", "fi AV To. " * 40]
SCRIPTS = {
    "cyrillic": "красный круг слева от синего квадрата",
    "greek": "ένας κόκκινος κύκλος",
    "accents": "a naïve café — œuvre ß Việt",
    "decomposed": "cafe\u0301",
    "arabic": "دائرة حمراء فوق مربع",
    "hebrew": "עיגול אדום",
    "mixed": "a красный circle ★ here",
    "invisible": "a\u200bred\u200dcircle",
}
HAN, DEVANAGARI = "一个红色的圆圈", "वृत्त"


def ink(text: str) -> np.ndarray:
    """The text on one line, as black and white pixels."""
    canvas = Image.new("RGB", (600, 24), "white")
    lettering = Lettering(text)
    lettering.draw(ImageDraw.Draw(canvas), 2, 2, lettering.text)
    return np.asarray(canvas)[..., 0] < 128


@pytest.fixture
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    fonts._system_codes.cache_clear()
    yield
    fonts._system_codes.cache_clear()


@pytest.mark.parametrize("caption", LATIN)
def test_ascii_is_written_in_pillows_font(caption: str) -> None:
    font = ImageFont.load_default(SIZE)
    words = " ".join(caption.split())[:60]
    canvas = Image.new("RGB", (600, 24), "white")
    ImageDraw.Draw(canvas).text((2, 2), words, fill="black", font=font)
    assert (ink(words) == (np.asarray(canvas)[..., 0] < 128)).all()
    assert Lettering(words).length(words) == font.getlength(words)


def test_ascii_needs_no_other_font() -> None:
    code = (
        "import sys; from lineage.fonts import Lettering;"
        "Lettering('a red circle').length('a red');"
        "raise SystemExit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("no_system_fonts")
def test_many_scripts_need_no_font_of_the_system(name: str) -> None:
    """Each letter differs from an empty box, and none is escaped."""
    lettering = Lettering(SCRIPTS[name])
    assert "\\" not in lettering.text
    assert ink(lettering.text).any()
    font = fonts._dejavu()
    box = ink("\ufffd")
    for char in set(lettering.text) - {" "}:
        assert font.has(char) or fonts._pillows_font().has(char)
        assert (ink(char) != box).any()


@pytest.mark.usefixtures("no_system_fonts")
@pytest.mark.parametrize(
    ("text", "written"),
    [
        (HAN[0], "\\u4e00"),
        ("a 红 star", "a \\u7ea2 star"),
        ("👩 😀", "\\U0001f469 😀"),
        ("\ue000", "\\ue000"),
        ("a\x1b[31m red\0", "a\\x1b[31m red\\x00"),
        ("\u202etrr", "\\u202etrr"),
        ("x\udcff \ud800", "x\\xff \\ud800"),
        (" a\n\tb\u2028c\r\n", "a b c"),
    ],
)
def test_what_no_font_has_is_escaped(text: str, written: str) -> None:
    assert Lettering(text).text == written


def save_font(path: Path, text: str) -> None:
    """A font in which each character of `text` is a filled square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, text), "square"))
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (1000, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2()
    builder.setupPost()
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.save(path)


@pytest.mark.usefixtures("no_system_fonts")
def test_other_scripts_are_written_in_fonts_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as few fonts as possible, never in one of empty boxes; what none has is still escaped."""
    families = {"Han": HAN, "One": HAN[0], "Deva": DEVANAGARI, "Last Resort": HAN + "ก", "Torn": ""}
    entries = []
    for name, text in families.items():
        path = tmp_path / f"{name}.ttf"
        save_font(path, text)
        entries.append(font_manager.FontEntry(fname=str(path), name=name))
    (tmp_path / "Torn.ttf").write_bytes(b"torn")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    lettering = Lettering(f"a {HAN} {DEVANAGARI} ก")
    assert lettering.text == f"a {HAN} {DEVANAGARI} \\u0e01"
    used = {Path(str(font.face.path)).stem for font, _ in lettering._runs(lettering.text)}
    assert {"Han", "Deva"} <= used and not {"One", "Last Resort"} & used
    assert ink(HAN[0]).sum() > 50


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("abc", ["a", "b", "c"]),
        ("e\u0301a", ["e\u0301", "a"]),
        ("👩‍👩‍👧x", ["👩‍👩‍👧", "x"]),
        ("👍🏽❤️", ["👍🏽", "❤️"]),
        ("\u0301", ["\u0301"]),
        ("", []),
    ],
)
def test_a_letter_is_not_parted_from_its_marks(text: str, parts: list[str]) -> None:
    assert clusters(text) == parts


@pytest.mark.parametrize(
    "caption", [*LATIN, *SCRIPTS.values(), HAN * 30, "ж" * 9000, "a\u0301" * 99]
)
def test_lines_are_no_wider_than_the_picture(caption: str) -> None:
    lettering = Lettering(caption)
    lines = wrap(lettering, WIDTH)
    assert 1 <= len(lines) <= 5
    assert all(lettering.length(line) <= WIDTH for line in lines)
    shown = "".join(lines).replace(" ", "")
    whole = lettering.text.replace(" ", "")
    assert shown == whole or (len(lines) == 5 and whole.startswith(shown.removesuffix("...")))


def test_a_letter_with_a_thousand_marks_stays_on_its_line() -> None:
    picture = torch.full((3, WIDTH, WIDTH), 255, dtype=torch.uint8)
    pixels = np.asarray(sheet([picture], ["z" + "\u0301" * 1000], side=WIDTH))
    assert (pixels[:WIDTH] == 255).all() and (pixels < 128).any()
