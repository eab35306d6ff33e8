"""Which encoders' words may be predicted: their vectors must not know what comes after them."""

from __future__ import annotations

import pytest
import torch

from lineage.config import TextConfig
from lineage.text.contract import NoText, TextEncoder
from lineage.text.encoders import ENCODERS, TokenEncoder, make_encoder
from lineage.text.tokenizer import Tokenizer, make_tokenizer

SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
WORDS = 9
IN_ORDER, OTHERS = ("bag", "transformer"), ("lstm", "char_cnn_rnn", "bert", "glide")


def tokenizer_of(kind: str) -> Tokenizer:
    return make_tokenizer(kind, [SHORT, LONG], 300)


def make(name: str, kind: str = "word") -> TextEncoder:
    torch.manual_seed(0)
    config = TextConfig(tokenizer=kind, words=WORDS, width=12, layers=2, heads=2, channels=12)
    encoder = make_encoder(name, config, tokenizer_of(kind))
    with torch.no_grad():  # learnt weights are larger than those at the start
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    return encoder


def test_every_encoder_is_of_one_kind() -> None:
    assert set(IN_ORDER) | set(OTHERS) == set(ENCODERS)


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("name", IN_ORDER)
def test_encoders_in_order_tell_how_many_tokens_there_are(name: str, kind: str) -> None:
    """All that `ids` may hold is below it: words, unknown ones, padding and no caption."""
    encoder = make(name, kind)
    assert encoder.tokens == len(tokenizer_of(kind)) > 0
    ids = encoder.encode([SHORT, LONG, "", "a zorp ☃ ring", "ÿ" * 30]).ids
    assert ids.min() >= 0 and ids.max() < encoder.tokens
    assert encoder.null(2).ids.max() < encoder.tokens


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_that_know_later_words_have_no_tokens(name: str) -> None:
    assert make(name).tokens == 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("name", IN_ORDER)
@torch.no_grad()
def test_a_word_knows_no_later_word(name: str, kind: str, train: bool) -> None:
    """Changed words, more words and fewer: the vectors of those before are the same to the bit, or
    as near to it as sums of another length are. The word itself has another."""
    encoder = make(name, kind).train(train)
    assert encoder.tokens > 0
    words = LONG.split()
    whole = encoder.encode([LONG])
    for place in range(len(words)):
        for rest in (["circle"], [], ["circle", *words[place + 1 :]], ["red", "a", "zorp", "red"]):
            caption = " ".join([*words[:place], *rest])
            other = encoder.encode([caption, LONG])
            common = 0
            while common < min(other.ids.shape[1], WORDS) and (
                other.ids[0, common] == whole.ids[0, common]
            ):
                common += 1
            assert common >= min(place, WORDS)
            torch.testing.assert_close(
                other.words[0, :common], whole.words[0, :common], atol=1e-5, rtol=1e-5
            )
            if common < WORDS and other.mask[0, common]:
                changed = (other.words[0, common] - whole.words[0, common]).abs().max()
                assert changed > 1e-3


def test_a_gradient_reaches_no_later_word() -> None:
    """Through the attention itself, whatever the numbers."""
    encoder = make("transformer").eval()
    assert isinstance(encoder, TokenEncoder)
    text = encoder.encode(["red circle two small yellow"])
    for place in range(5):
        (gradient,) = torch.autograd.grad(
            text.words[0, place].square().sum(), encoder.table.weight, retain_graph=True
        )
        reached = [bool(gradient[number].any()) for number in text.ids[0]]
        assert reached == [other <= place for other in range(5)]


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_those_without_tokens_do_know(name: str) -> None:
    """Else a prior leaves out a loss for nothing. A line of letters knows those of its own place
    and a few of the next."""
    encoder = make(name).eval()
    one, other = encoder.encode([f"{LONG} circle", f"{LONG[:20]} and nothing else"]).words
    assert (one[0] - other[0]).abs().max() > 1e-5


def test_no_text_reads_nothing() -> None:
    """What a stage without captions has: rows, but no words, no width, no weights."""
    encoder = NoText()
    assert encoder.tokens == encoder.width == 0
    assert not list(encoder.parameters()) and not encoder.state_dict()
    for text in (encoder.encode([SHORT, LONG, ""]), encoder.null(3)):
        assert len(text) == 3
        assert text.words.shape == (3, 0, 0) and text.sentence.shape == (3, 0)
        assert text.mask.shape == (3, 0) and text.mask.dtype == torch.bool
        assert text.ids.shape == (3, 0) and text.ids.dtype == torch.int64
    assert len(encoder.encode([])) == 0
    assert encoder.pieces(LONG) == [] and encoder.unknown([LONG]) == []
