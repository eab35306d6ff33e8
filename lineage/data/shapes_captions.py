"""Grammar of `shapes`: true captions of a scene, with paraphrases.

    caption := [frame] what [ground]
    what    := one thing | thing joint thing | number things | number things and thing(s)
    thing   := a|an [size] [colour] shape [place]   or   a shape that is colour
    joint   := and | next to | left of | right of | above | below   (and their longer forms)

Caption 0 is the plain one, which evaluation reads. It names every colour and the relation of two
objects that are side by side or one above the other. The other captions omit a part, change the
order or add something that is also true.
"""

from __future__ import annotations

from typing import NamedTuple

NUM_UNIFORMS = 6
"""Number of random numbers that one caption uses."""

NUMBERS = ("no", "one", "two", "three", "four")
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)


class SceneWords(NamedTuple):
    """A scene in words.

    Attributes:
        shapes, colours: Name for each object; the first sort comes before the second.
        first: Number of objects of the first sort.
        large: If true, a single object is large.
        relation: Place of the first of two objects relative to the second, or None.
        place: Phrase from `PLACES` for a single object, or None.
        background: Name of the background's colour.
    """

    shapes: list[str]
    colours: list[str]
    first: int
    large: bool
    relation: str | None
    place: str | None
    background: str


def caption(scene: SceneWords, u: list[float] | None) -> str:
    """One caption.

    Args:
        scene: The scene in words.
        u: `NUM_UNIFORMS` numbers in [0, 1) that choose among the paraphrases; None for the plain
            caption.
    """
    count, first = len(scene.shapes), scene.first
    if count == 1:
        what = _single(scene, u)
    elif count == 2 and first == 1:
        what = _pair(scene, u)
    else:
        # without a colour, two sorts might be the same
        coloured = u is None or u[0] < 0.8 or first < count
        what = _group(first, scene.shapes[0], scene.colours[0] if coloured else "", u)
        if first < count:
            what += " and " + _group(count - first, scene.shapes[-1], scene.colours[-1], u)
    return what if u is None else _frame(what, scene.background, u)


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _thing(shape: str, colour: str) -> str:
    return f"{colour} {shape}" if colour else shape


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _single(scene: SceneWords, u: list[float] | None) -> str:
    shape, colour = scene.shapes[0], scene.colours[0]
    if u is None:
        return _a(_thing(shape, colour))
    size = "large" if scene.large else "small"
    if u[0] < 0.12:
        what = _a(shape)
    elif u[0] < 0.20:
        what = f"{_a(shape)} that is {colour}"
    elif u[0] < 0.45:
        what = _a(f"{size} {colour} {shape}")
    elif u[0] < 0.53:
        what = f"one {colour} {shape}"
    else:
        what = _a(_thing(shape, colour))
    return f"{what} {scene.place}" if scene.place and u[1] < 0.3 else what


def _pair(scene: SceneWords, u: list[float] | None) -> str:
    shapes, colours, relation = scene.shapes, list(scene.colours), scene.relation
    order = (0, 1)
    if u is not None:
        if u[0] < 0.2 and shapes[0] != shapes[1]:
            colours = ["", ""]
        if u[1] < 0.5:
            order = (1, 0)
            relation = relation and OPPOSITE[relation]
    one, other = (_a(_thing(shapes[i], colours[i])) for i in order)
    if relation is None or (u is not None and u[2] < 0.4):
        joint = "next to" if u is not None and u[3] < 0.15 else "and"
    else:
        joint = RELATIONS[relation][0 if u is None or u[3] < 0.7 else 1]
    return f"{one} {joint} {other}"


def _group(count: int, shape: str, colour: str, u: list[float] | None) -> str:
    if count == 1:
        return _a(_thing(shape, colour))
    number = str(count) if u is not None and u[3] < 0.15 else NUMBERS[count]
    return f"{number} {_thing(_plural(shape), colour)}"


def _frame(what: str, background: str, u: list[float]) -> str:
    if u[4] < 0.12:
        what = f"{what} on a {background} background"
    if u[5] < 0.1:
        return f"a picture of {what}"
    if u[5] < 0.16:
        return f"{'there is' if what.startswith(('a ', 'an ', 'one ')) else 'there are'} {what}"
    if u[5] < 0.2:
        return f"a drawing of {what}"
    return what
