"""Edge cases: unusual prompts, pictures and embeddings."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lineage.data.shapes_draw import COLOURS
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.exam import exam
from lineage.evaluation.judge import DetectedObject, Detections, Judge, relations, verdict
from lineage.evaluation.prompts import ObjectSpec, Prompt, read_prompts
from lineage.evaluation.scenes import attributes, near_miss, scene_spec


def prompt_of(*include: ObjectSpec, level: str = "hard") -> Prompt:
    return Prompt("any", "a caption", include, level, "test")


def test_collapsed_text_embeddings_are_not_perfect() -> None:
    """If all captions are equally near, R-precision is that of rng."""
    captions = [str(i) for i in range(200)]
    section = sections.text_fit(torch.randn(200, 8), torch.ones(200, 8), captions, "damsm")
    assert section["r_precision"]["value"] == pytest.approx(1 / 100)


def plain(colours: Sequence[Sequence[int]]) -> torch.Tensor:
    """One picture of each colour, without objects."""
    tensor = torch.tensor(colours, dtype=torch.uint8)
    return tensor[:, :, None, None].expand(-1, -1, 32, 32)


def test_plain_colours_have_no_objects() -> None:
    """A model that has collapsed to one colour must not score for a yellow circle."""
    judge = Judge.load()
    assert not any(one.objects for one in judge.detect(plain(list(COLOURS.values()))))
    random = torch.randint(0, 256, (300, 3), generator=torch.Generator().manual_seed(0)).tolist()
    assert np.mean([bool(one.objects) for one in judge.detect(plain(random))]) < 0.02


BROKEN: list[dict[str, Any]] = [
    {"include": [{"class": "circle", "count": 5}, {"class": "square", "count": -2}]},
    {"include": [{"class": "circle", "count": 0}, {"class": "square"}]},
    {"include": [{"class": "circle", "count": 2.9}]},
    {"include": [{"class": "circle", "position": ["left of", 0]}]},
    {"include": [{"class": "circle", "count": float("inf")}]},
    {"include": [{"class": "circle"}, {"class": "star", "position": ["above", float("inf")]}]},
    {"include": [{"class": "circle", "colour": "red"}]},
    {"include": [{"class": "circle", "count": 2, "size": "large"}]},
    {"include": [{"class": "circle"}, {"class": "square", "place": "at the top"}]},
    {"include": [{"class": "circle", "size": "large", "place": "in the top left"}]},
    {"include": [{"class": "heart"}], "level": "easy"},
    {"include": "circle"},
    {"split": "training"},
    {"prompt": None},
    {"prompt": ""},
    {"tag": None},
]


@pytest.mark.parametrize("changes", BROKEN, ids=str)
def test_a_line_that_cannot_be_judged_is_an_error(changes: dict[str, Any], tmp_path: Path) -> None:
    """The error names the line, before anything is drawn."""
    line = {"tag": "t", "prompt": "p", "include": [{"class": "circle"}], **changes}
    (tmp_path / "x").write_text(json.dumps(line))
    with pytest.raises(UserError, match="line 1"):
        read_prompts(tmp_path / "x")


def test_a_line_of_endless_depth_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1"):
        read_prompts(tmp_path / "x")


def test_the_exam_of_a_prompt_with_every_shape_of_its_level() -> None:
    prompt = prompt_of(
        *(ObjectSpec(s) for s in ("circle", "square", "triangle", "cross")), level="easy"
    )
    assert exam(Judge.load(), [prompt], 32)["near_miss_pictures"] == 2


def test_two_of_a_shape_cannot_exchange_their_colours() -> None:
    prompt = prompt_of(ObjectSpec("circle", 1, "red"), ObjectSpec("circle", 1, "blue"))
    assert "binding" not in attributes(prompt)
    prompt = prompt_of(ObjectSpec("circle", 1, "red"), ObjectSpec("star", 1, "blue"))
    spec = scene_spec(prompt, np.random.default_rng(0))
    near = near_miss(prompt, spec, "binding", np.random.default_rng(0))
    assert set(near.objects) == {("circle", "blue"), ("star", "red")}


def detections(*objects: tuple[str, str, float, float]) -> Detections:
    """(shape, colour, x, radius) of each object, in the middle row."""
    return Detections(tuple(DetectedObject(s, c, x, 0.5, r) for s, c, x, r in objects), "white")


def test_a_relation_of_two_equal_shapes_depends_on_their_colours() -> None:
    prompt = prompt_of(
        ObjectSpec("circle", 1, "red"), ObjectSpec("circle", 1, "blue", ("left of", 0))
    )
    red_first = detections(("circle", "red", 0.2, 0.15), ("circle", "blue", 0.8, 0.15))
    assert not verdict(red_first, prompt)["strict"]
    assert verdict(
        detections(*[("circle", "blue", 0.2, 0.15), ("circle", "red", 0.8, 0.15)]), prompt
    )["strict"]


def test_two_large_circles_are_both_large() -> None:
    prompt = prompt_of(ObjectSpec("circle", 2, size="large"))
    one = detections(("circle", "red", 0.2, 0.28), ("circle", "red", 0.8, 0.15))
    both = detections(("circle", "red", 0.2, 0.28), ("circle", "red", 0.8, 0.28))
    assert not verdict(one, prompt)["strict"] and verdict(both, prompt)["strict"]


def geneval(a: DetectedObject, b: DetectedObject) -> set[str]:
    """GenEval's rule, with arrays."""
    offset = np.array([a.x - b.x, a.y - b.y])
    revised = np.maximum(np.abs(offset) - 0.1 * 2 * (a.radius + b.radius), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    x, y = revised / np.linalg.norm(offset)  # of the offset before the margin
    names = {"left": x < -0.5, "right": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


def test_relations_are_genevals() -> None:
    rng = random.Random(0)

    def random_object() -> DetectedObject:
        radius = rng.uniform(0.1, 0.2)
        return DetectedObject("star", "red", rng.random(), rng.random(), radius)

    for _ in range(2000):
        a, b = random_object(), random_object()
        assert relations(a, b) == geneval(a, b)


def test_a_file_of_prompts_is_read_as_other_texts_are(tmp_path: Path) -> None:
    """With a mark of its byte order, line ends of any system, and separators inside of a prompt."""
    prompt = "a circle\u2028or so"
    row = {"tag": "t", "prompt": prompt, "include": [{"class": "circle"}]}
    text = json.dumps(row, ensure_ascii=False)
    for raw in (
        text.encode("utf-8-sig"),
        f"{text}\r\n\r\n{text}".encode(),
        text.encode("utf-16"),
    ):
        (tmp_path / "x").write_bytes(raw)
        assert {one.prompt for one in read_prompts(tmp_path / "x")} == {prompt}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_pipe_a_device_and_a_folder_are_no_prompts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            read_prompts(path)
        assert str(path) in str(caught.value)
