"""Indexes of shards in the cache: when one is used, and when the shard is listed again."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lineage.cli import main
from lineage.data import load_dataset, shard_index, wds
from lineage.data.contract import CaptionedDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "SMALL", 0)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards whose members were listed."""
    names: list[str] = []
    members = wds._members

    def counted(root: Path, shard: str, skipped: list) -> object:  # type: ignore[type-arg]
        names.append(shard)
        return members(root, shard, skipped)

    monkeypatch.setattr(wds, "_members", counted)
    return names


def write_shard(path: Path, *captions: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, caption in enumerate(captions):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(file, "PNG")
            row = b'{"split": "test", "label": 3, "width": 1.5}'
            files = {"png": file.getvalue(), "txt": caption.encode(), "json": row}
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def load(root: Path) -> CaptionedDataset:
    return load_dataset(f"wds:{root}", "all", 8)


def contents(data: CaptionedDataset) -> list[object]:
    examples = [(e.id, e.captions, e.label, e.meta, e.image.tolist()) for e in data]
    return [examples, data.skipped]


def test_a_second_start_is_the_same_and_lists_no_shard(tmp_path: Path, listings: list[str]) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite", "", "a dog\nтри кота")
    write_shard(tmp_path / "s/1.tar", "a cat")
    first = contents(load(tmp_path / "s"))
    assert listings == ["0.tar", "1.tar"]
    assert contents(load(tmp_path / "s")) == first and len(listings) == 2


def test_a_shard_that_changed_is_listed_again(tmp_path: Path, listings: list[str]) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite")
    write_shard(tmp_path / "s/1.tar", "a cat")
    load(tmp_path / "s")
    write_shard(tmp_path / "s/1.tar", "a dog")
    assert [e.captions[0] for e in load(tmp_path / "s")] == ["a kite", "a dog"]
    assert listings == ["0.tar", "1.tar", "1.tar"]
    (tmp_path / "s").rename(tmp_path / "moved")
    load(tmp_path / "moved")
    assert len(listings) == 5


@pytest.mark.parametrize(
    "junk",
    [b"", b"junk", gzip.compress(b"[1]"), gzip.compress(b"{")],
    ids=["empty", "junk", "list", "cut"],  # a compressed file holds the time
)
def test_a_damaged_index_is_made_again(
    junk: bytes, tmp_path: Path, own_cache: Path, listings: list[str]
) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite")
    first = contents(load(tmp_path / "s"))
    (index,) = own_cache.iterdir()
    sound = index.read_bytes()
    index.write_bytes(junk)
    assert contents(load(tmp_path / "s")) == first and len(listings) == 2
    assert len(index.read_bytes()) == len(sound)


def test_a_damaged_shard_has_no_index(tmp_path: Path, own_cache: Path, listings: list[str]) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite", "a dog")
    raw = (tmp_path / "s/0.tar").read_bytes()
    (tmp_path / "s/0.tar").write_bytes(raw[:5000])
    load(tmp_path / "s")
    assert not own_cache.exists()


def test_small_shards_have_no_index(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite")
    size = (tmp_path / "s/0.tar").stat().st_size
    monkeypatch.setattr(shard_index, "SMALL", size + 1)
    load(tmp_path / "s")
    assert not own_cache.exists()
    monkeypatch.setattr(shard_index, "SMALL", size)
    load(tmp_path / "s")
    assert len(list(own_cache.iterdir())) == 1


def test_the_index_of_the_longest_time_ago_goes_first(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}/0.tar", "a kite")
        load(tmp_path / f"{number}")
    for place, (path, _, _) in enumerate(shard_index.indexes()):
        os.utime(path, (place, place))
    oldest, middle, newest = (path for path, _, _ in shard_index.indexes())
    monkeypatch.setattr(shard_index, "LIMIT", 2 * newest.stat().st_size)
    write_shard(tmp_path / "3/0.tar", "a kite")
    load(tmp_path / "3")
    assert not oldest.exists() and not middle.exists() and newest.exists()


def test_the_command_deletes_indexes(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "s/0.tar", "a kite")
    load(tmp_path / "s")
    assert main(["data", "cache", "--clear"]) == 0
    out = capsys.readouterr().out
    assert "Indexes of shards: 1," in out and "2 deleted." in out
    assert not list(own_cache.iterdir())
