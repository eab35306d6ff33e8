"""The procedural world: it is deterministic, its captions are true, and held-out scenes are absent.

Captions are checked by a small parser of their language, which shares no code with the grammar.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example
from lineage.data.shapes import LEVELS, SPLITS, Shapes, heldout_pair, heldout_relation
from lineage.data.shapes_draw import BACKGROUNDS, COLOURS, SDF
from lineage.errors import UserError

TRAINING = ("train", "validation", "test")
SHAPE = "(?:" + "|".join(SDF) + ")"
COLOUR = "(?:" + "|".join(COLOURS) + ")"
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
THING = re.compile(
    rf"(?P<number>{'|'.join(NUMBERS)}) (?:(?P<size>large|small) )?(?:(?P<colour>{COLOUR}) )?"
    rf"(?P<shape>{SHAPE})(?P<many>s|es)?(?: that is (?P<after>{COLOUR}))?"
    r"(?: (?P<place>(?:in|on|at) the [a-z ]+?))?"
)
JOINTS = {
    "left of": "left",
    "to the left of": "left",
    "right of": "right",
    "to the right of": "right",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "next to": "next",
    "and": "and",
}
JOINT = re.compile(" (" + "|".join(sorted(JOINTS, key=len, reverse=True)) + ") ")


def has_relation(one: dict[str, Any], how: str, other: dict[str, Any]) -> bool:
    """Whether `one` is left of (right of, above, below) `other`, clearly and along one axis."""
    across, down = one["x"] - other["x"], one["y"] - other["y"]
    along, aside = (across, down) if how in ("left", "right") else (down, across)
    return abs(along) > 0.25 > 2 * abs(aside) and (along < 0) == (how in ("left", "above"))


def falsehood(caption: str, meta: dict[str, Any]) -> str | None:
    """The part of a caption that is not true of the scene, or None."""
    text = re.sub(r"^(a (picture|drawing) of|there (is|are)) ", "", caption)
    ground = re.search(r" on an? (\w+) background$", text)
    if ground:
        text = text[: ground.start()]
        if ground[1] != meta["background"]:
            return "background"
    joint = JOINT.search(text)
    parts = [text[: joint.start()], text[joint.end() :]] if joint else [text]
    named: list[list[dict[str, Any]]] = []
    for part in parts:
        thing = THING.fullmatch(part)
        if thing is None:
            return f"not understood: {part!r}"
        number, colour = NUMBERS[thing["number"]], thing["colour"] or thing["after"]
        if (number > 1) != bool(thing["many"]):
            return "singular and plural"
        vowel = part.split()[1][0] in "aeiou"
        if thing["number"] in ("a", "an") and (thing["number"] == "an") != vowel:
            return "article"
        fits = [
            o
            for o in meta["objects"]
            if o["shape"] == thing["shape"] and colour in (None, o["colour"])
        ]
        if len(fits) < number or (len(fits) > number and colour and len(parts) == 1):
            return f"number of {part!r}"
        if thing["size"] and (thing["size"] == "large") != (fits[0]["radius"] > 0.22):
            return "size"
        if thing["place"] and not at(thing["place"], fits[0]):
            return f"place {thing['place']!r}"
        named.append(fits[:number] if len(fits) == number else fits)
    total = sum(NUMBERS[THING.fullmatch(part)["number"]] for part in parts)  # type: ignore[index]
    if total != len(meta["objects"]):
        return "number of objects"
    if joint and JOINTS[joint[1]] not in ("and", "next"):
        how = JOINTS[joint[1]]
        pairs = permutations(meta["objects"], 2)
        if not any(a in named[0] and b in named[1] and has_relation(a, how, b) for a, b in pairs):
            return f"relation {how}"
    return None


def at(place: str, thing: dict[str, Any]) -> bool:
    """Whether an object is at the place that the phrase names."""
    words = place.split()
    x, y = thing["x"] - 0.5, thing["y"] - 0.5
    across = x < -0.1 if "left" in words else x > 0.1 if "right" in words else abs(x) < 0.1
    down = y < -0.1 if "top" in words else y > 0.1 if "bottom" in words else abs(y) < 0.1
    return across and down


def scenes_of(level: str, split: str, count: int) -> list[list[tuple[int, int, float, float]]]:
    """(shape, colour, x, y) of each object of each scene."""
    s = Shapes(level, split).scenes(range(count))
    return [
        [(int(s.shape[i, k]), int(s.colour[i, k]), *s.centre[i, k].tolist()) for k in range(n)]
        for i, n in enumerate(s.count)
    ]


def heldout_parts(level: str, scene: list[tuple[int, int, float, float]]) -> set[str]:
    """Held-out combinations of a scene: `pair`, `relation`, both or none."""
    parts: set[str] = set()
    for shape, colour, _, _ in scene:
        if heldout_pair(LEVELS[level], np.int64(shape), np.int64(colour)):
            parts.add("pair")
    for (a, _, ax, ay), (b, _, bx, by) in permutations(scene, 2):
        left, above = heldout_relation(LEVELS[level], np.int64(a), np.int64(b))
        if (left and bx - ax > 0.2) or (above and by - ay > 0.2):
            parts.add("relation")
    return parts


def same(a: Example, b: Example) -> bool:
    return (
        torch.equal(a.image, b.image)
        and (a.captions, a.label, a.meta) == (b.captions, b.label, b.meta)
        and a.id == b.id
    )


@pytest.mark.parametrize("level", LEVELS)
def test_an_example_is_a_function_of_seed_split_and_index(level: str) -> None:
    one, two = Shapes(level, "test", seed=3), Shapes(level, "test", seed=3)
    _ = [two[i] for i in (9, 4)]  # earlier examples do not matter
    assert all(same(one[i], two[i]) for i in (0, 4, 123, 10**9))
    pictures = [one[i].image for i in range(30)]
    for other in (Shapes(level, "test", seed=4), Shapes(level, "train", seed=3)):
        equal = sum(torch.equal(p, other[i].image) for i, p in enumerate(pictures))
        assert equal < 5
    assert len({p.numpy().tobytes() for p in pictures}) > 24


def test_the_first_captions_are_the_recorded_ones() -> None:
    """The world must not change, or earlier results could not be compared."""
    captions = [Shapes()[i].captions[0] for i in range(4)]
    assert captions == ["a yellow triangle", "a red square", "a blue circle", "a green circle"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_batch_equals_items(level: str, split: str) -> None:
    data = Shapes(level, split, size=32, seed=1)
    indices = [5, 0, 77, 5, 20_001, *range(100, 130)]
    batch = data.batch(indices, [0, 1, 2, 3, 4, *[0] * 30], seed=9)
    plain = CaptionedDataset.batch(data, indices, [0] * len(indices), seed=9)
    assert torch.equal(batch.image, plain.image)
    assert batch.id == plain.id
    assert batch.label is not None and plain.label is not None
    assert torch.equal(batch.label, plain.label)
    assert all(c in data[i].captions for i, c in zip(indices, batch.caption, strict=True))


def test_every_caption_is_read_over_many_epochs() -> None:
    data = Shapes("medium")
    index = next(i for i in range(50) if len(data[i].captions) == 5)
    captions = {data.batch([index], [epoch], seed=0).caption[0] for epoch in range(80)}
    assert captions == set(data[index].captions)


def test_captions_of_a_batch_depend_on_its_seed() -> None:
    data, rows = Shapes("medium"), list(range(64))
    first, again, other = (data.batch(rows, [0] * 64, seed=s).caption for s in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true(level: str, split: str) -> None:
    data = Shapes(level, split, size=16)
    wrong = [
        (i, caption, fault)
        for i in range(250)
        for caption in data[i].captions
        if (fault := falsehood(caption, data[i].meta))
    ]
    assert not wrong


def test_the_parser_of_captions_finds_errors() -> None:
    data = Shapes("medium", size=16)
    pool = [data[i] for i in range(150)]
    mixed = [falsehood(a.captions[0], b.meta) for a, b in pairwise(pool)]
    assert sum(m is not None for m in mixed) > 130
    pair = next(e for e in pool if e.meta["relation"] == "left" and " left of " in e.captions[0])
    assert falsehood(pair.captions[0].replace("left", "right"), pair.meta) == "relation right"
    group = next(e for e in pool if e.captions[0].startswith("two"))
    assert "number" in str(falsehood(group.captions[0].replace("two", "three"), group.meta))


@pytest.mark.parametrize("level", LEVELS)
def test_the_picture_shows_the_scene(level: str) -> None:
    """Pixels inside an outline have the object's colour, those outside the background's."""
    data = Shapes(level, size=64)
    for example in (data[i] for i in range(60)):
        image = example.image.numpy().astype(int)
        near = np.zeros((64, 64), bool)
        for thing in example.meta["objects"]:
            distance = distances(thing, 64)
            rgb = np.array(COLOURS[thing["colour"]])[:, None]
            assert np.abs(image[:, distance < -1.5] - rgb).max() <= 1
            assert (distance < -1.5).sum() > 15
            near |= distance < 1.5
        ground = np.array(BACKGROUNDS[example.meta["background"]])[:, None]
        assert np.abs(image[:, ~near] - ground).max() <= 27
        assert (~near).any()


def distances(thing: dict[str, Any], size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Signed distance of each pixel to an object's outline, in pixels."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = ((at - thing[axis]) / thing["radius"] for axis in ("x", "y"))
    return SDF[thing["shape"]](x[None, :], y[:, None]) * thing["radius"] * size


@pytest.mark.parametrize("level", LEVELS)
def test_objects_do_not_overlap_and_stay_in_the_picture(level: str) -> None:
    size, margin = 96, 24
    for split in ("train", "heldout"):
        for i in range(250):
            things = Shapes(level, split, size=16)[i].meta["objects"]
            at = (np.arange(-margin, size + margin, dtype=np.float32) + 0.5) / size
            inside = np.zeros((len(at), len(at)), int)
            for t in things:
                x, y = (at - t["x"]) / t["radius"], (at - t["y"]) / t["radius"]
                inside += SDF[t["shape"]](x[None, :], y[:, None]) < 0
            assert inside.max() == 1, (split, i)
            inside[margin:-margin, margin:-margin] = 0
            assert not inside.any(), (split, i)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", TRAINING)
def test_held_out_combinations_are_absent_in_training(level: str, split: str) -> None:
    scenes = scenes_of(level, split, 6000)
    assert not [scene for scene in scenes if heldout_parts(level, scene)]


@pytest.mark.parametrize("level", LEVELS)
def test_every_scene_of_heldout_has_a_held_out_combination(level: str) -> None:
    parts = [heldout_parts(level, scene) for scene in scenes_of(level, "heldout", 3000)]
    assert all(parts)
    kinds = Counter(kind for each in parts for kind in each)
    assert min(kinds["pair"], kinds["relation"]) > 150


@pytest.mark.parametrize("level", LEVELS)
def test_training_has_every_shape_and_colour_and_all_other_pairs(level: str) -> None:
    names = LEVELS[level]
    every = {(s, c) for s in range(names.shapes) for c in range(names.colours)}
    held = {p for p in every if heldout_pair(names, np.int64(p[0]), np.int64(p[1]))}
    present = {(s, c) for scene in scenes_of(level, "train", 6000) for s, c, _, _ in scene}
    assert held and present == every - held
    assert {s for s, _ in present} == set(range(names.shapes))
    assert {c for _, c in present} == set(range(names.colours))


@pytest.mark.parametrize("level", LEVELS)
def test_captions_cover_the_six_tasks_of_geneval(level: str) -> None:
    texts = [Shapes(level)[i].captions[0] for i in range(300)]
    thing = rf"an? {COLOUR} {SHAPE}"
    tasks = {
        "single object": rf"{thing}",
        "two objects": rf"{thing} .+ {thing}",
        "counting": rf"(two|three|four) ({COLOUR} )?{SHAPE}e?s",
        "colours": rf"an? ({COLOUR}) {SHAPE}",
        "position": rf"{thing} (left of|right of|above|below) {thing}",
    }
    for task, pattern in tasks.items():
        assert sum(bool(re.fullmatch(pattern, text)) for text in texts) >= 10, task
    both = re.compile(rf"an? ({COLOUR}) ({SHAPE}) .+ an? ({COLOUR}) ({SHAPE})")
    attributed = [both.fullmatch(text) for text in texts]
    assert sum(bool(m and m[1] != m[3] and m[2] != m[4]) for m in attributed) >= 10
    relations = {m[1] for t in texts if (m := re.search(r" (left|right|above|below)", t))}
    assert relations == {"left", "right", "above", "below"}
    assert {n for n in ("two", "three", "four") for t in texts if t.startswith(n)} == {
        "two",
        "three",
        "four",
    }


def test_all_sizes_show_the_same_scene() -> None:
    index = [3, 8]
    expected = Shapes("hard", size=128).batch(index, [0, 0], 0).image.mean((2, 3))
    for size in range(16, 257):
        actual = Shapes("hard", size=size).batch(index, [0, 0], 0).image
        assert actual.shape == (2, 3, size, size)
        assert (actual.mean((2, 3)) - expected).abs().max() < 0.06, size
    for size in (15, 257):
        with pytest.raises(UserError, match=str(size)):
            Shapes(size=size)


def test_edges_are_anti_aliased() -> None:
    """A small picture equals the averaged large one; a picture with hard edges would not."""
    data, large = Shapes("easy", size=32), Shapes("easy", size=256)
    worst = hard = 0.0
    for i in range(12):
        fine = large[i].image.float().view(3, 32, 8, 32, 8)
        worst = max(worst, float((data[i].image - fine.mean((2, 4))).abs().mean()))
        hard = max(hard, float((fine[:, :, 4, :, 4] - fine.mean((2, 4))).abs().mean()))
    assert worst < 1.2 < hard


def test_all_captions_are_those_of_the_examples() -> None:
    data = Shapes("medium")
    expected = {caption for i in range(40) for caption in data[i].captions}
    assert set(data.all_captions(limit=40)) == expected


def test_the_showcase_shows_every_kind() -> None:
    kinds = Counter(e.meta["kind"] for e in Shapes("hard").showcase(8))
    assert set(kinds) == {"single", "pair", "group", "mixed"} and sum(kinds.values()) == 8


def test_labels_name_shape_and_colour_of_the_first_object() -> None:
    data = load_dataset("shapes:medium")
    known: dict[int, tuple[str, str]] = {}
    for example in (data[i] for i in range(200)):
        first = example.meta["objects"][0]
        assert example.label is not None
        named = known.setdefault(example.label, (first["shape"], first["colour"]))
        assert named == (first["shape"], first["colour"])
    assert len(set(known.values())) == len(known) > 20


def test_lengths_are_nominal_and_wrong_names_are_errors() -> None:
    assert {split: len(Shapes(split=split)) for split in SPLITS} == SPLITS
    assert Shapes()[10**6].image.shape == (3, 32, 32)  # endless
    with pytest.raises(UserError, match="no split 'all'"):
        load_dataset("shapes", split="all")
    with pytest.raises(IndexError):
        Shapes()[-1]
