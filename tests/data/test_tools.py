"""Contact sheets, checks and exports of data sets."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lineage.characters import same_name
from lineage.cli import main
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example
from lineage.data.tools import check, contact_sheet, export, file_name
from lineage.errors import UserError
from lineage.text.tokenizer import default_limits


class Odd(CaptionedDataset):
    """Examples with difficult ids, captions and meta."""

    name, split, size, skipped = "odd", "test", 16, []
    ids = ("a/b", "a_b", "A/B", "..", "con:é*?", "x" * 300)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        noise = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 16, 16), generator=noise, dtype=torch.uint8)
        captions = ("a straße, \"quoted\"\tand 'more'", f"number {index}")[: 1 + index % 2]
        meta = {"ok": {"deep": [1, None]}, "nan": float("nan"), "tensor": torch.zeros(1), "t": (1,)}
        return Example(self.ids[index], image, captions, index, meta)


def test_an_export_loads_again(tmp_path: Path) -> None:
    data = Odd()
    assert export(data, tmp_path / "new" / "out") == 6
    again = load_dataset(f"imagefolder:{tmp_path / 'new' / 'out'}", split="test", size=16)
    assert again.skipped == [] and len(again) == 6
    for old, new in zip(data, again, strict=True):
        assert torch.equal(old.image, new.image)
        assert (old.captions, old.label) == (new.captions, new.label)
        assert new.meta["ok"] == {"deep": [1, None]} and new.meta["t"] == [1]
        assert "nan" not in new.meta and "tensor" not in new.meta
    names = [p.name for p in (tmp_path / "new").iterdir()]
    assert names == ["out"]  # no temporary folder is left


def test_an_export_has_a_row_for_each_example(tmp_path: Path) -> None:
    export(load_dataset("shapes:easy", "heldout"), tmp_path / "out", count=3)
    rows = [json.loads(x) for x in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 3 == len(list((tmp_path / "out/images").iterdir()))
    for row in rows:
        assert set(row) - {"alt_texts"} == {"file_name", "text", "label", "split", "meta"}
        assert row["split"] == "heldout" and row["meta"]["objects"]
        assert (tmp_path / "out" / row["file_name"]).is_file()


def test_an_export_of_all_splits_keeps_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "in" / split / "a.png")
        (tmp_path / "in" / split / "metadata.csv").write_text("file_name,text\na.png,x\n")
    export(load_dataset(str(tmp_path / "in"), "all", 16), tmp_path / "out")
    for split in ("train", "validation"):
        again = load_dataset(str(tmp_path / "out"), split, 16)
        assert [e.meta["source"].split("/")[0] for e in again] == [split.replace("idation", "")]


@pytest.mark.parametrize("own", [None, "test", "odd"])
def test_an_export_keeps_the_record_s_own_split(tmp_path: Path, own: str | None) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "a.png")
    row = {"file_name": "a.png", "text": "x", "meta": {"split": "weird", "meta": {"k": 1}}}
    row |= {"split": own} if own else {}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(row))
    split = own or "train"
    before = load_dataset(str(tmp_path / "in"), split, 16)
    assert before[0].meta == {"source": "a.png", "split": split, "meta": {"k": 1}}
    export(before, tmp_path / "out")
    assert load_dataset(str(tmp_path / "out"), split, 16)[0].meta == before[0].meta


def test_an_export_escapes_names_that_are_not_utf8(tmp_path: Path) -> None:
    source, target = tmp_path / "in\udce9", tmp_path / "out\udce9"
    source.mkdir()
    for name in ("caf\udce9", "\x1b[31m"):
        Image.new("RGB", (16, 16)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("x")
    assert check(str(source))["loaded"] == 2
    assert export(load_dataset(str(source), size=16), target) == 2
    files = sorted(p.name for p in (target / "images").iterdir())
    assert files == ["_x1b_31m.png", "caf_xe9.png"]
    assert len(load_dataset(str(target), size=16)) == 2


def test_what_the_command_prints_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "in\x1b[31m\udce9"
    root.mkdir()
    for name in ("a", "mute\x1b[2J\udce9\n"):
        Image.new("RGB", (16, 16)).save(root / f"{name}.png")
    (root / "a.txt").write_text("x")
    for command in (
        ["check", str(root)],
        ["show", str(root), "--out", str(tmp_path / "\x1b.png")],
        ["export", str(root), "--out", str(tmp_path / "out\x1b")],
    ):
        assert main(["data", *command]) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert len(printed.splitlines()) == 4 and r"mute\x1b[2J\xe9\n.png" in printed


def test_file_names_are_safe_and_unique() -> None:
    taken: dict[str, int] = {}
    names = [file_name(x, taken) for x in ("a/b", "a_b", "A\\B", "../../etc", ".", "é" * 99)]
    names += [file_name(x, taken) for x in ("\u1100\u1161", "\uac00")]  # one syllable, two ways
    assert len({same_name(n).lower() for n in names}) == len(names)
    assert names[:2] == ["a_b", "a_b-2"]
    assert all("/" not in n and not n.startswith(".") and len(n.encode()) < 200 for n in names)


def test_an_export_into_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(load_dataset("shapes"), tmp_path, 2)
    with pytest.raises(UserError, match="is not empty"):
        export(load_dataset("shapes"), tmp_path / "note.txt", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    export(load_dataset("shapes"), tmp_path / "empty", 2)
    assert len(load_dataset(str(tmp_path / "empty"))) == 2


def test_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = Image.Image.save, []

    def fill_up(self: Image.Image, file: Any, *rest: Any, **more: Any) -> None:
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, file, *rest, **more)

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(UserError, match="No space left"):
        export(load_dataset("shapes"), tmp_path / "out", 5)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export(load_dataset("shapes"), tmp_path / "file" / "out", 2)


def test_check_counts_shapes_without_rendering() -> None:
    counts = {"loaded": 20_000, "captions": 100_000, "cut": {}, "skipped": []}
    assert check("shapes:easy", 32) == counts


def test_check_counts_captions_that_are_too_long(tmp_path: Path) -> None:
    for number, caption in enumerate(["a ring", "red " * 32, "red " * 33, "x" * 202]):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    report = check(str(tmp_path), 16, default_limits())
    assert report["cut"] == {"32 words": 1, "201 characters": 1}
    assert json.loads(json.dumps(report)) == report


def test_check_counts_all_splits(tmp_path: Path) -> None:
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / split).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / split / "p.png")
        row = {"file_name": "p.png", "text": text, "alt_texts": ["more"]}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "test" / "alone.png").write_bytes(b"")
    report = check(str(tmp_path), 32)
    assert report["loaded"] == 2 and report["captions"] == 4
    assert [s["path"] for s in report["skipped"]] == ["test/alone.png"]
    assert set(report["skipped"][0]) == {"path", "reason"}
    assert json.loads(json.dumps(report)) == report


def test_check_of_a_folder_without_usable_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing can be loaded"):
        check(f"folder:{tmp_path}")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.png").write_bytes(b"x")
    report = check(f"folder:{tmp_path}")
    assert report["loaded"] == 0 and len(report["skipped"]) == 2


@pytest.mark.parametrize(("size", "side"), [(16, 128), (32, 128), (48, 144), (64, 128), (256, 256)])
def test_a_sheet_shows_each_pixel_as_a_square(size: int, side: int) -> None:
    data = load_dataset("shapes:easy", size=size)
    sheet = np.asarray(contact_sheet(data, 3, 2))
    factor = side // size
    first = sheet[10 : 10 + side, 10 : 10 + side]
    assert (first[::factor, ::factor] == data.showcase(3)[0].image.permute(1, 2, 0).numpy()).all()
    assert (first[::factor] == first[factor - 1 :: factor]).all()
    below = sheet[10 + side + 4 : 10 + side + 24, 10 : 10 + side]
    assert (below < 100).any()  # the caption


def test_a_sheet_of_few_pictures_wraps_long_words(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("w" * 900 + " " + "long " * 90)
    sheet = contact_sheet(load_dataset(str(tmp_path), size=16), 50, 9)
    assert sheet.width < 200 and sheet.height < 300
    assert (np.asarray(sheet)[:, -8:] == 255).all()  # nothing runs over the edge
    with pytest.raises(UserError, match="at least 1"):
        contact_sheet(load_dataset("shapes"), 0, 2)
