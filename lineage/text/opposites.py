"""Captions that are false of their pictures in one word: "left of" becomes "right of".

In a batch of pairs, hardly any two captions differ in a word of place alone, so that CLIP learns to
ignore such words: it is close to a bag of words (Yuksekgonul et al. 2023, arXiv:2210.01936). Their
remedy, NegCLIP, adds a false caption of each picture to its negatives. Ours exchanges the words of
place for their opposites, in English, Russian and Chinese.
"""

from __future__ import annotations

import re

_PAIRS = (
    *(("left", "right"), ("above", "below"), ("over", "under"), ("top", "bottom")),
    *(("upper", "lower"), ("leftmost", "rightmost")),
    *(("слева", "справа"), ("левом", "правом"), ("левее", "правее"), ("выше", "ниже")),
    *(("над", "под"), ("сверху", "снизу"), ("вверху", "внизу"), ("верхнем", "нижнем")),
)
_WORDS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_HAN = {"左": "右", "右": "左", "上": "下", "下": "上"}
_PATTERN = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b|[{''.join(_HAN)}]", re.IGNORECASE)


def opposite(caption: str) -> str | None:
    """The caption with each word of place exchanged for its opposite; None if it has none.

    "a red circle left of a blue square" -> "a red circle right of a blue square"
    """

    def exchange(match: re.Match[str]) -> str:
        word = match.group()
        return _HAN.get(word) or _WORDS.get(word.lower(), word)  # `RİGHT` has two cases of i

    changed = _PATTERN.sub(exchange, caption)
    return changed if changed != caption else None
