"""The grammar of `shapes`: true captions of a scene, with paraphrases.

    caption := [frame] what [ground]
    what    := one thing | thing joint thing | number things | number things and thing(s)
    thing   := a|an [size] [colour] shape [place]   or   a shape that is colour
    joint   := and | next to | left of | right of | above | below   (and their longer forms)

Caption 0 is the plain one, which evaluation reads: it names every colour and, for two objects side
by side or one above the other, how they stand. The others leave things out, turn them round or add
what is also true.
"""

from __future__ import annotations

from typing import NamedTuple

DRAWS = 6  # random numbers that one caption uses

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
    """What a caption may say of a scene.

    Attributes:
        shapes, colours: one name an object, those of the first sort before those of the second.
        first: how many objects are of the first sort.
        large: whether a single object is large.
        relation: how the first of two objects stands to the second, or None.
        place: of a single object, its phrase from `PLACES`, or None.
        background: name of the background's colour.
    """

    shapes: list[str]
    colours: list[str]
    first: int
    large: bool
    relation: str | None
    place: str | None
    background: str


def caption(scene: SceneWords, draw: list[float] | None) -> str:
    """One caption.

    `draw`: `DRAWS` numbers in [0, 1) that choose among the paraphrases; None gives the plain one.
    """
    count, first = len(scene.shapes), scene.first
    if count == 1:
        what = _single(scene, draw)
    elif count == 2 and first == 1:
        what = _pair(scene, draw)
    else:
        coloured = (
            draw is None or draw[0] < 0.8 or first < count
        )  # two sorts may differ by colour alone
        what = _group(first, scene.shapes[0], scene.colours[0] if coloured else "", draw)
        if first < count:
            what += " and " + _group(count - first, scene.shapes[-1], scene.colours[-1], draw)
    return what if draw is None else _frame(what, scene.background, draw)


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _thing(shape: str, colour: str) -> str:
    return f"{colour} {shape}" if colour else shape


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _single(scene: SceneWords, draw: list[float] | None) -> str:
    shape, colour = scene.shapes[0], scene.colours[0]
    if draw is None:
        return _a(_thing(shape, colour))
    size = "large" if scene.large else "small"
    if draw[0] < 0.12:
        what = _a(shape)
    elif draw[0] < 0.20:
        what = f"{_a(shape)} that is {colour}"
    elif draw[0] < 0.45:
        what = _a(f"{size} {colour} {shape}")
    elif draw[0] < 0.53:
        what = f"one {colour} {shape}"
    else:
        what = _a(_thing(shape, colour))
    return f"{what} {scene.place}" if scene.place and draw[1] < 0.3 else what


def _pair(scene: SceneWords, draw: list[float] | None) -> str:
    shapes, colours, relation = scene.shapes, list(scene.colours), scene.relation
    order = (0, 1)
    if draw is not None:
        if draw[0] < 0.2 and shapes[0] != shapes[1]:
            colours = ["", ""]
        if draw[1] < 0.5:
            order = (1, 0)
            relation = relation and OPPOSITE[relation]
    one, other = (_a(_thing(shapes[i], colours[i])) for i in order)
    if relation is None or (draw is not None and draw[2] < 0.4):
        joint = "next to" if draw is not None and draw[3] < 0.15 else "and"
    else:
        joint = RELATIONS[relation][0 if draw is None or draw[3] < 0.7 else 1]
    return f"{one} {joint} {other}"


def _group(count: int, shape: str, colour: str, draw: list[float] | None) -> str:
    if count == 1:
        return _a(_thing(shape, colour))
    number = str(count) if draw is not None and draw[3] < 0.15 else NUMBERS[count]
    return f"{number} {_thing(_plural(shape), colour)}"


def _frame(what: str, background: str, draw: list[float]) -> str:
    if draw[4] < 0.12:
        what = f"{what} on a {background} background"
    if draw[5] < 0.1:
        return f"a picture of {what}"
    if draw[5] < 0.16:
        return f"{'there is' if what.startswith(('a ', 'an ', 'one ')) else 'there are'} {what}"
    if draw[5] < 0.2:
        return f"a drawing of {what}"
    return what
