"""Tokenisers: what goes in comes out, and training depends on the captions alone."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from lineage.errors import UserError
from lineage.text.tokenizer import (
    NULL,
    PAD,
    SPECIAL,
    UNK,
    BPETokenizer,
    Tokenizer,
    WordTokenizer,
    make_tokenizer,
    split_words,
    tokenizer_from_json,
)

CAPTIONS = [
    "A red circle above a blue square.",
    "a small red circle, and a dog's ball",
    "two blue squares to the left of a red circle",
    "ein grüner Kreis über einem Quadrat",
]
STRANGE = [
    "a red circle",
    "naïve café — œuvre",
    "一个红色的圆圈",
    "👩‍👩‍👧 waves 🇩🇪",
    "snake_case __init__ x_1",
    "don't 'quote' \"this\" (or that)!?...",
    "e\u0301 combining, \u202ert\u202c, zero\u200bwidth",
    "1,234.5 % of $7",
    "ß ﬁ Σ ς",
    "\x00\x07 control",
]


def tokenizer(kind: str) -> Tokenizer:
    return make_tokenizer(kind, CAPTIONS * 3, 320)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's ball.", ["a", "dog's", "ball", "."]),
        ("red-green, blue!", ["red", "-", "green", ",", "blue", "!"]),
        ("  two\tstars\n", ["two", "stars"]),
        ("snake_case", ["snake", "_", "case"]),
        ("Über 3 Kreise", ["über", "3", "kreise"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_words(caption: str, words: list[str]) -> None:
    assert split_words(caption) == words


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_saved_tokeniser_is_the_same(kind: str) -> None:
    """A run folder holds it as JSON: numbers that shift would scramble every caption."""
    first = tokenizer(kind)
    second = tokenizer_from_json(json.loads(json.dumps(first.to_json())))
    assert type(second) is type(first)
    assert len(second) == len(first)
    for caption in CAPTIONS + STRANGE:
        assert second.encode(caption) == first.encode(caption)
    assert second.to_json() == first.to_json()


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_numbers_are_below_the_size(kind: str) -> None:
    """The table of word vectors has one row a token; a number beyond it crashes or worse."""
    one = tokenizer(kind)
    for caption in CAPTIONS + STRANGE:
        ids = one.encode(caption)
        assert ids and all(0 < i < len(one) for i in ids)
        assert PAD not in ids and NULL not in ids


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("caption", ["", "   ", "\n\t "])
def test_a_caption_without_words_is_no_caption(kind: str, caption: str) -> None:
    assert tokenizer(kind).encode(caption) == [NULL]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_the_order_of_the_captions_does_not_matter(kind: str) -> None:
    """Two copies of one data set, listed differently, must be one vocabulary."""
    captions = [f"word{i % 17} other{i % 5}" for i in range(100)]
    expected = make_tokenizer(kind, captions, 300).to_json()
    for seed in range(3):
        shuffled = random.Random(seed).sample(captions, len(captions))
        assert make_tokenizer(kind, shuffled, 300).to_json() == expected


def test_the_most_frequent_words_come_first_and_ties_by_the_alphabet() -> None:
    one = WordTokenizer.train(["b b b c a", "c a z", "z"], 100)
    assert one.words == ["b", "a", "c", "z"]
    assert one.encode("b a c z") == [3, 4, 5, 6]
    assert WordTokenizer.train(["b b b c a", "c a z", "z"], 5).words == ["b", "a"]


@pytest.mark.parametrize("size", [3, 4, 5, 8, 1000])
def test_the_vocabulary_of_words_is_limited(size: int) -> None:
    one = WordTokenizer.train(CAPTIONS, size)
    assert len(one) == min(size, len({w for c in CAPTIONS for w in split_words(c)}) + len(SPECIAL))


@pytest.mark.parametrize("size", [259, 260, 270, 10_000])
def test_the_vocabulary_of_bpe_is_limited(size: int) -> None:
    one = BPETokenizer.train(CAPTIONS * 2, size)
    assert len(one) <= size
    if size < 300:
        assert len(one) == size


@pytest.mark.parametrize(("kind", "size"), [("word", 2), ("word", 0), ("bpe", 100)])
def test_a_limit_that_cannot_be_kept_is_told_or_kept(kind: str, size: int) -> None:
    """Three special tokens, or 256 bytes more, are the least; a silent excess is a wrong model."""
    try:
        one = make_tokenizer(kind, CAPTIONS, size)
    except UserError:
        return
    assert len(one) <= max(size, len(SPECIAL))


def test_unknown_words_are_one_token_and_are_reported() -> None:
    one = tokenizer("word")
    assert one.encode("a zorp circle") == [*one.encode("a"), UNK, *one.encode("circle")]
    assert one.unknown("a Zorp circle quux zorp") == ["zorp", "quux", "zorp"]
    assert one.unknown("a red circle") == []
    assert one.decode(one.encode("A red zorp")) == "a red <unk>"
    assert one.decode([PAD, *one.encode("red"), NULL]) == "red"


def test_unknown_words_may_be_dropped() -> None:
    """As AttnGAN's code does; they are reported all the same, and a caption of nothing else is
    none. Punctuation is not looked at."""
    one, words = WordTokenizer(["a", "red", "bird"], drop=True), WordTokenizer(["a", "red", "bird"])
    assert one.encode("A zorp, RED bird!") == [3, 4, 5] == words.encode("a red bird")
    assert words.encode("A zorp, RED bird!") == [3, UNK, UNK, 4, 5, UNK]
    assert one.unknown("A zorp, RED bird!") == ["zorp"]
    assert one.encode("zorp!") == [NULL] == one.encode("")
    assert one.decode(one.encode("a zorp bird")) == "a bird"


def test_what_is_dropped_is_not_joined_to_what_is_known() -> None:
    """AttnGAN's code cuts captions at all but letters and figures, so its list has `bird` and `s`
    for `bird's`; a caption that has it must not lose the bird."""
    one = WordTokenizer(["the", "bird", "s", "beak", "red", "breasted"], drop=True)
    assert one.encode("The bird's beak.") == [3, 4, 5, 6]
    assert one.encode("the red-breasted bird") == [3, 7, 8, 4]


@pytest.mark.parametrize("drop", [False, True])
def test_dropping_is_saved(drop: bool) -> None:
    first = WordTokenizer(["a", "red", "bird"], drop)
    second: Any = tokenizer_from_json(json.loads(json.dumps(first.to_json())))
    assert second.drop is drop and second.encode("a zorp") == first.encode("a zorp")
    older = {"kind": "word", "words": ["a", "red", "bird"]}  # from before there was a choice
    assert tokenizer_from_json(older).encode("a zorp") == [3, UNK]


@pytest.mark.parametrize("caption", CAPTIONS + STRANGE)
def test_bpe_knows_every_text(caption: str) -> None:
    """Every byte is a token, so nothing is lost but case and the width of blanks."""
    for one in (tokenizer("bpe"), BPETokenizer([])):
        assert one.decode(one.encode(caption)) == " ".join(caption.lower().split())
        assert one.unknown(caption) == []
        assert UNK not in one.encode(caption)


def test_bpe_does_not_know_where_blanks_were() -> None:
    one = tokenizer("bpe")
    assert one.encode("  a red\n circle ") == one.encode("A red circle")


def test_bpe_merges_the_most_frequent_pair_first() -> None:
    """By hand: in "abab abab" with a blank before each word, `ab` occurs four times."""
    byte = 3
    a, b, blank = (byte + ord(c) for c in "ab ")
    one = BPETokenizer.train(["abab abab"], 259 + 3)
    assert one.merges == [(a, b), (blank, 259), (260, 259)]
    assert one.encode("abab") == [261]
    assert one.encode("ab") == [260]
    assert one.encode("abab ab b ba") == [261, 260, blank, b, blank, b, a]


def test_bpe_ties_go_to_the_smaller_numbers() -> None:
    """Else the vocabulary would depend on the order in which a dictionary was filled."""
    byte = 3
    one = BPETokenizer.train(["yz yz ab ab"], 259 + 1)
    # (blank, a), (a, b), (blank, y), (y, z) all occur twice
    assert one.merges == [(byte + ord(" "), byte + ord("a"))]


def test_bpe_merges_in_the_order_of_training_not_of_the_word() -> None:
    byte = 3
    a, b, c = (byte + ord(x) for x in "abc")
    one = BPETokenizer([(b, c), (a, b)])
    assert one.encode("abc")[1:] == [a, 259]  # b c was found first, so `ab` never forms


def test_bpe_stops_when_no_pair_occurs_twice() -> None:
    assert BPETokenizer.train(["abcdef"], 1000).merges == []
    assert BPETokenizer.train([], 1000).merges == []


def test_bpe_makes_frequent_words_short() -> None:
    one = BPETokenizer.train(["a red circle above a blue square"] * 50, 400)
    assert len(one.encode("a red circle")) == 3
    assert len(one.encode("a zebra")) > 2


def test_unknown_kinds_are_told() -> None:
    with pytest.raises(UserError, match=r"'wrod'.*did you mean 'word'"):
        make_tokenizer("wrod", CAPTIONS, 100)
    for saved in ({"kind": "sentencepiece"}, {}):
        with pytest.raises(UserError, match="does not know"):
            tokenizer_from_json(saved)


@pytest.mark.parametrize("saved", [{"kind": "word"}, {"kind": "bpe", "merges": [[1]]}])
def test_a_damaged_tokeniser_is_told(saved: dict[str, object]) -> None:
    with pytest.raises(UserError):
        tokenizer_from_json(saved)
