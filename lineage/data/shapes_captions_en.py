"""English captions of `shapes`: plan -> text.

a red circle left of a blue square        two green stars on a white background
a picture of a large red circle           a circle that is red in the top left
"""

from __future__ import annotations

from lineage.data.shapes_captions import CaptionPlan, Thing

NUMBERS = ("no", "one", "two", "three", "four")
JOINTS = {
    "and": ("and", "and"),
    "next to": ("next to", "next to"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Both wordings of each joint."""


def realise(plan: CaptionPlan) -> str:
    """The caption of a plan."""
    text = _thing(plan.things[0])
    if plan.joint:
        text = f"{text} {JOINTS[plan.joint][plan.second_wording]} {_thing(plan.things[1])}"
    if plan.place:
        text = f"{text} {plan.place}"
    if plan.background:
        text = f"{text} on a {plan.background} background"
    if plan.frame == "there is":
        return f"{'there is' if plan.things[0].number == 1 else 'there are'} {text}"
    return f"a {plan.frame} of {text}" if plan.frame else text


def _thing(thing: Thing) -> str:
    if thing.number > 1:
        plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
        number = str(thing.number) if thing.form == "digits" else NUMBERS[thing.number]
        return f"{number} {thing.colour} {plural}" if thing.colour else f"{number} {plural}"
    if thing.form == "that is":
        return f"{_a(thing.shape)} that is {thing.colour}"
    noun = " ".join(word for word in (thing.size, thing.colour, thing.shape) if word)
    return f"one {noun}" if thing.form == "one" else _a(noun)


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
