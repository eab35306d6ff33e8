"""Captions of `shapes` are read back to the scenes that they describe."""

from __future__ import annotations

import pytest
import torch

from lineage.data import load_dataset
from lineage.data.shapes import LEVELS
from lineage.evaluation.captions import read_caption
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import ObjectSpec, make_prompts


@pytest.mark.parametrize("level", LEVELS)
def test_every_prompt_is_read_as_what_it_was_made_from(level: str) -> None:
    for prompt in make_prompts(level):
        read = read_caption(prompt.prompt, level)
        assert read is not None, prompt.prompt
        assert (read.include, read.background) == (prompt.include, prompt.background), prompt.prompt


@pytest.mark.parametrize("level", LEVELS)
def test_every_caption_of_the_data_is_read(level: str) -> None:
    """All paraphrases, also those that no prompt has."""
    captions = load_dataset(f"shapes:{level}", "validation", 16).all_captions(300)
    assert [caption for caption in captions if read_caption(caption) is None] == []


def test_the_judge_accepts_real_pictures_of_captions_that_were_read() -> None:
    data = load_dataset("shapes", "validation", 32)
    examples = [data[i] for i in range(60)]
    detections = Judge.load().detect(torch.stack([one.image for one in examples]))
    right = 0
    for found, example in zip(detections, examples, strict=True):
        prompts = [read_caption(caption) for caption in example.captions]
        right += all(prompt and verdict(found, prompt)["strict"] for prompt in prompts)
    assert right >= 57


def test_spelling_that_does_not_matter() -> None:
    for caption in ("A red  circle.", "an red circle", " there is a red circle "):
        read = read_caption(caption)
        assert read is not None and read.include == (ObjectSpec("circle", 1, "red"),)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red circle",
        "a red dragon",
        "a circle and a square and a star",
        "two red circles left of a blue square",
        "three red circles and three blue squares",
        "two red circles on the left",
        "a red circle that is red",
        "a red circle, rotating",
    ],
)
def test_what_the_grammar_does_not_have_is_no_prompt(caption: str) -> None:
    """The judge would give a verdict on something else."""
    assert read_caption(caption) is None
