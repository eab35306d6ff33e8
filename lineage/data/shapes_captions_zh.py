"""Chinese captions of `shapes`: plan -> text, in simplified characters.

    一个红色的圆                    a red circle          两颗绿色的星星      two green stars
    红色的圆在蓝色的方块左边        a red circle left of a blue square
    蓝色的方块左边有一个红色的圆    the same in the second wording: where, `有` (there is), what
    图片的左上角有一个红色的大圆，白色背景    picture, place, size, background

Where English needs other words, Chinese needs another order: what stands before `在` (is at) is
bare, as definite nouns are; what follows a number or `有` has a measure word (个, or 颗 for stars
and hearts), and two of anything are 两.
"""

from __future__ import annotations

from lineage.data.shapes_captions import CaptionPlan, Thing

SHAPES = {
    "circle": "圆",
    "square": "方块",
    "triangle": "三角形",
    "cross": "十字",
    "star": "星星",
    "ring": "圆环",
    "diamond": "菱形",
    "heart": "爱心",
}
MEASURES = {"star": "颗", "heart": "颗"}
"""Measure words of shapes; 个 of all others."""
COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "pink": "粉色",
    "brown": "棕色",
    "white": "白色",
    "black": "黑色",
    "grey": "灰色",
}
SIZES = {"": "", "small": "小", "large": "大"}
NUMBERS = ("零", "一", "两", "三", "四")
RELATIONS = {
    "next to": "旁边",
    "left": "左边",
    "right": "右边",
    "above": "上方",
    "below": "下方",
}
PLACES = {
    "in the top left": "左上角",
    "at the top": "顶部",
    "in the top right": "右上角",
    "on the left": "左边",
    "in the middle": "中间",
    "on the right": "右边",
    "in the bottom left": "左下角",
    "at the bottom": "底部",
    "in the bottom right": "右下角",
}
FRAMES = {"picture": "图片", "drawing": "画"}


def realise(plan: CaptionPlan) -> str:
    """The caption of a plan."""
    text = _framed(plan)
    return f"{text}，{COLOURS[plan.background]}背景" if plan.background else text


def _framed(plan: CaptionPlan) -> str:
    if plan.frame == "there is":
        return f"可以看到{_what(plan)}"
    if not plan.frame:
        return _what(plan)
    frame = FRAMES[plan.frame]
    if plan.place:
        return f"{frame}的{_what(plan)}"
    is_clause = plan.joint in RELATIONS
    return f"{frame}里{'' if is_clause else '有'}{_what(plan)}"


def _what(plan: CaptionPlan) -> str:
    """A clause where there is a relation or a place, otherwise a noun phrase."""
    first = plan.things[0]
    if plan.joint in RELATIONS:
        second, where = plan.things[1], RELATIONS[plan.joint]
        if plan.second_wording:
            return f"{_noun(second)}{where}有{_counted(first)}"
        return f"{_noun(first)}在{_noun(second)}{where}"
    if plan.joint:
        return f"{_counted(first)}和{_counted(plan.things[1])}"
    return f"{PLACES[plan.place]}有{_counted(first)}" if plan.place else _counted(first)


def _counted(thing: Thing) -> str:
    digits = thing.form == "one" or (thing.form == "digits" and thing.number > 1)
    number = str(thing.number) if digits else NUMBERS[thing.number]
    return number + MEASURES.get(thing.shape, "个") + _noun(thing)


def _noun(thing: Thing) -> str:
    shape = SIZES[thing.size] + SHAPES[thing.shape]
    if not thing.colour:
        return shape
    colour = COLOURS[thing.colour]
    return f"颜色是{colour}的{shape}" if thing.form == "that is" else f"{colour}的{shape}"
