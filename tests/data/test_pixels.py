"""The store of decoded pictures: decoded once, sound, bounded; and data sets that are streamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lineage.cli import main
from lineage.data import load_dataset, pictures, pixels
from lineage.data.contract import to_unit
from lineage.data.decoding import decode
from lineage.data.pictures import PictureDataset
from lineage.data.pixels import PixelStore, open_store
from lineage.data.tools import export
from lineage.errors import UserError
from lineage.training.loader import Loader


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned pictures."""
    root = tmp_path / "data"
    root.mkdir()
    for number in range(6):
        save(root, number)
    return root


def save(root: Path, number: int) -> None:
    noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(noise).save(root / f"{number}.png")
    (root / f"{number}.txt").write_text(f"picture {number}\nnumber {number}")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that are decoded from now on."""
    names: list[str] = []

    def note(source: Path, *options: object, **more: object) -> object:
        names.append(source.name)
        return decode(source, *options, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "decode", note)
    return names


def load(root: Path, size: int = 8, split: str = "train") -> PictureDataset:
    data = load_dataset(f"folder:{root}", split, size)
    assert isinstance(data, PictureDataset)
    return data


def pixels_of(data: PictureDataset) -> torch.Tensor:
    """(N, 3, S, S), all of them."""
    return torch.stack([example.image for example in data])


def only(cache: Path) -> Path:
    (store,) = cache.iterdir()
    return store


# --- decoded once -----------------------------------------------------------------------------


def test_a_second_start_decodes_nothing(folder: Path, decoded: list[str]) -> None:
    first = load(folder)
    assert sorted(decoded) == [f"{i}.png" for i in range(6)]
    decoded.clear()
    second = load(folder, split="all")
    assert decoded == [] and torch.equal(pixels_of(second), pixels_of(first))
    assert second.fingerprint() == first.fingerprint()


@pytest.mark.parametrize("change", ["bytes", "size", "crop"])
def test_other_pixels_are_decoded_anew(change: str, folder: Path, decoded: list[str]) -> None:
    """Also for a file of the same length, whose date of change was set back."""
    before = pixels_of(load(folder))
    decoded.clear()
    if change == "bytes":
        file = folder / "2.png"
        dates = file.stat()
        raw = bytearray(file.read_bytes())
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
        file.write_bytes(file.read_bytes()[: len(raw)].ljust(len(raw), b"\0"))
        os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        after = pixels_of(load(folder))
        assert not torch.equal(after[2], before[2]) and torch.equal(after[3:], before[3:])
    elif change == "size":
        assert pixels_of(load(folder, size=16)).shape == (6, 3, 16, 16)
    else:
        load_dataset(f"folder:{folder}?crop=pad", size=8)
    assert "2.png" in decoded


def test_damaged_rows_are_decoded_again(folder: Path, cache: Path, decoded: list[str]) -> None:
    before = pixels_of(load(folder))
    decoded.clear()
    with (only(cache) / "pixels").open("r+b") as file:
        file.seek(3 * 192 + 17)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert torch.equal(pixels_of(load(folder)), before)
    assert decoded == ["3.png"]


def test_a_picture_that_was_broken_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the system, unlike one of the file, may be gone without a new date."""
    with monkeypatch.context() as patch:

        def refuse(source: Path, *rest: object, **more: object) -> object:
            if source.name == "4.png":
                raise PermissionError(13, "Permission denied")
            return decode(source, *rest, **more)  # type: ignore[arg-type]

        patch.setattr(pictures, "decode", refuse)
        data = load(folder)
        assert len(data) == 5 and "permission denied" in data.skipped[0].reason
    data = load(folder)
    assert len(data) == 6 and data.skipped == []
    assert data[4].captions[0] == "picture 4"


# --- where there is no cache ------------------------------------------------------------------


def test_without_a_cache_pictures_are_read_all_the_same(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = pixels_of(load(folder))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "file"))
    assert torch.equal(pixels_of(load(folder)), expected)
    assert "LINEAGE_CACHE sets another folder" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the disk is not asked here")
def test_a_full_disk_is_told_before_anything_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"need up to 0\.1 GB in .*No space left.*TMPDIR"):
        load(folder)
    assert decoded == []


def test_stores_are_bounded_and_the_oldest_goes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.full((3, 64, 64), 7, np.uint8)
    monkeypatch.setattr(pixels, "LIMIT", 3 * (10 * row.nbytes + 4096))
    for age, key in enumerate("abc"):
        open_store(32 * key, 10, (64, 64)).put(0, row)
        os.utime(cache / (32 * key), (age, age))
    (cache / "mine").mkdir()
    (cache / "mine" / "thesis.txt").write_text("x")
    open_store(32 * "a", 10, (64, 64))  # used again
    open_store(32 * "d", 10, (64, 64))
    names = {path.name[0] for path in cache.iterdir()}
    assert names == {"a", "c", "d", "m"}
    assert main(["data", "cache", "--clear"]) == 0
    assert [path.name for path in cache.rglob("*")] == ["mine", "thesis.txt"]


def test_of_a_data_set_over_the_limit_the_first_pictures_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pixels, "SMALL", 0)
    monkeypatch.setattr(pixels, "LIMIT", 4 * 192)
    store = open_store(32 * "a", 6, (8, 8))
    row = np.ones((3, 8, 8), np.uint8)
    for number in range(6):
        store.put(number, row)
    assert (
        store.missing(np.arange(6)) == [4, 5]
        and (store.folder / "pixels").stat().st_size == 4 * 192
    )


@pytest.mark.parametrize("text", ["many", "-1", "nan"])
def test_a_wrong_limit_is_told(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAGE_PIXELS_GB", text)
    with pytest.raises(UserError, match="LINEAGE_PIXELS_GB"):
        load(folder)


def test_pages_that_were_read_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same when they are read again, though they were not saved."""
    monkeypatch.setattr(pixels, "RELEASE_AFTER", 0)
    store = PixelStore(None, 2, (8, 8), 2)
    row = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    store.put(1, row)
    assert np.array_equal(store.get(1), row)  # type: ignore[arg-type]
    assert np.array_equal(store.take(np.array([1, 1]))[0], row)


def test_the_command_lists_and_clears_the_cache(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(folder)
    assert main(["data", "cache"]) == 0
    listed = capsys.readouterr().out
    assert only(cache).name in listed and "1 data set" in listed
    assert main(["data", "cache", "--clear"]) == 0
    assert list(cache.iterdir()) == []
    assert main(["data", "cache"]) == 0
    assert "nothing" in capsys.readouterr().out


def test_a_data_set_over_the_limit_is_streamed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    expected = pixels_of(load(folder))
    monkeypatch.setattr(pixels, "SMALL", 0)
    monkeypatch.setattr(pixels, "LIMIT", 4 * 192)
    (folder / "0.txt").touch()
    save(folder, 6)
    decoded.clear()
    data = load(folder)
    assert data.streamed and decoded == []
    assert torch.equal(data.batch(range(6), [0] * 6, 0).image, to_unit(expected))
    data.batch([5, 5], [0, 0], 0)  # has no row
    assert decoded.count("5.png") == 2 and decoded.count("3.png") == 1


def test_what_is_damaged_beyond_reading_is_made_again(folder: Path, cache: Path) -> None:
    expected = pixels_of(load(folder))
    store = only(cache)
    (store / "sums").unlink()
    (store / "sums").mkdir()
    assert torch.equal(pixels_of(load(folder)), expected) and (store / "sums").is_file()


def test_a_damaged_store_that_stays_is_told_and_left(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = pixels_of(load(folder))
    (only(cache) / "sums").unlink()
    (only(cache) / "sums").mkdir()
    monkeypatch.setattr(pixels, "remove", lambda folder: False)
    assert torch.equal(pixels_of(load(folder)), expected)
    assert "decoded again in each run" in capsys.readouterr().err


# --- streamed ---------------------------------------------------------------------------------


@pytest.fixture
def streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], PictureDataset]:
    """A function that loads the folder as a data set that is too large to be decoded at once."""
    monkeypatch.setattr(pictures, "STREAM_FROM", 3)
    monkeypatch.setattr("lineage.data.folder.STREAM_FROM", 3)
    return lambda: load(folder)


def test_a_large_data_set_is_decoded_when_it_is_due(
    folder: Path, streamed: Callable[[], PictureDataset], decoded: list[str]
) -> None:
    data = streamed()
    assert decoded == [] and data.streamed
    batch = data.batch([4, 1, 4], [0, 0, 1], 0)
    assert sorted(decoded) == ["1.png", "4.png"]
    data.batch([1, 4], [2, 2], 0)
    assert len(decoded) == 2
    shutil.rmtree(os.environ["LINEAGE_CACHE"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "STREAM_FROM", 100)
        patch.setattr("lineage.data.folder.STREAM_FROM", 100)
        whole = load(folder)
    expected = whole.batch([4, 1, 4], [0, 0, 1], 0)
    assert torch.equal(batch.image, expected.image) and batch.caption == expected.caption
    assert list(data.all_captions()) == list(whole.all_captions())
    assert data[5].captions == whole[5].captions and torch.equal(data[5].image, whole[5].image)


def test_in_place_of_a_bad_picture_or_text_comes_the_next(
    folder: Path, streamed: Callable[[], PictureDataset]
) -> None:
    (folder / "1.png").write_bytes(b"broken")
    (folder / "2.txt").write_text("\n")
    (folder / "5.png").write_bytes(b"")
    data = streamed()
    assert data.batch([0, 1, 2, 5], [0] * 4, 0).id == ["0", "3", "3", "0"]
    assert data[1].id == "3"
    assert sorted(s.path for s in data.skipped) == ["1.png", "2.txt", "5.png"]
    again = streamed()  # in another order
    assert again[5].id == "0" and again[2].id == "3" and again[1].id == "3"


def test_a_streamed_data_set_is_passed_once(
    folder: Path, streamed: Callable[[], PictureDataset], tmp_path: Path
) -> None:
    (folder / "1.png").write_bytes(b"broken")
    assert [e.id for e in streamed()] == ["0", "2", "3", "4", "5"]
    assert streamed()[-1].id == "5" and streamed().batch([-5], [0], 0).id == ["2"]
    assert export(streamed(), tmp_path / "out") == 5


def test_a_small_split_of_a_large_folder_has_its_captions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lineage.data.folder.STREAM_FROM", 3)
    (folder / "2.txt").write_text("\n")
    data = load(folder)
    assert not data.streamed and [s.path for s in data.skipped] == ["2.txt"]
    assert data[1].captions == ("picture 1", "number 1") and len(data) == 5
    before = data.fingerprint()
    (folder / "1.txt").write_text("other")
    assert load(folder).fingerprint() != before


def test_a_streamed_data_set_without_a_good_picture_ends(
    folder: Path, streamed: Callable[[], PictureDataset]
) -> None:
    for number in range(6):
        (folder / f"{number}.png").write_bytes(b"broken")
    data = streamed()
    with pytest.raises(UserError, match=r"Nothing can be loaded.*0\.png"):
        data.batch([0], [0], 0)


def test_check_reads_all_of_a_streamed_data_set(
    folder: Path, streamed: Callable[[], PictureDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"broken")
    (folder / "2.txt").write_text("\n")
    assert main(["data", "check", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "4 pictures, 8 captions" in printed and "1.png" in printed and "2.txt" in printed


def test_the_loader_reads_the_same_batches_streamed_or_not(
    folder: Path, streamed: Callable[[], PictureDataset]
) -> None:
    data = streamed()
    batches = [Loader(data, 4, seed=1).at(i) for i in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "STREAM_FROM", 100)
        whole = Loader(load(folder), 4, seed=1)
    for number, batch in enumerate(batches):
        expected = whole.at(number)
        assert batch.id == expected.id and batch.caption == expected.caption
        assert torch.equal(batch.image, expected.image)


def test_the_fingerprint_of_a_streamed_data_set_follows_its_files(
    folder: Path, streamed: Callable[[], PictureDataset]
) -> None:
    first = streamed().fingerprint()
    assert streamed().fingerprint() == first
    (folder / "3.png").chmod(0o600)
    assert streamed().fingerprint() == first
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    second = streamed().fingerprint()
    assert second != first
    (folder / "4.txt").write_text("other words")
    assert streamed().fingerprint() != second


def test_names_that_are_not_utf8_have_a_fingerprint(
    folder: Path, streamed: Callable[[], PictureDataset]
) -> None:
    for ending in (".png", ".txt"):
        name = os.fsencode(folder / "1") + b"\xe9" + ending.encode()
        with open(name, "wb") as file:
            file.write((folder / f"1{ending}").read_bytes())
    assert len(streamed().fingerprint()) == 32
