"""What `lineage sample` tells: options without effect, masks that paint nothing, files that cannot
be written; and how wide its sheets are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image
from refusal import assert_refused

import lineage
from lineage.cli.drawing import caption_sheet
from lineage.errors import UserError
from lineage.sheets import check_picture, save_picture

SIDE = 16

Sample = Callable[..., Answer]


def pixels(*values: int, side: int = SIDE) -> Image.Image:
    """A grey picture whose columns take turns with `values`, a quarter of its side each."""
    row = np.array(values, np.uint8).repeat(-(-side // len(values)))[:side]
    return Image.fromarray(np.tile(row, (side, 1)))


# --- options without effect -----------------------------------------------------------------------

IDLE: list[tuple[str, dict[str, Any], list[str]]] = [
    # system, options, those of them that change nothing
    ("ddpm", {"guidance": 1, "negative": "a blue square"}, ["negative"]),
    ("ddpm", {"guidance": 1, "rescale": 0.7, "interval": "0.3,5"}, ["interval", "rescale"]),
    ("ddpm", {"negative": "a blue square", "rescale": 0.7}, []),
    ("ddpm", {"interval": "1e6,1e7", "rescale": 0.7}, ["rescale"]),
    ("ddpm", {"interval": "0.3,5", "guidance": 8, "sampling_steps": 4}, []),
    ("ddpm", {"eta": 1, "sampling_steps": 1}, ["eta"]),
    ("ddpm", {"eta": 1, "sampling_steps": 4}, []),
    ("vqvae", {"temperature": 0, "top_k": 8}, ["top_k"]),
    ("vqvae", {"top_k": 1, "temperature": 2, "top_p": 0.5}, ["temperature", "top_p"]),
    ("vqvae", {"top_k": 1000}, ["top_k"]),
    ("vqvae", {"temperature": 2}, []),
    ("stackgan", {"interpolate_share": 0.25}, ["interpolate_share"]),
    ("stackgan", {"interpolate_share": 0, "interpolate_to": "a ring"}, ["interpolate_to"]),
    ("stackgan", {"interpolate_share": 0.25, "interpolate_to": "a ring"}, []),
    ("stackgan", {"truncation": 0, "noise_share": 0.5}, ["noise_share"]),
    ("stackgan", {"truncation": 0.5, "noise_share": 0.5, "stage": 1}, []),
    ("attngan", {"truncation": 0.5, "scale": 1}, []),
    ("retrieval", {"paste": "false"}, ["paste"]),
]


@pytest.mark.parametrize(("key", "options", "idle"), IDLE, ids=lambda value: str(value)[:60])
def test_exactly_the_options_without_effect_are_named(
    key: str, options: dict[str, Any], idle: list[str], smoke_run: Callable[[str], Any]
) -> None:
    """Without one of them the picture is the same; without another it is not."""
    system = lineage.load(smoke_run(key).folder)
    captions = ["a red circle"]
    assert system.idle_options(captions, system.typed_options(options)).keys() == set(idle)
    whole = system.generate(captions, **options)
    for name in options:
        others = {n: value for n, value in options.items() if n != name}
        if name == "interpolate_share" and "interpolate_to" in idle:
            continue  # it is why the other one has none
        assert torch.equal(system.generate(captions, **others), whole) == (name in idle), name


def test_an_option_without_effect_is_told(sample: Sample) -> None:
    flags = ["--set", "guidance=1", "--set", "negative=a zorp square", "--out", "a.png"]
    answer = sample("ddpm", "a red circle", *flags)
    assert answer.code == 0 and Path("a.png").is_file()
    unknown, idle = answer.errors.splitlines()
    assert unknown == "lineage: unknown words: zorp"
    assert idle == "lineage: negative has no effect: guidance=1 is no guidance."


def test_a_picture_of_which_nothing_is_kept_is_told(sample: Sample) -> None:
    pixels(0, 255).save("image.png")
    start = ["a red circle", "--image", "image.png", "--set"]
    answer = sample("vqvae", *start, "keep=1", "--set", "temperature=2")
    assert answer.errors == "lineage: temperature has no effect: the whole picture is kept.\n"


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 1), ["0 to 1", "nothing"]),
        ((0, 100), ["0 to 100", "nothing"]),
        ((0, 0), ["0 to 0", "nothing"]),
        ((255, 255), ["255 to 255", "all"]),
        ((200, 255), ["200 to 255", "all"]),
    ],
)
def test_a_mask_that_paints_nothing_or_all_is_refused(
    values: tuple[int, ...], words: list[str], sample: Sample
) -> None:
    pixels(30, 60).save("image.png")
    pixels(*values).save("mask.png")
    flags = ["--image", "image.png", "--mask", "mask.png"]
    assert_refused(sample("ddpm", "a red circle", *flags), "mask.png", "white (255)", *words)
    assert not Path("sample.png").exists()


@pytest.mark.parametrize(("spot", "words"), [(255, "little white"), (0, "little black")])
def test_a_mask_that_is_too_fine_is_refused(spot: int, words: str, sample: Sample) -> None:
    pixels(30, 60).resize((160, 160)).save("image.png")
    mask = np.full((160, 160), 255 - spot, np.uint8)
    mask[44:46, 44:46] = spot  # less than half of a pixel of the picture that is drawn
    Image.fromarray(mask).save("mask.png")
    flags = ["--image", "image.png", "--mask", "mask.png"]
    assert_refused(sample("ddpm", "a red circle", *flags), "mask.png", words, "larger")


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((40, 20), (40, 20), True),
        ((40, 20), (80, 40), True),
        ((41, 20), (20, 10), True),
        ((40, 20), (20, 20), False),
        ((40, 20), (20, 40), False),
        ((200, 100), (200, 104), False),
    ],
)
def test_a_mask_has_the_shape_of_its_picture(
    image: tuple[int, int], mask: tuple[int, int], fits: bool, sample: Sample
) -> None:
    """At another size, but not at another shape, whose centre is another."""
    pixels(30, 60).resize(image).save("image.png")
    pixels(0, 255, 0, 255, 0, 255, 0, 255).resize(mask, Image.Resampling.NEAREST).save("mask.png")
    answer = sample("ddpm", "a red circle", "--image", "image.png", "--mask", "mask.png")
    if fits:
        assert answer.code == 0 and answer.errors == ""
    else:
        assert_refused(answer, "mask.png must have the shape of image.png", str(mask), str(image))


def test_a_mask_that_is_made_smaller_does_not_grow(sample: Sample) -> None:
    """Black pixels of the large mask stay as they are in the small one."""
    pixels(90, 90).save("image.png")
    mask = np.zeros((160, 160), np.uint8)
    mask[40:80, 40:80] = 255
    Image.fromarray(mask).save("mask.png")
    flags = ["--image", "image.png", "--mask", "mask.png", "--single"]
    assert sample("ddpm", "a red circle", *flags).code == 0
    with Image.open("sample_000.png") as picture:
        changed = (np.asarray(picture) != 90).any(2)
    inside = np.zeros((SIDE, SIDE), bool)
    inside[4:8, 4:8] = True
    assert changed[inside].any() and not changed[~inside].any()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
@pytest.mark.parametrize("flag", ["--image", "--mask"])
def test_a_pipe_is_no_picture(flag: str, sample: Sample) -> None:
    """Nobody writes into it: it would be waited for."""
    os.mkfifo("pipe.png")
    assert_refused(sample("ddpm", "a red circle", flag, "pipe.png"), "pipe.png", "a pipe")


# --- output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("a.xyz", ["a.xyz", "a.png"]),
        ("sheet", ["sheet", "sheet.png"]),
        ("a.ico", ["a.ico", "a.png"]),
        ("a.xbm", ["a.xbm", "a.png"]),
        ("taken/a.png", ["taken", "is a file"]),
        ("folder.png", ["folder.png", "a folder has this name"]),
        (".", ["a folder has this name"]),
        ("/proc/no/a.png", ["/proc/no/a.png"]),
        ("x" * 250 + ".png", ["choose a shorter name"]),
    ],
)
@pytest.mark.parametrize("command", ["sample", "data show"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    command: str, out: str, words: list[str], call: Callable[..., Answer]
) -> None:
    """The run and the data set do not even exist."""
    Path("taken").write_text("mine")
    Path("folder.png").mkdir()
    arguments = ["sample", "nowhere", "a star"] if command == "sample" else [*command.split(), "x"]
    assert_refused(call(*arguments, "--out", out), *words)


@pytest.mark.parametrize(
    "command", [["evaluate", "nowhere"], ["compare", "retrieval"], ["data", "export", "x"]]
)
@pytest.mark.parametrize("out", ["taken", "taken/x", "/proc/x"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    command: list[str], out: str, call: Callable[..., Answer]
) -> None:
    Path("taken").write_text("mine")
    assert_refused(call(*command, "--out", out), f"Could not write {out}")


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "gif", "bmp", "tiff", "pdf"])
def test_a_sheet_of_many_pictures_has_the_width_of_a_screen(ending: str, tmp_path: Path) -> None:
    images, captions = torch.zeros(600, 3, SIDE, SIDE, dtype=torch.uint8), ["a star"] * 600
    sheet = caption_sheet(images, captions, 600)
    assert 1000 < sheet.width <= 1920 and sheet.height > 5000
    path = tmp_path / f"wide.{ending}"
    if ending == "pdf":  # Pillow does not read it
        with pytest.raises(UserError, match=r"wide\.png"):
            check_picture(path)
        return
    check_picture(path)
    save_picture(sheet, path)
    with Image.open(path) as written:
        assert written.size == sheet.size


@pytest.mark.parametrize("ending", ["jpg", "webp", "gif"])
def test_a_format_without_room_for_a_sheet_is_named(ending: str, tmp_path: Path) -> None:
    sheet = Image.new("L", (70_000, 4))
    path = tmp_path / f"long.{ending}"
    with pytest.raises(UserError, match=rf"70,000 x 4 pixels does not fit into .*long\.{ending}"):
        save_picture(sheet, path)
    assert not list(tmp_path.iterdir())
    save_picture(sheet, tmp_path / "long.png")


@pytest.mark.parametrize(("side", "widest"), [(16, 13), (64, 13), (256, 7), (1024, 1)])
def test_each_caption_begins_a_row_of_its_pictures(side: int, widest: int) -> None:
    cell = max(128, side)
    images = torch.zeros(2 * (widest + 1), 3, side, side, dtype=torch.uint8)
    captions = ["a"] * (widest + 1) + ["b"] * (widest + 1)
    sheet = caption_sheet(images, captions, widest + 1)
    assert sheet.width == widest * (cell + 10) + 10
    assert sheet.height > 4 * cell  # two rows of each
    few = caption_sheet(images[:4], ["a", "a", "b", "b"], 2)
    assert few.width == min(2, widest) * (cell + 10) + 10
    one = caption_sheet(images[:3], ["a", "b", "c"], 1)
    assert one.width == min(3, widest) * (cell + 10) + 10
