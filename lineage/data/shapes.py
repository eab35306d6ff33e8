"""`shapes`: a procedural captioned world, endless and deterministic, rendered in memory.

A picture shows a scene: one to four objects (shape, colour, size, place) on a background. Its
captions describe the same scene, so they are always true. `Example.meta` holds the scene, so that
an evaluation has the ground truth. Captions cover the six tasks of GenEval (Ghosh et al. 2023):
single object, two objects, counting, colours, position, colour attribution. They are English,
Chinese or Russian (see `shapes_languages`); scenes and pictures do not depend on the language.

Example `index` is a function of (seed, split, index), by counter-based random numbers
(`uniforms.py`).

Combinations that never occur in `train`, `validation` and `test`, but in every scene of `heldout`:
    pairs: some pairs (shape, colour);
    relations: some (shape A left of shape B) and some (shape A above shape B).

Levels:
    easy     4 shapes, 4 colours, plain white, places and sizes from a short list (the default);
    medium   6 shapes, 6 colours, three plain backgrounds, free places;
    hard     8 shapes, 8 colours, textured backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lineage.data.contract import Batch, CaptionedDataset, Example, to_unit
from lineage.data.shapes_captions import NUM_UNIFORMS, PLACES, RELATIONS, SceneWords
from lineage.data.shapes_draw import BACKGROUNDS, COLOURS, SDF, TEXTURES, backgrounds, paint
from lineage.data.shapes_languages import ENGLISH, caption, name_of
from lineage.data.uniforms import uniforms
from lineage.errors import UserError, nearest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NUM_CAPTIONS = 5
"""Number of captions of an example, in each language."""
SPLITS = {"train": 20_000, "validation": 2_000, "test": 2_000, "heldout": 2_000}
"""The splits and their nominal lengths; larger indices are valid too."""

SMALL, LARGE = 0.18, 0.28  # radius as a share of the picture's side
KINDS = ("single", "pair", "group", "mixed")


@dataclass(frozen=True, kw_only=True)
class Level:
    """Difficulty of the world.

    Attributes:
        shapes, colours, backgrounds, textures: Number of entries of each vocabulary that are used,
            from its start.
        kinds: Share of scenes with one object, with two different ones, with 2 to 4 equal ones, and
            with 3 to 4 of two sorts.
        free: If true, objects have any place and any size between small and large; otherwise they
            stand on a coarse grid.
    """

    shapes: int
    colours: int
    backgrounds: int
    textures: int
    kinds: tuple[float, float, float, float]
    free: bool


LEVELS = {
    "easy": Level(
        shapes=4, colours=4, backgrounds=1, textures=1, kinds=(0.5, 0.3, 0.2, 0.0), free=False
    ),
    "medium": Level(
        shapes=6, colours=6, backgrounds=3, textures=1, kinds=(0.4, 0.3, 0.2, 0.1), free=True
    ),
    "hard": Level(
        shapes=8, colours=8, backgrounds=3, textures=5, kinds=(0.3, 0.3, 0.2, 0.2), free=True
    ),
}


@dataclass
class Scenes:
    """B scenes as arrays; the values of unused object slots are arbitrary.

    Attributes:
        kind: (B,) index into `KINDS`.
        count: (B,) number of objects, 1 to 4.
        first: (B,) number of objects of the first sort: all, except in `pair` and `mixed`.
        shape, colour: (B, 4) indices into the vocabularies.
        radius: (B, 4) radius as a share of the side.
        centre: (B, 4, 2) x and y as shares of the side, y downward.
        relation: (B,) place of the first object of a pair relative to the second: 0 left, 1 right,
            2 above, 3 below, -1 none.
        anchor: (B, 2) column and row of a single object on a 3 by 3 grid, -1 between two places.
        background, texture: (B,) indices into the vocabularies.
        phase: (B, 2) shift of the texture.
    """

    kind: Ints
    count: Ints
    first: Ints
    shape: Ints
    colour: Ints
    radius: Floats
    centre: Floats
    relation: Ints
    anchor: Ints
    background: Ints
    texture: Ints
    phase: Floats


def heldout_pair(level: Level, shape: Ints, colour: Ints) -> Bools:
    """True where (shape, colour) never occurs in training: every second shape lacks one colour."""
    return (shape % 2 == 0) & (colour == (shape + 3) % level.colours)


def heldout_relation(level: Level, first: Ints, second: Ints) -> tuple[Bools, Bools]:
    """Where training never shows `first` left of `second`, and `first` above `second`.

    The shapes may be any arrays that broadcast.
    """
    left = (first % 2 == 0) & (second == first + 1)
    above = (first % 2 == 1) & (second == (first + 1) % level.shapes)
    return left, above


def make_scenes(level: Level, seed: int, split: str, index: Ints) -> Scenes:
    """The scenes of examples `index` (B,).

    Every random number is computed for every row and used where it applies.
    """
    u = uniforms(seed, split, index, 32)
    b = len(index)
    pick = lambda column, n: (u[:, column] * n).astype(np.int64)  # noqa: E731

    kind = np.searchsorted(np.cumsum(level.kinds), u[:, 0], side="right").clip(0, 3)
    shape = np.stack([pick(1, level.shapes), pick(2, level.shapes)], 1)  # (B, 2) two sorts
    colour = np.stack([pick(3, level.colours), pick(4, level.colours)], 1)
    axis = pick(5, 5)  # of a pair: 0, 1 side by side; 2, 3 one above the other; 4 diagonal
    swapped = (axis % 2 == 1) & (axis < 4)  # the first object is right of, or below, the second

    step = 1 + pick(30, level.colours - 1)  # from a held-out colour to any other

    if split == "heldout":
        by_relation = (kind == 1) & (u[:, 6] < 0.5)
        swapped = np.where(by_relation, u[:, 7] < 0.5, swapped)
        _impose_relation(level, by_relation, swapped, shape, axis)
        even = (shape[:, 0] // 2) * 2
        shape[:, 0] = np.where(by_relation, shape[:, 0], even)
        colour[:, 0] = np.where(by_relation, colour[:, 0], (even + 3) % level.colours)
        _avoid_pairs(level, by_relation, shape, colour, step)
    else:
        swapped = _avoid_relations(level, kind, axis, swapped, shape)
        _avoid_pairs(level, np.ones(b, bool), shape, colour, step)
    colour[:, 1] = _distinct(level, shape, colour)

    count = np.select([kind == 0, kind == 1, kind == 2], [1, 2, 2 + pick(8, 3)], 3 + pick(8, 2))
    first = np.select([kind == 1, kind == 3], [1, 1 + pick(9, 2)], count)
    sort = (np.arange(4)[None, :] >= first[:, None]).astype(np.int64)  # (B, 4) 0 first, 1 second
    centre, radius, anchor = layout(level, u, kind, count, axis, swapped)
    relation = np.where(kind == 1, np.array([0, 0, 2, 2, -1])[axis], -1)
    relation = np.where((relation >= 0) & swapped, relation + 1, relation)
    return Scenes(
        kind=kind,
        count=count,
        first=first,
        shape=np.take_along_axis(shape, sort, 1),
        colour=np.take_along_axis(colour, sort, 1),
        radius=radius,
        centre=centre,
        relation=relation,
        anchor=anchor,
        background=pick(10, level.backgrounds),
        texture=pick(11, level.textures),
        phase=u[:, 12:14],
    )


def _avoid_pairs(level: Level, rows: Bools, shape: Ints, colour: Ints, step: Ints) -> None:
    """Replace each colour of `rows` that forms a held-out pair with its shape; in place."""
    heldout = heldout_pair(level, shape, colour) & rows[:, None]
    colour[:] = np.where(heldout, (colour + step[:, None]) % level.colours, colour)


def _distinct(level: Level, shape: Ints, colour: Ints) -> Ints:
    """Colours of the second sort, replaced where both sorts are equal, but by no held-out pair."""
    second = colour[:, 1]
    equal = (shape[:, 0] == shape[:, 1]) & (colour[:, 0] == second)
    other = (second + 1) % level.colours
    other = np.where(heldout_pair(level, shape[:, 1], other), (second + 2) % level.colours, other)
    return np.where(equal, other, second)


def _impose_relation(level: Level, rows: Bools, swapped: Bools, shape: Ints, axis: Ints) -> None:
    """Give each pair of `rows` a held-out relation; in place.

    A shape with an even number has a held-out right neighbour, one with an odd number a held-out
    lower neighbour. A swapped pair is described from the other side: "B right of A" for "A left of
    B".
    """
    one = shape[:, 0].copy()
    other = (one + 1) % level.shapes
    shape[:, 0] = np.where(rows, np.where(swapped, other, one), shape[:, 0])
    shape[:, 1] = np.where(rows, np.where(swapped, one, other), shape[:, 1])
    axis[:] = np.where(rows, np.where(one % 2 == 0, 0, 2), axis)


def _avoid_relations(level: Level, kind: Ints, axis: Ints, swapped: Bools, shape: Ints) -> Bools:
    """The new `swapped` (B,): pairs with a held-out relation change places.

    In scenes with 3 or 4 objects of two sorts, the second sort takes the shape of the first (in
    place).
    """
    left, above = heldout_relation(level, shape[:, 0], shape[:, 1])
    right, below = heldout_relation(level, shape[:, 1], shape[:, 0])
    mixed = (kind == 3) & (left | above | right | below)
    shape[:, 1] = np.where(mixed, shape[:, 0], shape[:, 1])
    beside = (axis < 2) | (axis == 4)  # a diagonal is both
    stacked = axis >= 2
    must_swap = (left & beside) | (above & stacked)
    must_stay = (right & beside) | (below & stacked)  # never both: the shapes' parities differ
    return must_swap | (swapped & ~must_stay)


def layout(
    level: Level, u: Floats, kind: Ints, count: Ints, axis: Ints, swapped: Bools
) -> tuple[Floats, Floats, Ints]:
    """Centres (B, 4, 2), radii (B, 4) and anchors (B, 2) of objects that do not overlap."""
    b = len(kind)
    near, far = 9 / 32, 23 / 32
    large = u[:, 14] < 0.5
    if level.free:
        single_radius = np.where(large, 0.26 + 0.06 * u[:, 15], 0.14 + 0.06 * u[:, 15])
        radius = np.repeat((0.13 + 0.06 * u[:, 16])[:, None], 4, 1)
        jitter = (u[:, 20:28].reshape(b, 4, 2) - 0.5) * 0.10
    else:
        single_radius = np.where(large, LARGE, SMALL)
        radius = np.full((b, 4), SMALL)
        jitter = ((u[:, 20:28].reshape(b, 4, 2) * 3).astype(np.int64) - 1) / 32
    anchor = (u[:, 17:19] * 3).astype(np.int64)

    quadrants = np.array([[near, near], [far, near], [near, far], [far, far]])
    turn = (np.arange(4)[None, :] + (u[:, 19] * 4).astype(np.int64)[:, None]) % 4
    centre = quadrants[turn]  # (B, 4, 2) groups of 3 or 4 start at a random quadrant
    pairs = np.array(  # (5, 2, 2) the two places of a pair, by axis
        [[[near, 0.5], [far, 0.5]]] * 2
        + [[[0.5, near], [0.5, far]]] * 2
        + [[[near, near], [far, far]]]
    )
    two = count == 2
    places = pairs[axis]  # (B, 2, 2)
    places = np.where(swapped[:, None, None], places[:, ::-1], places)
    centre[:, :2] = np.where(two[:, None, None], places, centre[:, :2])
    single = kind == 0
    on_grid = (10 + 6 * anchor) / 32
    if level.free:
        margin = (single_radius + 0.02)[:, None]
        alone = margin + (1 - 2 * margin) * u[:, 28:30]
        third = (alone - 0.5) * 6.0
        anchor = np.where(
            np.abs(third) < 0.4, 1, np.where(third < -1.0, 0, np.where(third > 1.0, 2, -1))
        )
        centre[:, 0] = np.where(single[:, None], alone - jitter[:, 0], centre[:, 0])
    else:
        centre[:, 0] = np.where(single[:, None], on_grid, centre[:, 0])
    radius[:, 0] = np.where(single, single_radius, radius[:, 0])
    return centre + jitter, radius, np.where(single[:, None], anchor, -1)


def render(scenes: Scenes, size: int) -> NDArray[np.uint8]:
    """Pictures (B, 3, S, S) uint8 of B scenes."""
    pad = int(np.ceil(0.07 * size)) + 4  # the window of an object may extend beyond the border
    wide = size + 2 * pad
    canvas = np.zeros((len(scenes.kind), 3, wide, wide), np.float32)
    inner = (slice(None), slice(None), slice(pad, pad + size), slice(pad, pad + size))
    canvas[inner] = backgrounds(scenes.background, scenes.texture, scenes.phase, size)
    canvas += np.float32(0.5)  # everything is half a level higher: truncation then rounds
    palette = np.array(list(COLOURS.values()), np.float32) + np.float32(0.5)
    names = list(SDF)
    for slot in range(4):
        for large in (True, False):  # a window is as wide as the largest object of its group
            chosen = (scenes.count > slot) & ((scenes.radius[:, slot] > 0.22) == large)
            rows = np.nonzero(chosen)[0]
            if len(rows):
                paint(
                    canvas,
                    rows,
                    scenes.shape[rows, slot],
                    palette[scenes.colour[rows, slot]],
                    scenes.centre[rows, slot] * size + pad,
                    scenes.radius[rows, slot] * size,
                    names,
                )
    return canvas[inner].astype(np.uint8)


def scene_words(scenes: Scenes) -> list[SceneWords]:
    """The words of B scenes, from which captions are made."""
    shapes, colours, grounds = list(SDF), list(COLOURS), list(BACKGROUNDS)
    large = (scenes.radius[:, 0] > 0.22).tolist()
    table = zip(
        scenes.count.tolist(),
        scenes.first.tolist(),
        scenes.shape.tolist(),
        scenes.colour.tolist(),
        scenes.relation.tolist(),
        scenes.anchor.tolist(),
        scenes.background.tolist(),
        large,
        strict=True,
    )
    return [
        SceneWords(
            shapes=[shapes[s] for s in shape[:count]],
            colours=[colours[c] for c in colour[:count]],
            first=first,
            large=is_large,
            relation=RELATIONS[relation] if relation >= 0 else None,
            place=PLACES[anchor[1]][anchor[0]] if min(anchor) >= 0 else None,
            background=grounds[ground],
        )
        for count, first, shape, colour, relation, anchor, ground, is_large in table
    ]


def scene_meta(scenes: Scenes, row: int) -> dict[str, Any]:
    """One scene in words and numbers, for `Example.meta`; lengths are shares of the side."""
    words = scene_words(scenes)[row]
    places = scenes.centre[row].tolist()
    return {
        "kind": KINDS[scenes.kind[row]],
        "background": words.background,
        "texture": TEXTURES[scenes.texture[row]],
        "relation": words.relation,
        "objects": [
            {"shape": shape, "colour": colour, "x": x, "y": y, "radius": radius}
            for shape, colour, (x, y), radius in zip(
                words.shapes, words.colours, places, scenes.radius[row].tolist(), strict=False
            )
        ],
    }


class Shapes(CaptionedDataset):
    """The world at one level, split and size. Every index from 0 up is a new example.

    Args:
        languages: Names of languages. Of several, each visit of an example draws one, and the
            captions of example i begin with those of language i.
    """

    endless = True

    def __init__(
        self,
        level: str = "easy",
        split: str = "train",
        size: int = 32,
        seed: int = 0,
        languages: tuple[str, ...] = ENGLISH,
    ) -> None:
        if level not in LEVELS:
            raise UserError(f"shapes has no level {level!r}: {nearest(level, LEVELS)}")
        if split not in SPLITS:
            raise UserError(f"shapes has no split {split!r}: {nearest(split, SPLITS)}")
        if not 16 <= size <= 256:
            raise UserError(f"size={size} must be between 16 and 256 pixels for shapes.")
        self.name = name_of(level, languages)
        self.level_name, self.level, self.languages = level, LEVELS[level], languages
        self.split, self.size, self.seed = split, size, seed
        self.skipped = []

    def __len__(self) -> int:
        return SPLITS[self.split]

    def scenes(self, indices: Sequence[int] | Ints) -> Scenes:
        """The scenes of `indices` as arrays."""
        return make_scenes(self.level, self.seed, self.split, np.asarray(indices, np.int64))

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"shapes has no example {index}: indices start at 0")
        scenes = self.scenes([index])
        words = scene_words(scenes)[0]
        numbers = range(NUM_CAPTIONS)
        u = self._uniforms([index] * NUM_CAPTIONS, numbers)
        first = index % len(self.languages)
        captions = [
            caption(words, u[number], language)
            for language in (*self.languages[first:], *self.languages[:first])
            for number in numbers
        ]
        return Example(
            id=f"{self.split}-{index}",
            image=torch.from_numpy(render(scenes, self.size)[0]),
            captions=tuple(dict.fromkeys(captions)),
            label=int(self._labels(scenes)[0]),
            meta=scene_meta(scenes, 0),
        )

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        scenes = self.scenes(indices)
        visit = np.asarray(indices, np.int64) + (np.asarray(epochs, np.int64) << 40)
        choices = uniforms(seed, "visit", visit, 2) * [NUM_CAPTIONS, len(self.languages)]
        number, language = choices.astype(np.int64).T.tolist()
        u = self._uniforms(indices, number)
        rows = zip(scene_words(scenes), u, language, strict=True)
        return Batch(
            to_unit(torch.from_numpy(render(scenes, self.size))),
            [caption(words, row, self.languages[one]) for words, row, one in rows],
            torch.from_numpy(self._labels(scenes)),
            [f"{self.split}-{i}" for i in indices],
        )

    def _uniforms(
        self, indices: Sequence[int] | Ints, number: Sequence[int] | Ints
    ) -> list[list[float] | None]:
        """Random numbers of caption `number[i]` of example `indices[i]`; None for caption 0."""
        at = np.asarray(indices, np.int64) * NUM_CAPTIONS + np.asarray(number, np.int64)
        u = uniforms(self.seed, "words/" + self.split[:2], at, NUM_UNIFORMS).tolist()
        return [row if k else None for row, k in zip(u, number, strict=True)]

    def _labels(self, scenes: Scenes) -> Ints:
        """Class (B,) of each scene: one number for shape and colour of its first object."""
        return scenes.shape[:, 0] * self.level.colours + scenes.colour[:, 0]

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        indices = np.arange(min(limit, len(self)))
        words = scene_words(self.scenes(indices))
        for number in range(NUM_CAPTIONS):
            u = self._uniforms(indices, np.full(len(indices), number))
            for language in self.languages:
                yield from (caption(w, row, language) for w, row in zip(words, u, strict=True))

    def showcase(self, count: int) -> list[Example]:
        """The first scenes of each kind in turn, so that few pictures show every task."""
        kinds = self.scenes(np.arange(50 * count)).kind
        present = [k for k in range(len(KINDS)) if (kinds == k).any()]
        queues = [np.nonzero(kinds == k)[0].tolist() for k in present]
        turns = [queue[turn] for turn in range(count) for queue in queues if turn < len(queue)]
        return [self[i] for i in turns[:count]]
