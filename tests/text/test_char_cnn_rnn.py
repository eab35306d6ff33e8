"""`char_cnn_rnn`: captions letter by letter, from places to padding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.char_cnn_rnn import ALPHABET, CharCNNRNN, places
from lineage.text.tokenizer import WordTokenizer

SEEN = 66  # letters that one place sees
LONG = "two small yellow stars to the left of a large purple ring, and a blue square " * 2


def make(**sizes: int) -> CharCNNRNN:
    torch.manual_seed(0)
    config = TextConfig(**{"width": 12, "channels": 18, **sizes})
    encoder = CharCNNRNN(config, WordTokenizer(["a"]))
    with torch.no_grad():  # learnt weights are larger than those at the start
        for parameter in encoder.parameters():
            parameter.mul_(3.0)
    return encoder.eval()


def sentence(encoder: CharCNNRNN, caption: str) -> Tensor:
    return encoder.encode([caption]).sentence[0]


# --- sizes ------------------------------------------------------------------------------------


def test_201_letters_give_8_places() -> None:
    """66 places of 384 channels, 21 of 512, 8 of 512, as Reed's network has them."""
    shapes: list[tuple[int, ...]] = []
    encoder = CharCNNRNN(TextConfig(), WordTokenizer(["a"]))
    for layer in [*encoder.convolutions[1:], encoder.recurrent]:
        layer.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    text = encoder.encode([LONG, ""])
    assert shapes == [(2, 384, 66), (2, 512, 21), (2, 8, 512)]
    assert text.words.shape == (2, 8, 128) and places(201) == 8


@pytest.mark.parametrize("letters", [SEEN, 80, 100, 120, 201, 256])
def test_places_are_counted_as_the_network_counts_them(letters: int) -> None:
    encoder = make(letters=letters)
    assert encoder.encode([LONG * 2]).words.shape[1] == places(letters)


@pytest.mark.parametrize("letters", [1, 10, SEEN - 1])
def test_a_line_that_is_too_short_is_told(letters: int) -> None:
    """One letter less than a place sees; a word of PyTorch about kernels helps nobody."""
    with pytest.raises(UserError, match=f"encoder.letters={letters} .*201"):
        make(letters=letters)


def test_the_alphabet_is_that_of_zhang_et_al() -> None:
    """70 letters, the hyphen twice, and the blank; all small, since captions are made small."""
    assert len(ALPHABET) == 70
    assert {letter for letter, count in Counter(ALPHABET).items() if count > 1} == {"-"}
    assert ALPHABET.lower() == ALPHABET and " " in ALPHABET
    assert isinstance(make().convolutions[0], nn.Conv1d)
    assert make().convolutions[0].in_channels == 70


# --- what a caption's features depend on ------------------------------------------------------


def test_neither_padding_nor_batch_mates_matter() -> None:
    """A caption alone, among longer ones, and on a longer line."""
    captions = ["a red circle", LONG, "", "a blue star on the left"]
    encoder, longer = make(), make(letters=256)
    together = encoder.encode(captions)
    for row, caption in enumerate(captions):
        alone = encoder.encode([caption])
        for name in ("words", "mask", "sentence", "ids"):
            one, other = getattr(alone, name)[0], getattr(together, name)[row]
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        if len(caption) < SEEN:
            torch.testing.assert_close(
                alone.sentence, longer.encode([caption]).sentence, atol=1e-5, rtol=0
            )


def test_a_place_sees_its_letters_and_those_before() -> None:
    """Place k sees letters 18 k to 18 k + 65, and through the recurrence what came before."""
    encoder = make()
    one = LONG[:140]
    other = one[:110] + "z" + one[111:]
    apart = [
        (a - b).abs().max().item() for a, b in zip(*encoder.encode([one, other]).words, strict=True)
    ]
    first = next(k for k in range(8) if 18 * k + SEEN > 110)
    assert max(apart[:first]) < 1e-6 < 1e-3 < min(apart[first + 1 : 8])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red circle", "a red circlf"),
        ("red above blue", "blue above red"),
        ("a ring", "aring"),
        ("ab", "ba"),
        ("3 stars", "4 stars"),
    ],
)
def test_other_letters_are_other_features(one: str, other: str) -> None:
    """No word is unknown to it, not even one with a slip."""
    encoder = make()
    assert (sentence(encoder, one) - sentence(encoder, other)).abs().max() > 1e-4
    assert encoder.unknown([one, "zorp"]) == []


def test_letters_of_the_alphabet_differ_and_others_do_not() -> None:
    """An accent or an emoji is no letter at all, and stops nothing."""
    encoder = make()
    known = encoder.encode([f"a {letter} b" for letter in dict.fromkeys(ALPHABET)]).sentence
    nearest = torch.cdist(known, known) + torch.eye(len(known))
    assert len(known) == 69 and nearest.min() > 1e-4
    strange = encoder.encode([f"a {letter} b" for letter in "éü个👩\x01"]).sentence
    torch.testing.assert_close(strange, strange[:1].expand_as(strange))


def test_capital_letters_are_small_ones() -> None:
    encoder = make()
    assert torch.equal(sentence(encoder, "A RED Circle"), sentence(encoder, "a red circle"))


def test_blanks_around_a_caption_say_nothing() -> None:
    encoder = make()
    assert torch.equal(sentence(encoder, " \ta ring \n"), sentence(encoder, "a ring"))


def test_a_caption_is_read_to_the_end_of_the_line() -> None:
    encoder = make(letters=100)
    line = (LONG * 2)[:100]
    assert torch.equal(sentence(encoder, line), sentence(encoder, line + " and what follows"))
    last = 18 * (places(100) - 1) + SEEN - 1  # the last letter that a place sees
    assert not torch.equal(sentence(encoder, line), sentence(encoder, line[:last] + "#"))


# --- the mean ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "count"), [(0, 1), (1, 1), (18, 1), (19, 2), (36, 2), (37, 3), (150, 8), (500, 8)]
)
def test_the_sentence_is_the_mean_of_places_that_see_a_letter(letters: int, count: int) -> None:
    """Places behind the caption know nothing; with them, short captions would all look alike."""
    text = make().encode([("red ring " * 60)[:letters]])
    assert text.mask[0].tolist() == [True] * count + [False] * (8 - count)
    torch.testing.assert_close(text.sentence[0], text.words[0, :count].mean(0))
    assert not text.words[0, count:].any() and not text.ids[0, count:].any()
    assert (text.ids[0, :count] > 0).all()


def test_the_empty_caption_is_null() -> None:
    """What guidance and caption dropout use; attention always has one place to look at."""
    encoder = make()
    empty, null = encoder.encode(["", ""]), encoder.null(2)
    for name in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(empty, name), getattr(null, name))
    assert torch.isfinite(null.sentence).all() and null.mask.sum(1).tolist() == [1, 1]
    assert (null.sentence[0] - sentence(encoder, "a ring")).abs().max() > 1e-3
