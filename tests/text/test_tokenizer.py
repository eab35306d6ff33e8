"""Tokenisers: encoding and decoding, and training that depends on the captions alone."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from typing import Any

import pytest

from lineage.config import TextConfig
from lineage.data import load_dataset
from lineage.errors import UserError
from lineage.text.tokenizer import (
    NULL,
    PAD,
    SPECIAL,
    UNK,
    BPETokenizer,
    Tokenizer,
    WordTokenizer,
    _merge,
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
        ("Синий круг, ёж", ["синий", "круг", ",", "ёж"]),
        ("红色的圆", ["红", "色", "的", "圆"]),
        ("2个红的X形，ok", ["2", "个", "红", "的", "x", "形", "，", "ok"]),
        ("\U00020000々〇", ["\U00020000", "々", "〇"]),  # rare characters, repetition, zero
        ("あか tori", ["あか", "tori"]),  # kana are not split
        ("", []),
        (" \n ", []),
    ],
)
def test_words(caption: str, words: list[str]) -> None:
    assert split_words(caption) == words


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_saved_tokeniser_stays_the_same(kind: str) -> None:
    """A run folder holds it as JSON: shifted ids would scramble every caption."""
    first = tokenizer(kind)
    second = tokenizer_from_json(json.loads(json.dumps(first.to_json())))
    assert type(second) is type(first)
    assert len(second) == len(first)
    for caption in CAPTIONS + STRANGE:
        assert second.encode(caption) == first.encode(caption)
    assert second.to_json() == first.to_json()


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_ids_are_below_the_vocabulary_size(kind: str) -> None:
    """The embedding table has one row for each token; an id beyond it is an error."""
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
    """Two copies of one data set, listed differently, must have the same vocabulary."""
    captions = [f"word{i % 17} other{i % 5}" for i in range(100)]
    expected = make_tokenizer(kind, captions, 300).to_json()
    for seed in range(3):
        shuffled = random.Random(seed).sample(captions, len(captions))
        assert make_tokenizer(kind, shuffled, 300).to_json() == expected


def test_the_most_frequent_words_come_first_and_ties_are_alphabetical() -> None:
    one = WordTokenizer.train(["b b b c a", "c a z", "z"], 100)
    assert one.words == ["b", "a", "c", "z"]
    assert one.encode("b a c z") == [3, 4, 5, 6]
    assert WordTokenizer.train(["b b b c a", "c a z", "z"], 5).words == ["b", "a"]


@pytest.mark.parametrize("vocab_size", [3, 4, 5, 8, 1000])
def test_the_vocabulary_of_words_is_limited(vocab_size: int) -> None:
    one = WordTokenizer.train(CAPTIONS, vocab_size)
    words = {word for caption in CAPTIONS for word in split_words(caption)}
    assert len(one) == min(vocab_size, len(words) + len(SPECIAL))


@pytest.mark.parametrize("vocab_size", [259, 260, 270, 10_000])
def test_the_vocabulary_of_bpe_is_limited(vocab_size: int) -> None:
    one = BPETokenizer.train(CAPTIONS * 2, vocab_size)
    assert len(one) <= vocab_size
    if vocab_size < 300:
        assert len(one) == vocab_size


@pytest.mark.parametrize(("kind", "vocab_size"), [("word", 2), ("word", 0), ("bpe", 100)])
def test_an_impossible_limit_is_respected_or_raises_a_sentence(kind: str, vocab_size: int) -> None:
    """The smallest size is three special tokens, or 256 bytes more; it is never exceeded
    silently."""
    try:
        one = make_tokenizer(kind, CAPTIONS, vocab_size)
    except UserError:
        return
    assert len(one) <= max(vocab_size, len(SPECIAL))


def test_unknown_words_are_one_token_and_are_reported() -> None:
    one = tokenizer("word")
    assert one.encode("a zorp circle") == [*one.encode("a"), UNK, *one.encode("circle")]
    assert one.unknown("a Zorp circle quux zorp") == ["zorp", "quux", "zorp"]
    assert one.unknown("a red circle") == []
    assert one.decode(one.encode("A red zorp")) == "a red <unk>"
    assert one.decode([PAD, *one.encode("red"), NULL]) == "red"


def test_unknown_words_may_be_dropped() -> None:
    """As in AttnGAN's code. They are still reported; a caption of nothing else is the null caption;
    punctuation is no word."""
    vocabulary = ["a", "red", "bird"]
    one, words = WordTokenizer(vocabulary, drop_unknown=True), WordTokenizer(vocabulary)
    assert one.encode("A zorp, RED bird!") == [3, 4, 5] == words.encode("a red bird")
    assert words.encode("A zorp, RED bird!") == [3, UNK, UNK, 4, 5, UNK]
    assert one.unknown("A zorp, RED bird!") == ["zorp"]
    assert one.encode("zorp!") == [NULL] == one.encode("")
    assert one.decode(one.encode("a zorp bird")) == "a bird"


def test_a_known_word_is_not_dropped_with_its_ending() -> None:
    """AttnGAN's code splits captions at everything but letters and digits, so that its vocabulary
    has `bird` and `s` for `bird's`; such a caption must not lose the bird."""
    one = WordTokenizer(["the", "bird", "s", "beak", "red", "breasted"], drop_unknown=True)
    assert one.encode("The bird's beak.") == [3, 4, 5, 6]
    assert one.encode("the red-breasted bird") == [3, 7, 8, 4]


@pytest.mark.parametrize(
    ("drop_unknown", "length", "unknown", "rest"),
    [
        (False, 3, ["zorp"], "bird , a quux"),
        (False, 6, ["zorp", ","], "quux"),
        (False, 7, ["zorp", ",", "quux"], ""),
        (True, 2, ["zorp"], "bird a quux"),
        (True, 4, ["zorp", "quux"], ""),
        (True, 9, ["zorp", "quux"], ""),
    ],
)
def test_words_are_read_up_to_a_number_of_tokens(
    drop_unknown: bool, length: int, unknown: list[str], rest: str
) -> None:
    """Words that are left out take up no room."""
    one = WordTokenizer(["a", "red", "bird"], drop_unknown)
    caption = "A zorp red bird, a quux"
    assert one.unknown(caption, length) == unknown
    assert one.rest(caption, length) == rest


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("caption", ["a \udcff", "\ud800 a", "a \ud83d b"])
def test_text_that_is_no_utf8_is_trained_on_and_encoded(kind: str, caption: str) -> None:
    """Arguments and metadata may hold it; it is read as U+FFFD."""
    replaced = re.sub("[\ud800-\udfff]", "\ufffd", caption)
    one, other = (make_tokenizer(kind, [text] * 9, 300) for text in (caption, replaced))
    assert json.dumps(one.to_json()) == json.dumps(other.to_json())
    assert one.encode(caption) == one.encode(replaced)
    assert one.unknown(caption) == [] and "\ufffd" in one.decode(one.encode(caption))


@pytest.mark.parametrize("drop_unknown", [False, True])
def test_dropping_is_saved(drop_unknown: bool) -> None:
    first = WordTokenizer(["a", "red", "bird"], drop_unknown)
    second: Any = tokenizer_from_json(json.loads(json.dumps(first.to_json())))
    assert second.drop_unknown is drop_unknown
    assert second.encode("a zorp") == first.encode("a zorp")
    default = {"kind": "word", "words": ["a", "red", "bird"]}
    assert tokenizer_from_json(default).encode("a zorp") == [3, UNK]


@pytest.mark.parametrize("caption", CAPTIONS + STRANGE)
def test_bpe_encodes_every_text(caption: str) -> None:
    """Every byte is a token: only case and the width of blanks are lost."""
    for one in (tokenizer("bpe"), BPETokenizer([])):
        assert one.decode(one.encode(caption)) == " ".join(caption.lower().split())
        assert one.unknown(caption) == []
        assert UNK not in one.encode(caption)


@pytest.mark.parametrize("caption", [*CAPTIONS, *STRANGE, "две зелёные звезды", "あか, naïve_x"])
def test_text_without_chinese_is_split_as_before(caption: str) -> None:
    """Runs that were trained earlier must read their captions in the same tokens."""
    text = re.sub("[\u4e00-\u9fff]", "", caption).lower()
    assert split_words(text) == re.findall(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]|_", text)
    bpe = re.findall(
        r"\s*[^\W_]{1,64}|\s*[^\w\s]{1,64}|\s*_{1,64}|\s+", " " + " ".join(text.split())
    )
    assert BPETokenizer._split(text) == bpe


def test_bpe_has_no_token_of_several_chinese_characters() -> None:
    """Else a frequent caption would be one token, and a new one would share none with it."""
    captions = ["红色的圆在蓝色的方块左边", "红色的圆", "2个蓝色的方块 ok"] * 50
    one = make_tokenizer("bpe", captions, 4096)
    pieces = [one.decode([i]) for i in one.encode("蓝色的圆在红色的方块左边")]
    assert pieces == list("蓝色的圆在红色的方块左边")
    assert one.encode("红色")[1:] == one.encode("蓝色")[1:]  # wherever a character stands
    assert [one.decode([i]) for i in one.encode("2个蓝 ok")] == ["2", "个", "蓝", "ok"]


@pytest.mark.parametrize(
    ("language", "pieces"),
    [
        ("zh", ["两", "颗", "绿", "色", "的", "星", "星"]),
        ("ru", ["две", "зелёные", "звезды"]),
    ],
)
def test_bpe_learns_the_languages_of_shapes(language: str, pieces: list[str]) -> None:
    """From bytes: two of a Russian letter, three of a Chinese character."""
    captions = list(load_dataset(f"shapes:hard:{language}").all_captions(400))
    one = make_tokenizer("bpe", captions, 1024)
    caption = ("" if language == "zh" else " ").join(pieces)
    assert [one.decode([i]) for i in one.encode(caption)] == pieces
    assert all(one.decode(one.encode(caption)) == caption for caption in set(captions))
    assert max(len(one.encode(caption)) for caption in set(captions)) <= TextConfig().max_words


def test_bpe_ignores_the_width_of_blanks() -> None:
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
    """Otherwise the vocabulary would depend on the order of a dictionary."""
    byte = 3
    one = BPETokenizer.train(["yz yz ab ab"], 259 + 1)
    # (blank, a), (a, b), (blank, y), (y, z) all occur twice
    assert one.merges == [(byte + ord(" "), byte + ord("a"))]


def test_bpe_merges_in_the_order_of_training_not_of_the_word() -> None:
    byte = 3
    a, b, c = (byte + ord(x) for x in "abc")
    one = BPETokenizer([(b, c), (a, b)])
    assert one.encode("abc")[1:] == [a, 259]  # `bc` is merged first, so that `ab` never is


def test_bpe_stops_when_no_pair_occurs_twice() -> None:
    assert BPETokenizer.train(["abcdef"], 1000).merges == []
    assert BPETokenizer.train([], 1000).merges == []


def test_bpe_makes_frequent_words_short() -> None:
    one = BPETokenizer.train(["a red circle above a blue square"] * 50, 400)
    assert len(one.encode("a red circle")) == 3
    assert len(one.encode("a zebra")) > 2


def test_unknown_kinds_raise_a_sentence() -> None:
    with pytest.raises(UserError, match=r"'wrod'.*did you mean 'word'"):
        make_tokenizer("wrod", CAPTIONS, 100)
    for saved in ({"kind": "sentencepiece"}, {}):
        with pytest.raises(UserError, match="does not know"):
            tokenizer_from_json(saved)


@pytest.mark.parametrize("saved", [{"kind": "word"}, {"kind": "bpe", "merges": [[1]]}])
def test_a_damaged_tokeniser_raises_a_sentence(saved: dict[str, object]) -> None:
    with pytest.raises(UserError):
        tokenizer_from_json(saved)


def test_merges_are_those_of_the_plain_algorithm() -> None:
    """Which counts every pair of every word again after each merge."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcä ", k=chance.randint(1, 12))) for _ in range(200)]
    trained = BPETokenizer.train(words, 340)
    counts = Counter(word for caption in words for word in BPETokenizer._split(caption))
    ids = {word: [3 + value for value in word.encode()] for word in counts}
    merges: list[tuple[int, int]] = []
    while len(merges) < 340 - 259:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, one in ids.items():
            for pair in zip(one, one[1:], strict=False):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], (-pair[0], -pair[1])))
        if pairs[best] < 2:
            break
        merges.append(best)
        ids = {word: _merge(one, best, 258 + len(merges)) for word, one in ids.items()}
    assert trained.merges == merges and len(merges) > 20


def test_merges_of_many_words_are_found_at_once() -> None:
    started = time.perf_counter()
    BPETokenizer.train(
        [" ".join(f"w{n:x}" for n in range(5000)), "語" * 20_000, "x" * 100_000], 4096
    )
    assert time.perf_counter() - started < 20
