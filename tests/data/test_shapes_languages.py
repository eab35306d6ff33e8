"""Chinese and Russian captions of `shapes`: correct, true, and of the same scenes as English ones.

Grammar is held by a hand-written list; truth by readers that share no code with the grammars.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from caption_readers import READERS, Reading, Said

from lineage.data import load_dataset, parse_spec
from lineage.data.contract import CaptionedDataset
from lineage.data.shapes import LEVELS, SPLITS, Shapes
from lineage.data.shapes_captions import CaptionPlan, Thing
from lineage.data.shapes_languages import ALL, GRAMMARS, parse_rest
from lineage.errors import UserError
from lineage.evaluation.prompts import make_prompts

FOREIGN = ("zh", "ru")

# --- grammar --------------------------------------------------------------------------------------


def one(
    shape: str, colour: str = "", number: int = 1, size: str = "", form: Any = "plain"
) -> Thing:
    return Thing(shape, colour, number, size, form)


def say(*things: Thing, joint: str = "", second: bool = False, **rest: Any) -> CaptionPlan:
    return CaptionPlan(things, joint, second, **rest)


RED, BLUE_SQUARE = one("circle", "red"), one("square", "blue")
RING, HEART = one("ring", "yellow"), one("heart", "blue")
GOLDEN = [
    (say(RED), "a red circle", "一个红色的圆", "красный круг"),
    (say(one("square", "green")), "a green square", "一个绿色的方块", "зелёный квадрат"),
    (say(one("triangle", "blue")), "a blue triangle", "一个蓝色的三角形", "синий треугольник"),
    (say(one("cross", "yellow")), "a yellow cross", "一个黄色的十字", "жёлтый крест"),
    (say(one("star", "purple")), "a purple star", "一颗紫色的星星", "фиолетовая звезда"),
    (say(one("ring", "orange")), "an orange ring", "一个橙色的圆环", "оранжевое кольцо"),
    (say(one("diamond", "pink")), "a pink diamond", "一个粉色的菱形", "розовый ромб"),
    (say(one("heart", "brown")), "a brown heart", "一颗棕色的爱心", "коричневое сердце"),
    (say(one("star", "blue")), "a blue star", "一颗蓝色的星星", "синяя звезда"),
    (say(HEART), "a blue heart", "一颗蓝色的爱心", "синее сердце"),
    (say(one("star")), "a star", "一颗星星", "звезда"),
    # numbers
    (say(one("circle", "red", 2)), "two red circles", "两个红色的圆", "два красных круга"),
    (say(one("star", "green", 2)), "two green stars", "两颗绿色的星星", "две зелёные звезды"),
    (say(one("star", "blue", 3)), "three blue stars", "三颗蓝色的星星", "три синие звезды"),
    (say(one("ring", "blue", 4)), "four blue rings", "四个蓝色的圆环", "четыре синих кольца"),
    (say(one("heart", "pink", 2)), "two pink hearts", "两颗粉色的爱心", "два розовых сердца"),
    (say(one("circle", number=3)), "three circles", "三个圆", "три круга"),
    (say(one("star", number=4)), "four stars", "四颗星星", "четыре звезды"),
    (
        say(one("square", "yellow", 4)),
        "four yellow squares",
        "四个黄色的方块",
        "четыре жёлтых квадрата",
    ),
    (
        say(one("triangle", "purple", 3)),
        "three purple triangles",
        "三个紫色的三角形",
        "три фиолетовых треугольника",
    ),
    (
        say(one("cross", "orange", 2, form="digits")),
        "2 orange crosses",
        "2个橙色的十字",
        "2 оранжевых креста",
    ),
    (
        say(one("star", "brown", 2, form="digits")),
        "2 brown stars",
        "2颗棕色的星星",
        "2 коричневые звезды",
    ),
    (say(one("diamond", "green", 2)), "two green diamonds", "两个绿色的菱形", "два зелёных ромба"),
    (say(one("star", "red", form="one")), "one red star", "1颗红色的星星", "одна красная звезда"),
    (say(one("heart", "red", form="one")), "one red heart", "1颗红色的爱心", "одно красное сердце"),
    (say(one("cross", "red", form="one")), "one red cross", "1个红色的十字", "один красный крест"),
    # relations
    (
        say(RED, BLUE_SQUARE, joint="left"),
        "a red circle left of a blue square",
        "红色的圆在蓝色的方块左边",
        "красный круг слева от синего квадрата",
    ),
    (
        say(RED, BLUE_SQUARE, joint="left", second=True),
        "a red circle to the left of a blue square",
        "蓝色的方块左边有一个红色的圆",
        "красный круг левее синего квадрата",
    ),
    (
        say(one("star", "red"), one("star", "green"), joint="right"),
        "a red star right of a green star",
        "红色的星星在绿色的星星右边",
        "красная звезда справа от зелёной звезды",
    ),
    (
        say(one("circle"), one("cross"), joint="right", second=True),
        "a circle to the right of a cross",
        "十字右边有一个圆",
        "круг правее креста",
    ),
    (
        say(RING, HEART, joint="above"),
        "a yellow ring above a blue heart",
        "黄色的圆环在蓝色的爱心上方",
        "жёлтое кольцо выше синего сердца",
    ),
    (
        say(RING, HEART, joint="above", second=True),
        "a yellow ring over a blue heart",
        "蓝色的爱心上方有一个黄色的圆环",
        "жёлтое кольцо над синим сердцем",
    ),
    (
        say(one("square"), one("triangle"), joint="below"),
        "a square below a triangle",
        "方块在三角形下方",
        "квадрат ниже треугольника",
    ),
    (
        say(one("square"), one("triangle"), joint="below", second=True),
        "a square under a triangle",
        "三角形下方有一个方块",
        "квадрат под треугольником",
    ),
    (
        say(one("cross", "green"), one("star", "blue"), joint="above", second=True),
        "a green cross over a blue star",
        "蓝色的星星上方有一个绿色的十字",
        "зелёный крест над синей звездой",
    ),
    (
        say(one("heart", "pink"), one("ring", "red"), joint="below", second=True),
        "a pink heart under a red ring",
        "红色的圆环下方有一颗粉色的爱心",
        "розовое сердце под красным кольцом",
    ),
    (
        say(one("diamond"), one("ring"), joint="below"),
        "a diamond below a ring",
        "菱形在圆环下方",
        "ромб ниже кольца",
    ),
    (
        say(one("diamond"), one("star"), joint="next to"),
        "a diamond next to a star",
        "菱形在星星旁边",
        "ромб рядом со звездой",
    ),
    (
        say(one("star", "orange"), one("diamond", "purple"), joint="next to"),
        "an orange star next to a purple diamond",
        "橙色的星星在紫色的菱形旁边",
        "оранжевая звезда рядом с фиолетовым ромбом",
    ),
    (
        say(one("heart"), one("circle"), joint="next to"),
        "a heart next to a circle",
        "爱心在圆旁边",
        "сердце рядом с кругом",
    ),
    (
        say(RED, one("star", "blue"), joint="and"),
        "a red circle and a blue star",
        "一个红色的圆和一颗蓝色的星星",
        "красный круг и синяя звезда",
    ),
    (
        say(one("circle", "red", 2), one("star", "blue"), joint="and"),
        "two red circles and a blue star",
        "两个红色的圆和一颗蓝色的星星",
        "два красных круга и синяя звезда",
    ),
    # size, place, background
    (
        say(one("circle", "red", size="large")),
        "a large red circle",
        "一个红色的大圆",
        "большой красный круг",
    ),
    (
        say(one("star", "green", size="small")),
        "a small green star",
        "一颗绿色的小星星",
        "маленькая зелёная звезда",
    ),
    (
        say(one("ring", "blue", size="large")),
        "a large blue ring",
        "一个蓝色的大圆环",
        "большое синее кольцо",
    ),
    (
        say(one("circle", "red", form="that is")),
        "a circle that is red",
        "一个颜色是红色的圆",
        "круг красного цвета",
    ),
    (
        say(one("star", "blue", form="that is")),
        "a star that is blue",
        "一颗颜色是蓝色的星星",
        "звезда синего цвета",
    ),
    (
        say(RED, place="in the top left"),
        "a red circle in the top left",
        "左上角有一个红色的圆",
        "красный круг в левом верхнем углу",
    ),
    (
        say(one("star", "green"), place="in the middle"),
        "a green star in the middle",
        "中间有一颗绿色的星星",
        "зелёная звезда в центре",
    ),
    (
        say(RED, background="white"),
        "a red circle on a white background",
        "一个红色的圆，白色背景",
        "красный круг на белом фоне",
    ),
    (
        say(one("star", number=2), background="black"),
        "two stars on a black background",
        "两颗星星，黑色背景",
        "две звезды на чёрном фоне",
    ),
    # frames
    (
        say(RED, frame="picture"),
        "a picture of a red circle",
        "图片里有一个红色的圆",
        "на картинке красный круг",
    ),
    (
        say(RED, place="on the right", frame="picture"),
        "a picture of a red circle on the right",
        "图片的右边有一个红色的圆",
        "на картинке красный круг справа",
    ),
    (
        say(one("circle"), one("square"), joint="left", frame="picture"),
        "a picture of a circle left of a square",
        "图片里圆在方块左边",
        "на картинке круг слева от квадрата",
    ),
    (
        say(one("ring", "blue", 2), frame="drawing"),
        "a drawing of two blue rings",
        "画里有两个蓝色的圆环",
        "рисунок двух синих колец",
    ),
    (
        say(one("heart", "red", 3), frame="drawing"),
        "a drawing of three red hearts",
        "画里有三颗红色的爱心",
        "рисунок трёх красных сердец",
    ),
    (
        say(one("star", "yellow", 4), frame="drawing"),
        "a drawing of four yellow stars",
        "画里有四颗黄色的星星",
        "рисунок четырёх жёлтых звёзд",
    ),
    (
        say(one("star", "red", size="large"), frame="drawing"),
        "a drawing of a large red star",
        "画里有一颗红色的大星星",
        "рисунок большой красной звезды",
    ),
    (
        say(one("heart", "blue", size="small"), frame="drawing"),
        "a drawing of a small blue heart",
        "画里有一颗蓝色的小爱心",
        "рисунок маленького синего сердца",
    ),
    (
        say(one("star", "blue"), one("triangle", "red", 2), joint="and", frame="drawing"),
        "a drawing of a blue star and two red triangles",
        "画里有一颗蓝色的星星和两个红色的三角形",
        "рисунок синей звезды и двух красных треугольников",
    ),
    (
        say(one("diamond", "red"), RED, joint="left", frame="drawing"),
        "a drawing of a red diamond left of a red circle",
        "画里红色的菱形在红色的圆左边",
        "рисунок красного ромба слева от красного круга",
    ),
    (
        say(one("cross", "red", form="one"), frame="drawing"),
        "a drawing of one red cross",
        "画里有1个红色的十字",
        "рисунок одного красного креста",
    ),
    (
        say(one("star", "red", form="one"), frame="drawing"),
        "a drawing of one red star",
        "画里有1颗红色的星星",
        "рисунок одной красной звезды",
    ),
    *(
        (
            say(one(shape, number=2), frame="drawing"),
            f"a drawing of two {english}",
            f"画里有两个{chinese}",
            f"рисунок двух {russian}",
        )
        for shape, english, chinese, russian in (
            ("circle", "circles", "圆", "кругов"),
            ("square", "squares", "方块", "квадратов"),
            ("cross", "crosses", "十字", "крестов"),
            ("diamond", "diamonds", "菱形", "ромбов"),
        )
    ),
    (
        say(RED, frame="there is"),
        "there is a red circle",
        "可以看到一个红色的圆",
        "виден красный круг",
    ),
    (
        say(one("star", "red"), frame="there is"),
        "there is a red star",
        "可以看到一颗红色的星星",
        "видна красная звезда",
    ),
    (
        say(one("heart", "red"), frame="there is"),
        "there is a red heart",
        "可以看到一颗红色的爱心",
        "видно красное сердце",
    ),
    (
        say(one("star", "red", 2), frame="there is"),
        "there are two red stars",
        "可以看到两颗红色的星星",
        "видны две красные звезды",
    ),
    (
        say(RED, one("star", "blue"), joint="and", frame="there is"),
        "there is a red circle and a blue star",
        "可以看到一个红色的圆和一颗蓝色的星星",
        "видны красный круг и синяя звезда",
    ),
    (
        say(one("star"), one("circle"), joint="left", second=True, frame="there is"),
        "there is a star to the left of a circle",
        "可以看到圆左边有一颗星星",
        "видна звезда левее круга",
    ),
    (
        say(
            one("circle", "green", 2, form="digits"),
            one("square", "red", 2, form="digits"),
            joint="and",
            background="grey",
            frame="picture",
        ),
        "a picture of 2 green circles and 2 red squares on a grey background",
        "图片里有2个绿色的圆和2个红色的方块，灰色背景",
        "на картинке 2 зелёных круга и 2 красных квадрата на сером фоне",
    ),
]


@pytest.mark.parametrize(("plan", "en", "zh", "ru"), GOLDEN, ids=[row[1] for row in GOLDEN])
def test_captions_are_the_hand_written_ones(plan: CaptionPlan, en: str, zh: str, ru: str) -> None:
    assert {name: realise(plan) for name, realise in GRAMMARS.items()} == {
        "en": en,
        "zh": zh,
        "ru": ru,
    }


DECLENSION = {  # masculine, feminine, neuter: nominative; genitive after `слева от`; plural after 3
    "red": "красный красная красное красного красной красного красных красные",
    "green": "зелёный зелёная зелёное зелёного зелёной зелёного зелёных зелёные",
    "blue": "синий синяя синее синего синей синего синих синие",
    "yellow": "жёлтый жёлтая жёлтое жёлтого жёлтой жёлтого жёлтых жёлтые",
    "purple": "фиолетовый фиолетовая фиолетовое фиолетового фиолетовой фиолетового фиолетовых "
    "фиолетовые",
    "orange": "оранжевый оранжевая оранжевое оранжевого оранжевой оранжевого оранжевых оранжевые",
    "pink": "розовый розовая розовое розового розовой розового розовых розовые",
    "brown": "коричневый коричневая коричневое коричневого коричневой коричневого коричневых "
    "коричневые",
}


@pytest.mark.parametrize("colour", DECLENSION)
def test_colours_agree_with_their_nouns(colour: str) -> None:
    realise = GRAMMARS["ru"]
    three = [one(shape, colour) for shape in ("circle", "star", "ring")]
    forms = [realise(say(thing)).split()[0] for thing in three]
    forms += [realise(say(one("square"), thing, joint="left")).split()[3] for thing in three]
    forms += [realise(say(thing._replace(number=3))).split()[1] for thing in three[:2]]
    assert forms == DECLENSION[colour].split()


# --- captions of scenes ---------------------------------------------------------------------------


def falsehood(reading: Reading, meta: dict[str, Any]) -> str | None:
    """The part of a reading that is not true of a scene, or None."""
    objects, things = meta["objects"], reading.things
    if sum(thing.number for thing in things) != len(objects):
        return "number of objects"
    named: list[list[dict[str, Any]]] = []
    for thing in things:
        fits = [
            o for o in objects if o["shape"] == thing.shape and thing.colour in (None, o["colour"])
        ]
        if len(fits) < thing.number:
            return "shape or colour"
        if thing.size and (thing.size == "large") != (fits[0]["radius"] > 0.22):
            return "size"
        named.append(fits)
    if reading.background not in (None, meta["background"]):
        return "background"
    if reading.place:
        x, y = objects[0]["x"] - 0.5, objects[0]["y"] - 0.5
        across = "left" if x < -0.1 else "right" if x > 0.1 else ""
        down = "top" if y < -0.1 else "bottom" if y > 0.1 else ""
        if set(re.findall("left|right|top|bottom", reading.place)) != {across, down} - {""}:
            return "place"
    if reading.joint in ("left", "right", "above", "below"):
        axis, sign = ("x" if reading.joint in ("left", "right") else "y"), reading.joint
        ordered = [
            a[axis] < b[axis] - 0.2 if sign in ("left", "above") else a[axis] > b[axis] + 0.2
            for a in named[0]
            for b in named[1]
            if a is not b
        ]
        if not any(ordered):
            return "relation"
    return None


def whole_scene(meta: dict[str, Any]) -> tuple[Counter[tuple[str, str]], str | None]:
    return Counter((o["shape"], o["colour"]) for o in meta["objects"]), meta["relation"]


@pytest.mark.parametrize("language", GRAMMARS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_the_plain_one_tells_the_scene(
    language: str, level: str, split: str
) -> None:
    data, read = Shapes(level, split, 16, languages=(language,)), READERS[language]
    for example in (data[i] for i in range(200)):
        readings = [read(caption) for caption in example.captions]
        wrong = [
            (caption, fault)
            for caption, reading in zip(example.captions, readings, strict=True)
            if (fault := falsehood(reading, example.meta))
        ]
        assert not wrong, example.id
        plain = readings[0]
        told = Counter[tuple[str, str | None]]()
        for thing in plain.things:
            told[thing.shape, thing.colour] += thing.number
        relation = plain.joint if plain.joint not in ("and", None) else None
        assert (told, relation) == whole_scene(example.meta), example.captions[0]


def test_the_readers_and_the_check_find_errors() -> None:
    circle = {"shape": "circle", "colour": "red", "x": 0.3, "y": 0.5, "radius": 0.18}
    square = {"shape": "square", "colour": "blue", "x": 0.7, "y": 0.5, "radius": 0.18}
    meta = {"objects": [circle, square], "background": "white", "relation": "left"}
    for language, text in (
        ("zh", "红色的圆在蓝色的方块左边"),
        ("ru", "красный круг слева от синего квадрата"),
    ):
        read = READERS[language]
        assert falsehood(read(text), meta) is None
        right = {"zh": text.replace("左", "右"), "ru": text.replace("слева", "справа")}
        assert falsehood(read(right[language]), meta) == "relation"
        green = {"zh": text.replace("蓝", "绿"), "ru": text.replace("синего", "зелёного")}
        assert falsehood(read(green[language]), meta) == "shape or colour"
    for language, text in (("zh", "两颗红色的圆"), ("zh", "红色的圆"), ("ru", "красных кругам")):
        with pytest.raises(ValueError, match=text):
            READERS[language](text)
    for language in FOREIGN:
        pool = [Shapes("medium", size=16, languages=(language,))[i] for i in range(80)]
        wrong = [falsehood(READERS[language](a.captions[0]), b.meta) for a, b in pairwise(pool)]
        assert sum(fault is not None for fault in wrong) > 65


@pytest.mark.parametrize("language", FOREIGN)
def test_captions_say_in_each_language_what_the_english_one_says(language: str) -> None:
    """Paraphrases included: the random numbers choose a plan, not words."""
    english, foreign = Shapes("hard", size=16), Shapes("hard", size=16, languages=(language,))
    ours, theirs = list(english.all_captions(1500)), list(foreign.all_captions(1500))
    assert len(set(ours)) == len(set(theirs)) == len(set(zip(ours, theirs, strict=True)))
    for own, other in zip(ours[:3000], theirs[:3000], strict=True):
        assert READERS["en"](own) == READERS[language](other)
    rows = list(range(64))
    pairs = zip(english.batch(rows, rows, 3).caption, foreign.batch(rows, rows, 3).caption)  # noqa: B905
    assert all(READERS["en"](own) == READERS[language](other) for own, other in pairs)


# --- the same world -------------------------------------------------------------------------------

RECORDED = {
    "easy": "31f4bb536c498357b7c2a11a01b4c32c",
    "medium": "b351be8d2f0352813c455b0a55e7cccd",
    "hard": "28e6d152219009823f725a429cf04022",
}
"""Hashes of English captions, from before there were other languages."""


@pytest.mark.parametrize("level", LEVELS)
def test_english_captions_are_those_of_before(level: str) -> None:
    texts: list[str] = []
    for split in SPLITS:
        data = Shapes(level, split, 16)
        texts += ["|".join(data[i].captions) for i in range(150)]
        texts += data.batch(list(range(300)), [k % 7 for k in range(300)], seed=5).caption
        texts += data.all_captions(limit=100)
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=16)
    assert digest.hexdigest() == RECORDED[level]


@pytest.mark.parametrize("languages", [("zh",), ("ru",), ALL])
@pytest.mark.parametrize("level", LEVELS)
def test_pictures_do_not_depend_on_the_language(level: str, languages: tuple[str, ...]) -> None:
    english = Shapes(level, "heldout", 32, seed=2)
    foreign = Shapes(level, "heldout", 32, seed=2, languages=languages)
    for i in (0, 7, 12_345):
        a, b = english[i], foreign[i]
        assert torch.equal(a.image, b.image)
        assert (a.id, a.label, a.meta) == (b.id, b.label, b.meta)
        assert not set(a.captions) & set(b.captions) or "en" in languages
    rows = list(range(20))
    a, b = english.batch(rows, rows, 1), foreign.batch(rows, rows, 1)
    assert torch.equal(a.image, b.image) and a.id == b.id
    assert a.label is not None and b.label is not None and torch.equal(a.label, b.label)


# --- several languages ----------------------------------------------------------------------------


def language_of(caption: str) -> str:
    return "zh" if re.search("[一-鿿]", caption) else "ru" if re.search("[а-я]", caption) else "en"


def test_each_visit_draws_a_language() -> None:
    data = load_dataset("shapes:medium:all", seed=1)
    rows = list(range(900))
    captions = data.batch(rows, [0] * 900, seed=4).caption
    assert captions == data.batch(rows, [0] * 900, seed=4).caption
    counts = Counter(map(language_of, captions))
    assert min(counts.values()) > 240 and set(counts) == set(ALL)
    later = data.batch(rows, [1] * 900, seed=4).caption
    changed = sum(language_of(a) != language_of(b) for a, b in zip(captions, later, strict=True))
    assert 500 < changed < 700  # two thirds
    assert all(caption in data[i].captions for i, caption in enumerate(captions[:60]))
    alone = data.batch([17], [0], seed=4).caption
    assert alone == [captions[17]]


def test_the_language_of_a_visit_does_not_choose_its_paraphrase() -> None:
    """Otherwise one language would have all the plain captions."""
    mixed, english = load_dataset("shapes:hard:all"), load_dataset("shapes:hard")
    rows = list(range(1200))
    plain = list(english.all_captions(1200))[:1200]
    is_plain: dict[str, list[bool]] = {name: [] for name in ALL}
    captions, own = (data.batch(rows, rows, 0).caption for data in (mixed, english))
    for i in rows:
        assert READERS[language_of(captions[i])](captions[i]) == READERS["en"](own[i])
        is_plain[language_of(captions[i])].append(own[i] == plain[i])
    shares = [sum(values) / len(values) for values in is_plain.values()]
    assert max(shares) - min(shares) < 0.12


def test_examples_of_several_languages_begin_with_each_in_turn() -> None:
    data = load_dataset("shapes:easy:ru,en")
    assert [language_of(data[i].captions[0]) for i in range(4)] == ["ru", "en", "ru", "en"]
    for i in range(4):
        singles = [load_dataset(f"shapes:easy:{name}")[i].captions for name in ("ru", "en")]
        assert data[i].captions == (*singles[i % 2], *singles[1 - i % 2])


def test_all_captions_of_several_languages_are_those_of_the_examples() -> None:
    data = load_dataset("shapes:hard:all")
    expected = {caption for i in range(30) for caption in data[i].captions}
    assert set(data.all_captions(limit=30)) == expected
    assert set(map(language_of, expected)) == set(ALL)


# --- prompts of the evaluation --------------------------------------------------------------------


@pytest.mark.parametrize("language", FOREIGN)
@pytest.mark.parametrize("level", LEVELS)
def test_prompts_ask_for_the_same_scenes_in_each_language(level: str, language: str) -> None:
    """Otherwise scores in two languages could not be compared."""
    english, foreign = make_prompts(level), make_prompts(level, (language,))
    assert len({prompt.prompt for prompt in foreign}) == len(english) == len(foreign)
    for own, other in zip(english, foreign, strict=True):
        assert replace(own, prompt="") == replace(other, prompt="")
        assert READERS["en"](own.prompt) == READERS[language](other.prompt)


def test_prompts_of_several_languages_take_turns() -> None:
    mixed = make_prompts("easy", ALL)
    singles = [make_prompts("easy", (name,)) for name in ALL]
    assert mixed == [singles[i % 3][i] for i in range(len(mixed))]


# --- spec -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "languages"),
    [
        ("shapes", "shapes:easy", "en"),
        ("shapes:hard", "shapes:hard", "en"),
        ("shapes:easy?lang=en", "shapes:easy", "en"),
        ("shapes:easy:en", "shapes:easy", "en"),
        ("shapes?lang=zh", "shapes:easy:zh", "zh"),
        ("shapes:easy?lang=zh", "shapes:easy:zh", "zh"),
        ("shapes:medium:ru", "shapes:medium:ru", "ru"),
        ("shapes::ru", "shapes:easy:ru", "ru"),
        ("shapes:hard:ru,zh", "shapes:hard:ru,zh", "ru,zh"),
        ("shapes:hard?lang=ru,zh", "shapes:hard:ru,zh", "ru,zh"),
        ("shapes:easy:all", "shapes:easy:en,zh,ru", "en,zh,ru"),
        ("shapes:easy?lang=all", "shapes:easy:en,zh,ru", "en,zh,ru"),
    ],
)
def test_a_name_tells_level_and_languages_and_loads_them_again(
    spec: str, name: str, languages: str
) -> None:
    """The name is the identity of a run's data: English keeps its own, no two share one."""
    data = load_dataset(spec)
    assert isinstance(data, Shapes)
    assert (data.name, ",".join(data.languages)) == (name, languages)
    again: CaptionedDataset = load_dataset(data.name)
    assert again.name == name and again[5].captions == data[5].captions


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("shapes:easy:ruu", r"no language 'ruu': did you mean 'ru'\?"),
        ("shapes:easy?lang=cn", "no language 'cn': there is: all, en, ru, zh"),
        ("shapes:easy:en,xx", "no language 'xx'"),
        ("shapes:easy:", "no language ''"),
        ("shapes:easy?lan=zh", r"no option 'lan': did you mean 'lang'\?"),
        ("shapes:easy?", "no option ''"),
        ("shapes:easy?lang", "no language ''"),
        ("shapes:easy:zh?lang=ru", "twice: write shapes:easy:zh"),
        ("shapes:easy:zh,zh", "twice"),
        ("shapes:zh", "no level 'zh': write shapes:easy:zh"),
        ("shapes:esay:zh", r"no level 'esay': did you mean 'easy'\?"),
    ],
)
def test_a_wrong_spec_is_one_sentence_with_the_nearest_names(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_dataset(spec)


def test_a_question_mark_in_a_path_is_no_option(tmp_path: Any) -> None:
    folder = tmp_path / "pictures?lang=zh"
    folder.mkdir()
    assert parse_spec(str(folder))[1] == str(folder)
    assert parse_spec(f"folder:{folder}") == ("folder", str(folder))
    assert parse_rest("hard") == ("hard", ("en",))


def test_said_is_what_a_reader_returns() -> None:
    """The readers, by hand."""
    two = Said(2, "star", "green", None)
    for language, text in (
        ("en", "two green stars"),
        ("zh", "两颗绿色的星星"),
        ("ru", "две зелёные звезды"),
    ):
        assert READERS[language](text) == Reading([two], None, None, None)
