"""Readers of the captions of `shapes` in three languages, which share no code with the grammars.

A reader returns what a caption says, or raises ValueError where a caption is not of the language.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    """What is said of equal objects; None where a caption leaves it out."""

    number: int
    shape: str
    colour: str | None
    size: str | None


class Reading(NamedTuple):
    """What a caption says; `joint` is the relation of the first thing to the second."""

    things: list[Said]
    joint: str | None
    place: str | None
    background: str | None


def turned(words: str) -> dict[str, str]:
    """`red красный, blue синий` -> {"красный": "red", "синий": "blue"}."""
    return {
        foreign: english for english, foreign in (pair.split(" ") for pair in words.split(", "))
    }


def either(names: dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True))


# --- English ------------------------------------------------------------------------------------

_EN = re.compile(
    r"(?:there (?P<be>is|are) |a (?:picture|drawing) of )?(?P<what>.+?)"
    r"(?: (?P<place>(?:in|on|at) the [a-z ]+?))?(?: on a (?P<ground>white|black|grey) background)?"
)
_EN_THING = re.compile(
    r"(an?|one|two|three|four|[234]) (?:(small|large) )?"
    r"(?:(red|green|blue|yellow|purple|orange|pink|brown) )?([a-z]+?)(?: that is ([a-z]+))?"
)
_EN_JOINTS = {
    "to the left of": "left",
    "to the right of": "right",
    "left of": "left",
    "right of": "right",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "next to": "next to",
    "and": "and",
}
_EN_SHAPES = ["circle", "square", "triangle", "cross", "star", "ring", "diamond", "heart"]
_EN_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}


def read_english(caption: str) -> Reading:
    whole = _EN.fullmatch(caption)
    if whole is None:
        raise ValueError(caption)
    joint = next((j for j in _EN_JOINTS if f" {j} " in whole["what"]), None)
    things = []
    for part in whole["what"].split(f" {joint} ") if joint else [whole["what"]]:
        match = _EN_THING.fullmatch(part)
        if match is None:
            raise ValueError(caption)
        number, size, colour, noun, late = match.groups()
        count = _EN_NUMBERS[number]
        shape = noun if count == 1 else noun.removesuffix("s").replace("crosse", "cross")
        if shape not in _EN_SHAPES:
            raise ValueError(caption)
        things.append(Said(count, shape, colour or late, size))
    return Reading(things, joint and _EN_JOINTS[joint], whole["place"], whole["ground"])


# --- Chinese ------------------------------------------------------------------------------------

_ZH_SHAPES = turned(
    "circle 圆, square 方块, triangle 三角形, cross 十字, star 星星, ring 圆环, diamond 菱形, "
    "heart 爱心"
)
_ZH_COLOURS = turned(
    "red 红, green 绿, blue 蓝, yellow 黄, purple 紫, orange 橙, pink 粉, brown 棕, white 白, "
    "black 黑, grey 灰"
)
_ZH_RELATIONS = turned("left 左边, right 右边, above 上方, below 下方") | {"旁边": "next to"}
_ZH_PLACES = {
    "左上角": "in the top left",
    "顶部": "at the top",
    "右上角": "in the top right",
    "左边": "on the left",
    "中间": "in the middle",
    "右边": "on the right",
    "左下角": "in the bottom left",
    "底部": "at the bottom",
    "右下角": "in the bottom right",
}
_ZH_BARE = rf"(?:(?:颜色是)?[{either(_ZH_COLOURS)}]色的)?[大小]?(?:{either(_ZH_SHAPES)})"
_ZH_COUNTED = rf"[一两三四1234][个颗]{_ZH_BARE}"
_ZH_FORMS = {  # name -> (pattern, whether the second thing is first)
    "place": rf"(?P<place>{either(_ZH_PLACES)})有(?P<a>{_ZH_COUNTED})",
    "exists": rf"(?P<b>{_ZH_BARE})(?P<how>{either(_ZH_RELATIONS)})有(?P<a>{_ZH_COUNTED})",
    "is at": rf"(?P<a>{_ZH_BARE})在(?P<b>{_ZH_BARE})(?P<how>{either(_ZH_RELATIONS)})",
    "and": rf"(?P<a>{_ZH_COUNTED})和(?P<b>{_ZH_COUNTED})",
    "alone": rf"(?P<a>{_ZH_COUNTED})",
}
_ZH_FRAMES = {  # beginnings that a form may have
    "place": ("图片的", "画的", "可以看到", ""),
    "exists": ("图片里", "画里", "可以看到", ""),
    "is at": ("图片里", "画里", "可以看到", ""),
    "and": ("图片里有", "画里有", "可以看到", ""),
    "alone": ("图片里有", "画里有", "可以看到", ""),
}


def read_chinese(caption: str) -> Reading:
    text, comma, ground = caption.partition("，")
    if comma and not re.fullmatch("[白黑灰]色背景", ground):
        raise ValueError(caption)
    for form, pattern in _ZH_FORMS.items():
        match = re.fullmatch(f"(?:{'|'.join(_ZH_FRAMES[form])}){pattern}", text)
        if match:
            parts = match.groupdict()
            joint = "and" if form == "and" else _ZH_RELATIONS.get(parts.get("how", ""))
            return Reading(
                [_chinese_thing(parts[name]) for name in ("a", "b") if parts.get(name)],
                joint,
                _ZH_PLACES.get(parts.get("place", "")),
                _ZH_COLOURS[ground[0]] if ground else None,
            )
    raise ValueError(caption)


def _chinese_thing(text: str) -> Said:
    match = re.fullmatch(
        rf"(?:(?P<number>.)(?P<measure>[个颗]))?(?:(?:颜色是)?(?P<colour>.)色的)?(?P<size>[大小])?"
        rf"(?P<shape>{either(_ZH_SHAPES)})",
        text,
    )
    if match is None:
        raise ValueError(text)
    shape, number = _ZH_SHAPES[match["shape"]], match["number"] or "一"
    if match["measure"] and (match["measure"] == "颗") != (shape in ("star", "heart")):
        raise ValueError(f"measure word of {text}")
    return Said(
        ("一两三四".find(number) if number in "一两三四" else "1234".find(number)) + 1,
        shape,
        _ZH_COLOURS[match["colour"]] if match["colour"] else None,
        {"大": "large", "小": "small"}.get(match["size"]),
    )


# --- Russian ------------------------------------------------------------------------------------

_RU_NOUNS = {
    "circle": "круг круга кругом кругов",
    "square": "квадрат квадрата квадратом квадратов",
    "triangle": "треугольник треугольника треугольником треугольников",
    "cross": "крест креста крестом крестов",
    "star": "звезда звезды звездой звёзд",
    "ring": "кольцо кольца кольцом колец",
    "diamond": "ромб ромба ромбом ромбов",
    "heart": "сердце сердца сердцем сердец",
}
_RU_SHAPES = {form: shape for shape, forms in _RU_NOUNS.items() for form in forms.split()}
_RU_STEMS = turned(
    "red красн, green зелён, blue син, yellow жёлт, purple фиолетов, orange оранжев, pink розов, "
    "brown коричнев, large больш, small маленьк"
)
_RU_ENDINGS = re.compile("[ыи]й|ой|ая|яя|[оеы]е|ие|[ое]го|ей|[ыи]м|[ыи]х")
_RU_NUMBERS = {
    **dict.fromkeys(("один", "одна", "одно", "одного", "одной"), 1),
    **dict.fromkeys(("два", "две", "двух", "2"), 2),
    **dict.fromkeys(("три", "трёх", "3"), 3),
    **dict.fromkeys(("четыре", "четырёх", "4"), 4),
}
_RU_JOINTS = {
    "слева от": "left",
    "левее": "left",
    "справа от": "right",
    "правее": "right",
    "выше": "above",
    "над": "above",
    "ниже": "below",
    "под": "below",
    "рядом с": "next to",
    "рядом со": "next to",
    "и": "and",
}
_RU_PLACES = {
    "в левом верхнем углу": "in the top left",
    "вверху": "at the top",
    "в правом верхнем углу": "in the top right",
    "слева": "on the left",
    "в центре": "in the middle",
    "справа": "on the right",
    "в левом нижнем углу": "in the bottom left",
    "внизу": "at the bottom",
    "в правом нижнем углу": "in the bottom right",
}
_RU_GROUNDS = turned("white белом, black чёрном, grey сером")
_RU = re.compile(
    rf"(?:на картинке |рисунок |виден |видна |видно |видны )?(?P<what>.+?)"
    rf"(?: (?P<place>{either(_RU_PLACES)}))?(?: на (?P<ground>{either(_RU_GROUNDS)}) фоне)?"
)


def read_russian(caption: str) -> Reading:
    whole = _RU.fullmatch(caption)
    if whole is None:
        raise ValueError(caption)
    joint = re.search(f" ({either(_RU_JOINTS)}) ", whole["what"])
    parts = [whole["what"]]
    if joint:
        parts = [whole["what"][: joint.start()], whole["what"][joint.end() :]]
    return Reading(
        [_russian_thing(part) for part in parts],
        _RU_JOINTS[joint[1]] if joint else None,
        _RU_PLACES.get(whole["place"] or ""),
        _RU_GROUNDS.get(whole["ground"] or ""),
    )


def _russian_thing(text: str) -> Said:
    words = text.split(" ")
    number = _RU_NUMBERS[words.pop(0)] if words[0] in _RU_NUMBERS else 1
    colour = size = None
    if words[-1] == "цвета":
        colour = _adjective(words[-2])
        words = words[:-2]
    *adjectives, noun = words
    for name in map(_adjective, adjectives):
        if name in ("large", "small"):
            size = name
        else:
            colour = name
    if noun not in _RU_SHAPES:
        raise ValueError(text)
    return Said(number, _RU_SHAPES[noun], colour, size)


def _adjective(word: str) -> str:
    for stem, name in _RU_STEMS.items():
        if word.startswith(stem) and _RU_ENDINGS.fullmatch(word[len(stem) :]):
            return name
    raise ValueError(word)


READERS: dict[str, Callable[[str], Reading]] = {
    "en": read_english,
    "zh": read_chinese,
    "ru": read_russian,
}
