"""The emoji of a font: of one made here, and of the system's where there is one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fontTools.colorLib.builder import buildCOLR, buildCPAL
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables.otTables import PaintFormat
from PIL import features

from lineage.data import emoji as emoji_module
from lineage.data import load_dataset, parse_spec
from lineage.data.colr import has_gradients
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError

GRIN, WAVE, TONE, FLAG = "\U0001f600", "\U0001f44b", "\U0001f3fd", "\U0001f1e9\U0001f1ea"
COLOURS = [(1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0), (1.0, 1.0, 0.0, 1.0)]


def square(size: int = 1000) -> Any:
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, size)), pen.lineTo((size, size)), pen.lineTo((size, 0))
    pen.closePath()
    return pen.glyph()


def gradient_layers() -> dict[str, Any]:
    """COLR of version 1: a grin from red below to blue above, a small blue hand, and so on."""
    stops = {"Extend": "pad", "ColorStop": [(0.0, 0), (1.0, 1)]}
    line = {"x0": 0, "y0": 0, "x1": 0, "y1": 1000, "x2": 1000, "y2": 0, "ColorLine": stops}
    fills = {
        "grin": {"Format": PaintFormat.PaintLinearGradient, **line},
        "wave": {"Format": PaintFormat.PaintSolid, "PaletteIndex": 1, "Alpha": 1.0},
        "wave_tone": {"Format": PaintFormat.PaintSolid, "PaletteIndex": 2, "Alpha": 1.0},
        "tone": {"Format": PaintFormat.PaintSolid, "PaletteIndex": 3, "Alpha": 0.5},
    }
    glyph = {"Format": PaintFormat.PaintGlyph, "Glyph": "layer0"}
    paints: dict[str, Any] = {name: {**glyph, "Paint": fill} for name, fill in fills.items()}
    half = {"Format": PaintFormat.PaintScaleUniform, "scale": 0.5, "Paint": paints["wave"]}
    return {**paints, "wave": half}


def make_font(path: Path, colours: bool = True, gradients: bool = False) -> Path:
    """A font of squares: a red grin, a blue hand, and a green one of medium skin tone."""
    names = [".notdef", "grin", "wave", "tone", "wave_tone", *[f"layer{i}" for i in range(4)]]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(GRIN): "grin", ord(WAVE): "wave", ord(TONE): "tone"})
    builder.setupGlyf({name: square() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1000, usWinAscent=1000)
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub wave tone by wave_tone; } ccmp;")
    if gradients:
        builder.setupGlyf(
            {n: square() if n == "layer0" else TTGlyphPen(None).glyph() for n in names}
        )
        builder.font["COLR"] = buildCOLR(gradient_layers(), version=1)
        builder.font["CPAL"] = buildCPAL([COLOURS])
    elif colours:
        layers = {"grin": 0, "wave": 1, "wave_tone": 2, "tone": 3}
        builder.font["COLR"] = buildCOLR({name: [(f"layer{i}", i)] for name, i in layers.items()})
        builder.font["CPAL"] = buildCPAL([COLOURS])
    builder.save(path)
    return path


@pytest.fixture
def font(tmp_path: Path) -> Path:
    return make_font(tmp_path / "squares.ttf")


def load(spec: object, split: str = "all") -> CaptionedDataset:
    return load_dataset(f"emoji:{spec}", split, 16)


needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no Raqm here")


@needs_raqm
def test_each_emoji_of_a_font_is_a_captioned_picture(font: Path) -> None:
    """Flags are not in this font, and neither are other skin tones."""
    examples = {e.id: e for e in load(font)}
    assert {key: e.captions[0] for key, e in examples.items()} == {
        "1f600": "grinning face",
        "1f44b": "waving hand sign",
        "1f44b-1f3fd": "waving hand sign, medium skin tone",
    }
    groups = [emoji_module.GROUPS[examples[key].label or 0] for key in ("1f600", "1f44b")]
    assert groups == ["Smileys & Emotion", "People & Body"]
    assert examples["1f600"].meta["emoji"] == GRIN and examples["1f44b"].captions[1] == "wave"
    colours = [tuple(e.image[:, 8, 8].tolist()) for e in examples.values()]
    assert sorted(colours) == [(0, 0, 255), (0, 255, 0), (255, 0, 0)]


def test_skin_tones_of_one_emoji_are_in_one_split(
    font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {e.id: e.meta["split"] for e in load(font)}
    assert splits["1f44b"] == splits["1f44b-1f3fd"]
    monkeypatch.setattr(emoji_module, "seeded_split", lambda name: name)
    assert {e.meta["split"] for e in load(font)} == {"1F600", "1F44B"}


def test_a_split_by_class_has_other_groups_in_the_test(font: Path) -> None:
    labels = [{e.label for e in load(f"{font}?splits=class", s)} for s in ("train", "test")]
    assert labels[0] and labels[1] and not labels[0] & labels[1]


@pytest.mark.parametrize(
    ("spec", "kind"), [("emoji", "emoji"), ("emoji:", "emoji"), ("emoji?splits=class", "emoji")]
)
def test_the_system_s_font_needs_no_path(spec: str, kind: str) -> None:
    assert parse_spec(spec)[0] == kind


def test_a_bare_path_of_a_font_is_recognised(font: Path) -> None:
    assert parse_spec(str(font)) == ("emoji", str(font))


def test_without_a_font_one_sentence_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_module, "FONTS", ("/no/such/*.ttf",))
    with pytest.raises(UserError, match=r"no font of colour emoji.*apt install.*emoji:PATH"):
        load_dataset("emoji")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.ttf", "cannot be read: No such file"),
        ("folder", "a folder, not a file"),
        ("text.ttf", "no font that can be read"),
        ("grey.ttf", "no colours that can be drawn"),
    ],
)
def test_what_is_no_colour_font_is_told(name: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.ttf").write_text("no font")
    make_font(tmp_path / "grey.ttf", colours=False)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / name)


def test_a_system_font_has_thousands_of_distinct_pictures() -> None:
    try:
        data = load_dataset("emoji", "all", 32)
    except UserError:
        pytest.skip("this system has no font of colour emoji")
    pixels = {np.asarray(e.image).tobytes() for e in data}
    assert len(pixels) >= 1000 and len({e.id for e in data}) == len(data)
    by_id = {e.id: e.captions[0] for e in data}
    assert by_id["1f436"] == "dog face"


def test_a_country_s_code_is_no_caption() -> None:
    captions = {emoji: names for _, emoji, names, _ in emoji_module._emoji()}
    assert captions["\U0001f1e9\U0001f1ea"] == ("germany flag",)
    assert captions["\U0001f600"][0] == "grinning face"


@needs_raqm
def test_other_emoji_of_the_same_font_have_their_own_pixels(
    font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(font)
    original = list(emoji_module._emoji())
    monkeypatch.setattr(emoji_module, "_emoji", lambda: reversed(original))
    colours = {e.id: tuple(e.image[:, 8, 8].tolist()) for e in load(font)}
    assert colours["1f600"] == (255, 0, 0) and colours["1f44b"] == (0, 0, 255)


# --- fonts with gradients ---------------------------------------------------------------------


@pytest.fixture
def gradient_font(tmp_path: Path) -> Path:
    return make_font(tmp_path / "gradients.ttf", gradients=True)


def test_without_its_library_a_font_with_gradients_is_refused(
    gradient_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pyproject.toml has the extra that the sentence names."""
    monkeypatch.setitem(sys.modules, "uharfbuzz", None)
    with pytest.raises(UserError, match=r"need uharfbuzz: pip install 'lineage-t2i\[emoji\]'"):
        load(gradient_font)
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '\nemoji = ["uharfbuzz' in project.read_text(encoding="utf-8")


def test_gradients_are_drawn(gradient_font: Path) -> None:
    """What is smaller than the usual emoji stays so; a skin tone is one glyph with its hand."""
    pytest.importorskip("uharfbuzz", reason="uharfbuzz is an extra, lineage-t2i[emoji]")
    images = {e.id: e.image for e in load(gradient_font)}
    assert images.keys() == {"1f600", "1f44b", "1f44b-1f3fd"}
    red, _, blue = images["1f600"][:, :, 8].int()
    assert (red.diff() > 0).all() and (blue.diff() < 0).all() and (red + blue - 255).abs().max() < 3
    assert red[0] < 16 and red[-1] > 239
    hand = images["1f44b"]
    assert hand[:, 8, 8].tolist() == [0, 0, 255] and hand[:, 2, 2].tolist() == [255, 255, 255]
    assert images["1f44b-1f3fd"][:, 1, 1].tolist() == [0, 255, 0]


def test_freetype_draws_what_it_can(font: Path, gradient_font: Path) -> None:
    pytest.importorskip("uharfbuzz", reason="uharfbuzz is an extra, lineage-t2i[emoji]")
    faces = [type(emoji_module.face_of(path)).__name__ for path in (font, gradient_font)]
    assert faces == ["FreeTypeFace", "GradientFace"]


@pytest.mark.parametrize("length", [0, 3, 100])
def test_a_damaged_font_has_no_gradients(gradient_font: Path, length: int) -> None:
    assert has_gradients(gradient_font)
    gradient_font.write_bytes(gradient_font.read_bytes()[:length])
    assert not has_gradients(gradient_font)


@pytest.mark.parametrize("gradients", [False, True])
def test_damaged_fonts_never_end_in_a_traceback(tmp_path: Path, gradients: bool) -> None:
    font = make_font(tmp_path / "whole.ttf", gradients=gradients)
    raw, random = font.read_bytes(), np.random.default_rng(0)
    for number in range(25):
        damaged = bytearray(raw)
        for place in random.integers(0, len(raw), 4):
            damaged[place] = random.integers(256)
        path = tmp_path / f"{number}.ttf"
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert all(e.image.shape == (3, 16, 16) for e in load(path))
