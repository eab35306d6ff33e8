"""Real pictures of a prompt show it, and near misses miss it in one attribute and no other.

The exam of the judge is marked by these scenes: were one of them wrong, the judge would be praised
for a mistake or blamed for being right. So a checker of its own, which looks at places, sizes and
names alone, reads every scene that is drawn for the prompts of every level.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest

from lineage.data.shapes import LEVELS, Scenes
from lineage.data.shapes_draw import BACKGROUNDS, COLOURS, SDF
from lineage.errors import UserError
from lineage.evaluation.prompts import Prompt, Wanted, make_prompts
from lineage.evaluation.scenes import Plan, _scene, attributes, draw, missed, plan

SHAPES, COLOUR_NAMES, GROUNDS = list(SDF), list(COLOURS), list(BACKGROUNDS)
SEEDS = (0, 1)


class Seen(NamedTuple):
    shape: str
    colour: str
    x: float
    y: float
    radius: float


def things_of(scenes: Scenes) -> list[Seen]:
    """What stands in the first of some scenes."""
    return [
        Seen(
            SHAPES[scenes.shape[0, slot]],
            COLOUR_NAMES[scenes.colour[0, slot]],
            *scenes.centre[0, slot].tolist(),
            scenes.radius[0, slot],
        )
        for slot in range(scenes.count[0])
    ]


def stands(one: Seen, other: Seen, relation: str) -> bool:
    """Plainly so, and not on a diagonal."""
    x, y = other.x - one.x, other.y - one.y
    if relation in ("above", "below"):
        x, y = y, x
    return abs(x) > max(0.3, 2 * abs(y)) and (x > 0) == (relation in ("left of", "above"))


def third(value: float) -> int | None:
    """0, 1, 2 for the thirds of an axis; None where it would be hard to say."""
    return 0 if value < 0.4 else 2 if value > 0.6 else 1 if 0.42 < value < 0.58 else None


def at_place(thing: Seen, place: str) -> bool:
    column = 0 if "left" in place else 2 if "right" in place else 1
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    return (third(thing.x), third(thing.y)) == (column, row)


def of_size(thing: Seen, size: str) -> bool:
    return thing.radius < 0.21 if size == "small" else thing.radius > 0.25


def faults(scenes: Scenes, prompt: Prompt) -> Counter[str]:
    """The attributes in which a scene is not what a prompt asks for; none if it shows it.

    Things are matched to what was asked for so that the fewest faults are left.
    """
    things, ground = things_of(scenes), GROUNDS[scenes.background[0]]
    wrong: Counter[str] = Counter()
    if prompt.background not in (None, ground):
        wrong["background"] += 1
    slots = [(number, w) for number, w in enumerate(prompt.include) for _ in range(w.count)]
    if len(things) != len(slots):
        return wrong + Counter(count=1)

    def faults_of(order: tuple[Seen, ...]) -> Counter[str]:
        found: Counter[str] = Counter()
        for (_, wanted), thing in zip(slots, order, strict=True):
            found["shape"] += thing.shape != wanted.shape
            found["colour"] += wanted.colour not in (None, thing.colour)
            found["size"] += bool(wanted.size) and not of_size(thing, wanted.size or "")
            found["place"] += bool(wanted.place) and not at_place(thing, wanted.place or "")
            if wanted.position:
                relation, to = wanted.position
                other = next(t for (n, _), t in zip(slots, order, strict=True) if n == to)
                found["relation"] += not stands(thing, other, relation)
        return +found

    best = min(map(faults_of, permutations(things)), key=lambda found: found.total())
    asked = Counter(w.shape for _, w in slots), Counter(w.colour for _, w in slots)
    there = Counter(t.shape for t in things), Counter(t.colour for t in things)
    if best.total() == 2 and asked == there:
        best = Counter(binding=1)
    return wrong + best


@lru_cache
def prompts_of(level: str) -> list[Prompt]:
    return make_prompts(level)


@pytest.mark.parametrize("level", LEVELS)
def test_the_checker_can_tell(level: str) -> None:
    """Of scenes drawn for other prompts of the task it finds faults in nearly all."""
    prompts = [p for p in prompts_of(level) if p.split == "test" and p.tag != "two_object"]
    chance = np.random.default_rng(0)
    refused = [
        bool(faults(_scene(LEVELS[level], plan(other, chance), 0, row), prompt))
        for row, (prompt, other) in enumerate(zip(prompts, prompts[7:] + prompts[:7], strict=True))
        if prompt.include != other.include or prompt.background != other.background
    ]
    assert np.mean(refused) > 0.9


@pytest.mark.parametrize("level", LEVELS)
def test_plans_fit_and_near_misses_miss_one_attribute(level: str) -> None:
    """All prompts, all attributes, several seeds: the answers to the exam's questions are right."""
    for seed in SEEDS:
        chance = np.random.default_rng(seed)
        for row, prompt in enumerate(prompts_of(level)):
            right = plan(prompt, chance)
            scene = _scene(LEVELS[level], right, seed, row)
            assert not faults(scene, prompt), (prompt, right)
            for attribute in attributes(prompt):
                near = missed(prompt, right, attribute, chance)
                scene = _scene(LEVELS[level], near, seed, row)
                assert faults(scene, prompt) == {attribute: 1}, (prompt, near)


OWN = (  # what a file of one's own may ask for beside the package's prompts
    (Wanted("square", 1, "blue"), Wanted("circle", 1, "red", ("left of", 0))),
    (Wanted("circle", 1, "red", ("below", 1)), Wanted("square", 1, "blue")),
    (Wanted("square"), Wanted("circle", 1, "red", ("above", 0))),
    (Wanted("circle", 1, "red", ("right of", 1)), Wanted("square")),
    (Wanted("circle", 2, "red"), Wanted("square", 2, "blue")),
    (Wanted("circle", 3, "red"), Wanted("square")),
    (Wanted("circle", 1, "red", None, "small", "in the middle"),),
)


@pytest.mark.parametrize("include", OWN)
def test_the_same_of_prompts_of_ones_own(include: tuple[Wanted, ...]) -> None:
    chance = np.random.default_rng(0)
    prompt = Prompt("my own", "a caption", include, "hard", "test", "grey")
    for row in range(30):
        right = plan(prompt, chance)
        assert not faults(_scene(LEVELS["hard"], right, 0, row), prompt), right
        for attribute in attributes(prompt):
            near = missed(prompt, right, attribute, chance)
            found = faults(_scene(LEVELS["hard"], near, 0, row), prompt)
            if attribute == "binding" and len(right.things) > 2:
                assert set(found) == {"colour"} or set(found) == {"shape"}
            else:
                assert found == {attribute: 1}, near


@pytest.mark.parametrize("level", LEVELS)
def test_every_named_attribute_has_a_near_miss(level: str) -> None:
    """An attribute that the exam forgot could be misjudged for ever."""
    for prompt in prompts_of(level):
        text, colours = prompt.prompt, sum(w.colour is not None for w in prompt.include)
        expected = {
            "shape": True,
            "colour": colours > 0,
            "binding": colours == 2,
            "count": True,
            "relation": prompt.tag == "position",
            "size": "small" in text or "large" in text,
            "place": any(f"{word} the" in text for word in ("in", "on", "at")),
            "background": "background" in text,
        }
        assert attributes(prompt) == [name for name, named in expected.items() if named], text


@pytest.mark.parametrize("level", LEVELS)
def test_a_near_miss_is_like_its_picture_in_all_else(level: str) -> None:
    """Else the judge might tell the two apart by what the prompt does not ask for."""
    chance = np.random.default_rng(5)
    for row, prompt in enumerate(prompts_of(level)):
        right = plan(prompt, chance)
        one = _scene(LEVELS[level], right, 5, row)
        for attribute in attributes(prompt):
            near = missed(prompt, right, attribute, chance)
            other = _scene(LEVELS[level], near, 5, row)
            same = {"centre", "radius", "background", "texture", "phase"}
            if (right.size or right.place) and attribute in ("size", "place", "count"):
                same = set()  # other layouts are drawn until one fits
            elif attribute in ("count", "relation"):
                same -= {"centre", "radius"} if attribute == "count" else {"centre"}
            elif attribute == "background":
                same -= {"background"}
            for field in same:
                assert np.array_equal(getattr(one, field), getattr(other, field)), (near, field)
            if attribute == "count":
                more, fewer = sorted((right.things, near.things), key=len, reverse=True)
                assert more[:-1] == fewer and more[-1] in right.things
            elif attribute in ("relation", "size", "place", "background"):
                assert near.things == right.things
            else:
                changed = sum(a != b for a, b in zip(right.things, near.things, strict=True))
                assert changed == (2 if attribute == "binding" else 1)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_left_to_chance_stays_in_the_level(level: str) -> None:
    """The ceiling of a level must not rest on things that its training never shows."""
    world, chance = LEVELS[level], np.random.default_rng(3)
    shapes, colours = SHAPES[: world.shapes], COLOUR_NAMES[: world.colours]
    drawn = set()
    for row, prompt in enumerate(prompts_of(level)):
        right = plan(prompt, chance)
        if (prompt.tag, prompt.split) == ("two_object", "test"):  # which names no colours
            drawn |= {colour for _, colour in right.things}
        for one in (right, *(missed(prompt, right, a, chance) for a in attributes(prompt))):
            assert all(s in shapes and c in colours for s, c in one.things), one
            scene = _scene(world, one, 3, row)
            if not one.background:
                assert scene.background[0] < world.backgrounds
            for thing in things_of(scene):
                for at in (thing.x, thing.y):
                    assert thing.radius <= at + 1e-9 and at + thing.radius <= 1 + 1e-9
    assert drawn == set(colours)


def test_a_near_miss_is_any_of_the_others() -> None:
    """A judge that cannot tell left from below must not pass for want of the question."""
    find = {p.tag: p for p in prompts_of("easy") if p.split == "test"}
    chance = np.random.default_rng(0)

    def seen(prompt: Prompt, attribute: str) -> list[Plan]:
        right = plan(prompt, chance)
        return [missed(prompt, right, attribute, chance) for _ in range(60)]

    relations = {near.relation for near in seen(find["position"], "relation")}
    assert len(relations) == 3
    assert len({near.things for near in seen(find["color_attr"], "colour")}) == 2 * 3
    assert len({near.things for near in seen(find["color_attr"], "shape")}) == 2 * 2
    assert {len(near.things) for near in seen(find["two_object"], "count")} == {1, 3}
    four = Prompt("counting", "four circles", (Wanted("circle", 4),), "easy", "test")
    one = Prompt("single_object", "a circle", (Wanted("circle"),), "easy", "test")
    assert {len(near.things) for near in seen(four, "count")} == {3}
    assert {len(near.things) for near in seen(one, "count")} == {2}


def test_drawing_is_a_function_of_seed_and_row() -> None:
    """The same pictures on every machine, whatever is drawn beside them."""
    level, chance = LEVELS["hard"], np.random.default_rng(0)
    plans = [plan(prompt, chance) for prompt in prompts_of("hard")[:40]]
    pictures = draw(level, plans, 4, 32)
    assert pictures.shape == (40, 3, 32, 32) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, draw(level, plans, 4, 32))
    assert np.array_equal(pictures[:7], draw(level, plans[:7], 4, 32))
    assert (pictures != draw(level, plans, 5, 32)).any((1, 2, 3)).all()  # another seed
    alike = draw(level, plans[:1] * 8, 4, 32)
    assert len({picture.tobytes() for picture in alike}) == 8  # other rows, other places


@pytest.mark.parametrize("level", LEVELS)
def test_pixels_have_the_colours_and_grounds_of_the_plan(level: str) -> None:
    """The scene is what is drawn: colours at the things, the ground between them."""
    chance, size = np.random.default_rng(1), 64
    prompts = [p for p in prompts_of(level) if p.tag in ("colors", "color_attr", "counting")]
    plans = [plan(prompt, chance) for prompt in prompts]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    grounds = np.array(list(BACKGROUNDS.values()))
    for row, (one, picture) in enumerate(
        zip(plans, draw(LEVELS[level], plans, 1, size), strict=True)
    ):
        scene = _scene(LEVELS[level], one, 1, row)
        free = np.ones((size, size), bool)
        for thing in things_of(scene):
            free &= np.hypot(x - thing.x, y - thing.y) > 1.3 * thing.radius
            beside = 0.7 * thing.radius if thing.shape == "ring" else 0.0
            pixel = picture[:, int(thing.y * size), int((thing.x + beside) * size)]
            assert tuple(pixel) == COLOURS[thing.colour], one
        mean = picture[:, free].mean(1)
        nearest = GROUNDS[np.abs(grounds - mean).sum(1).argmin()]
        assert nearest == GROUNDS[scene.background[0]]
        assert one.background in (None, nearest)


def test_pixels_lie_where_and_as_large_as_the_plan_says() -> None:
    """Measured on the picture: the middle of what is coloured, and how much of it there is."""
    size, level = 64, LEVELS["easy"]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    rows = {"top": 0, "bottom": 2}
    for prompt in prompts_of("easy"):
        wanted = prompt.include[0]
        if not (wanted.place or wanted.size):
            continue
        one = Plan((("circle", "red"),), None, wanted.size, wanted.place)
        for picture in draw(level, [one] * 3, 2, size):
            red = np.abs(picture.astype(int) - picture[:, :1, :1]).sum(0) > 60
            area = red.mean()
            assert abs(area / (np.pi * (0.95 * 0.18) ** 2) - 1) < 0.1 or area > 0.2
            if wanted.size:
                assert (area > 0.15) == (wanted.size == "large")
            if wanted.place:
                row = next((n for word, n in rows.items() if word in wanted.place), 1)
                column = 0 if "left" in wanted.place else 2 if "right" in wanted.place else 1
                assert (third(x[red].mean()), third(y[red].mean())) == (column, row)


@pytest.mark.parametrize(
    "include",
    [
        (Wanted("star"), Wanted("circle", position=("above", 0)), Wanted("cross")),
        (Wanted("star", 2), Wanted("circle", position=("above", 0))),
        (Wanted("star", position=("below", 1)), Wanted("circle", position=("above", 0))),
        (Wanted("circle", 2, position=("above", 0)),),
    ],
)
def test_what_cannot_be_placed_is_one_sentence(include: tuple[Wanted, ...]) -> None:
    prompt = Prompt("position", "a circle above a star", include, "hard", "test")
    with pytest.raises(UserError, match="a circle above a star") as raised:
        plan(prompt, np.random.default_rng(0))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
