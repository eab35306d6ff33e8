"""`char_cnn_rnn`: captions character by character; its positions and its padding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.char_cnn_rnn import ALPHABET, CharCNNRNN, num_positions
from lineage.text.tokenizer import WordTokenizer

FIELD = 66  # characters that one position covers
LONG = "two small yellow stars to the left of a large purple ring, and a blue square " * 2


def make(**sizes: int) -> CharCNNRNN:
    torch.manual_seed(0)
    config = TextConfig(**{"width": 12, "conv_channels": 18, **sizes})
    encoder = CharCNNRNN(config, WordTokenizer(["a"]))
    with torch.no_grad():  # trained weights are larger than initial ones
        for parameter in encoder.parameters():
            parameter.mul_(3.0)
    return encoder.eval()


def sentence(encoder: CharCNNRNN, caption: str) -> Tensor:
    return encoder.encode([caption]).sentence[0]


# --- sizes ------------------------------------------------------------------------------------


def test_201_characters_give_8_positions() -> None:
    """66 positions of 384 channels, 21 of 512, 8 of 512, as in Reed's network."""
    shapes: list[tuple[int, ...]] = []
    encoder = CharCNNRNN(TextConfig(), WordTokenizer(["a"]))
    for layer in [*encoder.convs[1:], encoder.rnn]:
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    text = encoder.encode([LONG, ""])
    assert shapes == [(2, 384, 66), (2, 512, 21), (2, 8, 512)]
    assert text.words.shape == (2, 8, 128) and num_positions(201) == 8


@pytest.mark.parametrize("max_chars", [FIELD, 80, 100, 120, 201, 256])
def test_num_positions_is_that_of_the_network(max_chars: int) -> None:
    encoder = make(max_chars=max_chars)
    assert encoder.encode([LONG * 2]).words.shape[1] == num_positions(max_chars)


@pytest.mark.parametrize("max_chars", [1, 10, FIELD - 1])
def test_too_few_characters_raise_a_sentence(max_chars: int) -> None:
    """One less than a position covers; PyTorch's own error is about kernels."""
    with pytest.raises(UserError, match=f"encoder.max_chars={max_chars} .*201"):
        make(max_chars=max_chars)


def test_the_alphabet_is_that_of_zhang_et_al() -> None:
    """70 characters, the hyphen twice, and the blank; lower case, as captions are lowered."""
    assert len(ALPHABET) == 70
    assert {char for char, count in Counter(ALPHABET).items() if count > 1} == {"-"}
    assert ALPHABET.lower() == ALPHABET and " " in ALPHABET
    assert isinstance(make().convs[0], nn.Conv1d)
    assert make().convs[0].in_channels == 70


# --- dependence of features on captions -------------------------------------------------------


def test_features_depend_neither_on_padding_nor_on_the_batch() -> None:
    """A caption alone, among longer ones, and with more padding."""
    captions = ["a red circle", LONG, "", "a blue star on the left"]
    encoder, longer = make(), make(max_chars=256)
    together = encoder.encode(captions)
    for row, caption in enumerate(captions):
        alone = encoder.encode([caption])
        for name in ("words", "mask", "sentence", "ids"):
            one, other = getattr(alone, name)[0], getattr(together, name)[row]
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        if len(caption) < FIELD:
            torch.testing.assert_close(
                alone.sentence, longer.encode([caption]).sentence, atol=1e-5, rtol=0
            )


def test_a_position_depends_on_its_characters_and_those_before() -> None:
    """Position k covers characters 18 k to 18 k + 65; the recurrence adds the earlier ones."""
    encoder = make()
    one = LONG[:140]
    other = one[:110] + "z" + one[111:]
    changes = [
        (a - b).abs().max().item() for a, b in zip(*encoder.encode([one, other]).words, strict=True)
    ]
    first = next(k for k in range(8) if 18 * k + FIELD > 110)
    assert max(changes[:first]) < 1e-6 < 1e-3 < min(changes[first + 1 : 8])


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
def test_other_characters_give_other_features(one: str, other: str) -> None:
    """No word is unknown, not even a misspelt one."""
    encoder = make()
    assert (sentence(encoder, one) - sentence(encoder, other)).abs().max() > 1e-4
    assert encoder.unknown([one, "zorp"]) == []


@pytest.mark.parametrize(
    ("caption", "unknown"),
    [
        ("红色的圆", ["红", "色", "的", "圆"]),
        ("a 红色 circle, a 红色 ring", ["红", "色"]),
        ("красный круг", ["красный", "круг"]),
        ("A RED Circle; 50% (of $7)!", []),
        ("a red\tcircle\n", []),
        ("a dog’s ball", ["’"]),
        ("", []),
    ],
)
def test_words_of_other_alphabets_are_unknown(caption: str, unknown: list[str]) -> None:
    assert make().unknown([caption]) == unknown


def test_characters_beyond_the_limit_are_the_overflow() -> None:
    encoder = make()
    limit = encoder.config.max_chars
    caption = "A" * limit + "b 圆"
    assert encoder.overflow(f"  {caption} ") == (f"{limit} characters", "b 圆")
    assert encoder.unknown([caption]) == [] and encoder.overflow(caption[:limit]) is None


def test_characters_outside_the_alphabet_are_all_the_same() -> None:
    """An accent or an emoji is a column of zeros, and raises nothing."""
    encoder = make()
    inside = encoder.encode([f"a {char} b" for char in dict.fromkeys(ALPHABET)]).sentence
    nearest = torch.cdist(inside, inside) + torch.eye(len(inside))
    assert len(inside) == 69 and nearest.min() > 1e-4
    outside = encoder.encode([f"a {char} b" for char in "éü个👩\x01"]).sentence
    torch.testing.assert_close(outside, outside[:1].expand_as(outside))


def test_capital_letters_are_lowered() -> None:
    encoder = make()
    assert torch.equal(sentence(encoder, "A RED Circle"), sentence(encoder, "a red circle"))


def test_blanks_around_a_caption_are_stripped() -> None:
    encoder = make()
    assert torch.equal(sentence(encoder, " \ta ring \n"), sentence(encoder, "a ring"))


def test_a_caption_is_cut_after_max_chars() -> None:
    encoder = make(max_chars=100)
    line = (LONG * 2)[:100]
    assert torch.equal(sentence(encoder, line), sentence(encoder, line + " and what follows"))
    last = 18 * (num_positions(100) - 1) + FIELD - 1  # the last character that is covered
    assert not torch.equal(sentence(encoder, line), sentence(encoder, line[:last] + "#"))


# --- the mean ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_chars", "count"), [(0, 1), (1, 1), (18, 1), (19, 2), (36, 2), (37, 3), (150, 8), (500, 8)]
)
def test_the_sentence_is_the_mean_of_positions_with_a_character(num_chars: int, count: int) -> None:
    """With the positions behind the caption, short captions would all be alike."""
    text = make().encode([("red ring " * 60)[:num_chars]])
    assert text.mask[0].tolist() == [True] * count + [False] * (8 - count)
    torch.testing.assert_close(text.sentence[0], text.words[0, :count].mean(0))
    assert not text.words[0, count:].any() and not text.ids[0, count:].any()
    assert (text.ids[0, :count] > 0).all()


def test_the_empty_caption_is_null() -> None:
    """Guidance and caption dropout use it; attention always has one key."""
    encoder = make()
    empty, null = encoder.encode(["", ""]), encoder.null(2)
    for name in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(empty, name), getattr(null, name))
    assert torch.isfinite(null.sentence).all() and null.mask.sum(1).tolist() == [1, 1]
    assert (null.sentence[0] - sentence(encoder, "a ring")).abs().max() > 1e-3
