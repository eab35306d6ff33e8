"""Scenes for prompts: real pictures that show a prompt's scene, and pictures that just miss it.

The judge is measured on them. A real picture of a prompt shows exactly its scene; what the prompt
does not mention (colours, sizes, places, background) is random within the prompt's level. A near
miss differs in one attribute that the prompt names, and has the same random rest (except that
another count, size or place needs another layout).

    shape       one object has another shape
    colour      one object has another colour, if the prompt names its colour
    binding     two objects have exchanged their colours, if the prompt names both
    count       one object more, or one less
    relation    the two objects stand the other way round, or at a right angle
    size, place, background    another one, if the prompt names it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.data.shapes import LEVELS, Level, Scenes, layout, render, scene_words
from lineage.data.shapes_captions import RELATIONS
from lineage.data.uniforms import uniforms
from lineage.errors import UserError
from lineage.evaluation.prompts import (
    COLOUR_NAMES,
    GROUNDS,
    PLACE_NAMES,
    RELATION_NAMES,
    SHAPES,
    SIZES,
    Prompt,
)

ATTRIBUTES = ("shape", "colour", "binding", "count", "relation", "size", "place", "background")
_LAYOUTS = 512  # layouts for one prompt; the first that fits is used


@dataclass(frozen=True)
class SceneSpec:
    """Attributes that a scene must have; None leaves one to chance.

    Attributes:
        objects: (shape, colour) of each.
        relation: Place of the first of two objects: left, right, above or below the second.
    """

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None
    size: str | None = None
    place: str | None = None
    background: str | None = None


def scene_spec(prompt: Prompt, rng: np.random.Generator) -> SceneSpec:
    """A scene that a prompt describes; colours without a name are drawn from its level.

    Raises:
        UserError: the prompt places more than two objects, or two of a kind.
    """
    names = COLOUR_NAMES[: LEVELS[prompt.level].colours]
    objects: list[tuple[str, str]] = []
    for entry in prompt.include:
        colour = entry.colour or names[rng.integers(len(names))]
        objects += [(entry.shape, colour)] * entry.count
    relation = None
    placed = [(i, entry.position) for i, entry in enumerate(prompt.include) if entry.position]
    if placed:
        if len(objects) != 2 or len(placed) != 1 or len(prompt.include) != 2:
            raise UserError(
                f"No scene can be drawn for {prompt.prompt!r}: a position needs exactly two "
                "objects, one of them placed."
            )
        ((number, (name, _)),) = placed
        relation = RELATION_NAMES[name]
        objects = [objects[number], objects[1 - number]]
    single = prompt.include[0]
    return SceneSpec(tuple(objects), relation, single.size, single.place, prompt.background)


def attributes(prompt: Prompt) -> list[str]:
    """Attributes in which a picture can miss a prompt."""
    colours = [entry.colour for entry in prompt.include for _ in range(entry.count)]
    named = {
        "shape": True,
        "colour": any(colours),
        "binding": len(colours) == 2
        and len({entry.shape for entry in prompt.include}) == 2
        and len(set(colours) - {None}) == 2,
        "count": True,
        "relation": any(entry.position for entry in prompt.include),
        "size": any(entry.size for entry in prompt.include),
        "place": any(entry.place for entry in prompt.include),
        "background": prompt.background is not None,
    }
    return [name for name in ATTRIBUTES if named[name]]


def near_miss(
    prompt: Prompt, spec: SceneSpec, attribute: str, rng: np.random.Generator
) -> SceneSpec:
    """`spec`, a scene of `prompt`, with one attribute wrong."""
    level = LEVELS[prompt.level]
    objects = list(spec.objects)

    def choose(names: Sequence[str]) -> str:
        return names[int(rng.integers(len(names)))]

    def another(value: str | None, names: Sequence[str]) -> str:
        return choose([name for name in names if name != value])

    if attribute == "count":
        fewer = len(objects) > 1 and (len(objects) == 4 or rng.random() < 0.5)
        objects = objects[:-1] if fewer else [*objects, objects[-1]]
        return SceneSpec(tuple(objects), background=spec.background)
    if attribute in ("relation", "size", "place", "background"):
        names = {"relation": RELATIONS, "size": SIZES, "place": PLACE_NAMES}
        changed: Any = {attribute: another(getattr(spec, attribute), names.get(attribute, GROUNDS))}
        return replace(spec, **changed)
    if attribute == "shape":
        i = int(rng.integers(len(objects)))
        present = {shape for shape, _ in objects}
        absent = [shape for shape in SHAPES if shape not in present]
        in_level = [shape for shape in SHAPES[: level.shapes] if shape in absent]
        objects[i] = (choose(in_level or absent), objects[i][1])
    elif attribute == "colour":
        named = [entry.colour for entry in prompt.include for _ in range(entry.count)]
        if spec.relation and prompt.include[1].position:  # the placed object is first in the spec
            named = named[::-1]
        i = int(rng.choice([i for i, colour in enumerate(named) if colour]))
        objects[i] = (objects[i][0], another(objects[i][1], COLOUR_NAMES[: level.colours]))
    else:  # binding
        shapes, colours = zip(*objects, strict=True)
        objects = list(zip(shapes, colours[::-1], strict=True))
    return replace(spec, objects=tuple(objects))


def draw_scenes(
    level: Level, specs: list[SceneSpec], seed: int, size: int, rows: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Pictures (B, 3, S, S) of `specs`.

    Args:
        rows: (B,) numbers; equal seed and row make equal random choices for two specs. None is
            0, 1, 2, ...
    """
    numbers = range(len(specs)) if rows is None else rows
    scenes = [_scene(level, spec, seed, row) for row, spec in zip(numbers, specs, strict=True)]
    fields = vars(scenes[0])
    return render(
        Scenes(**{f: np.concatenate([getattr(scene, f) for scene in scenes]) for f in fields}), size
    )


def _scene(level: Level, spec: SceneSpec, seed: int, row: int) -> Scenes:
    """One scene that fits a spec: the first of many layouts that has its size and place."""
    tries = _LAYOUTS if spec.size or spec.place else 1
    u = uniforms(seed, "prompts", np.arange(tries) + row * _LAYOUTS, 32)
    count = len(spec.objects)
    pair = count == 2 and spec.objects[0] != spec.objects[1]
    kind = np.full(tries, 0 if count == 1 else 1 if pair else 2)
    axis, swapped = (u[:, 5] * 5).astype(np.int64), u[:, 6] < 0.5
    if spec.relation:
        axis[:] = 0 if spec.relation in ("left", "right") else 2
        swapped[:] = spec.relation in ("right", "below")
    centre, radius, anchor = layout(level, u, kind, np.full(tries, count), axis, swapped)
    shapes = [SHAPES.index(shape) for shape, _ in spec.objects]
    colours = [COLOUR_NAMES.index(colour) for _, colour in spec.objects]
    padding = [0] * (4 - count)
    ground = (u[:, 10] * level.backgrounds).astype(np.int64)
    if spec.background:
        ground[:] = GROUNDS.index(spec.background)
    scenes = Scenes(
        kind=kind,
        count=np.full(tries, count),
        first=np.full(tries, 1 if pair else count),
        shape=np.tile(shapes + padding, (tries, 1)),
        colour=np.tile(colours + padding, (tries, 1)),
        radius=radius,
        centre=centre,
        relation=np.full(tries, -1),
        anchor=anchor,
        background=ground,
        texture=(u[:, 11] * level.textures).astype(np.int64),
        phase=u[:, 12:14],
    )
    fits = [
        spec.size in (None, SIZES[words.large]) and spec.place in (None, words.place)
        for words in scene_words(scenes)
    ]
    i = fits.index(True)
    return Scenes(**{name: value[i : i + 1] for name, value in vars(scenes).items()})
