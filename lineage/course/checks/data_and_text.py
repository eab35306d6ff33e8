"""Checks of `01_data_and_text`.

Axes: B captions, L words, D width of a word's vector.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched

ID_OF = {"a": 3, "red": 4, "blue": 5, "circle": 6, "square": 7, "above": 8}


def _padded(rows: list[list[int]], pad: int = 0) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


@exercise(points=2)
def token_ids(answer: Any) -> None:
    """Numbers of the words, padded on the right."""
    captions = ["a red circle", "a kite above", "a blue square above a red circle"]
    rows = [[3, 4, 6], [3, 1, 8], [3, 5, 7, 8, 3, 4, 6]]
    arguments = list(captions), dict(ID_OF)
    value = answer(*arguments)
    if arguments != (captions, ID_OF):
        raise Wrong("changes its arguments: leave the captions and `id_of` as they are.")
    if isinstance(value, list):
        raise Wrong("returns a list: torch.tensor(...) makes a tensor of it.")
    if isinstance(value, Tensor):
        _same_mistake_of_length(value, rows)
    left = torch.tensor([[0] * (7 - len(row)) + row for row in rows])
    expect(
        value,
        _padded(rows),
        mistakes={
            "leaves unknown words out: `kite` has the number 1": _padded(
                [rows[0], [3, 8], rows[2]]
            ),
            "gives an unknown word the number 0, which is padding": _padded(
                [rows[0], [3, 0, 8], rows[2]]
            ),
            "gives an unknown word the number 2, which is no caption": _padded(
                [rows[0], [3, 2, 8], rows[2]]
            ),
            "pads on the left: the words come first": left,
            "pads with 1, the number of an unknown word": _padded(rows, pad=1),
            "pads with -1: padding has the number 0": _padded(rows, pad=-1),
        },
    )
    if value.dtype != torch.int64:
        raise Wrong(f"returns numbers of {value.dtype}: an embedding table expects int64.")
    expect(answer(["a"], dict(ID_OF)), torch.tensor([[3]]), "is wrong for one caption: it")


def _same_mistake_of_length(value: Tensor, rows: list[list[int]]) -> None:
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    if value.shape == (len(rows), shortest):
        raise Wrong(f"cuts all captions after {shortest} words, as many as the shortest has.")
    if value.dim() == 2 and value.shape[0] == len(rows) and value.shape[1] > longest:
        raise Wrong(
            f"returns {value.shape[1]} columns, but the longest caption has {longest} words: split "
            "at blanks, not at letters, and pad no further than needed."
        )


def _features() -> tuple[Tensor, Tensor]:
    """Words with numbers on the padding too, and a mask of 2, 4 and 1 words."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    return torch.randn(3, 4, 5), mask


@exercise(points=2)
def mean_of_words(answer: Any) -> None:
    """Mean over the words of each caption, without its padding."""
    words, mask = _features()
    m, count = mask[..., None], mask.sum(1, keepdim=True)
    total = (words * m).sum(1)
    expect(
        untouched(answer, words, mask),
        total / count,
        mistakes={
            "averages over padding too: multiply by the mask first": words.mean(1),
            "divides by L, the length with padding: divide by the number of words": total / 4,
            "adds the padding up: multiply by the mask first": words.sum(1) / count,
            "returns sums: divide by the number of words": total,
            "inverts the mask in the sum: True stands for a word": (words * ~m).sum(1) / count,
            "divides all captions by the number of words of the whole batch": total / mask.sum(),
            "divides by the mean number of words: each caption has its own": total
            / count.float().mean(),
        },
    )
    words.requires_grad_()
    expect_gradient(answer(words, mask), words, "the sentence to the words")


@exercise()
def state_at_last_word(answer: Any) -> None:
    """The vector at each caption's last word."""
    words, mask = _features()
    rows, count = torch.arange(3), mask.sum(1)
    expect(
        untouched(answer, words, mask),
        words[rows, count - 1],
        mistakes={
            "takes the last column, which is padding in shorter captions": words[:, -1],
            "takes the first word": words[:, 0],
            "reads one position too far: words are counted from 0": words[rows, count.clamp(max=3)],
            "reads one position too far, and around the end: words are counted from 0": words[
                rows, count % 4
            ],
            "reads the word before the last": words[rows, count - 2],
            "takes the last word of the first caption in all rows": words[:, int(count[0]) - 1],
        },
    )
    words.requires_grad_()
    expect_gradient(answer(words, mask), words, "the sentence to the words")


@exercise(points=2)
def same_bag(answer: Any) -> None:
    """Whether two captions are one bag of words."""
    cases = {
        ("a red circle above a blue square", "a blue square above a red circle", True): (
            "returns False for two captions that differ in order alone: a bag has no order."
        ),
        ("a red circle above a blue square", "a red square above a blue circle", True): (
            "returns False for exchanged colours, though the words are the same."
        ),
        ("a red circle", "a blue circle", False): (
            "returns True for captions with different words."
        ),
        ("a red circle above a blue square", "a red circle above blue square", False): (
            "returns True where one word occurs twice in one caption and once in the other: a set "
            "forgets how often."
        ),
        ("a red circle", "a red circle above", False): (
            "returns True where one caption has a word more: compare all words of both."
        ),
        ("a red kite", "a red lion", True): (
            "returns False for `kite` and `lion`: both are unknown, and have one number."
        ),
        ("a red kite", "a red", False): (
            "returns True where an unknown word is missing: it has a number too, 1."
        ),
    }
    for (first, second, right), sentence in cases.items():
        for pair in ((first, second), (second, first)):
            value = answer(*pair, dict(ID_OF))
            if not isinstance(value, bool):
                raise Wrong(f"returns {type(value).__name__}, and should return True or False.")
            if value != right:
                raise Wrong(sentence)


Pair = tuple[str, str]


@exercise(points=2)
def unseen_pairs(answer: Any) -> None:
    """Pairs of known shapes and known colours that training never shows together."""
    train = [
        [("circle", "red"), ("square", "blue")],
        [("circle", "blue")],
        [("square", "green"), ("square", "green"), ("square", "yellow")],
    ]
    other = [
        [("circle", "green"), ("square", "blue")],
        [("square", "red"), ("star", "red")],
        [("circle", "purple"), ("circle", "green"), ("circle", "red")],
    ]
    right = {("circle", "green"), ("square", "red")}
    scenes = [list(scene) for scene in train], [list(scene) for scene in other]
    value = answer(*scenes)
    if scenes != (train, other):
        raise Wrong("changes its arguments: build new sets.")
    if value is None:
        raise Wrong("returns nothing: end it with `return`.")
    if not isinstance(value, (set, frozenset)):
        raise Wrong(f"returns {type(value).__name__}, not a set: set(...) makes one.")
    if value != right:
        raise Wrong(_mistake(set(value), right, train, other))
    if answer(train, train):
        raise Wrong("returns pairs for a split against itself, where nothing is unseen.")


def _mistake(
    value: set[Any], right: set[Pair], train: list[list[Pair]], other: list[list[Pair]]
) -> str:
    """The rest of a sentence about a wrong set."""
    known = {pair for scene in train for pair in scene}
    others = {pair for scene in other for pair in scene}
    grid = {(s, c) for s, _ in known for c in {c for _, c in known}}
    once = {pair for pair, count in Counter(p for s in other for p in s).items() if count == 1}
    sentences: list[tuple[set[Any], str]] = [
        (
            others - known,
            "returns pairs with a shape or a colour that training never shows: both must be known.",
        ),
        (known - others, "exchanges its arguments: it returns pairs that only training shows."),
        (others, "returns all pairs of the other scenes: take those of training away."),
        (others & known, "returns the pairs of both: take those of training away, not the others."),
        (known ^ others, "returns pairs of training too: only those of the other scenes count."),
        ({(c, s) for s, c in right}, "exchanges shape and colour in the pairs."),
        (right & once, "loses pairs that occur more than once."),
        (set(), "returns an empty set, though two pairs are unseen."),
    ]
    for mistake, sentence in sentences:
        if value == mistake:
            return sentence
    for pair in sorted(value - right, key=str):
        if pair in grid - known:
            return f"holds {pair}, which is in no other scene."
        return f"holds {pair}, which is no unseen pair of known parts."
    return f"lacks {sorted(right - value)[0]}: its shape and its colour are known, the pair is not."
