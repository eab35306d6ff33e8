"""What is wrong in the files of the public data sets is named, and the rest is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import (
    BOXES,
    CUB,
    FLOWERS,
    LABELS,
    MAKERS,
    SETS,
    SPLIT,
    TEXTS,
    TOKENS,
    TRAIN,
    make_coco,
    make_cub,
    make_kaggle,
    mat,
    move,
    refusal,
    replace,
    reports,
    save_picture,
    save_text,
    splits,
)

from lineage.data import load_dataset
from lineage.errors import UserError

# --- faults ---------------------------------------------------------------------------------------

Change = Callable[[bytes], bytes]


def put(text: bytes) -> Change:
    return lambda raw: text


def put_mat(**arrays: Any) -> Change:
    return lambda raw: mat(**arrays)


def add(line: str) -> Change:
    return lambda raw: raw + line.encode() + b"\n"


def swap(old: str, new: str) -> Change:
    def change(raw: bytes) -> bytes:
        assert old.encode() in raw
        return raw.replace(old.encode(), new.encode())

    return change


def cut(raw: bytes) -> bytes:
    return raw[:-5]


JUNK = put(b"\xff\x00\xfe junk\n" * 9)


@pytest.mark.parametrize(
    ("maker", "file"),
    [
        ("cub", f"{CUB}/images.txt"),
        ("cub", SPLIT),
        ("cub", TEXTS),
        ("flowers", "imagelabels.mat"),
        ("flowers", SETS),
        ("flowers", TEXTS),
        ("coco", "annotations"),
        ("flickr8k", TOKENS),
        ("kaggle", "captions.txt"),
    ],
)
def test_the_sentence_about_a_missing_file_names_it(tmp_path: Path, maker: str, file: str) -> None:
    move(MAKERS[maker](tmp_path), (file, ".gone"))
    kind = "flickr8k" if maker == "kaggle" else maker
    assert Path(file).name in refusal(f"{kind}:{tmp_path}")


def test_files_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    move(make_cub(tmp_path / "cub"), (BOXES, ".gone"))
    assert len(load_dataset(str(tmp_path / "cub"), "all", 8)) == 6
    assert "bounding_boxes.txt" in refusal(f"{tmp_path / 'cub'}?crop=box")
    make_kaggle(tmp_path / "kaggle")
    assert "Flickr_8k.trainImages.txt" in refusal(f"{tmp_path / 'kaggle'}?splits=list")
    assert splits(tmp_path / "kaggle") == {"3_b": "validation", "1_a": "train"}
    save_text(tmp_path / "coco/annotations/instances_val2017.json", "{}")
    assert "holds objects, no captions" in refusal(f"coco:{tmp_path / 'coco'}")


def test_the_split_of_cubs_table_needs_the_table(tmp_path: Path) -> None:
    move(make_cub(tmp_path), (SPLIT, ".gone"))
    assert "train_test_split.txt" in refusal(f"{tmp_path}?splits=list")


def test_without_their_table_classes_are_those_of_the_folders_numbers(tmp_path: Path) -> None:
    move(make_cub(tmp_path), (LABELS, ".gone"))
    assert [e.label for e in load_dataset(str(tmp_path), "all")] == [6, 6, 1, 1, 8, 3]


Row = tuple[str, str, Change | None, int, str]
"""Miniature, file, its change (None: it is removed), pictures that are left, part of `path: reason`
or, if none is left, of the sentence."""

CUB_FAULTS: list[Row] = [
    ("cub", f"{CUB}/images.txt", put(b""), 0, "images.txt"),
    ("cub", f"{CUB}/images.txt", JUNK, 0, "images.txt: line 1"),
    ("cub", f"{CUB}/images.txt", cut, 5, "images/4.Jay/J_1: the picture is missing"),
    ("cub", f"{CUB}/images.txt", add("7"), 6, "images.txt: line 7"),
    ("cub", f"{CUB}/images.txt", add("7 ../../../out.jpg"), 6, "out.jpg: the picture is missing"),
    ("cub", f"{CUB}/images.txt", add("7 ."), 6, "images"),
    ("cub", f"{CUB}/images.txt", add("7 7.Tern/T_2.jpg"), 6, "a second"),
    ("cub", f"{CUB}/images/2.Wren/W_2.jpg", None, 5, "W_2.jpg: the picture is missing"),
    ("cub", f"{TEXTS}/2.Wren/W_2.txt", None, 5, "W_2.jpg: a picture without captions"),
    ("cub", f"{TEXTS}/2.Wren/W_2.txt", put(b" \n"), 5, "W_2.txt: the file has no caption"),
    ("cub", f"{TEXTS}/7.Tern/T_9.txt", add("a"), 6, "T_9.txt: captions without a picture"),
    ("cub", LABELS, JUNK, 6, "image_class_labels.txt: line 1"),
    ("cub", LABELS, swap("1 1\n", "1 1 9\n"), 6, "image_class_labels.txt"),
    ("cub", LABELS, swap("1 1\n", "1 0\n"), 6, "image_class_labels.txt"),
    ("cub", SPLIT, JUNK, 0, "train_test_split.txt"),
    ("cub", SPLIT, swap("1 0\n", "1 x\n"), 5, "train_test_split.txt"),
    ("cub", SPLIT, swap("1 0\n", ""), 5, "train_test_split.txt"),
    ("cub", BOXES, swap("1 4.0 ", "1 "), 5, "bounding_boxes.txt: line 1"),
    ("cub", BOXES, swap("1 4.0 ", "1 x "), 5, "bounding_boxes.txt"),
    ("cub", BOXES, swap("1 4.0 ", "1 nan "), 5, "bounding_boxes.txt"),
]
FLOWERS_FAULTS: list[Row] = [
    ("flowers", "imagelabels.mat", put(b""), 0, "imagelabels.mat is no table"),
    ("flowers", "imagelabels.mat", cut, 0, "imagelabels.mat cannot be read"),
    ("flowers", "imagelabels.mat", put_mat(other=[[1]]), 0, "imagelabels.mat is no table"),
    ("flowers", "imagelabels.mat", put_mat(labels=[FLOWERS[:5]]), 5, "6.jpg: imagelabels"),
    ("flowers", "imagelabels.mat", put_mat(labels=[[0, *FLOWERS[1:]]]), 5, "imagelabels.mat"),
    ("flowers", "imagelabels.mat", put_mat(labels=[[1e300, *FLOWERS[1:]]]), 5, "imagelabels.mat"),
    ("flowers", SETS, JUNK, 0, "setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[4]], valid=[[2]]), 0, "setid.mat is no table"),
    ("flowers", SETS, put_mat(trnid=[[4]], valid=[[2]], tstid=[[1]]), 3, "6.jpg: setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[]], valid=[[]], tstid=[[]]), 0, "setid.mat"),
    ("flowers", SETS, put_mat(trnid=[[1, 4]], valid=[[2, 3]], tstid=[[1, 5, 6]]), 6, "setid.mat"),
    ("flowers", "jpg/image_00001.jpg", None, 5, "image_00001.txt: captions without a picture"),
    ("flowers", f"{TEXTS}/class_00077/image_00001.txt", None, 5, "1.jpg: a picture without"),
    ("flowers", f"{TEXTS}/class_00099/image_00001.txt", add("a"), 6, "image_00001.txt"),
]
COCO_FAULTS: list[Row] = [
    ("coco", TRAIN, JUNK, 1, f"{TRAIN}: the captions are not valid JSON"),
    ("coco", TRAIN, put(b"[" * 100_000), 1, "not valid JSON"),
    ("coco", TRAIN, put(b"[1]"), 1, "not an object"),
    ("coco", TRAIN, put(b'{"images": 1}'), 1, "no list 'images'"),
    ("coco", TRAIN, swap('"id": 7, ', ""), 2, "no id or no file_name"),
    ("coco", TRAIN, swap("000000000007.jpg", "../../out.jpg"), 2, "out.jpg: the picture is"),
    ("coco", TRAIN, swap("0000000007.jpg", "0000000005.jpg"), 2, "5.jpg: a second entry"),
    ("coco", TRAIN, swap('"image_id": 5', '"image_id": 9'), 2, "5.jpg: the picture has no caption"),
    ("coco", TRAIN, swap('"image_id": 5', '"image_id": 9'), 2, "that images does not list: 1"),
    ("coco", "train2017/000000000005.jpg", None, 2, "5.jpg: the picture is missing"),
]
FLICKR_FAULTS: list[Row] = [
    ("flickr8k", TOKENS, put(b""), 0, TOKENS),
    ("flickr8k", TOKENS, JUNK, 0, f"{TOKENS}: it is not UTF-8"),
    ("flickr8k", TOKENS, swap("1_a.jpg#1\t", "1_a.j"), 3, f"{TOKENS}: line 4"),
    ("flickr8k", TOKENS, add("3_b.jpg#x\tdog"), 3, f"{TOKENS}: line 11"),
    ("flickr8k", TOKENS, add("../out.jpg#0\tx"), 3, "out.jpg: the picture is missing"),
    ("flickr8k", "Flickr_8k.testImages.txt", add("3_b.jpg"), 3, "3_b.jpg: it is in test too"),
    ("flickr8k", "Flickr_8k.trainImages.txt", JUNK, 2, "trainImages.txt: it is not UTF-8"),
    ("flickr8k", "Flickr_8k.trainImages.txt", None, 2, "3_b.jpg: the picture is in none"),
    ("flickr8k", "Flicker8k_Dataset/3_b.jpg", None, 2, "3_b.jpg: the picture is missing"),
    ("kaggle", "captions.txt", put(b""), 0, "captions.txt"),
    ("kaggle", "captions.txt", swap("image,", "img,"), 0, "captions.txt:2: the row has no image"),
    ("kaggle", "captions.txt", add("3_b.jpg,a,b"), 2, "captions.txt: line 5 has 3 cells"),
]


@pytest.mark.parametrize(
    "row",
    [*CUB_FAULTS, *FLOWERS_FAULTS, *COCO_FAULTS, *FLICKR_FAULTS],
    ids=lambda row: f"{Path(row[1]).name}: {row[4]}",
)
def test_what_is_wrong_is_reported_and_the_rest_is_read(tmp_path: Path, row: Row) -> None:
    maker, file, change, count, words = row
    root = MAKERS[maker](tmp_path / "up" / "set")
    for folder in (tmp_path, tmp_path / "up"):
        save_picture(folder / "out.jpg")
    path = root / file
    if change is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    if count == 0:
        assert words in refusal(str(root))
        return
    data = load_dataset(str(root), "all", 8)
    assert len(data) == count
    assert len(data.batch(range(count), [0] * count, 0)) == count
    assert all(e.label is None or 0 <= e.label < 102 for e in data)
    assert any(words in report for report in reports(data))


METADATA = [
    *[("cub", f"{CUB}/{name}.txt") for name in ("images", "bounding_boxes", "train_test_split")],
    *[("cub", file) for file in (LABELS, f"{TEXTS}/testclasses.txt", f"{TEXTS}/7.Tern/T_1.txt")],
    *[("flowers", file) for file in ("imagelabels.mat", SETS)],
    ("coco", TRAIN),
    *[("flickr8k", file) for file in (TOKENS, "Flickr_8k.testImages.txt")],
    ("kaggle", "captions.txt"),
]
SPECIAL = [b"\n7 .\n", b"../", b"#", b"\t", b'"', b"-1", b"nan", b"9" * 40]
NEW = st.binary(max_size=8) | st.sampled_from(SPECIAL) | st.text(max_size=5).map(str.encode)
SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), NEW), min_size=1, max_size=4)
"""Places (0 is the start of the file, 1 its end), numbers of bytes removed, bytes put there."""


@pytest.mark.parametrize(("maker", "file"), METADATA)
def test_metadata_of_any_bytes_are_read_or_refused(tmp_path: Path, maker: str, file: str) -> None:
    """A part of the file is replaced in a few places; nothing but `UserError` is raised."""

    root = MAKERS[maker](tmp_path)
    if maker == "cub" and "classes" in file:
        save_text(root / TEXTS / "trainvalclasses.txt", "7.Tern", "4.Jay")
        save_text(root / TEXTS / "testclasses.txt", "2.Wren", "9.Auk")
    valid = (root / file).read_bytes()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(SPLICES)
    def splice(splices: Sequence[tuple[float, int, bytes]]) -> None:
        raw = valid
        for place, length, new in splices:
            start = int(place * len(raw))
            raw = raw[:start] + new + raw[start + length :]
        (root / file).write_bytes(raw)
        try:
            data = load_dataset(str(root), "all", 8)
        except UserError:
            return
        data.batch(range(len(data)), [0] * len(data), 0)

    splice()


@pytest.mark.parametrize("maker", ["cub", "flowers"])
def test_a_class_in_no_list_is_in_no_split(tmp_path: Path, maker: str) -> None:
    """A list of test classes that was cut must not move them into training."""
    root = MAKERS[maker](tmp_path)
    first, second = sorted(path.name for path in (root / TEXTS).iterdir())[:2]
    save_text(root / TEXTS / "trainvalclasses.txt", first)
    save_text(root / TEXTS / "testclasses.txt", second)
    data = load_dataset(str(root), "all", 8)
    assert {e.meta["class"] for e in data} == {first, second}
    assert any("in no list of classes" in s.reason for s in data.skipped)


def test_coco_s_file_names_may_have_folders(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    replace(root / TRAIN, "000000000007.jpg", "train2017/000000000007.jpg")
    assert len(load_dataset(str(root), "train", 8)) == 2
