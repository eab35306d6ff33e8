"""`folder:`, and what all data sets on a disk share."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from lineage.data import load_dataset, parse_spec, records
from lineage.data.contract import Batch, CaptionedDataset, to_unit
from lineage.data.pictures import PictureDataset
from lineage.errors import UserError


def save_picture(
    path: Path, colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (32, 32)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def save_captions(path: Path, *captions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")


def save_pair(
    root: Path, key: str, *captions: str, colour: tuple[int, ...] = (200, 30, 30)
) -> None:
    save_picture(root / f"{key}.png", colour)
    save_captions(root / f"{key}.txt", *captions)


def reasons(dataset: CaptionedDataset) -> dict[str, str]:
    return {s.path: s.reason for s in dataset.skipped}


def test_every_line_is_a_caption_and_the_id_is_the_path(tmp_path: Path) -> None:
    save_pair(tmp_path, "b/cat", "  a red cat ", "", "one cat", colour=(1, 2, 3))
    save_pair(tmp_path, "cat", "another cat")
    data = load_dataset(f"folder:{tmp_path}")
    assert [e.id for e in data] == ["b/cat", "cat"]
    assert data[0].captions == ("a red cat", "one cat")
    assert data[0].image.shape == (3, 32, 32) and data[0].image.dtype == torch.uint8
    assert data[0].image[:, 5, 5].tolist() == [1, 2, 3]
    assert data.skipped == [] and data.split == "train" and data.name == f"folder:{tmp_path}"


def test_every_skipped_file_is_reported(tmp_path: Path) -> None:
    save_pair(tmp_path, "good", "a good one")
    save_picture(tmp_path / "mute.png")
    save_captions(tmp_path / "blind.txt", "nothing to see")
    save_pair(tmp_path, "blank", " ", "")
    save_picture(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("un café".encode("latin-1"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    save_captions(tmp_path / "broken.txt", "a broken one")
    whole = save_picture(tmp_path / "torn.png", size=(64, 64)).read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:-40])
    save_captions(tmp_path / "torn.txt", "half a file")
    save_picture(tmp_path / "good.webp")
    data = load_dataset(f"folder:{tmp_path}")
    assert [e.id for e in data] == ["good"]
    skipped = reasons(data)
    assert set(skipped) == {
        "mute.png",
        "blind.txt",
        "blank.txt",
        "latin.txt",
        "broken.jpg",
        "torn.png",
        "good.webp",
    }
    assert "mute.txt is missing" in skipped["mute.png"]
    assert "without a picture" in skipped["blind.txt"]
    assert "no caption" in skipped["blank.txt"]
    assert "UTF-8" in skipped["latin.txt"]
    assert "good.png is used" in skipped["good.webp"]


def test_rows_stay_aligned_when_pictures_in_the_middle_are_broken(tmp_path: Path) -> None:
    for number in range(6):
        save_pair(tmp_path, f"p{number}", f"number {number}", colour=(number * 40, 0, 0))
    for number in (0, 3):
        (tmp_path / f"p{number}.png").write_bytes(b"broken")
    data = load_dataset(f"folder:{tmp_path}")
    assert [(e.captions[0], int(e.image[0, 0, 0])) for e in data] == [
        (f"number {n}", n * 40) for n in (1, 2, 4, 5)
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_a_caption(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.PNG")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfa red cat\r\na cat\r\n")
    assert load_dataset(str(tmp_path))[0].captions == ("a red cat", "a cat")


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", "a")
    for hidden in ("._a.png", ".hidden/b.png", "__MACOSX/c.png"):
        save_picture(tmp_path / hidden)
    data = load_dataset(f"folder:{tmp_path}")
    assert len(data) == 1 and data.skipped == []


def test_names_of_any_bytes_are_escaped_and_unique(tmp_path: Path) -> None:
    names = ["caf\udce9", r"caf\xe9", "a\nb", "\x1b[31m", "dir\udcff/x"]
    for number, name in enumerate(names):
        save_pair(tmp_path, name, "x", colour=(number, 0, 0))
    save_picture(tmp_path / "mute\udce9.png")
    data = load_dataset(str(tmp_path))
    expected = {
        r"\x1b[31m": 3,
        r"a\nb": 2,
        r"caf\xe9": 1,
        r"caf\xe9-2": 0,
        r"dir\xff/x": 4,
    }
    assert {e.id: int(e.image[0, 0, 0]) for e in data} == expected
    assert {s.path for s in data.skipped} == {r"mute\xe9.png"}
    assert isinstance(data, PictureDataset) and data.fingerprint()
    assert data.batch([0, 1], [0, 0], seed=1).id == [e.id for e in data][:2]
    assert all(e.meta["source"].isprintable() for e in data)


def test_an_escaped_name_is_not_taken_from_another() -> None:
    paths = ["a\n", r"a\n", r"a\n-2", "b"]
    assert records.unique_ids(paths) == [r"a\n", r"a\n-3", r"a\n-2", "b"]


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "tif", "TIFF", "avif"])
def test_less_common_names_of_pictures_are_read(tmp_path: Path, suffix: str) -> None:
    form = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF"}.get(suffix, "TIFF")
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", form)
    save_captions(tmp_path / "a.txt", "x")
    assert len(load_dataset(str(tmp_path))) == 1


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "crème") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        (f"{COMPOSED}/{DECOMPOSED}", f"{DECOMPOSED}/{COMPOSED}"),
    ],
)
def test_accents_may_be_written_in_two_ways(tmp_path: Path, picture: str, text: str) -> None:
    save_picture(tmp_path / f"{picture}.png")
    save_captions(tmp_path / f"{text}.txt", "x")
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == [picture] and data.skipped == []


def test_an_exact_name_goes_before_one_with_other_accents(tmp_path: Path) -> None:
    for name, caption in ((COMPOSED, "one"), (DECOMPOSED, "two")):
        save_pair(tmp_path, name, caption)
    captions = {e.id: e.captions for e in load_dataset(str(tmp_path))}
    assert captions == {COMPOSED: ("one",), DECOMPOSED: ("two",)}
    (tmp_path / f"{DECOMPOSED}.txt").unlink()
    data = load_dataset(str(tmp_path))
    assert {e.id: e.captions for e in data} == {COMPOSED: ("one",)}
    assert list(reasons(data)) == [f"{DECOMPOSED}.png"]


def test_texts_may_be_utf16_and_hold_halves_of_characters(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("un café\r\nЮ\0".encode("utf-16"))
    assert load_dataset(str(tmp_path))[0].captions == ("un café", "Ю\N{REPLACEMENT CHARACTER}")


def test_only_regular_files_of_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "pipe", "device", "large", "gone"):
        save_pair(tmp_path, name, "x")
        if name in ("pipe", "device", "gone"):
            (tmp_path / f"{name}.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with (tmp_path / "large.txt").open("ab") as file:
        file.truncate(records.MAX_TEXT + 1)
    os.mkfifo(tmp_path / "tube.png")
    save_captions(tmp_path / "tube.txt", "x")
    data = load_dataset(str(tmp_path))
    assert [e.id for e in data] == ["good"]
    skipped = reasons(data)
    for path, words in {
        "pipe.txt": "it is a pipe",
        "device.txt": "it is a device",
        "large.txt": "more than the 1 MB",
        "gone.txt": "No such file",
        "tube.png": "it is a pipe",
    }.items():
        assert words in skipped.pop(path)
    assert not skipped


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ENAMETOOLONG])
def test_a_folder_that_fails_is_named_and_the_rest_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    for key in ("a", "closed/b", "closed/inside/c", "z/d"):
        save_pair(tmp_path, key, "x")
    scandir = os.scandir

    def fail(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)).name == "closed":
            raise OSError(error, os.strerror(error), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    for spec in (str(tmp_path), f"folder:{tmp_path}"):
        data = load_dataset(spec)
        assert [e.id for e in data] == ["a", "z/d"]
        assert reasons(data) == {"closed": f"the folder cannot be opened: {os.strerror(error)}"}


def test_the_depth_of_folders_is_not_bounded_by_python(tmp_path: Path) -> None:
    save_pair(tmp_path.joinpath(*["d"] * 150), "a", "x")
    limit, frames = sys.getrecursionlimit(), len(inspect.stack())
    sys.setrecursionlimit(frames + 100)
    try:
        files = records.list_files(tmp_path, [])
    finally:
        sys.setrecursionlimit(limit)
    assert files == ["d/" * 150 + "a.png", "d/" * 150 + "a.txt"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    save_pair(tmp_path / "elsewhere", "a", "a")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert [e.id for e in load_dataset(f"folder:{tmp_path / 'set'}")] == ["linked/a"]


def test_transparency_becomes_white_and_any_mode_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (32, 32), (0, 0)).save(tmp_path / "clear_grey.png")
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "clear_palette.png", transparency=0)
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    Image.fromarray(np.full((32, 32), 77 * 256, np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    for file in list(tmp_path.iterdir()):
        save_captions(file.with_suffix(".txt"), "x")
    data = load_dataset(str(tmp_path))
    centre = {e.id: e.image[:, 16, 16].tolist() for e in data}
    assert centre["clear"] == centre["clear_grey"] == centre["clear_palette"] == [255] * 3
    assert centre["grey"] == centre["deep"] == [77] * 3
    red, green, blue = centre["ink"]
    assert red > 200 and max(green, blue) < 60


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "white")
    image.paste((255, 0, 0), (0, 0, 32, 16))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    image.save(tmp_path / "a.png", exif=exif)
    save_captions(tmp_path / "a.txt", "x")
    turned = load_dataset(str(tmp_path))[0].image
    assert turned[:, 4, 16].tolist() == [255, 255, 255]
    assert turned[:, 28, 16].tolist() == [255, 0, 0]


def test_pictures_are_cropped_to_the_centred_square(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "blue")
    wide.paste((255, 0, 0), (32, 0, 64, 32))
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "high.png")
    for name in ("wide", "high"):
        save_captions(tmp_path / f"{name}.txt", "x")
    for example in load_dataset(str(tmp_path)):
        assert (example.image == torch.tensor([255, 0, 0])[:, None, None]).all()


def test_large_jpegs_are_resized_accurately(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 512, dtype=np.uint8)[None, :, None], (512, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.jpg", quality=95)
    save_captions(tmp_path / "ramp.txt", "x")
    actual = load_dataset(str(tmp_path), size=16)[0].image.float()
    expected = torch.linspace(0, 255, 512).view(16, 32).mean(1)
    assert (actual - expected).abs().max() < 4


def test_batch_equals_the_plain_implementation(tmp_path: Path) -> None:
    for number in range(5):
        captions = [f"caption {number} {k}" for k in range(number + 1)]
        save_pair(tmp_path, f"p{number}", *captions, colour=(number * 50, 10, 20))
    data = load_dataset(str(tmp_path))
    indices, epochs = [3, 0, 3, 4], [0, 7, 1, 12]
    batch = data.batch(indices, epochs, seed=5)
    plain = CaptionedDataset.batch(data, indices, epochs, seed=5)
    assert torch.equal(batch.image, plain.image) and batch.image.dtype == torch.float32
    assert batch.caption == plain.caption and batch.id == plain.id and batch.label is None
    assert torch.equal(batch.image[0], to_unit(data[3].image))
    captions_of_visits = {data.batch([4], [epoch], seed=5).caption[0] for epoch in range(60)}
    assert captions_of_visits == set(data[4].captions)


def test_an_example_does_not_share_memory_with_the_data(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", "x")
    data = load_dataset(str(tmp_path))
    data[0].image.zero_()
    assert data[0].image.any()


def test_the_fingerprint_depends_on_ids_captions_and_pixels(tmp_path: Path) -> None:
    def fingerprint(root: str, key: str = "a", caption: str = "x", red: int = 9) -> str:
        save_pair(tmp_path / root, key, caption, colour=(red, 0, 0))
        data = load_dataset(str(tmp_path / root))
        assert isinstance(data, PictureDataset)
        return data.fingerprint()

    first = fingerprint("0")
    others = [fingerprint("2", key="b"), fingerprint("3", caption="y"), fingerprint("4", red=8)]
    assert fingerprint("1") == first
    assert len({first, *others}) == 4


def test_a_folder_without_a_usable_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing can be loaded"):
        load_dataset(f"folder:{tmp_path}")
    save_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*a\.txt is missing.*one caption a line"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "a.png").write_bytes(b"no")
    save_captions(tmp_path / "a.txt", "x")
    with pytest.raises(UserError, match=r"a\.png: .*no picture"):
        load_dataset(f"folder:{tmp_path}")


def test_a_split_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    save_pair(tmp_path, "a", "x")
    with pytest.raises(UserError, match=r"no split 'test'.*train \(1\)"):
        load_dataset(f"folder:{tmp_path}", split="test")
    assert len(load_dataset(f"folder:{tmp_path}", split="all")) == 1


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_impossible_sizes_are_errors(tmp_path: Path, size: int) -> None:
    save_pair(tmp_path, "a", "x")
    with pytest.raises(UserError, match=str(size)):
        load_dataset(f"folder:{tmp_path}", size=size)


def test_specs_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "pics", "a", "x")
    (tmp_path / "odd:name").mkdir()
    assert parse_spec("shapes") == ("shapes", "")
    assert parse_spec("shapes:hard") == ("shapes", "hard")
    assert parse_spec("folder:a/b:c") == ("folder", "a/b:c")
    assert parse_spec("pics") == ("folder", "pics")
    assert parse_spec("odd:name") == ("folder", "odd:name")
    assert load_dataset("shapes").name == "shapes:easy"
    assert load_dataset("pics").name == "folder:pics"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("shape", "did you mean 'shapes'"),
        ("foldr:x", "did you mean 'folder'"),
        ("zebra:x", "there is: coco, cub, emoji, flickr8k, flowers, folder, "),
        ("shapes:esay", "did you mean 'easy'"),
        ("folder:", "folder:PATH"),
        ("folder", "There is no data set or folder 'folder'"),
        ("folder:no/such/place", "no/such/place"),
        ("no/such/place", "no/such/place"),
        (r"C:\pictures", "no data set or folder"),
        ("C:/pictures", "no data set or folder"),
        ("", "no data set or folder"),
        ("~nosuchuser/x", "home folder that is not known"),
        ("folder:~nosuchuser/x", "home folder that is not known"),
        ("a\0b", "character 0"),
        ("folder:" + "x" * 5000, "There is no folder"),
    ],
)
def test_wrong_specs_are_explained(spec: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(spec)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_not_a_data_set(tmp_path: Path) -> None:
    file = save_picture(tmp_path / "a.png")
    for spec in (str(file), f"folder:{file}"):
        with pytest.raises(UserError, match="is a file"):
            load_dataset(spec)


def test_same_pairs_are_rows_with_equal_captions_or_labels() -> None:
    """Equal words in equal order, the empty caption too; with `class` also equal labels."""
    label = torch.tensor([0, 1, 2, 3, 1])
    batch = Batch(torch.zeros(5, 3, 4, 4), ["a b", "b a", "a b", "", ""], label, ["0"] * 5)
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[3, 4] = expected[4, 3] = True
    assert torch.equal(batch.same_pairs("caption"), expected)
    expected[1, 4] = expected[4, 1] = True
    assert torch.equal(batch.same_pairs("class"), expected)
