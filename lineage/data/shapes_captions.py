"""Captions of `shapes`, first half: which facts of a scene a caption states, in any language.

A caption is made in two steps, as in most systems that generate text (Reiter and Dale 1997,
"Building applied natural language generation systems"): content is planned here, and a grammar of
one language realises the plan (`shapes_captions_en.py`, `_zh`, `_ru`). So a scene has the same
captions in every language.

    plan  := [frame] what [background]
    what  := one thing [place] | thing joint thing | number things | number things and thing(s)
    thing := [number] [size] [colour] shape
    joint := and | next to | left | right | above | below   (each relation in two wordings)

Caption 0 is the plain one, which evaluation reads. It names every colour and the relation of two
objects that are side by side or one above the other. The other captions omit a part, change the
order or add something that is also true.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

NUM_UNIFORMS = 6
"""Number of random numbers that one caption uses."""

RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
"""Places of a single object, by row and column; the English phrases are their names."""

Form = Literal["plain", "one", "digits", "that is"]
Frame = Literal["", "picture", "drawing", "there is"]


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


class Thing(NamedTuple):
    """Equal objects, as a caption names them; an empty string is left out.

    Attributes:
        shape: Name of their shape.
        colour: Name of their colour.
        number: Number of objects, 1 to 4.
        size: `small`, `large`, or empty.
        form: `one` stresses the number of a single object, `digits` writes that of several as a
            digit, `that is` puts the colour behind the shape.
    """

    shape: str
    colour: str = ""
    number: int = 1
    size: str = ""
    form: Form = "plain"


class CaptionPlan(NamedTuple):
    """What a caption says; an empty string is left out.

    Attributes:
        things: One thing or two.
        joint: `and`, `next to`, or a relation of the first thing to the second.
        second_wording: If true, the relation has the second of its wordings.
        place: Phrase from `PLACES` for a single object.
        background: Name of the background's colour.
        frame: Kind of sentence around the things.
    """

    things: tuple[Thing, ...]
    joint: str = ""
    second_wording: bool = False
    place: str = ""
    background: str = ""
    frame: Frame = ""


def plan_caption(scene: SceneWords, u: list[float] | None) -> CaptionPlan:
    """The plan of one caption.

    Args:
        scene: The scene in words.
        u: `NUM_UNIFORMS` numbers in [0, 1) that choose among the paraphrases; None for the plain
            caption.
    """
    count, first = len(scene.shapes), scene.first
    if count == 1:
        plan = _single(scene, u)
    elif count == 2 and first == 1:
        plan = _pair(scene, u)
    else:
        plan = _groups(scene, u)
    return plan if u is None else _framed(plan, scene.background, u)


def _single(scene: SceneWords, u: list[float] | None) -> CaptionPlan:
    shape, colour = scene.shapes[0], scene.colours[0]
    if u is None:
        return CaptionPlan((Thing(shape, colour),))
    if u[0] < 0.12:
        thing = Thing(shape)
    elif u[0] < 0.20:
        thing = Thing(shape, colour, form="that is")
    elif u[0] < 0.45:
        thing = Thing(shape, colour, size="large" if scene.large else "small")
    elif u[0] < 0.53:
        thing = Thing(shape, colour, form="one")
    else:
        thing = Thing(shape, colour)
    return CaptionPlan((thing,), place=scene.place if scene.place and u[1] < 0.3 else "")


def _pair(scene: SceneWords, u: list[float] | None) -> CaptionPlan:
    one, other = map(Thing, scene.shapes, scene.colours)
    relation = scene.relation
    if u is None:
        return CaptionPlan((one, other), joint=relation or "and")
    if u[0] < 0.2 and one.shape != other.shape:
        one, other = Thing(one.shape), Thing(other.shape)
    if u[1] < 0.5:
        one, other = other, one
        relation = relation and OPPOSITE[relation]
    if relation is None or u[2] < 0.4:
        return CaptionPlan((one, other), joint="next to" if u[3] < 0.15 else "and")
    return CaptionPlan((one, other), joint=relation, second_wording=u[3] >= 0.7)


def _groups(scene: SceneWords, u: list[float] | None) -> CaptionPlan:
    count, first = len(scene.shapes), scene.first
    form: Form = "digits" if u is not None and u[3] < 0.15 else "plain"
    # without a colour, two sorts might be the same
    coloured = u is None or u[0] < 0.8 or first < count
    one = Thing(scene.shapes[0], scene.colours[0] if coloured else "", first, form=form)
    if first == count:
        return CaptionPlan((one,))
    other = Thing(scene.shapes[-1], scene.colours[-1], count - first, form=form)
    return CaptionPlan((one, other), joint="and")


def _framed(plan: CaptionPlan, background: str, u: list[float]) -> CaptionPlan:
    if u[4] < 0.12:
        plan = plan._replace(background=background)
    if u[5] < 0.1:
        return plan._replace(frame="picture")
    if u[5] < 0.16:
        return plan._replace(frame="there is")
    if u[5] < 0.2:
        return plan._replace(frame="drawing")
    return plan
