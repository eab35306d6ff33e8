"""Pictures of several shapes: which picture has which, and which batch is of which."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lineage
from lineage.catalog import working
from lineage.cli import main
from lineage.data import load_dataset
from lineage.data.cached import CachedDataset
from lineage.data.contract import bucket_shapes, nearest_shape
from lineage.data.layouts import square_spec
from lineage.data.pixels import stores
from lineage.diffusion.networks.dit import sincos_pos_emb
from lineage.errors import UserError
from lineage.training.loader import Loader, Turns

SIZES = {"wide": (96, 58), "tall": (58, 96), "square": (64, 60)}
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine wide, six tall and six nearly square pictures, black on the left and white right."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    for number in range(21):
        kind = ("wide", "tall", "square", "wide", "tall", "square", "wide")[number % 7]
        width, height = SIZES[kind]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, width // 2 :] = 255
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"{kind} {number}")
    return root


@pytest.mark.parametrize("size", [8, 32, 64, 100, 256, 1024])
def test_shapes_have_no_more_pixels_than_the_square_and_sides_that_halve(size: int) -> None:
    shapes = bucket_shapes(size)
    step = max(size // 8, min(size // 4, 16))
    assert len(set(shapes)) == len(shapes) >= 5
    assert set(shapes) == {(width, height) for height, width in shapes}
    for height, width in shapes:
        assert 0.5 * size**2 <= height * width <= size**2
        assert 1 / 4.5 <= height / width <= 4.5
        if (height, width) != (size, size):
            assert height % step == width % step == 0


def test_the_nearest_shape_is_so_by_ratio() -> None:
    """Of 4 : 1 and 1.67 : 1, 2.7 : 1 is nearer to the first by ratio, not by difference."""
    assert [nearest_shape(aspect, 32) for aspect in (100, 2.7, 1.3, 1, 0.6, 0.01)] == [
        (16, 64),
        (16, 64),
        (24, 40),
        (32, 32),
        (40, 24),
        (64, 16),
    ]


def test_each_picture_is_in_the_part_of_its_shape(folder: Path) -> None:
    data = load_dataset(f"{folder}?crop=buckets")
    parts = {part.shape: [example.captions[0] for example in part] for part in data.parts}
    for kind, shape in SHAPES.items():
        assert parts.pop(shape) == [e.captions[0] for e in data if e.captions[0].startswith(kind)]
    assert not parts


def test_parts_have_nearly_whole_pictures_and_all_else_the_centred_squares(folder: Path) -> None:
    data = load_dataset(f"{folder}?crop=buckets")
    squares = load_dataset(f"{folder}?crop=centre")
    rows, epochs = range(len(data)), [0] * len(data)
    assert torch.equal(data.batch(rows, epochs, 0).image, squares.batch(rows, epochs, 0).image)
    for part in data.parts:
        image = part.batch([0], [0], 0).image
        assert image.shape == (1, 3, *part.shape)
        middle = part.shape[1] // 2
        assert image[..., : middle - 2].max() < -0.9 and image[..., middle + 2 :].min() > 0.9


def test_a_second_start_opens_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [part.batch([1], [0], 0).image for part in load_dataset(f"{folder}?crop=buckets").parts]

    def fail(*_: object) -> None:
        raise AssertionError("a file was opened")

    for name in ("decode", "shown_size"):
        monkeypatch.setattr(f"lineage.data.pictures.{name}", fail)
    again = [part.batch([1], [0], 0).image for part in load_dataset(f"{folder}?crop=buckets").parts]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_a_damaged_list_of_shapes_is_read_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"{folder}?crop=buckets"
    expected = [part.shape for part in load_dataset(spec).parts]
    (path,) = tmp_path.glob("cache/pixels/*/shapes-*")
    path.write_bytes(bytes([77] * 21))
    assert [part.shape for part in load_dataset(spec).parts] == expected
    assert "is damaged" in capsys.readouterr().err
    assert len(stores()) == 3 and main(["data", "cache", "--clear"]) == 0
    assert not list(tmp_path.glob("cache/pixels/*"))


def test_a_shape_that_nearly_none_has_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lineage.data.buckets.RARE", 3)  # of 21: fewer than 7 are rare
    data = load_dataset(f"{folder}?crop=buckets")
    assert {part.shape: len(part) for part in data.parts} == {(24, 40): 9, (32, 32): 12}


def test_a_broken_picture_of_a_streamed_set_does_not_end_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lineage.data.pictures.STREAM_FROM", 5)
    whole = (folder / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[: len(whole) // 2])  # its head has the size
    (folder / "01.png").write_bytes(b"no picture")
    data = load_dataset(f"{folder}?crop=buckets")
    loader = Loader(data, 4, seed=0)
    seen = {name for number in range(20) for name in loader.at(number).id}
    assert seen == {f"{number:02d}" for number in range(2, 21)}
    assert {one.path for one in data.skipped} == {"00.png", "01.png"}


# --- batches --------------------------------------------------------------------------------------


def test_each_batch_has_one_shape_and_each_picture_is_seen_as_often(folder: Path) -> None:
    loader = Loader(load_dataset(f"{folder}?crop=buckets"), 4, seed=0)
    batches = [loader.at(number) for number in range(42)]  # 8 epochs
    seen = Counter(name for batch in batches for name in batch.id)
    assert len(seen) == 21 and set(seen.values()) <= {7, 8, 9}
    shapes = [batch.image.shape[2:] for batch in batches]
    assert len(set(shapes[:6])) == 3 and shapes[:5] != shapes[5:10]
    together = loader.several(3, 5)
    assert [batch.id for batch in together] == [batch.id for batch in batches[3:8]]


def test_turns_are_as_frequent_as_shares() -> None:
    """By the end of epoch e, a part of n pictures has had e n / B batches, rounded down; and its
    own batches are numbered without gaps.
    """
    turns = Turns([5, 60, 0, 35], batch_size=8, seed=3)
    placed = [turns.at(number) for number in range(1000)]
    for part, size in enumerate((5, 60, 0, 35)):
        own = [number for which, number in placed if which == part]
        assert own == list(range(len(own)))
        assert abs(len(own) - 1000 * size / 100) <= 4
    assert placed[:40] != [Turns([5, 60, 0, 35], 8, seed=4).at(number) for number in range(40)]


def test_a_batch_may_be_larger_than_all_parts() -> None:
    turns = Turns([2, 1], batch_size=64, seed=0)
    assert Counter(turns.at(number)[0] for number in range(300)) == {0: 200, 1: 100}


# --- systems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", working())
def test_a_system_learns_from_shapes_or_says_that_it_does_not(
    key: str, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"preset": "smoke", "data": f"{folder}?crop=buckets", "steps": 4}
    if key in ("ddpm", "ldm", "dit", "lora"):
        run = lineage.train(key, out=tmp_path / "run", **options)
        system = lineage.load(run)
        assert system.generate("a", sampling_steps=2).shape == (1, 3, 16, 16)
        assert system.generate("a", sampling_steps=2, aspect=1.6).shape == (1, 3, 12, 20)
        assert system.generate("a", sampling_steps=2, aspect=0.6).shape == (1, 3, 20, 12)
    else:
        with pytest.raises(UserError, match="squares alone, not from pictures of"):
            lineage.train(key, out=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


def test_a_picture_to_start_from_has_its_own_shape(tmp_path: Path) -> None:
    run = lineage.train("ddpm", preset="smoke", steps=1, out=tmp_path / "run")
    with pytest.raises(UserError, match="aspect has no effect beside an image"):
        lineage.load(run).generate("a", image=torch.zeros(1, 3, 16, 16), aspect=2)


def test_the_transformer_has_the_positions_of_the_shape() -> None:
    """Tokens of latents that are all zero differ from the patches' bias by the positions."""
    network: Any = lineage.load("pretrained:dit").network
    z_t = torch.zeros(1, network.patch_embed.in_channels, 4, 16)
    own = network.tokens(z_t) - network.patch_embed(z_t).flatten(2).transpose(1, 2)
    rows, columns = (side // network.config.patch_size for side in (4, 16))
    expected = sincos_pos_emb(network.config.width, rows, columns)
    assert torch.allclose(own[0], expected, atol=1e-5)


def test_values_of_a_frozen_network_are_cached_by_part(folder: Path) -> None:
    """Those of a picture as a square, whose scale is measured, are not those of it in its part."""
    data = load_dataset(f"{folder}?crop=buckets")
    cached = CachedDataset(data, "means", lambda images: images.mean((1, 2)), 21)
    cached.batch(range(21), [0] * 21, 0)
    for part, own in zip(data.parts, cached.parts, strict=True):
        rows, epochs = range(len(part)), [0] * len(part)
        for _ in range(2):
            expected = part.batch(rows, epochs, 0).image.mean((1, 2))
            assert torch.equal(own.batch(rows, epochs, 0).extra["means"], expected)


def test_a_scorer_is_trained_on_squares() -> None:
    assert (
        square_spec("folder:a?crop=buckets&splits=seeded") == "folder:a?crop=centre&splits=seeded"
    )
    assert square_spec("folder:a?crop=pad") == "folder:a?crop=pad"
    assert square_spec("shapes:easy") == "shapes:easy"


def test_a_column_of_boxes_is_for_crop_box_alone(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    row = '{"file_name": "a.png", "text": "a", "crop_box": [30, 5, 40, 15]}'
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    means = [
        float(load_dataset(f"imagefolder:{tmp_path}{options}", size=8)[0].image.float().mean())
        for options in ("", "?crop=box", "?crop=centre")
    ]
    assert means[:2] == [255, 255] and means[2] < 5
