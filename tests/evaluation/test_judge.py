"""The judge: its weights, its exam sat again, its rules by hand, and what it must not see.

All composition scores are its verdicts. The exam here has other pictures than the one that is
reported with scores, so that a judge which only knew those would fail.
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
    Judge,
    Reading,
    Thing,
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
    Prompt,
    Wanted,
    make_prompts,
)
from lineage.training.store import load_tensors, save_tensors

WEIGHTS = Path(lineage.evaluation.__file__).parent / "weights" / "judge.safetensors"
OTHER_SEED = 77  # the reported exam's is 0


def pictures(level: str, number: int, size: int, **fields: Any) -> tuple[Scenes, torch.Tensor]:
    """Scenes that nothing was trained on, with some fields replaced, and pictures of them."""
    scenes = make_scenes(LEVELS[level], 5, "exam", np.arange(number))
    for name, value in fields.items():
        getattr(scenes, name)[:] = value
    return scenes, torch.from_numpy(render(scenes, size))


# --- the trained judge -----------------------------------------------------


def test_the_weights_are_small() -> None:
    """They travel with the package."""
    assert 0 < WEIGHTS.stat().st_size < 2_000_000
    judge = Judge.load()
    assert not judge.training  # batch statistics would make a picture depend on its neighbours
    assert not any(p.requires_grad for p in judge.parameters())
    assert judge.fingerprint() == Judge.from_file(WEIGHTS).fingerprint()


@lru_cache
def exam_prompts(level: str) -> list[Prompt]:
    """Of some 90 prompts of each task, test and held out, every second or so: 50, to save time."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in make_prompts(level):
        groups.setdefault(prompt.tag, []).append(prompt)
    assert set(groups) == set(TASKS)
    return [of[i * len(of) // 50] for of in groups.values() for i in range(50)]


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_the_exam_sat_again(level: str, size: int) -> None:
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
def test_every_thing_is_read_where_it_stands(size: int) -> None:
    """Shapes, colours, places, sizes and grounds of scenes of any kind, at sizes between those of
    the exam and beyond.
    """
    scenes, images = pictures("hard", 128, size)
    right = 0
    for row, reading in enumerate(Judge.load().read(images)):
        truth = [
            (SHAPES[scenes.shape[row, k]], COLOUR_NAMES[scenes.colour[row, k]], k)
            for k in range(scenes.count[row])
        ]
        seen = [(thing.shape, thing.colour) for thing in reading.things]
        if sorted(seen) != sorted(pair[:2] for pair in truth):
            continue
        right += reading.background == GROUNDS[scenes.background[row]]
        for thing in reading.things:
            apart, k = min(
                (np.hypot(*(scenes.centre[row, k] - (thing.x, thing.y))), k)
                for shape, colour, k in truth
                if (shape, colour) == (thing.shape, thing.colour)
            )
            assert apart < 0.03
            assert abs(thing.radius - scenes.radius[row, k]) < 0.04
    assert right >= 0.98 * len(images)


def test_the_surest_thing_comes_first() -> None:
    """A table of failures names first what the judge is surest of."""
    _, images = pictures("hard", 64, 32)
    heat = Judge.load().maps(images).heat  # (B, G, G)
    compared = 0
    for row, reading in enumerate(Judge.load().read(images)):
        cells = [(int(thing.x * 16), int(thing.y * 16)) for thing in reading.things]
        sure = [
            float(heat[row, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()) for x, y in cells
        ]
        assert sure == sorted(sure, reverse=True)
        compared += len(sure) > 1
    assert compared > 20


def test_pictures_are_brought_to_one_size_by_averaging() -> None:
    """Each pixel of a large picture counts, not every second one."""
    board = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2) * 2.0 - 1.0
    assert resized(board.expand(2, 3, -1, -1), SIDE).abs().max() < 0.05
    same = torch.rand(2, 3, 64, 64)
    assert torch.equal(resized(same, SIDE), same)
    assert torch.allclose(resized(torch.full((1, 3, 16, 16), 0.3), SIDE), torch.tensor(0.3))


def test_a_reading_does_not_depend_on_the_other_pictures() -> None:
    """Bit for bit, and the features too: scores must not change with the size of a batch."""
    judge = Judge.load()
    _, images = pictures("hard", 200, 32)
    readings, features = judge.read(images), judge.features(images)
    assert features.shape == (200, judge.width) and features.dtype == torch.float32
    for count in (1, 63, 64, 65):
        assert judge.read(images[:count]) == readings[:count]
        assert torch.equal(judge.features(images[:count]), features[:count])
    for row in (5, 130, 199):
        assert judge.read(images[row : row + 1]) == readings[row : row + 1]
        assert torch.equal(judge.features(images[row : row + 1]), features[row : row + 1])
    order = torch.randperm(200)
    assert judge.read(images[order]) == [readings[i] for i in order]
    assert torch.equal(judge.features(images[order]), features[order])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_nothing_is_seen_where_there_is_nothing(size: int) -> None:
    """A system that draws nothing, or noise, must not be given things. At 16 pixels a few pictures
    of noise hold what might be a small star; none may hold much more.
    """
    judge = Judge.load()
    _, empty = pictures("hard", 60, size, count=0)
    assert all(not reading.things for reading in judge.read(empty))
    plain = torch.tensor([[242, 242, 242], [22, 22, 26], [140, 140, 145], [0, 0, 0], [255] * 3])
    plain = plain.to(torch.uint8)[:, :, None, None].expand(-1, 3, size, size)
    grounds = [(r.things, r.background) for r in judge.read(plain)]
    assert grounds == [((), name) for name in ("white", "black", "grey", "black", "white")]
    noise = torch.randint(0, 256, (100, 3, size, size), dtype=torch.uint8)
    known = [any(t.shape != UNKNOWN for t in r.things) for r in judge.read(noise)]
    assert np.mean(known) <= (0.35 if size == 16 else 0.05)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_halves_of_shapes_are_not_called_shapes(level: str, size: int) -> None:
    """Two renders joined along a line through the centre, and one half alone: generated pictures
    are full of them, and a judge that calls them a shape would praise them.
    """
    chance, count = np.random.default_rng(0), 150
    radius = np.where(chance.random((count, 1)) < 0.5, 0.18, 0.28)
    centre = chance.uniform(0.35, 0.65, (count, 1, 2))
    scenes, whole = pictures(level, count, size, count=1, radius=radius, centre=centre)
    other = copy.deepcopy(scenes)
    names = LEVELS[level].shapes
    other.shape[:, 0] = (other.shape[:, 0] + chance.integers(1, names, count)) % names
    nothing = copy.deepcopy(scenes)
    nothing.count[:] = 0
    at = (np.arange(size) + 0.5) / size
    turn = chance.uniform(0, 2 * np.pi, (count, 1, 1))
    x, y = at[None, None] - centre[..., :1], at[None, :, None] - centre[..., 1:]
    half = np.clip((np.cos(turn) * x + np.sin(turn) * y) * size + 0.5, 0, 1)[:, None]

    def known(second: Scenes) -> float:
        mixed = whole.numpy() * (1 - half) + render(second, size) * half
        readings = Judge.load().read(torch.from_numpy(mixed.astype(np.uint8)))
        return float(np.mean([any(t.shape != UNKNOWN for t in r.things) for r in readings]))

    assert known(scenes) >= 0.98  # two halves of one shape are that shape
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


# --- the verdict, by hand --------------------------------------------------


def thing(what: str, x: float = 0.5, y: float = 0.5, radius: float = 0.18) -> Thing:
    colour, shape = what.split()
    return Thing(shape, colour, x, y, radius)


def ask(*include: Wanted, background: str | None = None) -> Prompt:
    return Prompt("any", "a caption", include, "hard", "test", background)


def strict(prompt: Prompt, *things: Thing, background: str = "white") -> bool:
    return verdict(Reading(things, background), prompt)["strict"]


RED, BLUE = thing("red circle", 0.3), thing("blue square", 0.7)


def test_one_object() -> None:
    prompt = ask(Wanted("circle"))
    assert verdict(Reading((RED,), "white"), prompt) == {
        "strict": True,
        "object": True,
        "count": True,
    }
    assert strict(prompt, thing("brown circle"))  # any colour
    assert not strict(prompt)
    assert not strict(prompt, BLUE)
    assert not strict(prompt, RED, RED)  # one too many


@pytest.mark.parametrize("extra", ["blue square", "red square", "red circle", "red ?", "blue ?"])
def test_something_else_beside_it(extra: str) -> None:
    """The object is there, but the picture is not what was asked for."""
    reading = Reading((RED, thing(extra)), "white")
    assert verdict(reading, ask(Wanted("circle", 1, "red"))) == {
        "strict": False,
        "object": True,
        "colour": extra.startswith("red"),
        "count": False,
    }


def test_an_unknown_thing_is_not_what_was_asked_for() -> None:
    """It has a colour and can be counted, which shows that a system is on its way."""
    reading = Reading((thing("red ?"),), "white")
    assert verdict(reading, ask(Wanted("circle", 1, "red"))) == {
        "strict": False,
        "object": False,
        "colour": True,
        "count": True,
    }


def test_a_wrong_colour() -> None:
    reading = Reading((thing("blue circle"),), "white")
    assert verdict(reading, ask(Wanted("circle", 1, "red"))) == {
        "strict": False,
        "object": True,
        "colour": False,
        "count": True,
    }


def test_two_objects() -> None:
    prompt = ask(Wanted("circle"), Wanted("square"))
    assert strict(prompt, RED, BLUE) and strict(prompt, BLUE, RED)
    assert verdict(Reading((RED, RED), "white"), prompt) == {
        "strict": False,
        "object": False,
        "count": True,
    }
    assert not strict(prompt, RED)


def test_exchanged_colours() -> None:
    """All shapes and all colours are there, so every part is right, but not the whole."""
    prompt = ask(Wanted("circle", 1, "red"), Wanted("square", 1, "blue"))
    assert strict(prompt, RED, BLUE) and strict(prompt, BLUE, RED)
    reading = Reading((thing("blue circle"), thing("red square")), "white")
    assert verdict(reading, prompt) == {
        "strict": False,
        "object": True,
        "colour": True,
        "count": True,
    }


@pytest.mark.parametrize(
    ("include", "seen", "right"),
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
def test_colours_apart_from_shapes(include: str, seen: str, right: bool) -> None:
    """The part `colour`: whether the words for colours had their effect."""
    wanted = [name.split() for name in include.split(", ")]
    prompt = ask(*(Wanted(shape, 1, None if c == "any" else c) for c, shape in wanted))
    things = tuple(thing(name) for name in seen.split(", ") if name)
    assert verdict(Reading(things, "white"), prompt)["colour"] == right


def test_a_colour_named_for_one_of_two() -> None:
    prompt = ask(Wanted("circle", 1, "red"), Wanted("square"))
    assert strict(prompt, RED, thing("pink square")) and strict(prompt, RED, thing("red square"))
    assert not strict(prompt, thing("pink circle"), thing("red square"))


@pytest.mark.parametrize(("seen", "right"), [(1, False), (2, False), (3, True), (4, False)])
def test_counting(seen: int, right: bool) -> None:
    things = (thing("red circle"),) * seen
    assert verdict(Reading(things, "white"), ask(Wanted("circle", 3))) == {
        "strict": right,
        "object": True,
        "count": right,
    }


def test_counting_needs_the_shape_and_its_colour() -> None:
    """Two red circles are not a red one and a blue one, nor a circle and a square."""
    red = thing("red circle")
    assert strict(ask(Wanted("circle", 2)), red, thing("blue circle"))
    assert not strict(ask(Wanted("circle", 2, "red")), red, thing("blue circle"))
    assert not strict(ask(Wanted("circle", 2)), red, thing("red square"))
    result = verdict(Reading((red, thing("red ?")), "white"), ask(Wanted("circle", 2)))
    assert (result["object"], result["count"], result["strict"]) == (True, True, False)


def test_one_shape_in_two_colours() -> None:
    prompt = ask(Wanted("circle", 1, "red"), Wanted("circle", 1, "blue"))
    red, blue = thing("red circle"), thing("blue circle")
    assert strict(prompt, red, blue) and strict(prompt, blue, red)
    assert not strict(prompt, red, red)
    assert not strict(prompt, red, blue, blue)
    assert not strict(prompt, red)
    assert not strict(ask(Wanted("circle", 1, "red"), Wanted("circle", 1, "red")), red, blue)
    more = ask(Wanted("circle", 2, "red"), Wanted("circle", 1, "blue"))
    assert strict(more, red, blue, red)
    assert not strict(more, red, blue, blue)


def test_the_ground() -> None:
    prompt = ask(Wanted("circle"), background="black")
    assert strict(prompt, RED, background="black")
    assert not strict(prompt, RED, background="grey")
    assert verdict(Reading((RED,), "grey"), prompt)["object"]
    assert all(strict(ask(Wanted("circle")), RED, background=name) for name in GROUNDS)


@pytest.mark.parametrize(("radius", "size"), [(0.14, "small"), (0.2, "small"), (0.26, "large")])
def test_the_size(radius: float, size: str) -> None:
    other = "small" if size == "large" else "large"
    one = thing("red circle", radius=radius)
    assert strict(ask(Wanted("circle", size=size)), one)
    assert not strict(ask(Wanted("circle", size=other)), one)


def test_the_place() -> None:
    prompt = ask(Wanted("circle", place="in the top left"))
    assert strict(prompt, thing("red circle", 0.3, 0.3))
    for x, y in ((0.5, 0.3), (0.3, 0.5), (0.7, 0.3), (0.3, 0.7), (0.5, 0.5), (0.7, 0.7)):
        assert not strict(prompt, thing("red circle", x, y))


def test_every_place_has_its_name() -> None:
    names = [[place_name(x, y) for x in (0.2, 0.5, 0.8)] for y in (0.2, 0.5, 0.8)]
    assert names == [
        ["in the top left", "at the top", "in the top right"],
        ["on the left", "in the middle", "on the right"],
        ["in the bottom left", "at the bottom", "in the bottom right"],
    ]
    assert place_name(0.345, 0.345) == "in the top left"  # the most that `easy` shifts a place
    assert place_name(0.468, 0.532) == "in the middle"
    assert place_name(0.655, 0.655) == "in the bottom right"


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [("left of", 0.2, 0.5), ("right of", 0.8, 0.5), ("above", 0.5, 0.2), ("below", 0.5, 0.8)],
)
def test_positions(name: str, x: float, y: float) -> None:
    """The placed thing stands second in `include` and may be seen first or last."""
    prompt = ask(Wanted("square"), Wanted("circle", position=(name, 0)))
    circle, square = thing("red circle", x, y), thing("blue square")
    for order in ((circle, square), (square, circle)):
        assert verdict(Reading(order, "white"), prompt) == {
            "strict": True,
            "object": True,
            "count": True,
            "relation": True,
        }
    across = thing("red circle", 1 - x, 1 - y)
    turned = thing("red circle", y, x)
    for wrong in (across, turned):
        result = verdict(Reading((wrong, square), "white"), prompt)
        assert (result["strict"], result["relation"]) == (False, False)
        assert result["object"] and result["count"]
    missing = verdict(Reading((circle,), "white"), prompt)
    assert not missing["relation"] and not missing["strict"]
    unknown = verdict(Reading((circle, thing("blue ?")), "white"), prompt)
    assert not unknown["relation"] and not unknown["strict"]


def test_a_position_needs_things_of_both_colours() -> None:
    prompt = ask(Wanted("square", 1, "blue"), Wanted("circle", 1, "red", position=("left of", 0)))
    assert strict(prompt, RED, BLUE)
    assert not strict(prompt, thing("red circle", 0.7), thing("blue square", 0.3))
    assert not strict(prompt, thing("pink circle", 0.3), BLUE)


def standing(x: float, y: float, radius: float = 0.15) -> set[str]:
    """How a thing stands to one in the middle that is `x` and `y` away."""
    return relations(thing("red star", 0.5 + x, 0.5 + y, radius), thing("red ring", radius=radius))


def test_a_diagonal_is_two_relations() -> None:
    """GenEval: each component of the direction that is above one half counts."""
    assert standing(0.3, 0.3) == {"right", "below"}
    assert standing(-0.3, -0.3) == {"left", "above"}
    assert standing(0.4, 0.02) == {"right"}
    assert standing(0.02, -0.4) == {"above"}
    assert standing(0.0, 0.0) == set()
    assert standing(0.40, 0.15) == {"right"}  # less than 30 degrees off


def test_near_centres_stand_in_no_relation() -> None:
    """GenEval's margin, a tenth of both sizes: with radii of 0.15 they are 0.3 each."""
    assert standing(0.059, 0.059) == standing(-0.059, 0.0) == set()
    assert standing(0.13, 0.0) == {"right"} and standing(0.0, -0.13) == {"above"}
    assert standing(0.13, 0.0, radius=0.35) == set()  # larger things must stand farther apart
    assert standing(-0.3, 0.059) == {"left"}


def test_relations_are_antisymmetric() -> None:
    """What is left of another has it on its right."""
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    chance = random.Random(0)
    several = 0
    for _ in range(2000):
        numbers = [(chance.random(), chance.random(), chance.uniform(0.05, 0.3)) for _ in "ab"]
        one, other = (thing("red star", *each) for each in numbers)
        there, back = relations(one, other), relations(other, one)
        assert there == {turned[name] for name in back}
        assert not any(turned[name] in there for name in there)
        several += len(there) == 2
    assert several > 100


def test_a_reading_in_words() -> None:
    assert str(Reading((), "white")) == "nothing"
    assert str(Reading((RED, thing("blue ?")), "white")) == "red circle, blue ?"
