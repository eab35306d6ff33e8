"""Encoders that read the padding: against torch's own layers, and what each place sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.text.encoders import make_encoder
from lineage.text.padded import BertEncoder, GlideEncoder, PaddedEncoder
from lineage.text.tokenizer import NULL, PAD, WordTokenizer

WORDS, WIDTH = 7, 12
VOCABULARY = ["a", "red", "blue", "circle", "ring", "of", "left"]
SHORT, FULL = "a red circle", "a red circle left of a blue"
CAPTIONS = [SHORT, FULL, "", "ring", FULL + " ring of a circle"]
LENGTHS = [3, 7, 1, 1, 7]
NAMES = ("bert", "glide")


def made(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = TextConfig(**{"width": WIDTH, "words": WORDS, "layers": 2, "heads": 3, **sizes})
    encoder = make_encoder(name, config, WordTokenizer(VOCABULARY))
    with torch.no_grad():  # no weight at a value that hides a mistake
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


# --- what a caption becomes -------------------------------------------------------------------


def test_the_names_are_the_classes() -> None:
    assert type(made("bert")) is BertEncoder and type(made("glide")) is GlideEncoder
    assert issubclass(BertEncoder, PaddedEncoder) and issubclass(GlideEncoder, PaddedEncoder)


@pytest.mark.parametrize("captions", [CAPTIONS, ["ring"], ["", ""], [FULL] * 2], ids=str)
def test_every_caption_has_all_places(encoder: Any, captions: list[str]) -> None:
    """However short all are; what is too long is cut; the mask says where the words are."""
    text = encoder.encode(captions)
    assert text.words.shape == (len(captions), WORDS, WIDTH)
    assert text.mask.shape == text.ids.shape == (len(captions), WORDS)
    lengths = [LENGTHS[CAPTIONS.index(caption)] for caption in captions]
    assert text.mask.tolist() == [[k < n for k in range(WORDS)] for n in lengths]
    for row, caption in enumerate(captions):
        ids = [VOCABULARY.index(word) + 3 for word in caption.split()][:WORDS] or [NULL]
        assert text.ids[row].tolist() == ids + [PAD] * (WORDS - len(ids))


def test_no_caption_is_the_empty_one(encoder: Any) -> None:
    """One token, and padding that is read like any other."""
    null, empty = encoder.null(2), encoder.encode(["", " \n"])
    for part in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(null, part), getattr(empty, part)), part
    assert null.mask.sum(1).tolist() == [1, 1]
    assert null.words[0, 1:].abs().amax(1).min() > 0


def test_neighbours_do_not_matter(encoder: Any) -> None:
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        torch.testing.assert_close(alone.words[0], together.words[row])
        torch.testing.assert_close(alone.sentence[0], together.sentence[row])


def test_they_write_no_captions(encoder: Any) -> None:
    """Each place knows the ones after it, so a prior that learnt to write from them would cheat."""
    assert encoder.tokens == 0
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    assert (one[0] - other[0]).abs().max() > 1e-3


# --- against torch's own layers ---------------------------------------------------------------


def entered(encoder: Any, ids: Tensor) -> Tensor:
    """Token vectors at their places, one by one; GLIDE's padding is a vector of the place."""
    rows = []
    for row in ids.tolist():
        vectors = []
        for place, number in enumerate(row):
            if number == PAD and isinstance(encoder, GlideEncoder):
                vectors.append(encoder.padding[place])
            else:
                vectors.append(encoder.table.weight[number] + encoder.position[place])
        rows.append(torch.stack(vectors))
    return torch.stack(rows)


@torch.no_grad()
def test_glide_is_torchs_own_transformer() -> None:
    """Pre-norm, exact GELU, four times the width, every place seen by all; a norm at the end."""
    encoder = made("glide", layers=3, heads=4)
    text = encoder.encode(CAPTIONS)
    x = entered(encoder, text.ids)
    for block in encoder.blocks:
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        ).eval()
        attention, own = layer.self_attn, block.attention
        attention.in_proj_weight.copy_(torch.cat([own.query.weight, own.key_value.weight]))
        attention.in_proj_bias.copy_(torch.cat([own.query.bias, own.key_value.bias]))
        pairs = [(attention.out_proj, own.out), (layer.norm1, block.norm1)]
        pairs += [(layer.norm2, block.norm2), (layer.linear1, block.mlp[0])]
        for theirs, ours in [*pairs, (layer.linear2, block.mlp[2])]:
            theirs.load_state_dict(ours.state_dict())
        x = layer(x)
    x = F.layer_norm(x, (WIDTH,), encoder.norm.weight, encoder.norm.bias)
    torch.testing.assert_close(text.words, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text.sentence, x[:, WORDS - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bert_by_hand() -> None:
    """Eight heads of 64, whatever the width and `heads`, without biases of queries, keys and
    values; the sentence is the mean of the words."""
    encoder = made("bert", heads=5)
    text = encoder.encode(CAPTIONS)
    assert "attention.query.bias" not in "".join(encoder.state_dict())
    for row in range(len(CAPTIONS)):
        x = entered(encoder, text.ids)[row]
        for block in encoder.blocks:
            own = block.attention
            assert own.query.weight.shape == (512, WIDTH) and own.out.weight.shape == (WIDTH, 512)
            seen = F.layer_norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias)
            key, value = (own.key_value.weight[half] for half in (slice(512), slice(512, None)))
            found = []
            for head in range(8):
                at = slice(64 * head, 64 * (head + 1))
                q, k, v = (seen @ w[at].T for w in (own.query.weight, key, value))
                found.append((q @ k.T / 8).softmax(1) @ v)
            x = x + torch.cat(found, 1) @ own.out.weight.T + own.out.bias
            seen = F.layer_norm(x, (WIDTH,), block.norm2.weight, block.norm2.bias)
            inner = seen @ block.mlp[0].weight.T + block.mlp[0].bias
            inner = inner / 2 * (1 + (inner / 2**0.5).erf())
            x = x + inner @ block.mlp[2].weight.T + block.mlp[2].bias
        x = F.layer_norm(x, (WIDTH,), encoder.norm.weight, encoder.norm.bias)
        torch.testing.assert_close(text.words[row], x, atol=1e-4, rtol=1e-4)
        mean = x[: LENGTHS[row]].mean(0)
        torch.testing.assert_close(text.sentence[row], mean, atol=1e-4, rtol=1e-4)


# --- padding ----------------------------------------------------------------------------------


def changed(encoder: Any, name: str, rows: slice | int) -> tuple[Tensor, Tensor]:
    """How far the vectors of each place, and the sentence, move with some rows of a parameter."""
    before = encoder.encode([SHORT, FULL])
    with torch.no_grad():
        moved = encoder.get_parameter(name)[rows]
        moved += torch.randn_like(moved)
    after = encoder.encode([SHORT, FULL])
    words = (after.words - before.words).abs().amax(2)
    return words, (after.sentence - before.sentence).abs().amax(1)


@torch.no_grad()
def test_berts_padding_is_a_word_that_is_read() -> None:
    """Its vector reaches the words before it; a caption that fills all places has none."""
    words, sentence = changed(made("bert"), "table.weight", PAD)
    assert words[0].min() > 1e-4 and sentence[0] > 1e-4
    assert not words[1].any() and not sentence[1].any()


@torch.no_grad()
def test_glides_padding_is_a_vector_of_each_place() -> None:
    """Those behind the words are read, those at the words are not, and the table's row never."""
    words, sentence = changed(made("glide"), "padding", 5)
    assert words[0].min() > 1e-4 and sentence[0] > 1e-4
    assert not words[1].any() and not sentence[1].any()
    for name, rows in (("padding", slice(0, 3)), ("table.weight", PAD)):
        words, sentence = changed(made("glide"), name, rows)
        assert not words.any() and not sentence.any()
    words, _ = changed(made("glide"), "position", slice(3, None))
    assert not words[0].any() and words[1].min() > 1e-4


def test_padding_is_learnt() -> None:
    """By the gradient of the words alone."""
    for name, padding, rows in (("bert", "table.weight", PAD), ("glide", "padding", slice(3, 7))):
        encoder = made(name)
        encoder.encode([SHORT]).words[:, :3].square().sum().backward()
        grad = encoder.get_parameter(padding).grad
        assert grad is not None and grad[rows].abs().max() > 1e-6
        if name == "glide":
            assert not grad[:3].any() and not encoder.table.weight.grad[PAD].any()


def test_every_place_sees_every_place(encoder: Any) -> None:
    """Behind it and before it, words and padding alike."""
    seen: list[Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    text = encoder.encode([SHORT])
    for place in range(WORDS):
        target = text.words[0, place].square().sum()
        (grad,) = torch.autograd.grad(target, seen[0], retain_graph=True)
        assert grad[0].abs().amax(1).min() > 1e-7


def test_glides_sentence_is_the_last_place_even_if_it_is_a_word() -> None:
    text = made("glide").encode(CAPTIONS)
    assert torch.equal(text.sentence, text.words[:, -1])


# --- sizes ------------------------------------------------------------------------------------


def size_of(encoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


def test_the_encoder_of_latent_diffusion_has_as_many_parameters() -> None:
    """Its text-to-image model of 1.45 billion parameters, without the head that would write BERT's
    tokens."""
    tokens = 30_522
    config = TextConfig(width=1280, words=77, layers=32, vocabulary=tokens)
    tokenizer = WordTokenizer([f"w{k}" for k in range(tokens - 3)])
    with torch.device("meta"):
        encoder = BertEncoder(config, tokenizer)
    assert size_of(encoder) == 581_994_042 - (1280 + 1) * tokens


@pytest.mark.parametrize(("width", "layers", "words"), [(8, 1, 3), (12, 2, 9), (16, 3, 1)])
def test_sizes_by_hand(width: int, layers: int, words: int) -> None:
    """Table, places and norm; attention, perceptron and two norms a block."""
    tokens = len(VOCABULARY) + 3
    shared = (tokens + words + 2) * width + layers * (8 * width**2 + 9 * width)
    glide = made("glide", width=width, layers=layers, words=words, heads=2)
    assert size_of(glide) == shared + words * width + layers * 4 * (width**2 + width)
    bert = made("bert", width=width, layers=layers, words=words)
    assert size_of(bert) == shared + layers * (4 * 512 * width + width)
