"""Real pictures of a prompt show its scene, and near misses differ in exactly one attribute.

The judge's exam depends on these scenes: a wrong one would count a mistake as right. So an
independent checker, which compares positions, sizes and names, checks every scene that is drawn for
the prompts of every level.
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
from lineage.evaluation.prompts import ObjectSpec, Prompt, make_prompts
from lineage.evaluation.scenes import (
    SceneSpec,
    _scene,
    attributes,
    draw_scenes,
    near_miss,
    scene_spec,
)

SHAPES, COLOUR_NAMES, GROUNDS = list(SDF), list(COLOURS), list(BACKGROUNDS)
SEEDS = (0, 1)


class SceneObject(NamedTuple):
    shape: str
    colour: str
    x: float
    y: float
    radius: float


def objects_of(scenes: Scenes) -> list[SceneObject]:
    """Objects of the first scene."""
    return [
        SceneObject(
            SHAPES[scenes.shape[0, slot]],
            COLOUR_NAMES[scenes.colour[0, slot]],
            *scenes.centre[0, slot].tolist(),
            scenes.radius[0, slot],
        )
        for slot in range(scenes.count[0])
    ]


def has_relation(one: SceneObject, other: SceneObject, relation: str) -> bool:
    """Whether a relation clearly holds, and not on a diagonal."""
    x, y = other.x - one.x, other.y - one.y
    if relation in ("above", "below"):
        x, y = y, x
    return abs(x) > max(0.3, 2 * abs(y)) and (x > 0) == (relation in ("left of", "above"))


def third(value: float) -> int | None:
    """0, 1, 2 for the thirds of an axis; None near their borders."""
    return 0 if value < 0.4 else 2 if value > 0.6 else 1 if 0.42 < value < 0.58 else None


def at_place(one: SceneObject, place: str) -> bool:
    column = 0 if "left" in place else 2 if "right" in place else 1
    row = 0 if "top" in place else 2 if "bottom" in place else 1
    return (third(one.x), third(one.y)) == (column, row)


def of_size(one: SceneObject, size: str) -> bool:
    return one.radius < 0.21 if size == "small" else one.radius > 0.25


def faults(scenes: Scenes, prompt: Prompt) -> Counter[str]:
    """Attributes in which a scene differs from a prompt's; none if it shows the prompt's scene.

    Objects are matched to entries so that the fewest faults are left.
    """
    objects, ground = objects_of(scenes), GROUNDS[scenes.background[0]]
    wrong: Counter[str] = Counter()
    if prompt.background not in (None, ground):
        wrong["background"] += 1
    slots = [(number, w) for number, w in enumerate(prompt.include) for _ in range(w.count)]
    if len(objects) != len(slots):
        return wrong + Counter(count=1)

    def faults_of(order: tuple[SceneObject, ...]) -> Counter[str]:
        faults: Counter[str] = Counter()
        for (_, entry), one in zip(slots, order, strict=True):
            faults["shape"] += one.shape != entry.shape
            faults["colour"] += entry.colour not in (None, one.colour)
            faults["size"] += bool(entry.size) and not of_size(one, entry.size or "")
            faults["place"] += bool(entry.place) and not at_place(one, entry.place or "")
            if entry.position:
                relation, to = entry.position
                other = next(t for (n, _), t in zip(slots, order, strict=True) if n == to)
                faults["relation"] += not has_relation(one, other, relation)
        return +faults

    best = min(map(faults_of, permutations(objects)), key=lambda faults: faults.total())
    expected = Counter(w.shape for _, w in slots), Counter(w.colour for _, w in slots)
    actual = Counter(t.shape for t in objects), Counter(t.colour for t in objects)
    if best.total() == 2 and expected == actual:
        best = Counter(binding=1)
    return wrong + best


@lru_cache
def prompts_of(level: str) -> list[Prompt]:
    return make_prompts(level)


@pytest.mark.parametrize("level", LEVELS)
def test_the_checker_finds_faults(level: str) -> None:
    """In nearly all scenes of other prompts of the task."""
    prompts = [p for p in prompts_of(level) if p.split == "test" and p.tag != "two_object"]
    rng = np.random.default_rng(0)
    has_fault = [
        bool(faults(_scene(LEVELS[level], scene_spec(other, rng), 0, row), prompt))
        for row, (prompt, other) in enumerate(zip(prompts, prompts[7:] + prompts[:7], strict=True))
        if prompt.include != other.include or prompt.background != other.background
    ]
    assert np.mean(has_fault) > 0.9


@pytest.mark.parametrize("level", LEVELS)
def test_specs_fit_and_near_misses_miss_one_attribute(level: str) -> None:
    """All prompts, all attributes, several seeds."""
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        for row, prompt in enumerate(prompts_of(level)):
            spec = scene_spec(prompt, rng)
            scene = _scene(LEVELS[level], spec, seed, row)
            assert not faults(scene, prompt), (prompt, spec)
            for attribute in attributes(prompt):
                near = near_miss(prompt, spec, attribute, rng)
                scene = _scene(LEVELS[level], near, seed, row)
                assert faults(scene, prompt) == {attribute: 1}, (prompt, near)


OWN = (  # scenes of a user's own file that the package's prompts lack
    (ObjectSpec("square", 1, "blue"), ObjectSpec("circle", 1, "red", ("left of", 0))),
    (ObjectSpec("circle", 1, "red", ("below", 1)), ObjectSpec("square", 1, "blue")),
    (ObjectSpec("square"), ObjectSpec("circle", 1, "red", ("above", 0))),
    (ObjectSpec("circle", 1, "red", ("right of", 1)), ObjectSpec("square")),
    (ObjectSpec("circle", 2, "red"), ObjectSpec("square", 2, "blue")),
    (ObjectSpec("circle", 3, "red"), ObjectSpec("square")),
    (ObjectSpec("circle", 1, "red", None, "small", "in the middle"),),
)


@pytest.mark.parametrize("include", OWN)
def test_the_same_for_a_users_prompts(include: tuple[ObjectSpec, ...]) -> None:
    rng = np.random.default_rng(0)
    prompt = Prompt("my own", "a caption", include, "hard", "test", "grey")
    for row in range(30):
        spec = scene_spec(prompt, rng)
        assert not faults(_scene(LEVELS["hard"], spec, 0, row), prompt), spec
        for attribute in attributes(prompt):
            near = near_miss(prompt, spec, attribute, rng)
            missing = faults(_scene(LEVELS["hard"], near, 0, row), prompt)
            if attribute == "binding" and len(spec.objects) > 2:
                assert set(missing) == {"colour"} or set(missing) == {"shape"}
            else:
                assert missing == {attribute: 1}, near


@pytest.mark.parametrize("level", LEVELS)
def test_every_named_attribute_has_a_near_miss(level: str) -> None:
    """An attribute without one would never be tested."""
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
def test_a_near_miss_equals_its_picture_otherwise(level: str) -> None:
    """Otherwise the judge might separate the two by something else."""
    rng = np.random.default_rng(5)
    for row, prompt in enumerate(prompts_of(level)):
        spec = scene_spec(prompt, rng)
        one = _scene(LEVELS[level], spec, 5, row)
        for attribute in attributes(prompt):
            near = near_miss(prompt, spec, attribute, rng)
            other = _scene(LEVELS[level], near, 5, row)
            same = {"centre", "radius", "background", "texture", "phase"}
            if (spec.size or spec.place) and attribute in ("size", "place", "count"):
                same = set()  # other layouts are drawn until one fits
            elif attribute in ("count", "relation"):
                same -= {"centre", "radius"} if attribute == "count" else {"centre"}
            elif attribute == "background":
                same -= {"background"}
            for field in same:
                assert np.array_equal(getattr(one, field), getattr(other, field)), (near, field)
            if attribute == "count":
                more, fewer = sorted((spec.objects, near.objects), key=len, reverse=True)
                assert more[:-1] == fewer and more[-1] in spec.objects
            elif attribute in ("relation", "size", "place", "background"):
                assert near.objects == spec.objects
            else:
                changed = sum(a != b for a, b in zip(spec.objects, near.objects, strict=True))
                assert changed == (2 if attribute == "binding" else 1)


@pytest.mark.parametrize("level", LEVELS)
def test_random_attributes_stay_in_the_level(level: str) -> None:
    """The ceiling of a level must not depend on objects that its training never shows."""
    bounds, rng = LEVELS[level], np.random.default_rng(3)
    shapes, colours = SHAPES[: bounds.shapes], COLOUR_NAMES[: bounds.colours]
    colours_used = set()
    for row, prompt in enumerate(prompts_of(level)):
        spec = scene_spec(prompt, rng)
        if (prompt.tag, prompt.split) == ("two_object", "test"):  # which names no colours
            colours_used |= {colour for _, colour in spec.objects}
        for one in (spec, *(near_miss(prompt, spec, a, rng) for a in attributes(prompt))):
            assert all(s in shapes and c in colours for s, c in one.objects), one
            scene = _scene(bounds, one, 3, row)
            if not one.background:
                assert scene.background[0] < bounds.backgrounds
            for item in objects_of(scene):
                for at in (item.x, item.y):
                    assert item.radius <= at + 1e-9 and at + item.radius <= 1 + 1e-9
    assert colours_used == set(colours)


def test_near_misses_take_all_other_values() -> None:
    """A judge that confuses left and below must not pass because it was never tested."""
    find = {p.tag: p for p in prompts_of("easy") if p.split == "test"}
    rng = np.random.default_rng(0)

    def misses(prompt: Prompt, attribute: str) -> list[SceneSpec]:
        spec = scene_spec(prompt, rng)
        return [near_miss(prompt, spec, attribute, rng) for _ in range(60)]

    relations = {near.relation for near in misses(find["position"], "relation")}
    assert len(relations) == 3
    assert len({near.objects for near in misses(find["color_attr"], "colour")}) == 2 * 3
    assert len({near.objects for near in misses(find["color_attr"], "shape")}) == 2 * 2
    assert {len(near.objects) for near in misses(find["two_object"], "count")} == {1, 3}
    four = Prompt("counting", "four circles", (ObjectSpec("circle", 4),), "easy", "test")
    one = Prompt("single_object", "a circle", (ObjectSpec("circle"),), "easy", "test")
    assert {len(near.objects) for near in misses(four, "count")} == {3}
    assert {len(near.objects) for near in misses(one, "count")} == {2}


def test_pictures_depend_on_seed_and_row_alone() -> None:
    """The same on every machine, whatever other pictures are drawn."""
    level, rng = LEVELS["hard"], np.random.default_rng(0)
    specs = [scene_spec(prompt, rng) for prompt in prompts_of("hard")[:40]]
    pictures = draw_scenes(level, specs, 4, 32)
    assert pictures.shape == (40, 3, 32, 32) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, draw_scenes(level, specs, 4, 32))
    assert np.array_equal(pictures[:7], draw_scenes(level, specs[:7], 4, 32))
    assert (pictures != draw_scenes(level, specs, 5, 32)).any((1, 2, 3)).all()  # another seed
    repeated = draw_scenes(level, specs[:1] * 8, 4, 32)
    assert len({picture.tobytes() for picture in repeated}) == 8  # other rows, other places


@pytest.mark.parametrize("level", LEVELS)
def test_pixels_have_the_colours_of_the_scene(level: str) -> None:
    """At the objects, and of the background between them."""
    rng, size = np.random.default_rng(1), 64
    prompts = [p for p in prompts_of(level) if p.tag in ("colors", "color_attr", "counting")]
    specs = [scene_spec(prompt, rng) for prompt in prompts]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    grounds = np.array(list(BACKGROUNDS.values()))
    for row, (spec, picture) in enumerate(
        zip(specs, draw_scenes(LEVELS[level], specs, 1, size), strict=True)
    ):
        scene = _scene(LEVELS[level], spec, 1, row)
        free = np.ones((size, size), bool)
        for one in objects_of(scene):
            free &= np.hypot(x - one.x, y - one.y) > 1.3 * one.radius
            beside = 0.7 * one.radius if one.shape == "ring" else 0.0
            pixel = picture[:, int(one.y * size), int((one.x + beside) * size)]
            assert tuple(pixel) == COLOURS[one.colour], spec
        mean = picture[:, free].mean(1)
        nearest = GROUNDS[np.abs(grounds - mean).sum(1).argmin()]
        assert nearest == GROUNDS[scene.background[0]]
        assert spec.background in (None, nearest)


def test_pixels_have_the_place_and_size_of_the_scene() -> None:
    """Measured on the picture: the centre and the area of the coloured pixels."""
    size, level = 64, LEVELS["easy"]
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    rows = {"top": 0, "bottom": 2}
    for prompt in prompts_of("easy"):
        entry = prompt.include[0]
        if not (entry.place or entry.size):
            continue
        one = SceneSpec((("circle", "red"),), None, entry.size, entry.place)
        for picture in draw_scenes(level, [one] * 3, 2, size):
            red = np.abs(picture.astype(int) - picture[:, :1, :1]).sum(0) > 60
            area = red.mean()
            assert abs(area / (np.pi * (0.95 * 0.18) ** 2) - 1) < 0.1 or area > 0.2
            if entry.size:
                assert (area > 0.15) == (entry.size == "large")
            if entry.place:
                row = next((n for word, n in rows.items() if word in entry.place), 1)
                column = 0 if "left" in entry.place else 2 if "right" in entry.place else 1
                assert (third(x[red].mean()), third(y[red].mean())) == (column, row)


@pytest.mark.parametrize(
    "include",
    [
        (ObjectSpec("star"), ObjectSpec("circle", position=("above", 0)), ObjectSpec("cross")),
        (ObjectSpec("star", 2), ObjectSpec("circle", position=("above", 0))),
        (ObjectSpec("star", position=("below", 1)), ObjectSpec("circle", position=("above", 0))),
        (ObjectSpec("circle", 2, position=("above", 0)),),
    ],
)
def test_a_scene_that_cannot_be_drawn_is_one_sentence(include: tuple[ObjectSpec, ...]) -> None:
    prompt = Prompt("position", "a circle above a star", include, "hard", "test")
    with pytest.raises(UserError, match="a circle above a star") as raised:
        scene_spec(prompt, np.random.default_rng(0))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
