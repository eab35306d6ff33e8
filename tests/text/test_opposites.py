"""Captions with their words of place exchanged."""

from __future__ import annotations

import pytest

from lineage.text.opposites import opposite


@pytest.mark.parametrize(
    ("caption", "false"),
    [
        ("a red circle left of a blue square", "a red circle right of a blue square"),
        ("a ring below and left of a star", "a ring above and right of a star"),
        ("The Upper one, at the TOP", "The lower one, at the bottom"),
        ("a cat over a mat", "a cat under a mat"),
        ("the leftmost star", "the rightmost star"),
        ("круг слева от квадрата", "круг справа от квадрата"),
        ("круг над квадратом, Выше звезды", "круг под квадратом, ниже звезды"),
        ("в левом верхнем углу", "в правом нижнем углу"),
        ("红色的圆在蓝色方块的左边", "红色的圆在蓝色方块的右边"),
        ("圆在方块上方", "圆在方块下方"),
    ],
)
def test_words_of_place_are_exchanged(caption: str, false: str) -> None:
    """All of them, in three languages; and exchanged again, they are what they were."""
    assert opposite(caption) == false
    back = opposite(false)
    assert back is not None and back.lower() == caption.lower()


@pytest.mark.parametrize(
    "caption",
    ["a red circle", "", "covers a leftover undertow", "стоп, подставка", "copyright", "RİGHT"],
)
def test_a_caption_without_them_has_no_opposite(caption: str) -> None:
    """Parts of words are no words of place; a letter with two cases of its own is no fault."""
    assert opposite(caption) is None
