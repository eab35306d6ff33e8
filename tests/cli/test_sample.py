"""`lineage sample`: sheets, single pictures, options, picture files, the best of several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from PIL import Image
from refusal import assert_refused
from torch import Tensor

import lineage
from lineage.data.contract import to_bytes, to_unit
from lineage.evaluation.best import best_of, scorer_of_run

SIDE = 16

Sample = Callable[..., Answer]


@pytest.fixture(autouse=True)
def picture_files(tmp_path: Path) -> None:
    """A picture and a mask of the size of a smoke run, where the commands run."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(4, 0)
    Image.fromarray(pixels.repeat(4, 1)).save(tmp_path / "image.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 6:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")


def read(path: str | Path) -> Tensor:
    """(3, S, S) uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def pictures(answer: Answer) -> Tensor:
    """Pictures (B, 3, S, S) uint8 of `--single`."""
    assert answer.code == 0 and answer.errors == "", answer
    return torch.stack([read(path) for path in answer.out.split()])


def assert_nothing_drawn(answer: Answer, *words: str) -> None:
    assert_refused(answer, *words)
    assert not list(Path().glob("sample*.png"))


# --- sheets and single pictures -------------------------------------------------------------------


def test_sample_writes_a_sheet_and_reports_unknown_words(sample: Sample) -> None:
    answer = sample("ddpm", "a red circle", "a zorp circle", "", "--out", "sheet.png")
    assert answer.code == 0
    assert answer.out.strip() == "sheet.png"
    assert "zorp" in answer.errors and "circle" not in answer.errors
    with Image.open("sheet.png") as sheet:
        assert sheet.width > sheet.height > 100
        assert len(set(sheet.convert("L").tobytes())) > 20
    assert sample("ddpm", "a red circle").errors == ""


def test_sample_writes_single_pictures(sample: Sample) -> None:
    flags = ["--single", "--count", 2, "--out", "p/x.png"]
    images = pictures(sample("ddpm", "a red circle", "a blue circle", *flags))
    assert images.shape == (4, 3, SIDE, SIDE)
    assert len(torch.unique(images, dim=0)) == 4


def test_sample_is_a_function_of_its_seed(sample: Sample) -> None:
    sheets = []
    for number, seed in enumerate((1, 1, 2)):
        out = f"{number}.png"
        assert sample("ddpm", "a red circle", "--seed", seed, "--out", out).code == 0
        sheets.append(Path(out).read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_captions_of_any_bytes_are_drawn(smoke_run: Callable[[str], Any], tmp_path: Path) -> None:
    """A terminal in another encoding passes bytes that are no text at all."""
    captions = [b"a \xff ring", "👩‍👩‍👧 一个 \x01".encode(), b"word" * 500]
    start = [sys.executable, "-m", "lineage", "sample", smoke_run("ddpm").folder]
    done = subprocess.run(
        [*start, *captions, "--out", tmp_path / "a.png"], capture_output=True, timeout=60
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 and (tmp_path / "a.png").is_file()


def test_the_first_picture_comes_soon(smoke_run: Callable[[str], Any], tmp_path: Path) -> None:
    """PyTorch's objects are frozen, the collector is on again, and nothing unused is imported."""
    code = (
        "import gc, sys; from lineage.cli import main; code = main(sys.argv[1:]);"
        "unused = ('matplotlib', 'pandas', 'scipy', 'torchmetrics', 'torchvision', 'transformers',"
        "'torch._dynamo', 'torch._inductor', 'lineage.evaluation', 'lineage.comparison');"
        "found = [name for name in unused if name in sys.modules];"
        "print(code, gc.isenabled(), gc.get_freeze_count() > 100_000, found)"
    )
    run, out = smoke_run("ddpm").folder, tmp_path / "a.png"
    arguments = [sys.executable, "-c", code, "sample", run, "a red circle", "--out", out]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 True True []", done


def test_a_picture_that_cannot_be_written_is_refused(sample: Sample) -> None:
    assert_refused(sample("ddpm", "a red circle", "--out", "a.xyz"), "a.xyz", "a.png")
    Path("taken").write_text("mine")
    assert_refused(sample("ddpm", "a red circle", "--out", "taken/a.png"), "taken")
    Path("folder.png").mkdir()
    assert_refused(sample("ddpm", "a red circle", "--out", "folder.png"), "folder.png")


# --- options of a system --------------------------------------------------------------------------


def test_options_reach_the_system(sample: Sample) -> None:
    sheets = []
    for flags in (
        [],
        ["--set", "guidance=8"],
        ["--set", "sampling_steps=1", "--set", "sampler=ddpm"],
    ):
        assert sample("ddpm", "a red circle", *flags, "--out", "a.png").code == 0
        sheets.append(Path("a.png").read_bytes())
    assert len(set(sheets)) == 3


@pytest.mark.parametrize(
    ("key", "option", "word"),
    [
        ("ddpm", "gidance=3", "'guidance'"),
        ("ddpm", "guidance", "name=value"),
        ("ddpm", "sampling_steps=many", "sampling_steps"),
        ("ddpm", "sampling_steps=0", "sampling_steps"),
        ("ddpm", "sampling_steps=2.5", "sampling_steps"),
        ("ddpm", "sampling_steps=2000", "sampling_steps"),
        ("ddpm", "guidance=high", "guidance"),
        ("ddpm", "guidance=NaN", "guidance"),
        ("ddpm", "sampler=dimm", "'ddim'"),
        ("ddpm", "sampler=3", "sampler"),
        ("ddpm", "image=image.png", "--image"),
        ("ddpm", "mask=mask.png", "--mask"),
        ("attngan", "truncaton=0.5", "'truncation'"),
        ("attngan", "scale=3", "scale=3"),
        ("attngan", "scale=large", "scale"),
        ("attngan", "return_attention=true", "return_attention"),
        ("attngan", "seed=3", "seed"),
        ("attngan", "progress=3", "progress"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    key: str, option: str, word: str, sample: Sample
) -> None:
    """What else `generate` takes is no option, and none is passed over in silence."""
    assert_nothing_drawn(sample(key, "a red circle", "--set", option), word)


def test_a_negative_caption_may_be_a_number(sample: Sample) -> None:
    """Text that looks like a number stays text where the option is text."""
    assert sample("ddpm", "a red circle", "--set", "negative=3").code == 0


# --- picture files --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ddpm", "ldm", "dit"])
def test_black_in_the_mask_stays_as_it_is(key: str, sample: Sample) -> None:
    before, white = read("image.png"), read("mask.png") > 0
    flags = ["--image", "image.png", "--mask", "mask.png", "--single"]
    (after,) = pictures(sample(key, "a red circle", *flags))
    assert after.shape == before.shape
    assert torch.equal(after[~white], before[~white])
    assert (after[white] != before[white]).float().mean() > 0.5


def test_a_little_strength_stays_nearer_than_much(sample: Sample) -> None:
    before = read("image.png").float()
    distances = []
    for strength in (0.2, 1.0):
        flags = ["--image", "image.png", "--set", f"strength={strength}", "--single"]
        (after,) = pictures(sample("ddpm", "a red circle", *flags))
        distances.append((after - before).abs().mean())
    assert distances[0] < distances[1]


def test_an_image_alone_has_a_strength_and_a_share_by_default(sample: Sample) -> None:
    """A diffusion model changes it, a prior completes it."""
    start = ["a red circle", "--image", "image.png", "--single"]
    for key, default in (("ddpm", "strength=0.6"), ("vqvae", "keep=0.5")):
        alone = pictures(sample(key, *start))
        assert torch.equal(alone, pictures(sample(key, *start, "--set", default)))


@pytest.mark.parametrize("key", ["vqvae", "dalle", "vqgan"])
def test_a_prior_completes_a_picture(
    key: str, sample: Sample, smoke_run: Callable[[str], Any]
) -> None:
    """The command draws what `generate` does, each caption `--count` times."""
    flags = ["--image", "image.png", "--count", 2, "--seed", 3, "--set", "guidance=2", "--single"]
    after = pictures(sample(key, "a red circle", "a blue square", *flags, "--set", "keep=0.25"))
    image = to_unit(read("image.png"))[None]
    captions = ["a red circle"] * 2 + ["a blue square"] * 2
    system = lineage.load(smoke_run(key).folder)
    expected = system.generate(captions, image=image, keep=0.25, seed=3, guidance=2.0)
    assert torch.equal(after, to_bytes(expected))
    assert len(torch.unique(after, dim=0)) > 1


def test_a_prior_keeps_the_share_of_the_picture(
    sample: Sample, smoke_run: Callable[[str], Any]
) -> None:
    """All of it or none of it."""
    system = lineage.load(smoke_run("vqvae").folder)
    with torch.no_grad():
        whole = to_bytes(system.reconstruct(to_unit(read("image.png"))[None]))
    new = to_bytes(system.generate("a blue square"))
    start = ["a blue square", "--image", "image.png", "--single", "--set"]
    assert torch.equal(pictures(sample("vqvae", *start, "keep=1")), whole)
    answer = sample("vqvae", *start, "keep=0")
    assert answer.errors == "lineage: image has no effect: no row of its codes is kept.\n"
    assert torch.equal(read("sample_000.png"), new[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_pictures_of_any_kind_are_read(mode: str, sample: Sample) -> None:
    """Of another size and shape as well."""
    if mode == "I;16":
        Image.fromarray(np.full((30, 50), 40_000, np.uint16)).save("any.png")
    else:
        Image.new("RGB", (50, 30), "red").convert(mode).save("any.png")
    answer = sample("vqvae", "a blue square", "--image", "any.png", "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    assert read("a.png").shape[1] > 100  # a sheet with its caption


@pytest.mark.parametrize("flag", ["--image", "--mask", "--control", "--reference"])
def test_files_that_are_no_pictures_are_refused(flag: str, sample: Sample) -> None:
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:60])
    Path("folder.png").mkdir()
    for name in ("nowhere.png", "empty.png", "text.png", "cut.png", "folder.png"):
        answer = sample("vqvae", "a blue square", flag, name)
        assert_nothing_drawn(answer, name, "picture")


@pytest.mark.parametrize(
    ("key", "flags", "words"),
    [
        ("ddpm", ["--mask", "mask.png"], ["image"]),
        ("ddpm", ["--set", "strength=0.5"], ["image"]),
        ("ddpm", ["--image", "image.png", "--set", "strength=0"], ["strength"]),
        ("ddpm", ["--image", "image.png", "--set", "strength=1.5"], ["strength"]),
        ("ddpm", ["--image", "image.png", "--set", "keep=0.5"], ["'keep'", "image"]),
        ("ddpm", ["--image", "image.png", "--set", "sampler=ddimm"], ["ddim"]),
        ("ddpm", ["--image", "image.png", "--control", "mask.png"], ["'control'"]),
        ("ddpm", ["--reference", "image.png"], ["'reference'"]),
        ("vqgan_clip", ["--set", "reference=image.png"], ["--reference"]),
        ("ddpm", ["--image", "image.png", "--set", "image=image.png"], ["--image"]),
        ("vqvae", ["--image", "image.png", "--mask", "mask.png"], ["'mask'", "image"]),
        ("vqvae", ["--image", "image.png", "--set", "strength=1"], ["'strength'"]),
        ("vqvae", ["--set", "keep=0.5"], ["keep", "image"]),
        ("vqvae", ["--image", "image.png", "--set", "gidance=3"], ["'gidance'", "'guidance'"]),
        ("vqvae", ["--image", "image.png", "--set", "top_p=0"], ["top_p=0"]),
        ("vqvae", ["--image", "image.png", "--out", "a.xyz"], ["a.xyz", "a.png"]),
        ("vqvae", ["--image"], ["--image"]),
        ("gan_int_cls", ["--image", "image.png"], ["'image'", "truncation"]),
        ("retrieval", ["--image", "image.png"], ["'image'"]),
        *[
            ("vqvae", ["--image", "image.png", "--set", f"keep={keep}"], ["keep", keep])
            for keep in ("-0.1", "1.1", "nan", "inf", "half", "")
        ],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_picture_options_that_do_not_fit_are_refused(
    key: str, flags: list[str], words: list[str], sample: Sample
) -> None:
    assert_nothing_drawn(sample(key, "a red circle", *flags), *words)


# --- the best of several --------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["auto", "damsm"])
def test_best_of_draws_what_the_scorer_prefers(
    scorer: str, sample: Sample, smoke_run: Callable[[str], Any]
) -> None:
    """The scorer is that of the data, or a matching model of another run."""
    name = f"damsm:{smoke_run('attngan').folder}" if scorer == "damsm" else "auto"
    folder = smoke_run("vqvae").folder
    flags = ["--best-of", 4, "--seed", 3, "--set", "temperature=1.5", "--count", 2, "--single"]
    after = pictures(sample("vqvae", "a red circle", "a blue square", *flags, "--scorer", name))
    system, judge = lineage.load(folder), scorer_of_run(name, folder, torch.device("cpu"))
    captions = ["a red circle"] * 2 + ["a blue square"] * 2
    expected, cosines = best_of(system, captions, judge, 4, seed=3, temperature=1.5)
    assert torch.equal(after, expected)
    assert (cosines.argmax(1) > 0).any()  # not only the first
    plain = to_bytes(system.generate(captions, seed=3, temperature=1.5))
    assert not torch.equal(after, plain)


def test_best_of_passes_pictures_on(sample: Sample, smoke_run: Callable[[str], Any]) -> None:
    folder = smoke_run("ddpm").folder
    flags = ["--image", "image.png", "--mask", "mask.png", "--set", "guidance=2", "--single"]
    after = pictures(sample("ddpm", "a red circle", *flags, "--best-of", 3))
    system, judge = lineage.load(folder), scorer_of_run("auto", folder, torch.device("cpu"))
    options = {"image": to_unit(read("image.png"))[None], "mask": read("mask.png")[None, :1] > 127}
    expected, _ = best_of(system, ["a red circle"], judge, 3, guidance=2.0, **options)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("key", ["ddpm", "retrieval"])
def test_best_of_is_for_every_system(key: str, sample: Sample) -> None:
    answer = sample(key, "a red circle", "a blue square", "--best-of", 2, "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    assert read("a.png").shape[2] > 256


def test_the_best_of_one_is_the_plain_picture(sample: Sample) -> None:
    """It needs no scorer."""
    sheets = []
    for flags in ([], ["--best-of", 1], ["--best-of", 1, "--scorer", "none"]):
        assert sample("vqvae", "a red circle", *flags, "--out", "a.png").code == 0
        sheets.append(read("a.png"))
    assert torch.equal(sheets[0], sheets[1]) and torch.equal(sheets[0], sheets[2])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--best-of", "0"], ["--best-of", "0"]),
        (["--best-of", "-3"], ["--best-of"]),
        (["--best-of", "many"], ["--best-of", "many"]),
        (["--best-of", "2.5"], ["--best-of", "2.5"]),
        (["--best-of"], ["--best-of"]),
        (["--best-of", "2", "--scorer", "none"], ["--best-of", "--scorer", "damsm:RUN"]),
        (["--best-of", "2", "--scorer", "best"], ["'best'", "damsm:RUN"]),
        (["--best-of", "2", "--scorer", ""], ["scorer"]),
        (["--best-of", "2", "--scorer", "damsm:nowhere"], ["nowhere"]),
        (["--best-of", "2", "--scorer", "damsm:."], ["config.json"]),
        (["--scorer", "auto"], ["--scorer", "--best-of"]),
        (["--best-of", "2", "--set", "gidance=3"], ["'gidance'", "'guidance'"]),
        (["--best-of", "2", "--set", "top_p=2"], ["top_p=2"]),
        (["--best-of", "2", "--set", "top_k=-1"], ["top_k=-1"]),
        (["--best-of", "2", "--set", "temperature=hot"], ["temperature", "'hot'"]),
        (["--best-of", "2", "--out", "a.xyz"], ["a.xyz", "a.png"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_best_of_refuses_what_does_not_fit(
    flags: list[str], words: list[str], sample: Sample
) -> None:
    assert_nothing_drawn(sample("vqvae", "a red circle", *flags), *words)


def test_a_scorer_without_a_matching_model_is_refused(
    sample: Sample, smoke_run: Callable[[str], Any]
) -> None:
    other = smoke_run("ddpm").folder
    answer = sample("vqvae", "a blue square", "--best-of", 2, "--scorer", f"damsm:{other}")
    assert_nothing_drawn(answer, str(other), "without a DAMSM", "attngan")


# --- visualise ------------------------------------------------------------------------------------


def test_visualise_shows_the_attention(sample: Sample) -> None:
    """Two scales, then a picture for each word, in rows; of the first caption, by its seed."""
    start = ["a red circle above a zorp", "a ring", "--visualise"]
    sheets = []
    for number, flags in enumerate(([], [], ["--seed", 1])):
        out = f"{number}.png"
        answer = sample("attngan", *start, *flags, "--out", out)
        assert answer.code == 0 and answer.out.strip() == out, answer
        assert "zorp" in answer.errors and "Traceback" not in answer.errors
        sheets.append(Path(out).read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    with Image.open("0.png") as sheet:
        assert sheet.width > 6 * 128 and 2 * 128 < sheet.height < 3 * 128
        pixels = sheet.convert("RGB")
        assert len(set(pixels.convert("L").tobytes())) > 20
        blank = pixels.crop((10 + 138 * 2, 10, sheet.width, 138))  # right of the two scales
        assert set(blank.convert("L").tobytes()) == {255}


def test_visualise_shows_a_prior_at_work(sample: Sample) -> None:
    """Eight pictures in a row, the last of which is the whole."""
    answer = sample("vqvae", "a red circle", "--visualise", "--seed", 3, "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    sheet = read("a.png")
    assert sheet.shape[2] == 8 * 138 + 10 and 138 < sheet.shape[1] < 2 * 138
    (picture,) = pictures(sample("vqvae", "a red circle", "--seed", 3, "--single"))
    picture = picture.repeat_interleave(8, 1).repeat_interleave(8, 2)
    last = sheet[:, 10 : 10 + 128, 10 + 7 * 138 : 10 + 7 * 138 + 128]
    assert torch.equal(last, picture)


def test_a_system_with_nothing_to_visualise_says_so(sample: Sample) -> None:
    refused = sample("gan_int_cls", "a red circle", "--visualise")
    assert_nothing_drawn(refused, "GanIntCls", "--visualise")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--out", "a.xyz"], "a.png"),
        (["--image", "image.png"], "--image"),
        (["--mask", "mask.png"], "--mask"),
        (["--control", "mask.png"], "--control"),
        (["--reference", "image.png"], "--reference"),
        (["--set", "truncation=0.5"], "--set"),
        (["--best-of", "2"], "--best-of"),
        (["--count", "2"], "--count"),
        (["--single"], "--single"),
        (["--scorer", "auto"], "--scorer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_visualise_refuses_other_options(flags: list[str], word: str, sample: Sample) -> None:
    """It would pass them over in silence."""
    assert_nothing_drawn(sample("attngan", "a red circle", "--visualise", *flags), word)


def test_a_drawing_resembles_its_reference(sample: Sample) -> None:
    """The file changes the picture, and so it has reached the system."""
    steps = ["--set", "steps=2", "--single"]
    for name, flags in (("a.png", []), ("b.png", ["--reference", "image.png"])):
        assert sample("vqgan_clip", "a red circle", *steps, *flags, "--out", name)[0] == 0
    assert (read("a_000.png") != read("b_000.png")).any()
