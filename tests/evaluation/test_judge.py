"""The judge: its weights, a second exam, its rules by hand, and pictures without objects.

All composition scores are its verdicts. The exam here has other pictures than the one that is
reported with scores, so that a judge which only fits those would fail.
"""

from __future__ import annotations

import copy
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lineage.evaluation
from lineage.data.shapes import LEVELS, Scenes, make_scenes, render
from lineage.errors import UserError
from lineage.evaluation.exam import exam
from lineage.evaluation.judge import (
    SIDE,
    UNKNOWN,
    DetectedObject,
    Detections,
    Judge,
    place_name,
    relations,
    resized,
    verdict,
)
from lineage.evaluation.prompts import (
    COLOUR_NAMES,
    GROUNDS,
    SHAPES,
    TASKS,
    ObjectSpec,
    Prompt,
    make_prompts,
)
from lineage.training.store import load_tensors, save_tensors

WEIGHTS = Path(lineage.evaluation.__file__).parent / "weights" / "judge.safetensors"
OTHER_SEED = 77  # the reported exam's is 0


def pictures(level: str, number: int, size: int, **fields: Any) -> tuple[Scenes, torch.Tensor]:
    """Scenes that no training uses, with some fields replaced, and pictures of them."""
    scenes = make_scenes(LEVELS[level], 5, "exam", np.arange(number))
    for name, value in fields.items():
        getattr(scenes, name)[:] = value
    return scenes, torch.from_numpy(render(scenes, size))


# --- the trained judge ------------------------------------------------------------------------


def test_the_weights_are_small() -> None:
    """They come with the package."""
    assert 0 < WEIGHTS.stat().st_size < 2_000_000
    judge = Judge.load()
    assert not judge.training  # batch statistics would make a picture depend on its neighbours
    assert not any(p.requires_grad for p in judge.parameters())
    assert judge.fingerprint() == Judge.from_file(WEIGHTS).fingerprint()


@lru_cache
def exam_prompts(level: str) -> list[Prompt]:
    """50 of some 90 prompts of each task, test and held out, to save time."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in make_prompts(level):
        groups.setdefault(prompt.tag, []).append(prompt)
    assert set(groups) == set(TASKS)
    return [group[i * len(group) // 50] for group in groups.values() for i in range(50)]


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_a_second_exam_is_passed(level: str, size: int) -> None:
    """Real pictures are accepted and near misses are not, in every task, at every size."""
    prompts = exam_prompts(level)
    result = exam(Judge.load(), prompts, size, repeats=1, seed=OTHER_SEED)
    assert result["pictures"] == len(prompts) == 50 * len(TASKS)
    assert set(result["accepted"]) == set(result["near_misses"]) == set(TASKS)
    assert min(result["accepted"].values()) >= 0.98, result["accepted"]
    assert max(result["near_misses"].values()) <= 0.02, result["near_misses"]
    assert len(result["near_misses_by_attribute"]) == 8
    assert max(result["near_misses_by_attribute"].values()) <= 0.02, result


def test_an_untrained_judge_fails_the_exam() -> None:
    """The exam can be failed."""
    torch.manual_seed(0)
    judge = Judge().eval().requires_grad_(False)
    result = exam(judge, exam_prompts("easy")[::4], 32, seed=OTHER_SEED)
    assert max(result["accepted"].values()) < 0.2


@pytest.mark.parametrize("size", [20, 48, 128])
def test_every_object_is_detected_at_its_place(size: int) -> None:
    """Shapes, colours, places, sizes and backgrounds of all kinds of scenes, at sizes between those
    of the exam and beyond.
    """
    scenes, images = pictures("hard", 128, size)
    right = 0
    for row, detections in enumerate(Judge.load().detect(images)):
        truth = [
            (SHAPES[scenes.shape[row, k]], COLOUR_NAMES[scenes.colour[row, k]], k)
            for k in range(scenes.count[row])
        ]
        pairs = [(one.shape, one.colour) for one in detections.objects]
        if sorted(pairs) != sorted(pair[:2] for pair in truth):
            continue
        right += detections.background == GROUNDS[scenes.background[row]]
        for one in detections.objects:
            distance, k = min(
                (np.hypot(*(scenes.centre[row, k] - (one.x, one.y))), k)
                for shape, colour, k in truth
                if (shape, colour) == (one.shape, one.colour)
            )
            assert distance < 0.03
            assert abs(one.radius - scenes.radius[row, k]) < 0.04
    assert right >= 0.98 * len(images)


def test_the_most_certain_object_comes_first() -> None:
    """A table of failures names it first."""
    _, images = pictures("hard", 64, 32)
    heat = Judge.load().detection_maps(images).heatmap  # (B, G, G)
    compared = 0
    for row, detections in enumerate(Judge.load().detect(images)):
        cells = [(int(one.x * 16), int(one.y * 16)) for one in detections.objects]
        certainty = [
            float(heat[row, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()) for x, y in cells
        ]
        assert certainty == sorted(certainty, reverse=True)
        compared += len(certainty) > 1
    assert compared > 20


def test_large_pictures_are_shrunk_by_averaging() -> None:
    """Each pixel counts, not every second one."""
    board = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2) * 2.0 - 1.0
    assert resized(board.expand(2, 3, -1, -1), SIDE).abs().max() < 0.05
    same = torch.rand(2, 3, 64, 64)
    assert torch.equal(resized(same, SIDE), same)
    assert torch.allclose(resized(torch.full((1, 3, 16, 16), 0.3), SIDE), torch.tensor(0.3))


def test_detections_do_not_depend_on_the_other_pictures() -> None:
    """Bit for bit, as do the features: scores must not change with the size of a batch."""
    judge = Judge.load()
    _, images = pictures("hard", 200, 32)
    detections, features = judge.detect(images), judge.features(images)
    assert features.shape == (200, judge.width) and features.dtype == torch.float32
    for count in (1, 63, 64, 65):
        assert judge.detect(images[:count]) == detections[:count]
        assert torch.equal(judge.features(images[:count]), features[:count])
    for row in (5, 130, 199):
        assert judge.detect(images[row : row + 1]) == detections[row : row + 1]
        assert torch.equal(judge.features(images[row : row + 1]), features[row : row + 1])
    order = torch.randperm(200)
    assert judge.detect(images[order]) == [detections[i] for i in order]
    assert torch.equal(judge.features(images[order]), features[order])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_nothing_is_detected_in_empty_pictures(size: int) -> None:
    """A system that draws nothing, or noise, must not score. At 16 pixels a few pictures of noise
    contain what might be a small star; few may contain more.
    """
    judge = Judge.load()
    _, empty = pictures("hard", 60, size, count=0)
    assert all(not r.objects for r in judge.detect(empty))
    plain = torch.tensor([[242, 242, 242], [22, 22, 26], [140, 140, 145], [0, 0, 0], [255] * 3])
    plain = plain.to(torch.uint8)[:, :, None, None].expand(-1, 3, size, size)
    grounds = [(r.objects, r.background) for r in judge.detect(plain)]
    assert grounds == [((), name) for name in ("white", "black", "grey", "black", "white")]
    noise = torch.randint(0, 256, (100, 3, size, size), dtype=torch.uint8)
    known = [any(t.shape != UNKNOWN for t in r.objects) for r in judge.detect(noise)]
    assert np.mean(known) <= (0.35 if size == 16 else 0.05)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_halves_of_shapes_are_no_shapes(level: str, size: int) -> None:
    """Two pictures joined along a line through the centre, and one half alone: generated pictures
    are full of them, and must not score.
    """
    rng, count = np.random.default_rng(0), 150
    radius = np.where(rng.random((count, 1)) < 0.5, 0.18, 0.28)
    centre = rng.uniform(0.35, 0.65, (count, 1, 2))
    scenes, whole = pictures(level, count, size, count=1, radius=radius, centre=centre)
    other = copy.deepcopy(scenes)
    names = LEVELS[level].shapes
    other.shape[:, 0] = (other.shape[:, 0] + rng.integers(1, names, count)) % names
    nothing = copy.deepcopy(scenes)
    nothing.count[:] = 0
    at = (np.arange(size) + 0.5) / size
    turn = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    x, y = at[None, None] - centre[..., :1], at[None, :, None] - centre[..., 1:]
    half = np.clip((np.cos(turn) * x + np.sin(turn) * y) * size + 0.5, 0, 1)[:, None]

    def known(second: Scenes) -> float:
        mixed = whole.numpy() * (1 - half) + render(second, size) * half
        detections = Judge.load().detect(torch.from_numpy(mixed.astype(np.uint8)))
        return float(np.mean([any(t.shape != UNKNOWN for t in r.objects) for r in detections]))

    assert known(scenes) >= 0.98  # both halves are of one shape
    assert known(other) < 0.15
    assert known(nothing) < 0.15


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "foreign", "another name", "another size", "missing"]
)
def test_damaged_weights_are_one_sentence(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    if damage == "cut":
        path.write_bytes(WEIGHTS.read_bytes()[:100_000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(b"not tensors at all" * 50)
    elif damage != "missing":
        tensors = load_tensors(WEIGHTS)
        weight = tensors.pop("ground.weight")
        changed = {
            "another name": {"sky.weight": weight},
            "another size": {"ground.weight": weight.T},
        }
        save_tensors(path, {**tensors, **changed[damage]})
    with pytest.raises(UserError) as raised:
        Judge.from_file(path)
    sentence = str(raised.value)
    assert str(path) in sentence and "\n" not in sentence and sentence[-1] in ".?"


# --- the verdict, by hand ---------------------------------------------------------------------


def detection(what: str, x: float = 0.5, y: float = 0.5, radius: float = 0.18) -> DetectedObject:
    colour, shape = what.split()
    return DetectedObject(shape, colour, x, y, radius)


def ask(*include: ObjectSpec, background: str | None = None) -> Prompt:
    return Prompt("any", "a caption", include, "hard", "test", background)


def strict(prompt: Prompt, *objects: DetectedObject, background: str = "white") -> bool:
    return verdict(Detections(objects, background), prompt)["strict"]


RED, BLUE = detection("red circle", 0.3), detection("blue square", 0.7)


def test_one_object() -> None:
    prompt = ask(ObjectSpec("circle"))
    assert verdict(Detections((RED,), "white"), prompt) == {
        "strict": True,
        "object": True,
        "count": True,
    }
    assert strict(prompt, detection("brown circle"))  # any colour
    assert not strict(prompt)
    assert not strict(prompt, BLUE)
    assert not strict(prompt, RED, RED)  # one too many


@pytest.mark.parametrize("extra", ["blue square", "red square", "red circle", "red ?", "blue ?"])
def test_something_else_beside_it(extra: str) -> None:
    """The object is there, but the picture shows more than the prompt's scene."""
    detections = Detections((RED, detection(extra)), "white")
    assert verdict(detections, ask(ObjectSpec("circle", 1, "red"))) == {
        "strict": False,
        "object": True,
        "colour": extra.startswith("red"),
        "count": False,
    }


def test_an_unknown_shape_is_not_the_right_one() -> None:
    """It has a colour and counts as an object, which shows a system's progress."""
    detections = Detections((detection("red ?"),), "white")
    assert verdict(detections, ask(ObjectSpec("circle", 1, "red"))) == {
        "strict": False,
        "object": False,
        "colour": True,
        "count": True,
    }


def test_a_wrong_colour() -> None:
    detections = Detections((detection("blue circle"),), "white")
    assert verdict(detections, ask(ObjectSpec("circle", 1, "red"))) == {
        "strict": False,
        "object": True,
        "colour": False,
        "count": True,
    }


def test_two_objects() -> None:
    prompt = ask(ObjectSpec("circle"), ObjectSpec("square"))
    assert strict(prompt, RED, BLUE) and strict(prompt, BLUE, RED)
    assert verdict(Detections((RED, RED), "white"), prompt) == {
        "strict": False,
        "object": False,
        "count": True,
    }
    assert not strict(prompt, RED)


def test_exchanged_colours() -> None:
    """All shapes and colours are there, so every part is right, but not the whole."""
    prompt = ask(ObjectSpec("circle", 1, "red"), ObjectSpec("square", 1, "blue"))
    assert strict(prompt, RED, BLUE) and strict(prompt, BLUE, RED)
    detections = Detections((detection("blue circle"), detection("red square")), "white")
    assert verdict(detections, prompt) == {
        "strict": False,
        "object": True,
        "colour": True,
        "count": True,
    }


@pytest.mark.parametrize(
    ("include", "names", "right"),
    [
        ("red circle", "red star", True),  # on whatever shape
        ("red circle", "", False),
        ("red circle", "red circle, blue circle", False),  # and no other colour
        ("red circle, blue square", "blue star, red star", True),
        ("red circle, blue square", "red circle, red square", False),
        ("red circle, blue square", "red circle, blue square, pink ring", False),
        ("red circle, any square", "red ring, pink ring", True),  # any colour may be the other's
        ("red circle, any square", "pink circle, red ring", True),
        ("red circle, any square", "blue circle, pink square", False),
    ],
)
def test_colours_apart_from_shapes(include: str, names: str, right: bool) -> None:
    """The part `colour`, which ignores shapes."""
    pairs = [name.split() for name in include.split(", ")]
    prompt = ask(*(ObjectSpec(shape, 1, None if c == "any" else c) for c, shape in pairs))
    objects = tuple(detection(name) for name in names.split(", ") if name)
    assert verdict(Detections(objects, "white"), prompt)["colour"] == right


def test_a_colour_named_for_one_of_two() -> None:
    prompt = ask(ObjectSpec("circle", 1, "red"), ObjectSpec("square"))
    assert strict(prompt, RED, detection("pink square")) and strict(
        prompt, RED, detection("red square")
    )
    assert not strict(prompt, detection("pink circle"), detection("red square"))


@pytest.mark.parametrize(("count", "right"), [(1, False), (2, False), (3, True), (4, False)])
def test_counting(count: int, right: bool) -> None:
    objects = (detection("red circle"),) * count
    assert verdict(Detections(objects, "white"), ask(ObjectSpec("circle", 3))) == {
        "strict": right,
        "object": True,
        "count": right,
    }


def test_counting_needs_the_shape_and_its_colour() -> None:
    """Two red circles are not a red one and a blue one, nor a circle and a square."""
    red = detection("red circle")
    assert strict(ask(ObjectSpec("circle", 2)), red, detection("blue circle"))
    assert not strict(ask(ObjectSpec("circle", 2, "red")), red, detection("blue circle"))
    assert not strict(ask(ObjectSpec("circle", 2)), red, detection("red square"))
    result = verdict(Detections((red, detection("red ?")), "white"), ask(ObjectSpec("circle", 2)))
    assert (result["object"], result["count"], result["strict"]) == (True, True, False)


def test_one_shape_in_two_colours() -> None:
    prompt = ask(ObjectSpec("circle", 1, "red"), ObjectSpec("circle", 1, "blue"))
    red, blue = detection("red circle"), detection("blue circle")
    assert strict(prompt, red, blue) and strict(prompt, blue, red)
    assert not strict(prompt, red, red)
    assert not strict(prompt, red, blue, blue)
    assert not strict(prompt, red)
    assert not strict(
        ask(ObjectSpec("circle", 1, "red"), ObjectSpec("circle", 1, "red")), red, blue
    )
    more = ask(ObjectSpec("circle", 2, "red"), ObjectSpec("circle", 1, "blue"))
    assert strict(more, red, blue, red)
    assert not strict(more, red, blue, blue)


def test_the_background() -> None:
    prompt = ask(ObjectSpec("circle"), background="black")
    assert strict(prompt, RED, background="black")
    assert not strict(prompt, RED, background="grey")
    assert verdict(Detections((RED,), "grey"), prompt)["object"]
    assert all(strict(ask(ObjectSpec("circle")), RED, background=name) for name in GROUNDS)


@pytest.mark.parametrize(("radius", "size"), [(0.14, "small"), (0.2, "small"), (0.26, "large")])
def test_the_size(radius: float, size: str) -> None:
    other = "small" if size == "large" else "large"
    one = detection("red circle", radius=radius)
    assert strict(ask(ObjectSpec("circle", size=size)), one)
    assert not strict(ask(ObjectSpec("circle", size=other)), one)


def test_the_place() -> None:
    prompt = ask(ObjectSpec("circle", place="in the top left"))
    assert strict(prompt, detection("red circle", 0.3, 0.3))
    for x, y in ((0.5, 0.3), (0.3, 0.5), (0.7, 0.3), (0.3, 0.7), (0.5, 0.5), (0.7, 0.7)):
        assert not strict(prompt, detection("red circle", x, y))


def test_every_place_has_its_name() -> None:
    names = [[place_name(x, y) for x in (0.2, 0.5, 0.8)] for y in (0.2, 0.5, 0.8)]
    assert names == [
        ["in the top left", "at the top", "in the top right"],
        ["on the left", "in the middle", "on the right"],
        ["in the bottom left", "at the bottom", "in the bottom right"],
    ]
    assert place_name(0.345, 0.345) == "in the top left"  # the largest shift of a place in `easy`
    assert place_name(0.468, 0.532) == "in the middle"
    assert place_name(0.655, 0.655) == "in the bottom right"


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [("left of", 0.2, 0.5), ("right of", 0.8, 0.5), ("above", 0.5, 0.2), ("below", 0.5, 0.8)],
)
def test_positions(name: str, x: float, y: float) -> None:
    """The placed object is second in `include` and may be detected first or last."""
    prompt = ask(ObjectSpec("square"), ObjectSpec("circle", position=(name, 0)))
    circle, square = detection("red circle", x, y), detection("blue square")
    for order in ((circle, square), (square, circle)):
        assert verdict(Detections(order, "white"), prompt) == {
            "strict": True,
            "object": True,
            "count": True,
            "relation": True,
        }
    across = detection("red circle", 1 - x, 1 - y)
    turned = detection("red circle", y, x)
    for wrong in (across, turned):
        result = verdict(Detections((wrong, square), "white"), prompt)
        assert (result["strict"], result["relation"]) == (False, False)
        assert result["object"] and result["count"]
    missing = verdict(Detections((circle,), "white"), prompt)
    assert not missing["relation"] and not missing["strict"]
    unknown = verdict(Detections((circle, detection("blue ?")), "white"), prompt)
    assert not unknown["relation"] and not unknown["strict"]


def test_a_position_needs_objects_of_both_colours() -> None:
    prompt = ask(
        ObjectSpec("square", 1, "blue"), ObjectSpec("circle", 1, "red", position=("left of", 0))
    )
    assert strict(prompt, RED, BLUE)
    assert not strict(prompt, detection("red circle", 0.7), detection("blue square", 0.3))
    assert not strict(prompt, detection("pink circle", 0.3), BLUE)


def relations_at(x: float, y: float, radius: float = 0.15) -> set[str]:
    """Relations of an object to one in the middle of the picture, `x` and `y` away."""
    return relations(
        detection("red star", 0.5 + x, 0.5 + y, radius), detection("red ring", radius=radius)
    )


def test_a_diagonal_is_two_relations() -> None:
    """GenEval: each component of the direction that is above one half counts."""
    assert relations_at(0.3, 0.3) == {"right", "below"}
    assert relations_at(-0.3, -0.3) == {"left", "above"}
    assert relations_at(0.4, 0.02) == {"right"}
    assert relations_at(0.02, -0.4) == {"above"}
    assert relations_at(0.0, 0.0) == set()
    assert relations_at(0.40, 0.15) == {"right"}  # less than 30 degrees off


def test_near_centres_have_no_relation() -> None:
    """GenEval's margin, a tenth of both sizes: with radii of 0.15 they are 0.3 each."""
    assert relations_at(0.059, 0.059) == relations_at(-0.059, 0.0) == set()
    assert relations_at(0.13, 0.0) == {"right"} and relations_at(0.0, -0.13) == {"above"}
    assert relations_at(0.13, 0.0, radius=0.35) == set()  # larger objects must be farther apart
    assert relations_at(-0.3, 0.059) == {"left"}


def test_relations_are_antisymmetric() -> None:
    """If one object is left of another, the other is right of it."""
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    rng = random.Random(0)
    several = 0
    for _ in range(2000):
        numbers = [(rng.random(), rng.random(), rng.uniform(0.05, 0.3)) for _ in "ab"]
        one, other = (detection("red star", *each) for each in numbers)
        there, back = relations(one, other), relations(other, one)
        assert there == {turned[name] for name in back}
        assert not any(turned[name] in there for name in there)
        several += len(there) == 2
    assert several > 100


def test_detections_in_words() -> None:
    assert str(Detections((), "white")) == "nothing"
    assert str(Detections((RED, detection("blue ?")), "white")) == "red circle, blue ?"
