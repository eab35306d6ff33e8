"""Cleaning: each rule by itself, what is written, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import make_cub
from PIL import Image, ImageDraw, ImageOps

from lineage.cli import main
from lineage.data import load_dataset, pictures
from lineage.data.cleaning import CleaningResult, clean
from lineage.data.cleaning_output import page, write
from lineage.data.cleaning_rules import Rules, script_share, why_removed
from lineage.errors import UserError

NONE = Rules(duplicates="none")


def drawing(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture like no other one."""
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    left, top = 5 * (seed % 7), 5 * (seed // 7 % 7)
    draw.ellipse((left, top, left + 30, top + 30), fill=(40 * seed % 256, 90 * seed % 256, 60))
    return image.resize(size)


class Folder:
    """A data set that grows by a picture at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.rows: list[dict[str, Any]] = []

    def add(
        self, name: str, image: Image.Image | bytes, *captions: str, split: str = "train"
    ) -> None:
        if isinstance(image, bytes):
            (self.root / name).write_bytes(image)
        else:
            image.save(self.root / name)
        self.rows.append({"file_name": name, "text": list(captions), "split": split})

    def clean(self, rules: Rules, **options: Any) -> CleaningResult:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.root / "metadata.jsonl").write_text(lines)
        return clean(load_dataset(f"imagefolder:{self.root}", "all", 32), rules, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "set")


def removed(cleaned: CleaningResult) -> list[tuple[str, str, str]]:
    return [(one.id, one.rule, one.caption) for one in cleaned.removals]


def kept(cleaned: CleaningResult) -> list[str]:
    return [cleaned.id_of(index) for index in cleaned.captions]


def test_sizes(folder: Folder) -> None:
    folder.add("square.png", drawing(1, (40, 40)), "a")
    folder.add("small.png", drawing(2, (39, 80)), "b")
    folder.add("wide.png", drawing(3, (121, 40)), "c")
    folder.add("just.png", drawing(4, (120, 40)), "d")
    cleaned = folder.clean(Rules(min_side=40, max_aspect=3, duplicates="none"))
    assert kept(cleaned) == ["square", "just"]
    assert [(one.id, one.reason) for one in cleaned.removals] == [
        ("small", "39 x 80 pixels: a side has fewer than 40"),
        ("wide", "121 x 40 pixels: longer than 3 to 1"),
    ]


def test_size_is_that_of_the_upright_picture(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    drawing(1, (90, 30)).save(file, "JPEG", exif=exif)
    folder.add("turned.jpg", file.getvalue(), "a")
    cleaned = folder.clean(Rules(min_side=40))
    assert [one.reason for one in cleaned.removals] == ["30 x 90 pixels: a side has fewer than 40"]


@pytest.mark.parametrize(
    ("caption", "rules", "reason"),
    [
        ("a red kite", {"min_words": 3, "max_words": 3}, None),
        ("a kite", {"min_words": 3}, "2 words, fewer than 3"),
        ("kite", {"min_words": 3}, "1 word, fewer than 3"),
        ("a red kite", {"max_words": 2}, "3 words, more than 2"),
        ("kite", {"min_letters": 5}, "4 letters, fewer than 5"),
        ("kites", {"min_letters": 5, "max_letters": 5}, None),
        ("a kite", {"max_letters": 5}, "6 letters, more than 5"),
        ("a kite over Москва", {"scripts": ("latin",)}, None),
        ("воздушный змей", {"scripts": ("latin",)}, "most letters are not latin"),
        ("风筝", {"scripts": ("cjk", "hangul")}, None),
        ("12:34", {"scripts": ("latin",)}, "most letters are not latin"),
        ("image", {"max_pictures": 1}, "2 pictures have this caption, more than 1"),
        ("image", {"max_pictures": 2}, None),
    ],
)
def test_captions(caption: str, rules: dict[str, Any], reason: str | None) -> None:
    assert why_removed(caption, Rules(**rules), pictures=2) == reason


def test_share_of_a_script() -> None:
    assert script_share("abcд!", ("latin",)) == 0.75
    assert script_share("abcд", ("latin", "cyrillic")) == 1
    assert script_share("", ("latin",)) == 0


def test_a_picture_goes_with_its_last_caption(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "x", "a red kite", "y")
    folder.add("b.png", drawing(2), "x", "y")
    cleaned = folder.clean(Rules(min_letters=3))
    assert removed(cleaned) == [
        ("a", "caption", "x"),
        ("a", "caption", "y"),
        ("b", "caption", ""),
    ]
    assert list(cleaned.captions.values()) == [("a red kite",)]


def test_a_caption_that_many_pictures_have(folder: Folder) -> None:
    for number in range(4):
        own = ["image"] if number < 3 else ["a kite"]
        folder.add(f"{number}.png", drawing(number), *own)
    assert kept(folder.clean(Rules(max_pictures=2))) == ["3"]
    assert len(kept(folder.clean(Rules(max_pictures=3)))) == 4


def test_copies_stay_in_another_split_until_leaks_are_removed(folder: Folder) -> None:
    same = drawing(5)
    folder.add("first.png", same, "a")
    folder.add("second.bmp", same, "b")
    folder.add("held.png", same, "c", split="test")
    folder.add("other.png", drawing(9), "d")
    exact = folder.clean(Rules())
    assert removed(exact) == [("second", "duplicate", "")]
    assert exact.removals[0].reason == "the same pixels as first"
    leaks = folder.clean(Rules(leaks=True))
    assert removed(leaks) == [("second", "duplicate", ""), ("first", "leak", "")]
    assert leaks.removals[1].reason == "the same pixels as held, of test"
    assert kept(folder.clean(NONE)) == ["first", "second", "held", "other"]
    only = folder.clean(Rules(leaks=True, duplicates="none"))
    assert removed(only) == [("first", "leak", ""), ("second", "leak", "")]


def test_of_near_copies_the_largest_stays(folder: Folder) -> None:
    small = io.BytesIO()
    drawing(5, (32, 32)).save(small, "JPEG", quality=80)
    folder.add("small.jpg", small.getvalue(), "a")
    folder.add("large.png", drawing(5), "b")
    folder.add("other.png", drawing(6), "c")
    assert len(kept(folder.clean(Rules()))) == 3
    cleaned = folder.clean(Rules(duplicates="near"))
    assert removed(cleaned) == [("small", "duplicate", "")]
    assert cleaned.removals[0].original == 1
    assert "nearly the same as large (" in cleaned.removals[0].reason
    assert len(kept(folder.clean(Rules(duplicates="near", near=0)))) == 3


def cosines(images: torch.Tensor, captions: Any) -> list[list[float]]:
    """The number that a caption holds."""
    assert images.dtype == torch.uint8 and len(images) == len(captions)
    return [[float(caption.split()[-1]) for caption in own] for own in captions]


def test_similarity(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "kite 0.3", "dog 0.1")
    folder.add("b.png", drawing(2), "cat 0.2")
    folder.add("c.png", drawing(3), "bird 0.15")
    by_bound = folder.clean(Rules(min_similarity=0.2), similarity=cosines)
    assert removed(by_bound) == [("a", "similarity", "dog 0.1"), ("c", "similarity", "")]
    assert by_bound.removals[0].reason == "cosine 0.100 with its picture, below 0.2"
    by_share = folder.clean(Rules(worst=0.25), similarity=cosines)
    assert removed(by_share) == [("a", "similarity", "dog 0.1")]
    assert by_share.removals[0].reason == "cosine 0.100 with its picture, among the lowest 25 %"
    assert by_share.similarities["median"] == 0.175
    with pytest.raises(UserError, match="needs a run of CLIP"):
        folder.clean(Rules(worst=0.3))


def test_of_equal_cosines_the_share_is_removed_too(folder: Folder) -> None:
    for number in range(10):
        folder.add(f"{number}.png", drawing(number), "a kite 0.1" if number < 8 else "a kite 0.9")
    cleaned = folder.clean(Rules(worst=0.5), similarity=cosines)
    assert kept(cleaned) == ["5", "6", "7", "8", "9"]


def test_cosines_that_are_no_numbers_end_in_a_sentence(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "kite 0.3")
    folder.add("b.png", drawing(2), "kite nan")
    with pytest.raises(UserError, match="cosines that are no numbers"):
        folder.clean(Rules(min_similarity=0.2), similarity=cosines)


def test_a_remark_about_a_picture_that_stays_is_no_removal(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "a kite")
    folder.add("b.png", drawing(2), "a dog")
    folder.rows[0]["label"] = 3
    cleaned = folder.clean(NONE)
    assert any("label" in one.reason for one in cleaned.dataset.skipped)
    assert kept(cleaned) == ["a", "b"] and not cleaned.removals


def test_pixels_that_only_look_alike_in_the_thumbnail_are_not_called_the_same(
    folder: Folder,
) -> None:
    board = Image.new("L", (32, 32))
    board.putdata([255 * ((x + y) % 2) for y in range(32) for x in range(32)])
    folder.add("a.png", board, "a board")
    folder.add("b.png", ImageOps.invert(board), "its inverse")
    (one,) = folder.clean(Rules(duplicates="near")).removals
    assert one.reason == "nearly the same as a (0.0 levels apart)"


def test_a_streamed_set(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken pictures are found first, and with a count only the first pictures are read."""
    monkeypatch.setattr(pictures, "STREAM_FROM", 2)
    for number in range(6):
        folder.add(f"{number}.png", b"junk" if number == 1 else drawing(number), "a kite")
    assert removed(folder.clean(NONE)) == [("1.png", "left out", "")]
    cleaned = folder.clean(NONE, count=3)
    assert kept(cleaned) == ["0", "2"] and len(cleaned.dataset) == 2
    for number in range(6):
        (folder.root / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="Nothing can be loaded"):
        folder.clean(NONE)


def test_a_picture_that_changes_meanwhile_is_named(folder: Folder, tmp_path: Path) -> None:
    folder.add("a.png", drawing(1), "a kite")
    folder.add("b.png", drawing(2), "a dog")
    lines = "".join(json.dumps(row) + "\n" for row in folder.rows)
    (folder.root / "metadata.jsonl").write_text(lines)
    data = load_dataset(f"imagefolder:{folder.root}", "all", 32)
    (folder.root / "a.png").unlink()
    cleaned = clean(data, Rules(min_side=3))
    assert removed(cleaned) == [("a", "left out", "")]
    (folder.root / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png has changed: No such file"):
        write(cleaned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["imagefolder", "wds"])
def test_other_forms_keep_the_bytes_of_their_pictures(form: str, tmp_path: Path) -> None:
    from lineage.data.tools import export

    export(load_dataset("shapes", "train", 32), tmp_path / "in", 6, form)
    data = load_dataset(tmp_path / "in", "all", 32)
    write(clean(data, Rules(min_words=3)), tmp_path / "out")
    again = load_dataset(tmp_path / "out", "all", 32)
    own = {e.captions[0]: e for e in data}
    assert 0 < len(again) <= 6
    for one in again:
        assert all(len(caption.split()) > 2 for caption in one.captions)
        assert any(torch.equal(one.image, other.image) for other in own.values())


def test_a_folder_in_the_data_set_or_with_contents_is_refused_first(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.add("a.png", drawing(1), "a kite")
    folder.clean(NONE)
    command = ["data", "filter", str(folder.root), "--out"]
    assert main([*command, str(folder.root / "inside")]) == 2
    assert "lies in the data set" in capsys.readouterr().err
    assert main(["data", "export", str(folder.root), "--out", str(folder.root / "inside")]) == 2
    assert main([*command, str(folder.root)]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert main([*command, str(tmp_path / "link")]) == 0
    assert (tmp_path / "empty" / "cleaning.html").exists()


def test_a_copy_of_a_removed_picture_stays(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "x")
    folder.add("b.png", drawing(1), "a red kite")
    assert removed(folder.clean(Rules(min_letters=3))) == [("a", "caption", "")]


def test_what_is_written(folder: Folder, tmp_path: Path) -> None:
    file = io.BytesIO()
    drawing(2, (80, 60)).save(file, "JPEG")
    folder.add("b.png", file.getvalue(), "a blue kite", "x", split="test")  # mislabelled
    folder.add("a.png", drawing(1), "x")
    folder.add("junk.png", b"junk", "a junk")
    write(folder.clean(Rules(min_letters=3)), tmp_path / "out")
    assert (tmp_path / "out/images/b.jpeg").read_bytes() == file.getvalue()
    again = load_dataset(tmp_path / "out", "all", 32)
    assert [(e.id, e.captions, e.meta["split"]) for e in again] == [
        ("images/b", ("a blue kite",), "test")
    ]
    assert not again.skipped
    rows = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").open()]
    assert [(row["id"], row["rule"]) for row in rows] == [
        ("junk.png", "left out"),
        ("b", "caption"),
        ("a", "caption"),
    ]
    assert rows[1]["caption"] == "x" and rows[1]["reason"] == "1 letter, fewer than 3"
    numbers = json.loads((tmp_path / "out/cleaning.json").read_text())
    assert numbers["kept_splits"] == {"test": 1} and numbers["removed_captions"] == {"caption": 1}


def test_boxes_are_kept(tmp_path: Path) -> None:
    birds = load_dataset(f"cub:{make_cub(tmp_path / 'birds')}", "all", 32)
    write(clean(birds, NONE), tmp_path / "out")
    again = load_dataset(tmp_path / "out", "all", 32)
    assert len(again) == len(birds) and again.crop == "box"  # type: ignore[attr-defined]
    for one, other in zip(birds, again, strict=True):
        assert torch.equal(one.image, other.image) and one.label == other.label


def test_page_shows_copies_beside_their_originals_and_escapes(folder: Folder) -> None:
    folder.add("a.png", drawing(1), "<script>alert(1)</script>")
    folder.add("b.png", drawing(1), "two")
    folder.add("<b>.png", b"junk", "three")
    html = page(folder.clean(Rules()))
    assert html.count("data:image/png") == 2  # kept, and duplicates
    assert "&lt;b&gt;.png" in html and "<b>.png" not in html and "<script" not in html


def test_an_endless_data_set_and_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["data", "filter", "shapes", "--count", "40", "--min-words", "4", "--out", str(out)]
    assert main(command) == 0
    assert "shapes:easy: 40 pictures" in capsys.readouterr().out
    again = load_dataset(out, "train", 32)
    assert 0 < len(again) < 40 and all(len(c.split()) > 3 for c in again.all_captions())
    assert (out / "cleaning.html").stat().st_size > 1000
    assert main([*command[:-1], str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_pictures"] == len(again)


def test_a_run_of_clip_compares(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "filter", "shapes", "--count", "40", "--clip", "pretrained:clip"]
    assert main([*command, "--worst", "0.1", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["similarity"]["median"] > 0.5
    low = round(0.1 * numbers["captions"])
    pictures = numbers["removed_pictures"].get("similarity", 0)
    assert low - pictures <= numbers["removed_captions"]["similarity"] <= low


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--min-side", "3"], "shapes:easy has no picture files whose size could be a rule."),
        (["--worst", "0.1"], "--clip, and --min-similarity or --worst, go together"),
        (["--clip", "pretrained:clip"], "--clip, and --min-similarity or --worst, go together"),
        (
            ["--clip", "pretrained:clip", "--worst", "0.1", "--size", "16"],
            "takes pictures of 32 pixels: add --size 32.",
        ),
        (["--clip", "pretrained:clip", "--worst", "1"], "A share of 1 is not between 0 and 1"),
        (["--script", "latn"], "There is no script 'latn': did you mean 'latin'?"),
        (["--max-aspect", "0.5"], "A largest aspect of 0.5 leaves nothing"),
        (["--leaks", "--near", "-1"], "A distance of -1 levels is less than 0."),
        (["--leaks", "--near", "nan"], "A distance of nan levels is less than 0."),
        (["--near", "2"], "A distance has no effect: add --duplicates near, or --leaks."),
        (
            ["--clip", "pretrained:clip", "--min-similarity", "2"],
            "A cosine of 2 is not between -1 and 1.",
        ),
        (
            ["--min-words", "5", "--max-words", "3"],
            "No caption has at least 5 and at most 3",
        ),
        (["--min-words", "90"], "No picture of shapes:easy is left: use weaker rules."),
    ],
)
def test_faults_are_told_in_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "filter", "shapes", "--count", "20", "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
