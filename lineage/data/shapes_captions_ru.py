"""Russian captions of `shapes`: plan -> text, with gender, case and number.

    красный круг                            a red circle (there are no articles)
    красный круг слева от синего квадрата   a red circle left of a blue square
    две зелёные звезды, три синих кольца    two green stars, three blue rings
    рисунок двух синих колец                a drawing of two blue rings

Cases. The first thing is nominative, or genitive after `рисунок` (a drawing of). The second is
genitive after `слева от`, `левее`, `выше` and their like, instrumental after `над` (over), `под`
(under) and `рядом с` (next to). After 2, 3 and 4 in the nominative, a noun is genitive singular and
its adjective genitive plural, or nominative plural if the noun is feminine.

Genders: m masculine, f feminine, n neuter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lineage.data.shapes_captions import CaptionPlan, Thing

Case = Literal["nominative", "genitive", "instrumental"]


class Noun(NamedTuple):
    """Gender and the forms of a noun that captions use."""

    gender: Literal["m", "f", "n"]
    nominative: str
    genitive: str
    instrumental: str
    genitive_plural: str


SHAPES = {
    "circle": Noun("m", "круг", "круга", "кругом", "кругов"),
    "square": Noun("m", "квадрат", "квадрата", "квадратом", "квадратов"),
    "triangle": Noun("m", "треугольник", "треугольника", "треугольником", "треугольников"),
    "cross": Noun("m", "крест", "креста", "крестом", "крестов"),
    "star": Noun("f", "звезда", "звезды", "звездой", "звёзд"),
    "ring": Noun("n", "кольцо", "кольца", "кольцом", "колец"),
    "diamond": Noun("m", "ромб", "ромба", "ромбом", "ромбов"),
    "heart": Noun("n", "сердце", "сердца", "сердцем", "сердец"),
}

# Endings of adjectives: singular m, f, n, then plural.
HARD = {
    "nominative": ("ый", "ая", "ое", "ые"),
    "genitive": ("ого", "ой", "ого", "ых"),
    "instrumental": ("ым", "ой", "ым", "ыми"),
    "prepositional": ("ом", "ой", "ом", "ых"),
}
SOFT = {
    "nominative": ("ий", "яя", "ее", "ие"),
    "genitive": ("его", "ей", "его", "их"),
    "instrumental": ("им", "ей", "им", "ими"),
}
VELAR = {  # after к no ы is written
    "nominative": ("ий", "ая", "ое", "ие"),
    "genitive": ("ого", "ой", "ого", "их"),
}
STRESSED = {  # stress on the ending
    "nominative": ("ой", "ая", "ое", "ие"),
    "genitive": ("ого", "ой", "ого", "их"),
}
ADJECTIVES = {
    "red": ("красн", HARD),
    "green": ("зелён", HARD),
    "blue": ("син", SOFT),
    "yellow": ("жёлт", HARD),
    "purple": ("фиолетов", HARD),
    "orange": ("оранжев", HARD),
    "pink": ("розов", HARD),
    "brown": ("коричнев", HARD),
    "white": ("бел", HARD),
    "black": ("чёрн", HARD),
    "grey": ("сер", HARD),
    "small": ("маленьк", VELAR),
    "large": ("больш", STRESSED),
}
"""Stem and endings of colours and sizes."""

ONE = {
    "nominative": {"m": "один", "f": "одна", "n": "одно"},
    "genitive": {"m": "одного", "f": "одной", "n": "одного"},
}
NUMBERS = {"nominative": ("два", "три", "четыре"), "genitive": ("двух", "трёх", "четырёх")}
JOINTS: dict[str, tuple[tuple[str, Case], tuple[str, Case]]] = {
    "next to": (("рядом с", "instrumental"), ("рядом с", "instrumental")),
    "left": (("слева от", "genitive"), ("левее", "genitive")),
    "right": (("справа от", "genitive"), ("правее", "genitive")),
    "above": (("выше", "genitive"), ("над", "instrumental")),
    "below": (("ниже", "genitive"), ("под", "instrumental")),
}
"""Both wordings of each relation, and the case that follows."""
PLACES = {
    "in the top left": "в левом верхнем углу",
    "at the top": "вверху",
    "in the top right": "в правом верхнем углу",
    "on the left": "слева",
    "in the middle": "в центре",
    "on the right": "справа",
    "in the bottom left": "в левом нижнем углу",
    "at the bottom": "внизу",
    "in the bottom right": "в правом нижнем углу",
}
VISIBLE = {"m": "виден", "f": "видна", "n": "видно"}


def realise(plan: CaptionPlan) -> str:
    """The caption of a plan."""
    first = plan.things[0]
    case: Case = "genitive" if plan.frame == "drawing" else "nominative"
    text = _thing(first, case)
    if plan.joint == "and":
        text = f"{text} и {_thing(plan.things[1], case)}"
    elif plan.joint:
        words, other_case = JOINTS[plan.joint][plan.second_wording]
        other = _thing(plan.things[1], other_case)
        if words == "рядом с" and other.startswith("зв"):
            words = "рядом со"  # before two consonants of which the first is like с
        text = f"{text} {words} {other}"
    if plan.place:
        text = f"{text} {PLACES[plan.place]}"
    if plan.background:
        stem, endings = ADJECTIVES[plan.background]
        text = f"{text} на {stem}{endings['prepositional'][0]} фоне"
    if plan.frame == "picture":
        return f"на картинке {text}"
    if plan.frame == "drawing":
        return f"рисунок {text}"
    if plan.frame == "there is":
        several = first.number > 1 or plan.joint == "and"
        return f"{'видны' if several else VISIBLE[SHAPES[first.shape].gender]} {text}"
    return text


def _thing(thing: Thing, case: Case) -> str:
    """Equal objects in a case; several of them only in the nominative and the genitive."""
    noun = SHAPES[thing.shape]
    if thing.number > 1:
        words = NUMBERS[case][thing.number - 2]
        if case == "genitive":
            adjective, form = _adjective(thing.colour, case, "plural"), noun.genitive_plural
        else:
            words = "две" if words == "два" and noun.gender == "f" else words
            colour_case = "nominative" if noun.gender == "f" else "genitive"
            adjective, form = _adjective(thing.colour, colour_case, "plural"), noun.genitive
        return _joined(str(thing.number) if thing.form == "digits" else words, adjective, form)
    form = getattr(noun, case)
    if thing.form == "that is":
        return f"{form} {_adjective(thing.colour, 'genitive', 'm')} цвета"
    one = ONE[case][noun.gender] if thing.form == "one" else ""
    size, colour = (_adjective(name, case, noun.gender) for name in (thing.size, thing.colour))
    return _joined(one, size, colour, form)


def _adjective(name: str, case: str, number: str) -> str:
    """A colour or size in a case; `number` is a gender, or `plural`."""
    if not name:
        return ""
    stem, endings = ADJECTIVES[name]
    return stem + endings[case][("m", "f", "n", "plural").index(number)]


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)
