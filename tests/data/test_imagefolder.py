"""`imagefolder:`: the Hugging Face layout."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lineage.data import load_dataset, parse_spec
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError

TWEMOJI = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "twemoji64"


def save_picture(path: Path, red: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (red, 0, 0)).save(path)


def save_table(file: Path, rows: Iterable[dict[str, Any]], pictures: bool = True) -> None:
    """Write a metadata.jsonl and, if `pictures`, every picture that it names."""
    rows = list(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for number, row in enumerate(rows):
        if pictures:
            save_picture(file.parent / row["file_name"], number)


def reasons(dataset: CaptionedDataset) -> dict[str, str]:
    return {s.path: s.reason for s in dataset.skipped}


def test_metadata_at_the_root_is_read(tmp_path: Path) -> None:
    rows = [{"file_name": f"images/{n}.png", "text": f"picture {n}"} for n in range(3)]
    save_table(tmp_path / "metadata.jsonl", rows)
    data = load_dataset(f"imagefolder:{tmp_path}", size=16)
    assert [e.id for e in data] == ["images/0", "images/1", "images/2"]
    assert [e.captions for e in data] == [("picture 0",), ("picture 1",), ("picture 2",)]
    assert [int(e.image[0, 8, 8]) for e in data] == [0, 1, 2]
    assert data.skipped == [] and data.split == "train"
    assert parse_spec(str(tmp_path)) == ("imagefolder", str(tmp_path))


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"text": " a "}, ("a",)),
        ({"caption": "a"}, ("a",)),
        ({"captions": ["a", "", " b", "a"]}, ("a", "b")),
        ({"prompt": "a"}, ("a",)),
        ({"alt_texts": ["z"], "text": "a"}, ("a", "z")),
        ({"caption_10": "c", "caption_2": "b", "caption_0": "a"}, ("a", "b", "c")),
        ({"text_0": "a", "text_1": None}, ("a",)),
        ({"text": ["a", 3, None]}, ("a",)),
        ({"text": [7, 8.5, True]}, ("7", "8.5")),
        ({"text": 7}, ("7",)),
        ({"text": 7.5, "prompt": True}, ("7.5",)),
        ({"text": "a", "caption_" + "9" * 5000: "b"}, ("a",)),
    ],
)
def test_every_caption_column_is_read(
    tmp_path: Path, row: dict[str, Any], captions: tuple[str, ...]
) -> None:
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", **row}])
    assert load_dataset(str(tmp_path))[0].captions == captions


def test_rows_of_one_picture_are_joined(tmp_path: Path) -> None:
    texts = ("a", "b", "a", "c")
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "x.png", "text": t} for t in texts])
    data = load_dataset(str(tmp_path))
    assert [e.captions for e in data] == [("a", "b", "c")]


def test_a_csv_may_have_commas_quotes_and_lists(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_bytes(
        b"\xef\xbb\xbffile_name,text,label,alt_texts\r\n"
        b'a.png,"red, ""big"" cat",3,"[""one"", ""two""]"\r\n'
        b"b.png,a dog,4,\r\n"
    )
    data = load_dataset(str(tmp_path))
    assert data[0].captions == ('red, "big" cat', "one", "two") and data[0].label == 3
    assert data[1].captions == ("a dog",)
    assert data.batch([1, 0], [0, 0], 0).label.tolist() == [4, 3]  # type: ignore[union-attr]


def test_a_csv_may_be_separated_by_semicolons(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name;text\na.png;a cat, a dog\n")
    assert load_dataset(str(tmp_path))[0].captions == ("a cat, a dog",)


def test_each_split_folder_may_have_its_own_metadata(tmp_path: Path) -> None:
    for folder, count in (("train", 3), ("val", 2), ("test", 1)):
        rows = [{"file_name": f"{n}.png", "text": folder} for n in range(count)]
        save_table(tmp_path / folder / "metadata.jsonl", rows)
    assert parse_spec(str(tmp_path))[0] == "imagefolder"
    for split, count in (("train", 3), ("validation", 2), ("val", 2), ("test", 1), ("all", 6)):
        data = load_dataset(str(tmp_path), split=split)
        assert len(data) == count and data.skipped == []
    assert load_dataset(str(tmp_path), split="dev").split == "validation"
    with pytest.raises(UserError, match=r"train \(3\), validation \(2\)|validation \(2\)"):
        load_dataset(str(tmp_path), split="heldout")


def test_the_split_column_has_precedence_over_the_folder(tmp_path: Path) -> None:
    rows = [
        {"file_name": "train/0.png", "text": "a"},
        {"file_name": "train/1.png", "text": "a", "split": "valid"},
        {"file_name": "pics/2.png", "text": "a"},
        {"file_name": "dev/3.png", "text": "a"},
    ]
    save_table(tmp_path / "metadata.jsonl", rows)
    splits = {e.id: e.meta["split"] for e in load_dataset(str(tmp_path), split="all")}
    assert splits == {
        "train/0": "train",
        "train/1": "validation",
        "pics/2": "train",
        "dev/3": "validation",
    }


def test_a_picture_is_never_in_two_splits(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": s, "split": s} for s in ("train", "test")]
    save_table(tmp_path / "metadata.jsonl", rows)
    data = load_dataset(str(tmp_path), split="all")
    assert [e.captions for e in data] == [("train",)]
    assert "'test'" in reasons(data)["a.png"]


def test_other_columns_are_in_meta(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "text": "x", "source": "the zoo", "size": 3, "meta": {"k": [1]}}
    save_table(tmp_path / "metadata.jsonl", [row])
    meta = load_dataset(str(tmp_path))[0].meta
    assert meta == {"source": "the zoo", "split": "train", "size": 3, "k": [1]}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0], [1, 0]),
        ([3.0, "2.0"], [3, 2]),
        ([-0.0, " 1. "], [0, 1]),
        ([1, None], None),
        ([1, "dog"], None),
        ([True, 1], None),
        ([1.5, 1], None),
    ],
)
def test_labels_are_for_all_pictures_or_none(
    tmp_path: Path, labels: list[Any], expected: Any
) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x", "label": v} for n, v in enumerate(labels)]
    save_table(tmp_path / "metadata.jsonl", rows)
    data = load_dataset(str(tmp_path))
    actual = data.batch([0, 1], [0, 0], 0).label
    assert (None if actual is None else actual.tolist()) == expected
    assert [e.label for e in data] == (expected or [None, None])
    if expected is None:
        assert data[0].meta["label"] == labels[0]
        odd = next(n for n, v in enumerate(labels) if type(v) is not int)
        assert "no label of this data set is used" in reasons(data)[f"{odd}.png"]


def test_every_skipped_file_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "set"
    save_picture(tmp_path / "outside.png")
    for name in ("good", "mute", "alone", "broken"):
        save_picture(root / f"{name}.png")
    (root / "broken.png").write_bytes(b"GIF89a no")
    lines = [
        '{"file_name": "good.png", "text": "good"}',
        '{"file_name": "good.png", "text": ',
        '["a list"]',
        '{"text": "no file name"}',
        "",
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "mute.png", "text": "  "}',
        '{"file_name": "../outside.png", "text": "x"}',
        json.dumps({"file_name": str(tmp_path / "outside.png"), "text": "x"}),
        '{"file_name": "broken.png", "text": "x"}',
    ]
    (root / "metadata.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    data = load_dataset(f"imagefolder:{root}")
    assert [e.id for e in data] == ["good"]
    skipped = [(s.path, s.reason) for s in data.skipped]
    for path, words in [
        ("metadata.jsonl", "line 2 is not valid JSON"),
        ("metadata.jsonl", "line 3 is not a JSON object"),
        ("metadata.jsonl:4", "no file_name"),
        ("gone.png", "missing"),
        ("mute.png", "no caption"),
        ("../outside.png", "out of the folder"),
        (str(tmp_path / "outside.png"), "out of the folder"),
        ("broken.png", "no picture"),
        ("metadata.jsonl", "line 11 is not valid JSON"),
        ("alone.png", "no row of the metadata names"),
    ]:
        assert any(p == path and words in r for p, r in skipped), (path, words, skipped)
    assert len(skipped) == 10


def test_equal_stems_keep_their_suffix(tmp_path: Path) -> None:
    rows = [{"file_name": f"a.{suffix}", "text": "x"} for suffix in ("png", "jpg")]
    save_table(tmp_path / "metadata.jsonl", [*rows, {"file_name": "b.png", "text": "x"}])
    assert [e.id for e in load_dataset(str(tmp_path))] == ["a.png", "a.jpg", "b"]


def test_paths_may_be_written_on_windows(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "images\\a.png", "text": "x"}], False)
    assert [e.id for e in load_dataset(str(tmp_path))] == ["images/a"]


def test_half_a_surrogate_does_not_break_later_steps(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a \\ud800 b"}\n')
    load_dataset(str(tmp_path))[0].captions[0].encode("utf-8")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("label", [10239237003504588839, -(2**63) - 1, 10**300])
def test_a_label_of_more_than_64_bits_is_named(tmp_path: Path, label: int, suffix: str) -> None:
    labels = [2**63 - 1, label, -(2**63)]
    if suffix == "jsonl":
        rows = [{"file_name": f"{n}.png", "text": "x", "label": v} for n, v in enumerate(labels)]
        save_table(tmp_path / "metadata.jsonl", rows)
    else:
        lines = [f"{n}.png,x,{v}" for n, v in enumerate(labels)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,label", *lines]))
        for number in range(3):
            save_picture(tmp_path / f"{number}.png")
    data = load_dataset(str(tmp_path))
    assert [e.label for e in data] == [labels[0], labels[2]]
    assert "64 bits" in reasons(data)["1.png"]


ODD_NAMES = {
    "\ud800.png": "no file can have this file_name",
    "a\0.png": "no file can have this file_name",
    "n" * 300 + ".png": "cannot be opened: File name too long",
    "a/" * 3000 + "b.png": "cannot be opened: File name too long",
    ".": "name of a folder",
    "sub": "name of a folder",
    "..": "leads out",
    "/": "leads out",
    "sub/../../a.png": "leads out",
    "C:/a.png": "leads out",
    "a.png/b.png": "is missing",
    " ": "no file_name",
    7: "no file_name",
    None: "no file_name",
}


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name)[:12])
def test_a_row_with_an_odd_name_is_named_and_the_rest_loads(tmp_path: Path, name: Any) -> None:
    (tmp_path / "sub").mkdir()
    save_picture(tmp_path / "a.png")
    odd = {"file_name": name, "text": "odd"}
    rows = [{"file_name": "a.png", "text": "a"}, odd, {"file_name": "a.png", "text": "b"}]
    save_table(tmp_path / "metadata.jsonl", rows, pictures=False)
    data = load_dataset(str(tmp_path))
    assert [e.captions for e in data] == [("a", "b")]
    assert len(data.skipped) == 1 and ODD_NAMES[name] in data.skipped[0].reason
    assert data.skipped[0].path.isprintable() and "metadata.jsonl:2" in str(data.skipped[0])


def test_an_absolute_path_inside_the_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"file_name": str(tmp_path / "set" / "a.png"), "text": "x"}
    save_picture(tmp_path / "set" / "a.png")
    save_table(tmp_path / "set" / "tables" / "metadata.jsonl", [row], pictures=False)
    monkeypatch.chdir(tmp_path)
    for spec in (str(tmp_path / "set"), "set"):
        assert [e.id for e in load_dataset(spec)] == ["a"]


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    rows = [{"file_name": "caf\udce9.png", "text": "x"}, {"file_name": "b\udcff.png", "text": "y"}]
    save_table(tmp_path / "metadata.jsonl", rows)
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == [r"caf\xe9", r"b\xff"] and data.skipped == []
    assert data[0].meta["source"] == r"caf\xe9.png"


@pytest.mark.parametrize(("on_disk", "in_row"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_may_be_written_in_two_ways(tmp_path: Path, on_disk: str, in_row: str) -> None:
    names = {form: unicodedata.normalize(form, "é/crème.png") for form in (on_disk, in_row)}
    save_picture(tmp_path / names[on_disk])
    row = {"file_name": names[in_row], "text": "x"}
    save_table(tmp_path / "metadata.jsonl", [row], pictures=False)
    data = load_dataset(str(tmp_path))
    assert [e.meta["source"] for e in data] == [names[on_disk]] and data.skipped == []


def test_ids_differ_where_paths_and_stems_meet(tmp_path: Path) -> None:
    names = ("a.png", "a.jpg", "a.png.png")
    save_table(tmp_path / "metadata.jsonl", [{"file_name": n, "text": "x"} for n in names])
    assert [e.id for e in load_dataset(str(tmp_path))] == ["a.png", "a.jpg", "a.png-2"]


def test_half_a_surrogate_in_any_column_is_replaced(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "text": "x\ud800", "k\ud800": ["\udcff", {"\ud800": "\ud800"}]}
    save_table(tmp_path / "metadata.jsonl", [row])
    example = load_dataset(str(tmp_path))[0]
    assert example.captions == ("x\ufffd",)
    assert example.meta["k\ufffd"] == ["\ufffd", {"\ufffd": "\ufffd"}]


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_metadata_is_found_at_any_depth(tmp_path: Path, depth: int) -> None:
    folder = tmp_path.joinpath(*["sub"] * depth)
    save_table(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    assert parse_spec(str(tmp_path))[0] == "imagefolder"
    assert [e.id for e in load_dataset(str(tmp_path))] == ["sub/" * depth + "a"]


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ("name,licence\nlogo.png,mine\n", "folder"),
        ("file_name,text\nlogo.png,a logo\n", "folder"),
        ("file_name,licence\n../a.png,x\n../b.png,x\n", "folder"),
        ("no table", "folder"),
        ("file_name,text\n../a.png,x\n../b.png,y\n", "imagefolder"),
    ],
)
def test_a_table_beside_texts_counts_only_if_it_lists_the_pictures(
    tmp_path: Path, table: str, kind: str
) -> None:
    for name in ("a", "b"):
        save_picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a text")
    save_picture(tmp_path / "info" / "logo.png")
    (tmp_path / "info" / "metadata.csv").write_text(table)
    assert parse_spec(str(tmp_path))[0] == kind
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == ["a", "b"]
    if kind == "folder":
        assert "imagefolder:PATH" in reasons(data)["info/metadata.csv"]


def test_a_second_table_under_a_wrong_name_is_named(tmp_path: Path) -> None:
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    (tmp_path / "metadata2.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n')
    assert "must be named" in reasons(load_dataset(str(tmp_path)))["metadata2.jsonl"]


def test_pipes_are_named_and_never_opened(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": "x"} for name in ("a", "tube")]
    save_table(tmp_path / "set" / "metadata.jsonl", rows[:1])
    os.mkfifo(tmp_path / "set" / "tube.png")
    save_table(tmp_path / "set" / "metadata.jsonl", rows, pictures=False)
    os.mkfifo(tmp_path / "metadata.csv")
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == ["set/a"]
    skipped = reasons(data)
    assert set(skipped) == {"metadata.csv", "set/tube.png"}
    assert all("it is a pipe, not a file" in reason for reason in skipped.values())


def test_a_picture_in_a_closed_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "closed/b.png")]
    save_table(tmp_path / "metadata.jsonl", rows)
    lstat, real = os.stat, os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: real(path) and "closed" not in str(path))

    def fail(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("b.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return lstat(path, **options)

    monkeypatch.setattr(os, "stat", fail)
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == ["a"]
    assert "cannot be opened: Permission denied" in reasons(data)["closed/b.png"]


def test_metadata_without_a_caption_column_is_an_error(tmp_path: Path) -> None:
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "description": "x"}])
    with pytest.raises(UserError, match=r"description, file_name; name the caption column.*text"):
        load_dataset(str(tmp_path))


MISNAMED = ("metadata.json", "metadata.json1", "train/metadata.JSONL", "Metadata.JSONL")


@pytest.mark.parametrize("name", [*MISNAMED, "metadata1000.jsonl", "train/metadata1000.jsonl"])
def test_misnamed_metadata_is_explained(tmp_path: Path, name: str) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "README.txt").write_text("about this set")
    (tmp_path / "train").mkdir()
    (tmp_path / name).write_text('{"file_name": "a.png", "text": "x"}\n')
    for spec in (f"imagefolder:{tmp_path}", str(tmp_path)):
        with pytest.raises(UserError, match=f"{name} must be named metadata.jsonl"):
            load_dataset(spec)


def test_a_folder_without_metadata_or_pictures_is_an_error(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no metadata\.jsonl, \.csv or \.parquet"):
        load_dataset(f"imagefolder:{tmp_path}")
    save_table(tmp_path / "metadata.jsonl", [{"file_name": "b.png", "text": "x"}], pictures=False)
    with pytest.raises(UserError, match=r"Nothing can be loaded.*b\.png.*missing.*1 more"):
        load_dataset(f"imagefolder:{tmp_path}")


@pytest.mark.skipif(not TWEMOJI.is_dir(), reason="there are no emoji pictures in ../shared/data")
def test_the_emoji_data_set_loads() -> None:
    counts = {"train": 3269, "validation": 188, "test": 190, "all": 3647}
    data = {split: load_dataset(str(TWEMOJI), split, size=16) for split in counts}
    assert {split: len(d) for split, d in data.items()} == counts
    assert all(d.skipped == [] for d in data.values())
    ids = [e.id for split in ("train", "validation", "test") for e in data[split]]
    assert len(set(ids)) == 3647
    assert all(3 <= len(e.captions) <= 5 and e.meta["emoji"] for e in data["test"])
