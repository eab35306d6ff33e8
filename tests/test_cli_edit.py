"""`lineage sample --init … --mask … --strength …`: editing from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE = 16


@pytest.fixture(autouse=True)
def given(tmp_path: Path) -> None:
    """A picture and a mask of the size of a smoke run, where the commands run."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 6:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")


def read(path: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def drawn(answer: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The single picture that was written."""
    assert answer.code == 0, answer.errors
    return read(answer.out.split()[-1])


@pytest.mark.parametrize("key", ["ddpm", "ldm", "dit"])
def test_what_is_not_white_in_the_mask_stays_as_it_is(key: str, sample: Callable[..., Any]) -> None:
    given, white = read("given.png"), read("mask.png")[..., 0] > 0
    found = drawn(
        sample(key, "a red circle", "--init", "given.png", "--mask", "mask.png", "--single")
    )
    assert found.shape == given.shape
    assert np.array_equal(found[~white], given[~white])
    assert (found[white] != given[white]).mean() > 0.5


def test_a_little_strength_stays_nearer_than_much(sample: Callable[..., Any]) -> None:
    given = read("given.png").astype(int)
    apart = []
    for strength in (0.2, 1.0):
        found = drawn(
            sample(
                "ddpm", "a red circle", "--init", "given.png", "--strength", strength, "--single"
            )
        )
        apart.append(np.abs(found.astype(int) - given).mean())
    assert apart[0] < apart[1]


def test_without_a_word_a_diffusion_model_edits_and_a_prior_completes(
    sample: Callable[..., Any],
) -> None:
    edited = drawn(sample("ddpm", "a red circle", "--init", "given.png", "--single"))
    again = drawn(
        sample("ddpm", "a red circle", "--init", "given.png", "--strength", 0.6, "--single")
    )
    assert np.array_equal(edited, again)
    assert sample("vqvae", "a red circle", "--init", "given.png").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask", "mask.png"], "--init"),
        (["--strength", "0.5"], "--init"),
        (["--init", "given.png", "--mask", "mask.png", "--keep", "0.5"], "--keep"),
        (["--init", "given.png", "--strength", "0"], "strength"),
        (["--init", "given.png", "--strength", "1.5"], "strength"),
        (["--init", "given.png", "--mask", "none.png"], "none.png"),
        (["--init", "given.png", "--keep", "0.5"], "begun"),
        (["--init", "given.png", "--set", "sampler=ddimm"], "ddim"),
    ],
    ids=str,
)
def test_faults_are_one_sentence(
    options: list[str], words: str, sample: Callable[..., Any]
) -> None:
    answer = sample("ddpm", "a red circle", *options)
    assert answer.code == 2
    assert words in answer.errors and len(answer.errors.strip().splitlines()) == 1
    assert "Traceback" not in answer.errors


def test_a_prior_cannot_paint_into_a_mask(sample: Callable[..., Any]) -> None:
    answer = sample("vqvae", "a red circle", "--init", "given.png", "--mask", "mask.png")
    assert answer.code == 2 and "ddpm, ldm and dit" in answer.errors
