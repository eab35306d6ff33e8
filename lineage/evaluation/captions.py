"""English captions of `shapes`, read back: text -> the scene that it describes, as a `Prompt`.

The grammar is that of `lineage.data.shapes_captions`, for which `shapes_captions_en` writes the
text. With it the judge can decide on a picture of any caption that somebody has typed.

    a red circle left of a blue square    ->  a square, and left of it a circle
    two green stars on a white background ->  two stars; the background
"""

from __future__ import annotations

import re
from dataclasses import replace

from lineage.data.shapes_captions_en import JOINTS, NUMBERS
from lineage.evaluation.prompts import (
    COLOUR_NAMES,
    GROUNDS,
    PLACE_NAMES,
    RELATION_NAMES,
    SHAPES,
    SIZES,
    ObjectSpec,
    Prompt,
)

MAX_OBJECTS = 4  # of a scene


def _any_of(name: str, words: tuple[str, ...]) -> str:
    """A pattern of one of some words, the longest first, as the group `name`."""
    return f"(?P<{name}>{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})"


_PLURALS = {shape + ("es" if shape.endswith("s") else "s"): shape for shape in SHAPES}
_COUNTS = {NUMBERS[n]: n for n in range(2, MAX_OBJECTS + 1)}
_COUNTS |= {str(n): n for n in range(2, MAX_OBJECTS + 1)}
_WORDINGS = {text: joint for joint, both in JOINTS.items() for text in both}
_GENEVAL = {ours: name for name, ours in RELATION_NAMES.items()}

_SEVERAL = re.compile(
    f"{_any_of('number', tuple(_COUNTS))} (?:{_any_of('colour', COLOUR_NAMES)} )?"
    f"{_any_of('plural', tuple(_PLURALS))}"
)
_ONE = re.compile(
    f"(?:an?|one) (?:{_any_of('size', SIZES)} )?(?:{_any_of('colour', COLOUR_NAMES)} )?"
    f"{_any_of('shape', SHAPES)}(?: that is {_any_of('colour_behind', COLOUR_NAMES)})?"
)
_FRAME = re.compile(r"(?:there (?:is|are)|a (?:picture|drawing) of) ")
_BACKGROUND = re.compile(f" on an? {_any_of('background', GROUNDS)} background$")
_PLACE = re.compile(f" {_any_of('place', PLACE_NAMES)}$")
_JOINT = re.compile(f" {_any_of('joint', tuple(_WORDINGS))} ")


def read_caption(caption: str, level: str = "easy") -> Prompt | None:
    """The prompt that a caption stands for; None if the grammar has no such caption.

    Capital letters, a full stop at the end and the number of spaces do not matter.

    Args:
        level: Level of `shapes` that the prompt is of.
    """
    text = " ".join(caption.lower().split()).rstrip(" .")
    if frame := _FRAME.match(text):
        text = text[frame.end() :]
    background = place = joint = None
    if match := _BACKGROUND.search(text):
        background, text = match["background"], text[: match.start()]
    if match := _PLACE.search(text):
        place, text = match["place"], text[: match.start()]
    parts = [text]
    if match := _JOINT.search(text):
        joint, parts = _WORDINGS[match["joint"]], [text[: match.start()], text[match.end() :]]
    include = _entries(parts, joint, place)
    if include is None:
        return None
    return Prompt("caption", caption, include, level, "test", background)


def _entries(
    parts: list[str], joint: str | None, place: str | None
) -> tuple[ObjectSpec, ...] | None:
    """The objects of one thing, or of two with a joint; the one that a relation places is last."""
    things = [thing for part in parts if (thing := _thing(part, place))]
    total = sum(thing.count for thing in things)
    if len(things) < len(parts) or total > MAX_OBJECTS:
        return None
    if len(things) == 1:
        return None if place and total > 1 else (things[0],)
    first, second = things
    if place or first.size or second.size or (joint != "and" and total > 2):
        return None
    if joint not in _GENEVAL:
        return first, second
    return second, replace(first, position=(_GENEVAL[joint], 0))


def _thing(text: str, place: str | None) -> ObjectSpec | None:
    if match := _SEVERAL.fullmatch(text):
        return ObjectSpec(_PLURALS[match["plural"]], _COUNTS[match["number"]], match["colour"])
    match = _ONE.fullmatch(text)
    if match is None or (match["colour_behind"] and (match["colour"] or match["size"])):
        return None
    colour = match["colour"] or match["colour_behind"]
    return ObjectSpec(match["shape"], 1, colour, size=match["size"], place=place)
