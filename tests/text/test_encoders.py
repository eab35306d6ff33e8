"""The text contract, held against every encoder."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.contract import TextEncoder, TextFeatures, same_captions
from lineage.text.encoders import ENCODERS, TokenEncoder, make_encoder
from lineage.text.tokenizer import NULL, PAD, UNK, WordTokenizer, make_tokenizer

SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
CAPTIONS = [SHORT, LONG, "", "a zorp circle"]
WIDTH, WORDS = 12, 10
CONFIG = TextConfig(width=WIDTH, words=WORDS, layers=2, heads=2, channels=12)
ORDERED = [name for name in ENCODERS if name != "bag"]
LETTERS = "char_cnn_rnn"  # reads letters; what only it does is in test_char_cnn_rnn.py
TOKENS = [name for name in ENCODERS if name != LETTERS]


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return make(request.param)


def make(name: str, kind: str = "word", config: TextConfig = CONFIG) -> TextEncoder:
    torch.manual_seed(0)
    encoder = make_encoder(name, config, make_tokenizer(kind, [SHORT, LONG], 300))
    with torch.no_grad():  # learnt weights are larger than those at the start
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    return encoder.eval()


def parts(text: TextFeatures) -> Iterable[Tensor]:
    return text.words, text.mask, text.sentence, text.ids


def test_shapes(encoder: TextEncoder) -> None:
    """LONG has 12 words and is cut; a line of letters has 8 places whatever stands in it."""
    text = encoder.encode(CAPTIONS)
    length = WORDS if isinstance(encoder, TokenEncoder) else 8
    assert encoder.width == WIDTH
    assert text.words.shape == (4, length, WIDTH) and text.words.dtype == torch.float32
    assert text.mask.shape == (4, length) and text.mask.dtype == torch.bool
    assert text.sentence.shape == (4, WIDTH) and text.sentence.dtype == torch.float32
    assert text.ids.shape == (4, length) and text.ids.dtype == torch.int64
    assert len(text) == 4


def test_mask_and_padding(encoder: TextEncoder) -> None:
    """True is a word, or a place at every 18th letter; numbers and vectors behind the words are
    zero."""
    text = encoder.encode(CAPTIONS)
    tokens = isinstance(encoder, TokenEncoder)
    assert text.mask.sum(1).tolist() == ([3, WORDS, 1, 3] if tokens else [1, 4, 1, 1])
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in text.mask)
    assert (text.ids[~text.mask] == PAD).all() and (text.ids[text.mask] != PAD).all()
    assert (text.words[~text.mask] == 0).all()
    assert (text.words[text.mask].abs().amax(1) > 0).all()
    if tokens:
        assert text.ids[2, 0] == NULL
        assert text.ids[3].tolist().count(UNK) == 1


def test_features_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    """Alone, before or behind a longer caption: padding must not leak into a caption."""
    together = encoder.encode(CAPTIONS)
    turned = encoder.encode(CAPTIONS[::-1])
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        length = alone.ids.shape[1]
        for whole, row in ((together, i), (turned, len(CAPTIONS) - 1 - i)):
            torch.testing.assert_close(whole.sentence[row], alone.sentence[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(whole.words[row, :length], alone.words[0], atol=1e-5, rtol=0)
            assert torch.equal(whole.ids[row, :length], alone.ids[0])


@pytest.mark.parametrize("name", ORDERED)
def test_the_order_of_words_is_known(name: str) -> None:
    encoder = make(name)
    one, other = encoder.encode(["red left of purple", "purple left of red"]).sentence
    assert (one - other).abs().max() > 1e-3


def test_a_bag_knows_no_order() -> None:
    """It is the baseline that the others are measured against."""
    one, other = make("bag").encode(["red left of purple", "purple left of red"]).sentence
    torch.testing.assert_close(one, other)


def test_a_bag_is_a_mean() -> None:
    encoder = make("bag")
    text = encoder.encode([SHORT, LONG])
    torch.testing.assert_close(text.sentence[0], text.words[0, :3].mean(0))


def test_a_causal_word_does_not_see_what_follows() -> None:
    """The transformer reads from left to right, as CLIP's does; its last word sees all."""
    encoder = make("transformer")
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    torch.testing.assert_close(one[:2], other[:2])
    assert (one[2] - other[2]).abs().max() > 1e-3


def test_both_directions_of_the_lstm_reach_a_word() -> None:
    encoder = make("lstm", config=TextConfig(width=WIDTH, layers=1))
    half = WIDTH // 2
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    torch.testing.assert_close(one[0, :half], other[0, :half])
    assert (one[0, half:] - other[0, half:]).abs().max() > 1e-4
    text = encoder.encode([SHORT])
    torch.testing.assert_close(text.sentence[0, :half], text.words[0, -1, :half])
    torch.testing.assert_close(text.sentence[0, half:], text.words[0, 0, half:])


def test_null_is_the_caption_without_words(encoder: TextEncoder) -> None:
    """Guidance compares with it, so it must be the one thing that training dropped to."""
    null, empty = encoder.null(3), encoder.encode(["", " ", "\n"])
    for a, b in zip(parts(null), parts(empty), strict=True):
        torch.testing.assert_close(a, b)
    assert null.mask.any(1).all()  # attention always has something to look at
    assert (null.sentence[0] - encoder.encode([SHORT]).sentence[0]).abs().max() > 1e-3


def test_long_captions_are_cut(encoder: TextEncoder) -> None:
    """A caption of a thousand words is drawn from its start, not refused."""
    endless = LONG + " red" * 1000
    text = encoder.encode([endless])
    tokens = isinstance(encoder, TokenEncoder)
    assert text.ids.shape == (1, WORDS if tokens else 8)
    start = LONG if tokens else endless[: CONFIG.letters]
    for a, b in zip(parts(text), parts(encoder.encode([start])), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter(encoder: TextEncoder) -> None:
    text = encoder.encode(CAPTIONS)
    (text.words.square().sum() + text.sentence.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("encoder", TOKENS, indirect=True)
def test_the_padding_row_is_never_trained(encoder: TextEncoder) -> None:
    text = encoder.encode(CAPTIONS)
    (text.words.sum() + text.sentence.square().sum()).backward()
    table = encoder.get_submodule("table")
    assert not table.weight[PAD].any() and not table.weight.grad[PAD].any()


def test_unknown_words_are_listed_once(encoder: TextEncoder) -> None:
    """To who reads letters, no word is unknown."""
    unknown = ["zorp", "quux"] if isinstance(encoder, TokenEncoder) else []
    assert encoder.unknown(["a zorp", "quux zorp red"]) == unknown
    assert encoder.unknown([SHORT]) == []


@pytest.mark.parametrize("name", list(ENCODERS))
def test_bpe_serves_every_encoder(name: str) -> None:
    encoder = make(name, "bpe")
    text = encoder.encode([*CAPTIONS, "👩‍👩‍👧 一个"])
    assert torch.isfinite(text.sentence).all()
    assert encoder.unknown(["👩‍👩‍👧"]) == []


def test_wrong_sizes_and_names_are_told() -> None:
    tokenizer = WordTokenizer(["a"])
    with pytest.raises(UserError, match=r"'lstn'.*did you mean 'lstm'"):
        make_encoder("lstn", CONFIG, tokenizer)
    with pytest.raises(UserError, match="even width"):
        make_encoder("lstm", TextConfig(width=7), tokenizer)


@pytest.mark.parametrize(
    "sizes",
    [{"heads": 5}, {"heads": 0}, {"words": 0}, {"width": 0}, {"layers": 0}, {"words": -1}],
    ids=str,
)
@pytest.mark.parametrize("name", list(ENCODERS))
def test_sizes_that_cannot_be_are_told(name: str, sizes: dict[str, int]) -> None:
    """Each is reached by `--set encoder.NAME=...`: a sentence, or an encoder that works."""
    try:
        encoder = make(name, config=TextConfig(**{"width": 12, "words": 10, **sizes}))
        text = encoder.encode(CAPTIONS)
    except UserError:
        return
    assert torch.isfinite(text.sentence).all() and text.sentence.shape[1] > 0


# --- features ---------------------------------------------------------------------------------


@pytest.fixture
def text() -> TextFeatures:
    return make("lstm").encode([SHORT, "red ring", "a", "of the left"])


def test_rows(text: TextFeatures) -> None:
    """By slice, by number and by mask, in the order asked for."""
    for rows in (slice(1, 3), torch.tensor([3, 0, 0]), torch.tensor([True, False, True, False])):
        for part, whole in zip(parts(text[rows]), parts(text), strict=True):
            assert torch.equal(part, whole[rows])


def test_detached_features_carry_no_gradient(text: TextFeatures) -> None:
    assert text.words.requires_grad and text.sentence.requires_grad
    detached = text.detach()
    assert not detached.words.requires_grad and not detached.sentence.requires_grad
    for a, b in zip(parts(detached), parts(text), strict=True):
        assert torch.equal(a, b)


def test_padding_adds_no_words(text: TextFeatures) -> None:
    longer = text.padded(7)
    assert longer.words.shape == (4, 7, WIDTH) and longer.ids.shape == longer.mask.shape == (4, 7)
    assert torch.equal(longer.mask.sum(1), text.mask.sum(1))
    assert not longer.words[:, 3:].any() and not longer.ids[:, 3:].any()
    assert torch.equal(longer.words[:, :3], text.words)
    assert torch.equal(longer.sentence, text.sentence)


@pytest.mark.parametrize("swap", [False, True])
def test_where_takes_rows_from_either(swap: bool) -> None:
    """Of different lengths, as captions and `null` are."""
    encoder = make("lstm")
    one, other = encoder.encode([SHORT] * 3), encoder.null(3)
    if swap:
        one, other = other, one
    keep = torch.tensor([True, False, True])
    mixed = one.where(keep, other)
    expected = TextFeatures.cat([one[:1], other[:1], one[:1]])
    for a, b in zip(parts(mixed), parts(expected), strict=True):
        assert torch.equal(a, b)
    assert mixed.words.shape[1] == 3


def test_cat_keeps_the_order_and_pads(text: TextFeatures) -> None:
    null = make("lstm").null(2)
    joined = TextFeatures.cat([null, text, null[:1]])
    assert len(joined) == 7
    for part, whole in zip(parts(joined[2:6]), parts(text), strict=True):
        assert torch.equal(part, whole)
    assert joined.mask.sum(1).tolist() == [1, 1, 3, 2, 1, 3, 1]
    assert torch.equal(joined.sentence[6], null.sentence[0])


def test_same_captions_is_same_words_in_the_same_order() -> None:
    found = same_captions(["a b", "b a", "a b", "", ""])
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[3, 4] = expected[4, 3] = True
    assert torch.equal(found, expected)
