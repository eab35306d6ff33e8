"""Scenes for prompts: real pictures of what a prompt asks for, and of what it just does not.

The judge is measured on them. A real picture of a prompt shows exactly what it asks for and leaves
the rest (colours, sizes, places, ground) to chance within its level. A near miss differs in one
attribute that the prompt names, and is left to the same chance otherwise (with another count,
size or place comes another layout).

    shape       one thing has another shape
    colour      one thing has another colour, where the prompt names its colour
    binding     two things have exchanged their colours, where the prompt names both
    count       one thing more, or one less
    relation    they stand the other way round, or at a right angle
    size, place, background    likewise, where the prompt names them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lineage.data.shapes import (
    LEVELS,
    Level,
    Scenes,
    layout,
    render,
    scene_words,
    uniforms,
)
from lineage.data.shapes_captions import RELATIONS
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
_TRIES = 512  # layouts drawn for one prompt, of which the first that fits is taken


@dataclass(frozen=True)
class Plan:
    """What a scene must be; None leaves it to chance.

    Attributes:
        things: (shape, colour) of each.
        relation: of two things, how the first stands to the second: left, right, above, below.
    """

    things: tuple[tuple[str, str], ...]
    relation: str | None = None
    size: str | None = None
    place: str | None = None
    background: str | None = None


def plan(prompt: Prompt, chance: np.random.Generator) -> Plan:
    """A scene that a prompt asks for; unnamed colours are drawn from its level.

    Raises:
        UserError: the prompt places more than two things, or two of a kind.
    """
    names = COLOUR_NAMES[: LEVELS[prompt.level].colours]
    things: list[tuple[str, str]] = []
    relation = None
    for wanted in prompt.include:
        colour = wanted.colour or names[chance.integers(len(names))]
        things += [(wanted.shape, colour)] * wanted.count
    placed = [(i, w.position) for i, w in enumerate(prompt.include) if w.position]
    if placed:
        if len(things) != 2 or len(placed) != 1 or len(prompt.include) != 2:
            raise UserError(
                f"No scene can be drawn for {prompt.prompt!r}: it places other things "
                "than one of two."
            )
        ((number, (name, _)),) = placed
        relation = RELATION_NAMES[name]
        things = [things[number], things[1 - number]]
    one = prompt.include[0]
    return Plan(tuple(things), relation, one.size, one.place, prompt.background)


def attributes(prompt: Prompt) -> list[str]:
    """The attributes in which a picture can miss a prompt."""
    things = [w for w in prompt.include for _ in range(w.count)]
    named = {
        "shape": True,
        "colour": any(w.colour for w in prompt.include),
        "binding": len(things) == 2
        and len({w.shape for w in things}) == 2
        and len({w.colour for w in things} - {None}) == 2,
        "count": True,
        "relation": any(w.position for w in prompt.include),
        "size": any(w.size for w in prompt.include),
        "place": any(w.place for w in prompt.include),
        "background": prompt.background is not None,
    }
    return [name for name in ATTRIBUTES if named[name]]


def missed(prompt: Prompt, right: Plan, attribute: str, chance: np.random.Generator) -> Plan:
    """The plan with one attribute wrong. `right` is a plan of `prompt`."""
    level = LEVELS[prompt.level]
    things = list(right.things)

    def other(than: str, names: tuple[str, ...]) -> str:
        rest = [name for name in names if name != than]
        return rest[chance.integers(len(rest))]

    if attribute == "shape":
        at = int(chance.integers(len(things)))
        present = {shape for shape, _ in things}
        rest = [s for s in SHAPES[: level.shapes] if s not in present] or [
            s for s in SHAPES if s not in present
        ]
        things[at] = (rest[chance.integers(len(rest))], things[at][1])
    elif attribute == "colour":
        named = [c for w in prompt.include for c in [w.colour] * w.count]
        if right.relation:  # the placed thing stands first in the plan
            named = named[::-1] if prompt.include[1].position else named
        at = int(chance.choice([i for i, colour in enumerate(named) if colour]))
        things[at] = (things[at][0], other(things[at][1], COLOUR_NAMES[: level.colours]))
    elif attribute == "binding":
        shapes, colours = zip(*things, strict=True)
        things = list(zip(shapes, colours[::-1], strict=True))
    elif attribute == "count":
        fewer = len(things) > 1 and (len(things) == 4 or chance.random() < 0.5)
        things = things[:-1] if fewer else [*things, things[-1]]
        return replace(right, things=tuple(things), relation=None, size=None, place=None)
    elif attribute == "relation":
        return replace(right, relation=other(str(right.relation), tuple(RELATIONS)))
    elif attribute == "size":
        return replace(right, size=other(str(right.size), SIZES))
    elif attribute == "place":
        return replace(right, place=other(str(right.place), PLACE_NAMES))
    else:
        return replace(right, background=other(str(right.background), GROUNDS))
    return replace(right, things=tuple(things))


def draw(
    level: Level, plans: list[Plan], seed: int, size: int, rows: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Pictures (B, 3, S, S) of `plans`.

    Args:
        rows: (B,) with the same seed and row, chance decides alike what two plans leave to it; 0,
            1, 2, ... if None.
    """
    numbers = range(len(plans)) if rows is None else rows
    drawn = [_scene(level, plan, seed, row) for row, plan in zip(numbers, plans, strict=True)]
    fields = vars(drawn[0]).keys()
    return render(
        Scenes(**{f: np.concatenate([getattr(d, f) for d in drawn]) for f in fields}), size
    )


def _scene(level: Level, plan: Plan, seed: int, row: int) -> Scenes:
    """One scene that fits a plan: layouts are drawn until one has its size and place."""
    tries = _TRIES if plan.size or plan.place else 1
    u = uniforms(seed, "prompts", np.arange(tries) + row * _TRIES, 32)
    count = len(plan.things)
    pair = count == 2 and plan.things[0] != plan.things[1]
    kind = np.full(tries, 0 if count == 1 else 1 if pair else 2)
    axis, swapped = (u[:, 5] * 5).astype(np.int64), u[:, 6] < 0.5
    if plan.relation:
        axis[:] = 0 if plan.relation in ("left", "right") else 2
        swapped[:] = plan.relation in ("right", "below")
    centre, radius, anchor = layout(level, u, kind, np.full(tries, count), axis, swapped)
    shapes = [SHAPES.index(shape) for shape, _ in plan.things]
    colours = [COLOUR_NAMES.index(colour) for _, colour in plan.things]
    padding = [0] * (4 - count)
    ground = (u[:, 10] * level.backgrounds).astype(np.int64)
    if plan.background:
        ground[:] = GROUNDS.index(plan.background)
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
        (plan.size is None or plan.size == SIZES[words.large])
        and (plan.place is None or plan.place == words.place)
        for words in scene_words(scenes)
    ]
    best = fits.index(True)
    return Scenes(**{name: value[best : best + 1] for name, value in vars(scenes).items()})
