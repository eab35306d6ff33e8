"""`lineage search`: the nearest pictures, what is left out, the cache, and the command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image
from torch import Tensor

from lineage import errors, search
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.search import Hit, Pictures, choose, embeddings, pictures_in, search_sheet

SIZE = 16
COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250), "white": (250,) * 3}


class Colours:
    """Compares mean colours; a caption's vector is that of the colours which it names."""

    size, embed_dim = SIZE, 3

    def __init__(self, device: str = "cpu") -> None:
        self.calls: list[int] = []
        self.devices: list[str] = []
        self.weight = torch.nn.Parameter(torch.ones(1, device=device))

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight

    def encode_image(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and images.shape[1:] == (3, SIZE, SIZE)
        self.calls.append(len(images))
        self.devices.append(images.device.type)
        if images.is_meta:
            return torch.ones(len(images), 3)
        return 5 * images.mean((2, 3)) + 0.01

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        rows = []
        for caption in captions:
            named = [torch.tensor(COLOURS[word]) for word in caption.split() if word in COLOURS]
            rows.append(torch.stack(named).float().mean(0) / 127.5 - 1)
        return 3 * torch.stack(rows)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and nothing that was said before."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(errors, "_said", set())


NAMES = ("red", "green", "deep/er/blue", "white")


def paint(path: Path, colour: Sequence[int], side: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side, tuple(colour)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures without captions, in folders of any depth, among other files."""
    place = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        paint(place / ("deep/er" if name == "blue" else ".") / f"{name}.png", colour)
    (place / "notes.txt").write_text("no picture")
    return place


def found(model: Colours, place: Path, queries: Sequence[str], count: int = 9) -> list[list[Hit]]:
    pictures = pictures_in(str(place), "test", SIZE)
    return search.search(model, embeddings(model, pictures, "w"), pictures.names, queries, count)


# --- what is found --------------------------------------------------------------------------------


def test_the_nearest_come_first(folder: Path) -> None:
    hits = found(Colours(), folder, ["a red thing", "white"])
    assert hits[0][0].name == "red.png" and hits[1][0].name == "white.png"
    assert {hit.name for hit in hits[0]} == {f"{name}.png" for name in NAMES}
    for row in hits:
        cosines = [hit.cosine for hit in row]
        assert cosines == sorted(cosines, reverse=True) and cosines[0] > 0.99 > cosines[1]
    assert [len(row) for row in found(Colours(), folder, ["red", "blue"], 2)] == [2, 2]


def test_it_equals_a_search_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cosine computed alone, over several parts of the data."""
    monkeypatch.setattr(search, "CHUNK", 7)
    model, rng = Colours(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 1, 1), generator=rng, dtype=torch.uint8)
    images = images.expand(-1, -1, SIZE, SIZE).contiguous()
    names = [f"p{i}" for i in range(23)]
    vectors = embeddings(model, Pictures(names, lambda i: images[i], "key"), "w")
    assert model.calls == [7, 7, 7, 2]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(23))
    queries = ["red", "green blue"]
    for query, row in zip(queries, search.search(model, vectors, names, queries, 5), strict=True):
        words = model.encode_text([query])[0]
        cosines = []
        for image in images:
            vector = model.encode_image(image[None] / 127.5 - 1)[0]
            cosines.append(float(vector @ words / (vector.norm() * words.norm())))
        best = sorted(range(23), key=lambda i: -cosines[i])[:5]
        assert [hit.number for hit in row] == best and [hit.name for hit in row] == [
            names[i] for i in best
        ]
        assert [hit.cosine for hit in row] == pytest.approx([cosines[i] for i in best], abs=1e-4)


def test_ten_thousand_vectors_are_one_product() -> None:
    """No picture is opened, and no vector is computed, for a query of embedded pictures."""
    model, image = Colours(), torch.nn.functional.normalize(torch.randn(10_000, 3), dim=1)
    (row,) = search.search(model, image, [""] * 10_000, ["red"], 3)
    words = model.encode_text(["red"])[0]
    assert row[0].number == int((image @ words).argmax()) and model.calls == []


def test_pictures_go_to_the_model_s_device() -> None:
    """Else nothing could be searched, nor a sheet be drawn in training, on a GPU."""
    model = Colours("meta")
    vectors = search.image_vectors(model, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8))
    assert model.devices == ["meta"] and vectors.shape == (2, 3)


def test_captions_of_one_picture_are_ranked() -> None:
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    image[0] = 255
    ranked = choose(Colours(), image, ["blue", "red", "red blue"])
    assert [caption for caption, _ in ranked] == ["red", "red blue", "blue"]
    assert ranked[0][1] > 0.99 and ranked[2][1] < 0


def test_any_data_set_is_searched(shapes: CaptionedDataset) -> None:
    """Of the split that is asked for; the pictures are its own."""
    pictures = pictures_in("shapes", "validation", SIZE)
    data = load_dataset("shapes", "validation", SIZE)
    assert len(pictures.names) == len(data) and pictures.names[2] == "validation-2"
    assert torch.equal(pictures.image(2), data[2].image)
    keys = {pictures_in("shapes", split, SIZE).key for split in ("train", "validation", "test")}
    assert len(keys) == 3


# --- what is left out -----------------------------------------------------------------------------


def test_broken_pictures_are_left_out_and_named(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a file that is no picture, and a link to nothing; nor do they fill up the last places."""
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "gone.png").symlink_to(folder / "absent.png")
    model = Colours()
    for _ in range(2):  # and said again, when the vectors are read from the cache
        errors._said.clear()
        hits = found(model, folder, ["red", "green"], 6)
        said = capfd.readouterr().err
        assert "Left out: " in said and "broken" in said and "and 1 more" in said
        for row in hits:
            assert len(row) == 4 and not {"broken.png", "gone.png"} & {hit.name for hit in row}
            assert row[-1].cosine < 0
    assert model.calls == [6]


def test_a_folder_of_broken_pictures_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "pictures"
    place.mkdir()
    for name in ("a.png", "b.png"):
        (place / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"No picture can be opened: .*a\.png") as caught:
        found(Colours(), place, ["red"])
    assert "\n" not in str(caught.value)
    paint(place / "a.png", COLOURS["red"])
    assert [hit.name for hit in found(Colours(), place, ["red"])[0]] == ["a.png"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="There is no picture in"):
        pictures_in(str(tmp_path), "test", SIZE)


# --- the cache ------------------------------------------------------------------------------------


def test_vectors_are_computed_once(folder: Path) -> None:
    model = Colours()
    first = found(model, folder, ["red"])
    assert model.calls == [4]
    assert found(model, folder, ["red"]) == first and model.calls == [4]
    assert found(model, folder, ["blue"], 1)[0][0].name == "deep/er/blue.png" and model.calls == [4]


def repaint(folder: Path) -> None:
    """Another picture under the same name, with the same number of bytes."""
    path, times = folder / "red.png", os.stat(folder / "red.png")
    paint(path, COLOURS["green"])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "another picture": repaint,
    "one more": lambda folder: paint(folder / "more.png", (9, 9, 9)),
    "one less": lambda folder: (folder / "white.png").unlink(),
    "another name": lambda folder: (folder / "white.png").rename(folder / "snow.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_folder_is_seen(change: str, folder: Path) -> None:
    model = Colours()
    before = found(model, folder, ["red"])
    CHANGES[change](folder)
    assert found(model, folder, ["red"]) != before and len(model.calls) == 2


def test_other_weights_have_other_vectors(folder: Path) -> None:
    model, pictures = Colours(), pictures_in(str(folder), "test", SIZE)
    for weights in ("one", "two", "one"):
        embeddings(model, pictures, weights)
    assert model.calls == [4, 4]


def test_a_damaged_cache_is_computed_again(folder: Path) -> None:
    model = Colours()
    before = found(model, folder, ["red"])
    (file,) = search.cache_folder("search").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert found(model, folder, ["red"]) == before and model.calls == [4, 4]


# --- sheets ---------------------------------------------------------------------------------------


def test_a_sheet_has_rows_of_its_own_for_each_query(folder: Path) -> None:
    """Filled up with white."""
    pictures = pictures_in(str(folder), "test", SIZE)
    vectors = embeddings(Colours(), pictures, "w")
    hits = search.search(Colours(), vectors, pictures.names, ["red", "blue"], 3)
    one = np.asarray(search_sheet(pictures, ["red", "blue"], hits, columns=2).convert("RGB"))
    (height, width), cells = one.shape[:2], []
    for row in range(4):
        for column in range(2):
            cell = one[row * height // 4 : (row + 1) * height // 4]
            cell = cell[:, column * width // 2 : (column + 1) * width // 2]
            cells.append([int(np.median(cell[10 : width // 4, 10:-10, c])) for c in range(3)])
    names = [Path(hit.name).stem for row in hits for hit in row]
    assert cells[0] == list(COLOURS["red"]) and cells[4] == list(COLOURS["blue"])
    assert [cells[i] for i in (0, 1, 2, 4, 5, 6)] == [list(COLOURS[name]) for name in names]
    assert cells[3] == cells[7] == [255, 255, 255]


def test_training_draws_the_best_pictures(
    shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many as there are, in evaluation mode, which ends with the sheet."""
    monkeypatch.setattr(search, "NUM_PICTURES", 10)

    class Model(Colours):
        training = True
        modes: list[bool] = []  # noqa: RUF012

        def train(self, mode: bool = True) -> None:
            self.training = mode

        def eval(self) -> None:
            self.training = False

        def encode_image(self, images: Tensor) -> Tensor:
            self.modes.append(self.training)
            return super().encode_image(images)

        def encode_text(self, captions: Sequence[str]) -> Tensor:
            return super().encode_text(["red"] * len(captions))

    model = Model()
    one = search.matches_sheet(model, shapes, [shapes[0], shapes[1]])
    assert model.calls == [10] and model.modes == [False] and model.training
    assert one.width > one.height > 100


# --- the command ----------------------------------------------------------------------------------

Call = Callable[..., Answer]


@pytest.fixture
def run(smoke_run: Callable[[str], Any]) -> Path:
    return Path(smoke_run("clip").folder)


def test_the_command_prints_names_and_writes_a_sheet(call: Call, run: Path, folder: Path) -> None:
    answer = call("search", run, folder, "a red circle", "a square", "--count", 3, "--out", "s.png")
    assert answer.code == 0 and answer.errors == ""
    lines = answer.out.splitlines()
    assert lines[0] == "a red circle" and lines[4] == "a square" and lines[-1] == "s.png"
    assert len(lines) == 9 and all(line.startswith("  ") for line in lines[1:4] + lines[5:8])
    assert {line.split()[1] for line in lines[1:4]} <= {f"{name}.png" for name in NAMES}
    with Image.open("s.png") as sheet:
        assert sheet.width > sheet.height > 100


def test_the_command_prints_json(call: Call, run: Path, folder: Path) -> None:
    """Equal to a search by hand with the loaded model."""
    import lineage

    answer = call("search", run, folder, "a red circle", "--json")
    (row,) = json.loads(answer.out).values()
    model = lineage.load(run, device="cpu")
    assert isinstance(model, torch.nn.Module)
    for hit in row:
        assert hit.keys() == {"number", "name", "cosine"}
        with Image.open(folder / hit["name"]) as picture:
            colour = torch.tensor(picture.getpixel((0, 0))).float() / 127.5 - 1
        image = colour.view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
        expected = model.similarity(image, ["a red circle"])  # type: ignore[operator]
        assert hit["cosine"] == pytest.approx(float(expected), abs=1e-5)
    assert [hit["cosine"] for hit in row] == sorted((h["cosine"] for h in row), reverse=True)


def test_a_single_picture_is_compared_with_each_caption(
    call: Call, run: Path, folder: Path
) -> None:
    words = ["a red circle", "a blue square"]
    answer = call("search", run, folder / "red.png", *words)
    assert answer.code == 0 and answer.errors == ""
    rows = [line.split(maxsplit=1) for line in answer.out.splitlines()]
    assert {caption for _, caption in rows} == set(words)
    assert float(rows[0][0]) >= float(rows[1][0])
    ranked = json.loads(call("search", run, folder / "red.png", *words, "--json").out)
    assert [one["words"] for one in ranked] == [caption for _, caption in rows]


def test_unknown_words_are_told(call: Call, run: Path, folder: Path) -> None:
    answer = call("search", run, folder, "a zorp square", "a red quux")
    assert answer.code == 0
    assert "unknown words: zorp, quux" in answer.errors and "square" not in answer.errors


def test_a_broken_picture_is_named_by_the_command(call: Call, run: Path, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    answer = call("search", run, folder, "a red circle", "--out", "s.png")
    assert answer.code == 0 and "broken.png" in answer.errors and "broken" not in answer.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{run}", "absent", "red"], "absent"),
        (["{run}", "{folder}/notes.txt", "red"], "notes.txt"),
        (["{run}", "{folder}/red.png", "red", "--out", "s.png"], "--out has no effect"),
        (["{run}", "{folder}", "red", "--count", "0"], "count"),
        (["{run}", "{folder}", "red", "--out", "s.txt"], "s.txt"),
        (["absent", "{folder}", "red"], "absent"),
        (["pretrained:retrieval", "{folder}", "red"], "is no run of clip"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(
    arguments: list[str], reason: str, call: Call, run: Path, folder: Path
) -> None:
    answer = call("search", *(a.format(run=run, folder=folder) for a in arguments))
    assert answer.code == 2 and answer.out == ""
    (line,) = answer.errors.strip().splitlines()
    assert line.startswith("lineage: ") and reason in line
