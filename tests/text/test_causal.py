"""Causal encoders: a word's vector must not depend on later words if a model predicts them."""

from __future__ import annotations

import pytest
import torch

from lineage.config import TextConfig
from lineage.text.contract import TextEncoder
from lineage.text.encoders import ENCODERS, TokenEncoder, make_encoder
from lineage.text.tokenizer import Tokenizer, make_tokenizer

SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
MAX_WORDS = 9
CAUSAL = ("bag", "transformer", "clip", "joined:bag+transformer@8")
NOT_CAUSAL = ("lstm", "char_cnn_rnn", "bert", "glide", "t5", "joined:bag+lstm", "joined:bert+bag")
TOKENS = ("bag", "transformer", "lstm", "bert", "glide", "t5")  # encoders of token ids


def tokenizer_of(kind: str) -> Tokenizer:
    return make_tokenizer(kind, [SHORT, LONG], 300)


def make(name: str, kind: str = "word") -> TextEncoder:
    torch.manual_seed(0)
    config = TextConfig(
        tokenizer=kind, max_words=MAX_WORDS, width=12, num_layers=2, num_heads=2, conv_channels=12
    )
    encoder = make_encoder(name, config, tokenizer_of(kind))
    with torch.no_grad():  # trained weights are larger than initial ones
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    return encoder


def test_every_encoder_is_of_one_kind() -> None:
    assert set(CAUSAL) | set(NOT_CAUSAL) >= set(ENCODERS)
    assert all(make(name).causal for name in CAUSAL)
    assert not any(make(name).causal for name in NOT_CAUSAL)


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("name", [*TOKENS, CAUSAL[-1]])
def test_ids_are_below_the_vocabulary_size(name: str, kind: str) -> None:
    """Those of known words, unknown words, padding and the null caption."""
    encoder = make(name, kind)
    assert encoder.vocab_size == len(tokenizer_of(kind)) > 0
    ids = encoder.encode([SHORT, LONG, "", "a zorp ☃ ring", "ÿ" * 30]).ids
    assert ids.min() >= 0 and ids.max() < encoder.vocab_size
    assert encoder.null(2).ids.max() < encoder.vocab_size


def test_an_encoder_of_characters_has_no_vocabulary() -> None:
    assert make("char_cnn_rnn").vocab_size == 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_word_does_not_depend_on_later_words(name: str, kind: str, train: bool) -> None:
    """Changed words, more words and fewer: the vectors before them stay the same, up to the
    rounding of sums of another length. The vector of the changed word differs."""
    encoder = make(name, kind).train(train)
    words = LONG.split()
    whole = encoder.encode([LONG])
    for place in range(len(words)):
        for rest in (["circle"], [], ["circle", *words[place + 1 :]], ["red", "a", "zorp", "red"]):
            caption = " ".join([*words[:place], *rest])
            other = encoder.encode([caption, LONG])
            common = 0
            while common < min(other.ids.shape[1], MAX_WORDS) and (
                other.ids[0, common] == whole.ids[0, common]
            ):
                common += 1
            assert common >= min(place, MAX_WORDS)
            torch.testing.assert_close(
                other.words[0, :common], whole.words[0, :common], atol=1e-5, rtol=1e-5
            )
            if common < MAX_WORDS and other.mask[0, common]:
                changed = (other.words[0, common] - whole.words[0, common]).abs().max()
                assert changed > 1e-3


def test_no_gradient_reaches_a_later_word() -> None:
    """Through the attention itself, whatever the numbers."""
    encoder = make("transformer").eval()
    assert isinstance(encoder, TokenEncoder)
    text = encoder.encode(["red circle two small yellow"])
    for place in range(5):
        (gradient,) = torch.autograd.grad(
            text.words[0, place].square().sum(), encoder.token_emb.weight, retain_graph=True
        )
        reached = [bool(gradient[token].any()) for token in text.ids[0]]
        assert reached == [other <= place for other in range(5)]


@pytest.mark.parametrize("name", NOT_CAUSAL)
@torch.no_grad()
def test_words_of_other_encoders_depend_on_later_words(name: str) -> None:
    """Otherwise a prior would leave out a loss for nothing. A position of `char_cnn_rnn` covers its
    own characters and a few of the next position."""
    encoder = make(name).eval()
    one, other = encoder.encode([f"{LONG} circle", f"{LONG[:20]} and nothing else"]).words
    assert (one[0] - other[0]).abs().max() > 1e-5
