"""WebDataset shards: samples, splits, brace lists, faults, and the round trip of an export."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lineage.cli import main
from lineage.data import load_dataset, tools, wds
from lineage.data.contract import CaptionedDataset
from lineage.data.tools import export
from lineage.data.wds import braces
from lineage.errors import UserError

Files = list[tuple[str, bytes]]


def png(number: int, kind: str = "PNG") -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (number * 20 % 256, 7, 90)).save(file, kind)
    return file.getvalue()


def sample(name: str, number: int = 0) -> Files:
    return [(f"{name}.png", png(number)), (f"{name}.txt", f"picture {number}".encode())]


def shard(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def load(path: object, split: str = "all") -> CaptionedDataset:
    return load_dataset(f"wds:{path}", split, 8)


# --- samples ----------------------------------------------------------------------------------


def test_a_sample_is_what_has_one_name_up_to_the_first_dot(tmp_path: Path) -> None:
    """Whatever the order of members, and with endings in capitals or of several parts."""
    values = {"caption": "from json", "url": "u", "label": 4}
    files = [
        ("d/a.JPG", png(3, "JPEG")),
        ("d/b.input.png", png(5)),
        ("c.png", png(1)),
        ("d/a.json", json.dumps(values).encode()),
        ("c.cls", b"7\n"),
        ("d/a.txt", b"first\n\n second \n"),
        ("d/b.outputs.txt", b"of b"),
        ("c.cap", b"of c"),
        ("d/a.npy", b"not read"),
        ("d/", b""),
        ("._c.png", b"of a Mac"),
    ]
    data = load(shard(tmp_path / "00.tar", files))
    assert [(e.id, e.captions, e.label) for e in data] == [
        ("00/d/a", ("first", "second", "from json"), 4),
        ("00/d/b", ("of b",), None),
        ("00/c", ("of c",), 7),
    ]
    assert data[0].meta["url"] == "u" and data.skipped == []
    assert [int(e.image[0, 0, 0]) for e in data][1:] == [100, 20]


def test_names_with_dots_are_told_apart_by_their_last(tmp_path: Path) -> None:
    files = [*sample("v1.2", 1), *sample("v1.3", 2)]
    data = load(shard(tmp_path / "00.tar", files))
    assert [(e.id, e.captions[0]) for e in data] == [
        ("00/v1.2", "picture 1"),
        ("00/v1.3", "picture 2"),
    ]


def test_accents_of_members_may_be_written_in_two_ways(tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "crème") for form in ("NFC", "NFD"))
    files = [(f"{two}.png", png(1)), (f"{one}.txt", b"x"), (f"{one}.json", b'{"n": 1}')]
    data = load(shard(tmp_path / "s.tar", files))
    assert [(e.id, e.captions, e.meta["n"]) for e in data] == [(f"s/{two}", ("x",), 1)]
    assert data.skipped == []
    both = [*sample(one, 1), *sample(two, 2), (f"{one}.json", b'{"n": 1}')]
    data = load(shard(tmp_path / "t.tar", both))
    assert [e.captions for e in data] == [("picture 1",), ("picture 2",)]


def test_the_same_name_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"s/{number}.tar", sample("a", number))
    assert [e.id for e in load(tmp_path / "s")] == ["0/a", "1/a"]
    assert [e.captions[0] for e in load_dataset(str(tmp_path / "s"), size=8)] == [
        "picture 0",
        "picture 1",
    ]


@pytest.mark.parametrize(
    ("path", "values", "split"),
    [
        ("x/val/0.tar", {}, "validation"),
        ("x/dev_000.tar", {}, "validation"),
        ("x/test-0.tar", {}, "test"),
        ("x/testament.tar", {}, "train"),
        ("x/cc3m-validation-0000.tar", {}, "validation"),
        ("x/val/0.tar", {"split": "fold 1"}, "fold 1"),
    ],
)
def test_splits(path: str, values: dict[str, str], split: str, tmp_path: Path) -> None:
    shard(tmp_path / path, [*sample("a"), ("a.json", json.dumps(values).encode())])
    assert load(tmp_path / "x")[0].meta["split"] == split


# --- where shards are -------------------------------------------------------------------------


def test_a_brace_list_names_shards(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        shard(tmp_path / f"{number:02d}.tar", sample("a", number))
    for number in (8, 10):
        shard(tmp_path / f"more/{number:02d}.tar", sample("b", number))
    data = load(tmp_path / "{09..11}.tar")
    assert [e.id for e in data] == ["09/a", "10/a"]
    assert [s.path for s in data.skipped] == [str(tmp_path / "11.tar")]
    both = load(str(tmp_path) + "/{more/08,09}.tar")
    assert [e.id for e in both] == ["more/08/b", "09/a"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x/{a,{b,c}}.tar", ["x/a.tar", "x/b.tar", "x/c.tar"]),
        ("{x{0..1},y}", ["x0", "y", "x1", "y"]),
        ("{08..10}{a,}", ["08a", "08", "09a", "09", "10a", "10"]),
    ],
)
def test_braces(text: str, names: list[str]) -> None:
    assert sorted(set(braces(text))) == sorted(set(names))


def test_shards_of_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named from the root and from here; and one whose own name has braces."""
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "a/0.tar", sample("x", 1))
    shard(tmp_path / "b/c/1.tar", sample("y", 2))
    shard(tmp_path / "a{1,2}.tar", sample("z", 3))
    both = load(f"{{{tmp_path}/a/0,b/c/1}}.tar")
    assert [e.id for e in both] == ["a/0/x", "b/c/1/y"]
    assert [e.id for e in load("a{1,2}.tar")] == ["a{1,2}/z"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no.tar", "no shard"),
        ("{0..5}.tar", "no shard"),
        ("{5..0}.tar", "no name"),
        ("{0..999999}{0..9}.tar", "more than 100,000 shards"),
        ("no", "There is no folder"),
        ("a" * 300 + ".tar", "no shard"),
        ("{0..99999}{0..999999}.tar", "more than 100,000 shards"),
    ],
)
def test_shards_that_are_not_there(path: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / path)


def test_a_folder_of_pictures_with_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("x")
    shard(tmp_path / "backup.tar", sample("b"))
    assert [e.id for e in load_dataset(str(tmp_path), size=8)] == ["a"]


# --- faults -----------------------------------------------------------------------------------


def left_out(path: Path) -> dict[str, str]:
    return {skipped.path: skipped.reason for skipped in load(path).skipped}


def test_samples_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wds, "MAX_TEXT", 100)
    files = [
        *sample("good"),
        ("alone.png", png(1)),
        ("text.txt", b"no picture"),
        *sample("two"),
        ("two.jpg", png(2, "JPEG")),
        *sample("twice"),
        ("twice.txt", b"again"),
        ("broken.png", b"broken"),
        ("broken.txt", b"x"),
        ("long.png", png(1)),
        ("long.txt", b"x" * 101),
        ("bytes.png", png(1)),
        ("bytes.txt", b"\xff\xfe\xff"),
        *sample("json"),
        ("json.json", b'{"caption": NaN}'),
    ]
    path = shard(tmp_path / "s.tar", files)
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    reasons = left_out(path)
    expected = {
        "alone": "without captions",
        "text": "no picture among txt",
        "two.jpg": "a second picture",
        "twice.txt": "a second member",
        "broken": "no picture of a known format",
        "long.txt": "more than the 1 MB",
        "long": "without captions",
        "bytes.txt": "no UTF-8",
        "bytes": "without captions",
        "json.json": "no object of JSON",
        "link.png": "a link",
    }
    got = {
        name.removeprefix("s.tar: ").removeprefix("s/"): reason for name, reason in reasons.items()
    }
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert part in got[name], (name, got[name])
    assert [e.id for e in load(path)] == ["s/good", "s/two", "s/twice", "s/json"]


def test_a_shard_that_is_cut_loses_only_its_end(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", [f for i in range(4) for f in sample(f"{i}", i)])
    raw = whole.read_bytes()
    end = raw.rindex(b"picture 3") + 512  # of the last member
    for length in range(600, end + 1, 97):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(raw[:length])
        try:
            data = load(cut)
        except UserError:  # of no whole sample
            assert length < raw.index(b"picture 0") + 9
            continue
        assert any(s.path.startswith("cut.tar") for s in data.skipped), length
        assert [e.captions[0] for e in data] == [f"picture {i}" for i in range(len(data))]


def test_labels_are_whole_numbers_or_named(tmp_path: Path) -> None:
    files = [*sample("a"), ("a.cls", b"dog"), *sample("b"), ("b.cls", b"-1")]
    files += [*sample("c"), ("c.json", b'{"label": "cat", "n": 1}'), ("c.more.json", b'{"m": 2}')]
    files += [*sample("d"), ("d.json", b'{"label": 99999999999999999999}')]
    files += [*sample("e"), ("e.cls", b"3.0\n")]
    data = load(shard(tmp_path / "s.tar", files))
    assert [e.label for e in data] == [None, -1, None, None, 3]
    assert [s.path for s in data.skipped] == ["s.tar: a.cls", "s.tar: d.json"]
    assert data[2].meta["label"] == "cat" and (data[2].meta["n"], data[2].meta["m"]) == (1, 2)


def test_names_from_the_current_folder_and_hidden_folders(tmp_path: Path) -> None:
    """As `tar cf x.tar .` writes them."""
    files = [*((f"./{name}", raw) for name, raw in sample("a")), *sample(".git/b")]
    files += sample("my__MACOSX_x")
    data = load(shard(tmp_path / "s.tar", files))
    assert [e.id for e in data] == ["s/a", "s/my__MACOSX_x"] and data.skipped == []


def test_a_member_of_negative_size_ends_the_listing(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [*sample("a"), *sample("b")])
    raw = bytearray(path.read_bytes())
    start = raw.index(b"b.png")
    header = tarfile.TarInfo("b.png").tobuf()
    raw[start : start + 512] = header
    raw[start + 124 : start + 136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
    raw[start + 148 : start + 156] = b" " * 8
    checksum = sum(raw[start : start + 512])
    raw[start + 148 : start + 156] = b"%06o\0 " % checksum
    path.write_bytes(raw)
    data = load(path)
    assert [e.id for e in data] == ["s/a"] and "damaged" in data.skipped[0].reason


def test_a_picture_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wds, "MAX_BYTES", 1000)
    files = [("a.png", bytes(1001)), ("a.txt", b"x"), *sample("b")]
    data = load(shard(tmp_path / "s.tar", files))
    assert [e.id for e in data] == ["s/b"] and "make it smaller" in data.skipped[0].reason


def test_a_compressed_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "s/0.tar", sample("a"))
    (tmp_path / "s/1.tar.gz").write_bytes(b"\x1f\x8b")
    assert "gunzip" in left_out(tmp_path / "s")["1.tar.gz"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_shards_never_end_in_a_traceback(draw: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = shard(Path(folder) / "s.tar", [*sample("a", 1), *sample("b", 2)])
        raw = bytearray(path.read_bytes())
        for _ in range(draw.draw(st.integers(1, 4))):
            place = draw.draw(st.integers(0, len(raw) - 1))
            new = draw.draw(st.binary(min_size=1, max_size=12))
            raw[place : place + len(new)] = new
        path.write_bytes(raw)
        try:
            data = load(path)
            assert all(e.captions and e.image.shape == (3, 8, 8) for e in data)
        except UserError:
            pass


# --- export -----------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> CaptionedDataset:
    """Five pictures with several captions, labels, splits and meta."""
    root = tmp_path / "source"
    root.mkdir()
    rows = []
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"p.{number}.png")
        split = ("train", "val", "fold 1")[number % 3]
        row = {"file_name": f"p.{number}.png", "text": f"a\nb {number}", "alt_texts": ["c", "d"]}
        rows.append(json.dumps({**row, "label": number % 2, "split": split, "extra": [1]}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return load_dataset(f"imagefolder:{root}", "all", 8)


def test_an_export_is_loaded_with_the_same_pixels(
    labelled: CaptionedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "SHARD", 1)
    assert export(labelled, tmp_path / "out", form="wds") == 5
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["fold-00000.tar", "train-00000.tar", "train-00001.tar"] + [
        f"validation-0000{i}.tar" for i in range(2)
    ]
    data = load(tmp_path / "out")
    by_caption = {e.captions[0]: e for e in data}
    assert len(by_caption) == 5 and data.skipped == []
    for expected in labelled:
        actual = by_caption[expected.captions[0]]
        assert torch.equal(actual.image, expected.image)
        assert actual.captions == expected.captions and actual.label == expected.label
        assert actual.meta["split"] == expected.meta["split"] and actual.meta["extra"] == [1]


def test_the_command_writes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--count", "3", "--size", "16", "--form", "wds"]
    assert main(["data", "export", "shapes", *options]) == 0
    assert "3 pictures in wds form" in capsys.readouterr().out
    assert len(load(out)) == 3
