"""`lineage sample`: pictures that are begun, and the best of several; faults are one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lineage
from lineage.data.contract import to_bytes, to_unit
from lineage.evaluation.best import best_of, scorer_of_run


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A picture of the size of a smoke run, with something in every part of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(4, 0)
    Image.fromarray(pixels.repeat(4, 1)).save(tmp_path / "begun.png")
    return tmp_path / "begun.png"


def read(path: str | Path) -> Tensor:
    """(3, S, S) uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def told(answer: Any, *words: str) -> None:
    """One sentence on standard error that holds `words`, nothing else, and exit code 2."""
    assert answer.code == 2 and answer.out == "", answer
    lines = [line for line in answer.errors.splitlines() if line.strip()]
    assert len(lines) == 1, answer.errors
    assert lines[0].startswith("lineage: ")
    assert "Traceback" not in lines[0]
    for word in words:
        assert word in lines[0], lines[0]
    assert not list(Path().glob("sample*.png"))


# --- pictures that are begun ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vqvae", "dalle", "vqgan"])
def test_init_goes_on_with_a_picture(
    key: str, sample: Callable[..., Any], begun: Path, smoke_run: Callable[[str], Any]
) -> None:
    """What `complete` gives: each caption as often as asked for, by seed and knobs."""
    flags = ["--init", begun, "--count", 2, "--seed", 3, "--set", "guidance=2", "--single"]
    answer = sample(key, "a red circle", "a blue square", *flags, "--keep", 0.25)
    assert answer.code == 0 and answer.errors == ""
    made = torch.stack([read(path) for path in answer.out.split()])
    image = to_unit(read(begun)).expand(4, -1, -1, -1)
    captions = ["a red circle"] * 2 + ["a blue square"] * 2
    system = lineage.load(smoke_run(key).folder)
    expected = system.complete(captions, image, keep=0.25, seed=3, guidance=2.0)
    assert torch.equal(made, to_bytes(expected))
    assert len(torch.unique(made, dim=0)) > 1


def test_init_keeps_what_keep_says(
    sample: Callable[..., Any], begun: Path, smoke_run: Callable[[str], Any]
) -> None:
    """All of it, none of it, or half, which is the default."""
    system = lineage.load(smoke_run("vqvae").folder)
    with torch.no_grad():
        whole = to_bytes(system.reconstruct(to_unit(read(begun))[None]))[0]
    drawn = to_bytes(system.generate("a circle"))[0]
    found = {}
    for name, flags in {"all": ["--keep", 1], "none": ["--keep", 0], "half": []}.items():
        answer = sample(
            "vqvae", "a blue square", "--init", begun, *flags, "--single", "--out", "x.png"
        )
        assert answer.code == 0, answer
        found[name] = read(answer.out.strip())
    assert torch.equal(found["all"], whole) and torch.equal(found["none"], drawn)
    half = to_unit(read(begun))[None]
    assert torch.equal(found["half"], to_bytes(system.complete(["a circle"], half, keep=0.5))[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_init_takes_pictures_of_any_kind(mode: str, sample: Callable[..., Any]) -> None:
    """Of another size and shape as well."""
    if mode == "I;16":
        Image.fromarray(np.full((30, 50), 40_000, np.uint16)).save("any.png")
    else:
        Image.new("RGB", (50, 30), "red").convert(mode).save("any.png")
    answer = sample("vqvae", "a blue square", "--init", "any.png", "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    assert read("a.png").shape[1] > 100  # a sheet with its caption


def test_pictures_that_cannot_be_begun_with_are_told(
    sample: Callable[..., Any], begun: Path
) -> None:
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(begun.read_bytes()[:60])
    Path("folder.png").mkdir()
    told(sample("vqvae", "a blue square", "--init", "nowhere.png"), "no picture", "nowhere.png")
    for name in ("empty.png", "text.png", "cut.png", "folder.png"):
        told(sample("vqvae", "a blue square", "--init", name), name, "no picture")


@pytest.mark.parametrize("keep", ["-0.1", "1.1", "nan", "inf", "half", ""])
def test_shares_that_cannot_be_kept_are_told(
    keep: str, sample: Callable[..., Any], begun: Path
) -> None:
    told(sample("vqvae", "a blue square", "--init", begun, f"--keep={keep}"), "keep", keep)


@pytest.mark.parametrize("key", ["gan_int_cls", "retrieval"])
def test_systems_that_cannot_go_on_say_so(
    key: str, sample: Callable[..., Any], begun: Path
) -> None:
    told(sample(key, "a blue square", "--init", begun), "cannot go on", "vqvae, dalle and vqgan")


# --- the best of several ----------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["auto", "damsm"])
def test_best_of_draws_what_the_scorer_prefers(
    scorer: str, sample: Callable[..., Any], smoke_run: Callable[[str], Any]
) -> None:
    """Of the data's scorer, and of a matching model of another run."""
    name = f"damsm:{smoke_run('attngan').folder}" if scorer == "damsm" else "auto"
    folder = smoke_run("vqvae").folder
    flags = ["--best-of", 4, "--seed", 3, "--set", "temperature=1.5", "--count", 2, "--single"]
    answer = sample("vqvae", "a red circle", "a blue square", *flags, "--scorer", name)
    assert answer.code == 0 and answer.errors == "", answer
    made = torch.stack([read(path) for path in answer.out.split()])
    system, judge = lineage.load(folder), scorer_of_run(name, folder, torch.device("cpu"))
    captions = ["a red circle"] * 2 + ["a blue square"] * 2
    expected, fit = best_of(system, captions, judge, 4, seed=3, temperature=1.5)
    assert torch.equal(made, expected)
    assert (fit.argmax(1) > 0).any()  # not just the first
    plain = to_bytes(system.generate(captions, seed=3, temperature=1.5))
    assert not torch.equal(made, plain)


@pytest.mark.parametrize("key", ["ddpm", "retrieval"])
def test_best_of_is_for_every_system(key: str, sample: Callable[..., Any]) -> None:
    answer = sample(key, "a red circle", "a blue square", "--best-of", 2, "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    assert read("a.png").shape[2] > 256


def test_the_best_of_one_is_what_is_drawn(sample: Callable[..., Any]) -> None:
    """No scorer is needed for it."""
    made = []
    for flags in ([], ["--best-of", 1], ["--best-of", 1, "--scorer", "none"]):
        assert sample("vqvae", "a red circle", *flags, "--out", "a.png").code == 0
        made.append(read("a.png"))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


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
        (["--best-of", "2", "--set", "gidance=3"], ["'gidance'", "'guidance'"]),
        (["--best-of", "2", "--set", "top_p=2"], ["top_p=2"]),
        (["--best-of", "2", "--set", "top_k=-1"], ["top_k=-1"]),
        (["--best-of", "2", "--set", "temperature=hot"], ["temperature", "'hot'"]),
        (["--best-of", "2", "--out", "a.xyz"], ["a.xyz", "a.png"]),
        (["--init"], ["--init"]),
        (["--init", "begun.png", "--best-of", "2"], ["--init", "--best-of"]),
        (["--init", "begun.png", "--inside"], ["--inside"]),
        (["--inside", "--best-of", "2"], ["--inside"]),
        (["--init", "begun.png", "--set", "gidance=3"], ["'gidance'", "'guidance'"]),
        (["--init", "begun.png", "--set", "keep=1"], ["'keep'"]),
        (["--init", "begun.png", "--set", "top_p=0"], ["top_p=0"]),
        (["--init", "begun.png", "--out", "a.xyz"], ["a.xyz", "a.png"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_are_told(
    flags: list[str], words: list[str], sample: Callable[..., Any], begun: Path
) -> None:
    told(sample("vqvae", "a red circle", *flags), *words)


def test_a_scorer_without_a_matching_model_is_told(
    sample: Callable[..., Any], smoke_run: Callable[[str], Any]
) -> None:
    other = smoke_run("ddpm").folder
    answer = sample("vqvae", "a blue square", "--best-of", 2, "--scorer", f"damsm:{other}")
    told(answer, str(other), "without a DAMSM", "attngan")


# --- inside -----------------------------------------------------------------------------------


def test_the_inside_of_a_prior_is_shown(sample: Callable[..., Any]) -> None:
    """Eight pictures in a row, the last of which is the whole."""
    answer = sample("vqvae", "a red circle", "--inside", "--seed", 3, "--out", "a.png")
    assert answer == (0, "a.png\n", ""), answer
    shown = read("a.png")
    assert shown.shape[2] == 8 * 138 + 10 and 138 < shown.shape[1] < 2 * 138
    alone = sample("vqvae", "a red circle", "--seed", 3, "--single", "--out", "b.png")
    picture = read(alone.out.strip()).repeat_interleave(8, 1).repeat_interleave(8, 2)
    last = shown[:, 10 : 10 + 128, 10 + 7 * 138 : 10 + 7 * 138 + 128]
    assert torch.equal(last, picture)
