"""The text contract, tested on every encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lineage.config import TextConfig, to_dict
from lineage.errors import UserError
from lineage.text.clip_text import CLIPTextEncoder
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.encoders import ENCODERS, EncoderSpec, TokenEncoder, make_encoder
from lineage.text.padded import PaddedEncoder
from lineage.text.tokenizer import NULL, PAD, UNK, WordTokenizer, make_tokenizer

SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
CAPTIONS = [SHORT, LONG, "", "a zorp circle"]
WIDTH, MAX_WORDS = 12, 10
CONFIG = TextConfig(width=WIDTH, max_words=MAX_WORDS, num_layers=2, num_heads=2, conv_channels=12)
ORDERED = [name for name in ENCODERS if name != "bag"]
CHARACTERS = "char_cnn_rnn"  # its own tests are in test_char_cnn_rnn.py
TOKENS = [name for name in ENCODERS if name != CHARACTERS]
PADDED = ("bert", "glide")  # their own tests are in test_padded.py
MARKED = "clip"  # start and end are two of its words; its own tests are in test_clip_text.py


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return make(request.param)


def make(name: str, kind: str = "word", config: TextConfig = CONFIG) -> TextEncoder:
    torch.manual_seed(0)
    encoder = make_encoder(name, config, make_tokenizer(kind, [SHORT, LONG], 300))
    with torch.no_grad():  # trained weights are larger than initial ones
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    return encoder.eval()


def reads_tokens(encoder: TextEncoder) -> bool:
    return isinstance(encoder, TokenEncoder | CLIPTextEncoder)


def parts(text: TextFeatures) -> Iterable[Tensor]:
    return text.words, text.mask, text.sentence, text.ids


def test_shapes(encoder: TextEncoder) -> None:
    """LONG has 12 words and is cut; characters have 8 positions, whatever the caption."""
    text = encoder.encode(CAPTIONS)
    length = MAX_WORDS if reads_tokens(encoder) else 8
    assert encoder.word_dim == encoder.sentence_dim == WIDTH
    assert text.words.shape == (4, length, WIDTH) and text.words.dtype == torch.float32
    assert text.mask.shape == (4, length) and text.mask.dtype == torch.bool
    assert text.sentence.shape == (4, WIDTH) and text.sentence.dtype == torch.float32
    assert text.ids.shape == (4, length) and text.ids.dtype == torch.int64
    assert len(text) == 4


def test_mask_and_padding(encoder: TextEncoder) -> None:
    """True is a word, or a position at every 18th character. Ids of the padding are zero, and so
    are its vectors, except in encoders that attend to it."""
    text = encoder.encode(CAPTIONS)
    tokens, marks = reads_tokens(encoder), 2 * isinstance(encoder, CLIPTextEncoder)
    words = [3 + marks, MAX_WORDS, 1 + marks, 3 + marks]
    assert text.mask.sum(1).tolist() == (words if tokens else [1, 4, 1, 1])
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in text.mask)
    assert (text.ids[~text.mask] == PAD).all() and (text.ids[text.mask] != PAD).all()
    if not isinstance(encoder, PaddedEncoder):
        assert (text.words[~text.mask] == 0).all()
    assert (text.words[text.mask].abs().amax(1) > 0).all()
    if tokens:
        assert text.ids[2, marks // 2] == NULL
        assert text.ids[3].tolist().count(UNK) == 1


def test_features_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    """Alone, before or after a longer caption: padding must not leak into a caption.

    In double precision where possible, so that rounding is not mistaken for a leak.
    """
    encoder = encoder.double()
    together = encoder.encode(CAPTIONS)
    reverse = encoder.encode(CAPTIONS[::-1])
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        length = alone.ids.shape[1]
        for whole, row in ((together, i), (reverse, len(CAPTIONS) - 1 - i)):
            torch.testing.assert_close(whole.sentence[row], alone.sentence[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(whole.words[row, :length], alone.words[0], atol=1e-5, rtol=0)
            assert torch.equal(whole.ids[row, :length], alone.ids[0])


@pytest.mark.parametrize("name", ORDERED)
def test_the_order_of_words_matters(name: str) -> None:
    encoder = make(name)
    one, other = encoder.encode(["red left of purple", "purple left of red"]).sentence
    assert (one - other).abs().max() > 1e-3


def test_a_bag_ignores_order() -> None:
    """It is the baseline for all others."""
    one, other = make("bag").encode(["red left of purple", "purple left of red"]).sentence
    torch.testing.assert_close(one, other)


def test_a_bag_is_a_mean() -> None:
    encoder = make("bag")
    text = encoder.encode([SHORT, LONG])
    torch.testing.assert_close(text.sentence[0], text.words[0, :3].mean(0))


def test_the_transformer_attends_to_earlier_words() -> None:
    """As CLIP's does; its last word attends to all."""
    encoder = make("transformer")
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    torch.testing.assert_close(one[:2], other[:2])
    assert (one[2] - other[2]).abs().max() > 1e-3


def test_both_directions_of_the_lstm_reach_a_word() -> None:
    encoder = make("lstm", config=TextConfig(width=WIDTH, num_layers=1))
    half = WIDTH // 2
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    torch.testing.assert_close(one[0, :half], other[0, :half])
    assert (one[0, half:] - other[0, half:]).abs().max() > 1e-4
    text = encoder.encode([SHORT])
    torch.testing.assert_close(text.sentence[0, :half], text.words[0, -1, :half])
    torch.testing.assert_close(text.sentence[0, half:], text.words[0, 0, half:])


def test_null_is_the_caption_without_words(encoder: TextEncoder) -> None:
    """Guidance uses it at sampling, and caption dropout in training: both must be the same."""
    null, empty = encoder.null(3), encoder.encode(["", " ", "\n"])
    for a, b in zip(parts(null), parts(empty), strict=True):
        torch.testing.assert_close(a, b)
    assert null.mask.any(1).all()  # attention always has a key
    assert (null.sentence[0] - encoder.encode([SHORT]).sentence[0]).abs().max() > 1e-3


def test_long_captions_are_cut(encoder: TextEncoder) -> None:
    """A caption of a thousand words is cut, not refused."""
    endless = LONG + " red" * 1000
    text = encoder.encode([endless])
    tokens = reads_tokens(encoder)
    assert text.ids.shape == (1, MAX_WORDS if tokens else 8)
    start = LONG if tokens else endless[: CONFIG.max_chars]
    for a, b in zip(parts(text), parts(encoder.encode([start])), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_reach_every_parameter(encoder: TextEncoder) -> None:
    text = encoder.encode(CAPTIONS)
    (text.words.square().sum() + text.sentence.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    "encoder", [name for name in TOKENS if name not in (*PADDED, MARKED)], indirect=True
)
def test_the_padding_row_is_never_trained(encoder: TextEncoder) -> None:
    text = encoder.encode(CAPTIONS)
    (text.words.sum() + text.sentence.square().sum()).backward()
    token_emb = encoder.get_submodule("token_emb")
    assert not token_emb.weight[PAD].any() and not token_emb.weight.grad[PAD].any()


def test_unknown_words_are_listed_once(encoder: TextEncoder) -> None:
    """An encoder of characters has no unknown words."""
    unknown = ["zorp", "quux"] if reads_tokens(encoder) else []
    assert encoder.unknown(["a zorp", "quux zorp red"]) == unknown
    assert encoder.unknown([SHORT]) == []


# --- captions that are too long ---------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TOKENS if name != MARKED])
@pytest.mark.parametrize(
    ("length", "limit", "rest", "unknown"),
    [
        (None, "10 words", "purple zorp ring", ["quux"]),
        (4, "4 words", "quux the left of a large purple zorp ring", []),
        (MAX_WORDS + 5, "10 words", "purple zorp ring", ["quux"]),
    ],
    ids=["all", "less than the encoder's", "more than the encoder's"],
)
def test_words_beyond_the_limit_are_the_overflow_and_not_unknown(
    name: str, length: int | None, limit: str, rest: str, unknown: list[str]
) -> None:
    """A word that is never read is not looked up."""
    encoder = make(name)
    caption = "Two small yellow stars quux the left of a large purple zorp ring"
    assert encoder.overflow(caption, length) == (limit, rest)
    assert encoder.unknown([caption], length) == unknown
    assert encoder.overflow(SHORT) is None and encoder.overflow("") is None


def test_the_overflow_of_bytes_may_begin_inside_a_word() -> None:
    encoder = make("bag", "bpe")
    assert encoder.overflow("zzzzzzzzzzorp") == ("10 tokens", "zorp")  # the blank is a token
    assert encoder.overflow("zzzzzzzzz") is None


# --- the lstm's sizes -------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_lstm_equals_torchs_own_on_each_caption(cell: Any, num_layers: int) -> None:
    """One caption at a time and without padding: words are the last layer's states, the sentence
    the last state of each direction. Embeddings may have another width."""
    sizes = TextConfig(width=8, embed_dim=5, cell=cell, num_layers=num_layers)
    encoder: Any = make("lstm", config=sizes)
    assert encoder.token_emb.weight.shape[1] == 5
    kind = torch.nn.LSTM if cell == "lstm" else torch.nn.GRU
    alone = kind(5, 4, num_layers, batch_first=True, bidirectional=True)
    alone.load_state_dict(encoder.rnn.state_dict())
    text = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        ids = torch.tensor([encoder.tokenizer.encode(caption)])
        states, _ = alone(encoder.token_emb(ids))
        torch.testing.assert_close(text.words[row, : ids.shape[1]], states[0])
        ends = torch.cat([states[0, -1, :4], states[0, 0, 4:]])
        torch.testing.assert_close(text.sentence[row], ends)


def test_embeddings_have_the_width_of_words_by_default() -> None:
    encoder: Any = make("lstm", config=TextConfig(width=8))
    assert encoder.token_emb.weight.shape[1] == 8 and encoder.rnn.input_size == 8


def test_dropout_zeroes_half_of_an_embedding_in_training() -> None:
    """The other half is doubled, so that the mean stays; evaluation drops nothing."""
    encoder: Any = make("lstm", config=TextConfig(width=8, embed_dim=400, dropout=0.5))
    outputs: list[Tensor] = []
    encoder.dropout.register_forward_hook(lambda layer, args, output: outputs.append(output))
    plain = encoder.encode([SHORT]).sentence
    assert torch.equal(encoder.encode([SHORT]).sentence, plain)
    encoder.train()
    one, other = encoder.encode([SHORT]).sentence, encoder.encode([SHORT]).sentence
    assert not torch.equal(one, other) and not torch.equal(one, plain)
    whole, dropped = outputs[0], outputs[2]
    nonzero = dropped != 0
    assert nonzero.float().mean().item() == pytest.approx(0.5, abs=0.06)
    torch.testing.assert_close(dropped[nonzero], 2 * whole[nonzero])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"embed_dim": -1}, "embed_dim"),
        ({"cell": "lstn"}, "cell"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"join": "chanels"}, "join"),
    ],
    ids=str,
)
def test_impossible_settings_raise_a_sentence(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        TextConfig(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_bpe_serves_every_encoder(name: str) -> None:
    encoder = make(name, "bpe")
    text = encoder.encode([*CAPTIONS, "👩‍👩‍👧 一个"])
    assert torch.isfinite(text.sentence).all()
    if name != CHARACTERS:
        assert encoder.unknown(["👩‍👩‍👧"]) == []


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize(
    "caption", [*CAPTIONS, LONG + " red" * 1000, "A Red\tRING,", "a naïve ring"]
)
def test_every_word_has_a_token(name: str, kind: str, caption: str) -> None:
    """The labels of the vectors, to be written below a picture: one for each word."""
    encoder = make(name, kind)
    tokens = encoder.tokens(caption)
    assert len(tokens) == encoder.encode([caption]).mask.sum()
    assert all(isinstance(token, str) and "\n" not in token for token in tokens)


def test_tokens_by_hand() -> None:
    """Words in lower case, unknown words, and the null caption; characters by eighteen."""
    assert make("lstm").tokens("Two zorp, stars") == ["two", "<unk>", "<unk>", "stars"]
    assert make("bag").tokens("") == ["<null>"]
    assert make("transformer").tokens(LONG) == LONG.split()[:MAX_WORDS]
    assert make(CHARACTERS).tokens("Two small yellow stars of old") == [
        "two small yellow s",
        "tars of old",
    ]


def test_wrong_names_and_sizes_raise_a_sentence() -> None:
    tokenizer = WordTokenizer(["a"])
    with pytest.raises(UserError, match=r"'lstn'.*did you mean 'lstm'"):
        make_encoder("lstn", CONFIG, tokenizer)
    with pytest.raises(UserError, match=r"'zorp'.*joined:NAME.*pretrained:NAME"):
        make_encoder("zorp", CONFIG, tokenizer)
    with pytest.raises(UserError, match="even width"):
        make_encoder("lstm", TextConfig(width=7), tokenizer)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"max_words": 0},
        {"width": 0},
        {"num_layers": 0},
        {"max_words": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", list(ENCODERS))
def test_impossible_sizes_raise_a_sentence(name: str, sizes: dict[str, Any]) -> None:
    """`--set encoder.NAME=...` reaches all of them: a sentence, or an encoder that works."""
    try:
        encoder = make(name, config=TextConfig(**{"width": 12, "max_words": 10, **sizes}))
        text = encoder.encode(CAPTIONS)
    except UserError:
        return
    assert torch.isfinite(text.sentence).all() and text.sentence.shape[1] > 0


# --- specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODERS, "joined:bag+lstm"])
def test_a_spec_builds_its_encoder(name: str) -> None:
    tokenizer = make_tokenizer("word", [SHORT, LONG], 300)
    torch.manual_seed(3)
    built = EncoderSpec(name, CONFIG, tokenizer).build()
    torch.manual_seed(3)
    expected = make_encoder(name, CONFIG, tokenizer)
    assert type(built) is type(expected)
    for key, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[key], value), key


def test_a_spec_is_plain_json() -> None:
    """It is part of a stage's cache key, so that each of its parts must show."""
    words = WordTokenizer(["a", "red"])
    spec = EncoderSpec("lstm", CONFIG, words)
    saved = spec.to_json()
    assert saved == json.loads(json.dumps(saved))
    assert saved == {"name": "lstm", "config": to_dict(CONFIG), "tokenizer": words.to_json()}
    others = (
        EncoderSpec("bag", CONFIG, words),
        EncoderSpec("lstm", TextConfig(width=16), words),
        EncoderSpec("lstm", CONFIG, WordTokenizer(["a", "blue"])),
    )
    assert all(other.to_json() != saved for other in others)


# --- features ---------------------------------------------------------------------------------


@pytest.fixture
def text() -> TextFeatures:
    return make("lstm").encode([SHORT, "red ring", "a", "of the left"])


def test_rows(text: TextFeatures) -> None:
    """By slice, by number and by mask, in the order of the numbers."""
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


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_truncated_features_have_the_first_words(text: TextFeatures, length: int) -> None:
    """Padding undoes it where only padding was cut; the sentence is that of the whole caption."""
    short, rest = text.truncated(length), min(length, 3)
    assert short.words.shape == (4, rest, WIDTH)
    assert short.ids.shape == short.mask.shape == (4, rest)
    for part, whole in ((short.words, text.words), (short.mask, text.mask), (short.ids, text.ids)):
        assert torch.equal(part, whole[:, :length])
    assert torch.equal(short.sentence, text.sentence)
    for part, whole in zip(parts(text.padded(7).truncated(3)), parts(text), strict=True):
        assert torch.equal(part, whole)


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


def test_one_string_is_one_caption(encoder: TextEncoder) -> None:
    """And not a batch of its letters."""
    text, one = encoder.encode("a red zorp"), encoder.encode(["a red zorp"])  # type: ignore[arg-type]
    assert len(text) == 1
    assert all(torch.equal(a, b) for a, b in zip(parts(text), parts(one), strict=True))
    assert encoder.unknown("a red zorp") == encoder.unknown(["a red zorp"])  # type: ignore[arg-type]
