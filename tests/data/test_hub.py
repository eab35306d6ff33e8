"""`hub:` data sets: those that `datasets` saved or reads from a folder, without a network."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lineage.cli import main
from lineage.data import hub, hub_source, load_dataset, parse_spec, pictures
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets`, with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets", reason="datasets is an extra, lineage-t2i[hub]")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "library" / name)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a test asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub_source, "_is_online", lambda: False)
    return datasets


def png(number: int = 0, form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A picture of one colour, red = 10 * number."""
    file = io.BytesIO()
    Image.new("RGB", (40, 32), (10 * number, 0, 0)).convert(mode).save(file, form, **options)
    return file.getvalue()


def columns(count: int = 4, first: int = 0) -> dict[str, list[Any]]:
    """Pictures `first`, `first + 1`, ..., each with a caption."""
    numbers = range(first, first + count)
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    return {"image": images, "text": [f"picture {n}" for n in numbers]}


def table(library: Any, values: dict[str, list[Any]], **features: Any) -> Any:
    """A `Dataset` of these columns; `image` is of type `Image` if no other type is named."""
    types = {name: library.Value("string") for name in values} | {"image": library.Image()}
    known = {name: types[name] for name in values} | features
    return library.Dataset.from_dict(values, features=library.Features(known))


def saved(folder: Path, data: Any) -> str:
    """The spec of a data set that is saved in a folder."""
    data.save_to_disk(str(folder))
    return f"hub:{folder}"


def load(spec: str, split: str = "all") -> CaptionedDataset:
    return load_dataset(spec, split, 8)


def sentence(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- columns and rows -------------------------------------------------------------------------


def test_rows_are_captioned_pictures(library: Any, tmp_path: Path) -> None:
    """With captions in lists of lists, a class, and other columns in `meta`."""
    classes = library.ClassLabel(names=["a_cat", "dog"])
    values = columns() | {
        "text": [[["a", "b"], [f"{n}"]] for n in range(4)],
        "label": [0, 1, 1, None],
        "kind": [1, 0, 0, 0],
        "vector": [[0.5]] * 4,
        "licence": ["CC0"] * 4,
    }
    data = table(
        library,
        values,
        text=[[library.Value("string")]],
        label=classes,
        kind=classes,
        vector=[library.Value("float32")],
    )
    loaded = load(saved(tmp_path / "set", data))
    assert [(e.id, e.captions, e.label) for e in loaded] == [
        ("train/0", ("a", "b", "0"), 0),
        ("train/1", ("a", "b", "1"), 1),
        ("train/2", ("a", "b", "2"), 1),
        ("train/3", ("a", "b", "3"), None),
    ]
    assert [int(e.image[0, 4, 4]) for e in loaded] == [0, 10, 20, 30] and loaded.skipped == []
    expected = {"source": "1.png", "class": "dog", "kind": "a_cat", "licence": "CC0"}
    assert loaded[1].meta == expected | {"split": "train"}


def test_columns_of_other_names_are_options(library: Any, tmp_path: Path) -> None:
    values = columns(2) | {"photo": [png(7), png(8)], "alt": ["seven", "eight"], "label": [0, 1]}
    data = table(
        library,
        values,
        photo=library.Value("binary"),
        label=library.ClassLabel(names=["a_cat", "dog"]),
    )
    spec = saved(tmp_path / "set", data)
    other = load(f"{spec}?image=photo&caption=alt")
    assert [(int(e.image[0, 4, 4]), e.captions) for e in other] == [
        (70, ("seven",)),
        (80, ("eight",)),
    ]
    assert [e.captions for e in load(f"{spec}?caption=label")] == [("a cat",), ("dog",)]
    assert [e.captions for e in load(spec)] == [("picture 0",), ("picture 1",)]


def test_a_column_of_bytes_needs_no_option(library: Any, tmp_path: Path) -> None:
    values = {"img": [png(1), png(2)], "caption": ["one", "two"]}
    data = table(library, values, img=library.Value("binary"))
    assert [e.captions[0] for e in load(saved(tmp_path / "set", data))] == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("", "no column of captions: it has image, words; name one with ?caption=COLUMN"),
        ("?caption=nothing", "no column 'nothing': it has image, words"),
        ("?caption=image", "holds no captions"),
        ("?image=words", "holds no pictures"),
        ("?caption=words&crop=box", "no crop=box: it has centre, pad, random"),
        ("?words=caption", "has no option 'words'"),
        ("?config=x", "has no configurations"),
    ],
)
def test_wrong_options_are_told(library: Any, tmp_path: Path, options: str, part: str) -> None:
    values = columns(2)
    data = table(library, {"image": values["image"], "words": values["text"]})
    assert part in sentence(saved(tmp_path / "set", data) + options)


def test_without_pictures_the_columns_are_named(library: Any, tmp_path: Path) -> None:
    data = table(library, {"text": ["a"], "url": ["https://example.org/a.png"]})
    assert "no column of pictures: it has text, url" in sentence(saved(tmp_path / "set", data))


def test_ids_are_those_of_the_rows_if_they_are_unique(library: Any, tmp_path: Path) -> None:
    data = {"a": table(library, columns(2) | {"id": ["x", "y"]})}
    assert [e.id for e in load(saved(tmp_path / "one", data["a"]))] == ["x", "y"]
    data["b"] = table(library, columns(2) | {"id": ["x", "z"]})
    both = load(saved(tmp_path / "two", library.DatasetDict(data)))
    assert [e.id for e in both] == ["a/0", "a/1", "b/0", "b/1"]


def test_what_cannot_be_used_is_named(library: Any, tmp_path: Path) -> None:
    """Each row with its split and number; the other rows are loaded."""
    values = columns(5)
    values["image"][1]["bytes"] = b"no picture"
    values["image"][2] = None
    values["text"][3] = " "
    loaded = load(saved(tmp_path / "set", table(library, values)))
    assert [e.id for e in loaded] == ["train/0", "train/4"]
    reasons = {skipped.path: skipped.reason for skipped in loaded.skipped}
    assert "no picture of a known format" in reasons["train/1"]
    assert "no picture" in reasons["train/2"] and "no caption" in reasons["train/3"]


def test_pictures_are_decoded_as_those_of_files(library: Any, tmp_path: Path) -> None:
    """CMYK, and turned upright as EXIF says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file, turned = io.BytesIO(), Image.new("RGB", (40, 20), "red")
    turned.paste("blue", (0, 0, 20, 20))
    turned.save(file, "PNG", exif=exif)
    raws = [png(20, "JPEG", "CMYK"), file.getvalue()]
    values = {"image": [{"bytes": raw, "path": None} for raw in raws], "text": ["a", "b"]}
    cmyk, upright = load(saved(tmp_path / "set", table(library, values)) + "?crop=pad")
    assert abs(int(cmyk.image[0, 4, 4]) - 200) < 8
    top, bottom, edge = (upright.image[:, y, x].tolist() for y, x in ((1, 4), (6, 4), (4, 0)))
    assert top[2] > 250 > 5 > top[0] and bottom[0] > 250 > 5 > bottom[2]
    assert edge == [255, 255, 255]


# --- splits -----------------------------------------------------------------------------------


def test_splits_are_those_of_the_data_set(library: Any, tmp_path: Path) -> None:
    tables = {"train": columns(3), "val": columns(2, 3), "fold 1": columns(1, 5)}
    data = library.DatasetDict({name: table(library, own) for name, own in tables.items()})
    spec = saved(tmp_path / "set", data)
    splits = ("train", "validation", "fold 1", "all")
    assert [len(load(spec, split)) for split in splits] == [3, 2, 1, 6]
    assert [e.id for e in load(spec, "validation")] == ["val/0", "val/1"]
    with pytest.raises(UserError, match=r"no split 'test': it has train \(3\), validation \(2\)"):
        load(spec, "test")
    assert {e.meta["split"] for e in load(f"{spec}?splits=seeded")} <= {
        "train",
        "validation",
        "test",
    }


def test_a_column_divides_a_set_with_one_split(library: Any, tmp_path: Path) -> None:
    values = columns(3) | {"split": ["train", "val", "test"]}
    spec = saved(tmp_path / "set", table(library, values))
    assert [e.captions[0] for e in load(spec, "validation")] == ["picture 1"]


def test_a_split_without_captions_is_named(library: Any, tmp_path: Path) -> None:
    data = {"train": table(library, columns(2)), "test": table(library, {"image": [None]})}
    loaded = load(saved(tmp_path / "set", library.DatasetDict(data)))
    assert len(loaded) == 2 and loaded.skipped[0].path == "test"


# --- folders that `load_dataset` reads --------------------------------------------------------


def test_a_folder_of_parquet(library: Any, tmp_path: Path) -> None:
    """And new pictures where its file has changed."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(2):
        table(library, columns(2, number)).to_parquet(folder / "train.parquet")
        os.utime(folder / "train.parquet", ns=(number, number))
        loaded = load(f"hub:{folder}", "train")
        assert [int(e.image[0, 4, 4]) for e in loaded] == [10 * number, 10 * number + 10]


def test_a_folder_of_pictures(library: Any, tmp_path: Path) -> None:
    """Whose rows name files; the class is the folder's name."""
    for number, name in enumerate(("kite", "boat")):
        path = tmp_path / "set" / "train" / name / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(number))
    (tmp_path / "set/train/boat/1.png").write_bytes(b"broken")
    loaded = load(f"hub:{tmp_path / 'set'}?caption=label", "train")
    assert sorted((e.captions[0], int(e.image[0, 4, 4])) for e in loaded) == [
        ("boat", 10),
        ("kite", 0),
    ]
    assert loaded[0].meta["source"] == "train/boat/0.png"
    assert [skipped.path for skipped in loaded.skipped] == ["train/boat/1.png"]


def test_a_row_names_no_file_outside_the_data_set(tmp_path: Path) -> None:
    """Neither another file of this machine nor an address. In a folder of the user, links are
    followed; in the library's cache, they are not."""
    root, cache = tmp_path / "set", tmp_path / "cache"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    os.symlink(tmp_path / "secret.png", root / "link.png")
    source = hub_source.Source({}, root, [os.path.realpath(cache)])
    allowed = [f"{root}/a.png", "a.png", f"{root}/link.png", f"{cache}/b.png"]
    refused = [f"{tmp_path}/secret.png", f"{root}/../secret.png", "../secret.png", f"{root}2/a.png"]
    refused += ["https://example.org/a.png", "zip://a.png::https://example.org/a.zip", "", None]
    assert not any(map(source.fault, allowed)) and all(map(source.fault, refused))
    assert source.relative(f"{root}/a.png") == "a.png"
    assert source.relative(f"{cache}/b.png") == f"{cache}/b.png"
    source.is_local = False
    assert not source.fault(f"{root}/a.png") and source.fault(f"{root}/link.png")


def test_an_address_in_a_row_is_not_fetched(library: Any, tmp_path: Path) -> None:
    values = columns(2)
    values["image"][1] = {"bytes": None, "path": "https://example.org/a.png"}
    types = {"bytes": library.Value("binary"), "path": library.Value("string")}
    loaded = load(saved(tmp_path / "set", table(library, values, image=types)))
    assert len(loaded) == 1 and "none is fetched" in loaded.skipped[0].reason


# --- the cache of pictures, batches and streams -----------------------------------------------


def test_each_picture_is_decoded_once(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second load has the same batch, id and captions included, from the store."""
    spec = saved(tmp_path / "set", table(library, columns(6)))
    first = load(spec, "train")
    monkeypatch.setattr(hub, "decode", None)
    second = load(spec, "train")
    for visit in range(3):
        one, two = (data.batch([3, 0, 5], [visit] * 3, 7) for data in (first, second))
        assert torch.equal(one.image, two.image)
        assert (one.caption, one.id) == (two.caption, two.id)
    assert first.fingerprint() == second.fingerprint()


def test_a_folder_that_is_saved_again_has_new_pictures(library: Any, tmp_path: Path) -> None:
    spec = saved(tmp_path / "set", table(library, columns(2)))
    first = load(spec)
    saved(tmp_path / "set", table(library, columns(2, 5)))
    second = load(spec)
    assert [int(e.image[0, 0, 0]) for e in second] == [50, 60]
    assert first.fingerprint() != second.fingerprint()


def test_a_large_set_is_streamed(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of a broken picture comes the next."""
    monkeypatch.setattr(pictures, "STREAM_FROM", 2)
    values = columns(4)
    values["image"][1]["bytes"] = b"broken"
    spec = saved(tmp_path / "set", table(library, values))
    data = load(spec)
    assert data.streamed and data.skipped == [] and len(data) == 4
    assert data.batch([1, 3], [0, 0], 0).id == ["train/2", "train/3"]
    assert [e.id for e in data] == ["train/0", "train/2", "train/3"]
    assert data.fingerprint() == load(spec).fingerprint()


def test_the_file_of_a_row_is_its_source(library: Any, tmp_path: Path) -> None:
    data = load(saved(tmp_path / "set", table(library, columns(2))))
    assert data.source(1) == png(1) and data.file_size(1) == (40, 32)


# --- errors -----------------------------------------------------------------------------------


def test_without_datasets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert sentence("hub:user/set") == "hub: needs datasets: pip install 'lineage-t2i[hub]'."


def test_an_unknown_name_without_a_network_is_quick(library: Any) -> None:
    """And the library is as it was."""
    before = dict(vars(library.config))
    start = time.monotonic()
    assert "the hub cannot be reached" in sentence("hub:user/no-such-set")
    assert time.monotonic() - start < 5 and vars(library.config) == before


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no/such/folder", "There is no folder 'no/such/folder'"),
        ("https://example.org/set", "There is no folder"),
        ("parquet", "a kind of files, not a data set"),
        ("user/set.py", "a loading script, which is never run"),
    ],
)
def test_names_that_are_no_data_set(library: Any, name: str, part: str) -> None:
    assert part in sentence(f"hub:{name}")


def test_a_script_is_never_run(library: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('it ran')")
    assert "never run" in sentence(f"hub:{tmp_path / 'set'}")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ValueError("Config name is missing.\nPick one of ['a']"), "?config=NAME: Config name is"),
        (FileNotFoundError("it doesn't exist\non the Hub"), "check the spelling; a private one"),
        (RuntimeError("Dataset scripts are no longer supported"), "never run"),
        (KeyError("odd"), "cannot be loaded: 'odd'"),
    ],
)
def test_errors_of_the_library_are_one_sentence(
    library: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(hub_source, "_is_online", lambda: True)
    monkeypatch.setattr(library, "load_dataset", fail)
    assert part in sentence("hub:user/set")


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_folder_is_one_sentence(library: Any, tmp_path: Path, file: str) -> None:
    spec = saved(tmp_path / "set", table(library, columns(2)))
    (tmp_path / "set" / file).write_bytes(b"damaged")
    assert "cannot be loaded" in sentence(spec)


def test_a_folder_without_data_is_one_sentence(library: Any, tmp_path: Path) -> None:
    assert sentence(f"hub:{tmp_path}")


def test_the_kind_is_known() -> None:
    assert parse_spec("hub:user/set?config=x") == ("hub", "user/set?config=x")
    assert "hub:PATH" in sentence("hub:")


def test_json_output_is_json_alone(
    library: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No bar is drawn and nothing is remarked, where the library reads Parquet."""
    (tmp_path / "set").mkdir()
    table(library, columns(3)).to_parquet(tmp_path / "set" / "train.parquet")
    capfd.readouterr()
    assert main(["data", "check", f"hub:{tmp_path / 'set'}", "--json"]) == 0
    output = capfd.readouterr()
    assert json.loads(output.out)["loaded"] == 3 and output.err == ""
