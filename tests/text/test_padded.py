"""Encoders that attend to the padding: equality with torch's own layers, and their padding."""

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

MAX_WORDS, WIDTH = 7, 12
VOCABULARY = ["a", "red", "blue", "circle", "ring", "of", "left"]
SHORT, FULL = "a red circle", "a red circle left of a blue"
CAPTIONS = [SHORT, FULL, "", "ring", FULL + " ring of a circle"]
LENGTHS = [3, 7, 1, 1, 7]
NAMES = ("bert", "glide")


def make(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"width": WIDTH, "max_words": MAX_WORDS, "num_layers": 2, "num_heads": 3}
    config = TextConfig(**{**defaults, **sizes})
    encoder = make_encoder(name, config, WordTokenizer(VOCABULARY))
    with torch.no_grad():  # no weight has a value that hides a mistake
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


# --- features of captions ---------------------------------------------------------------------


def test_the_names_are_the_classes() -> None:
    assert type(make("bert")) is BertEncoder and type(make("glide")) is GlideEncoder
    assert issubclass(BertEncoder, PaddedEncoder) and issubclass(GlideEncoder, PaddedEncoder)


@pytest.mark.parametrize("captions", [CAPTIONS, ["ring"], ["", ""], [FULL] * 2], ids=str)
def test_every_caption_has_all_positions(encoder: Any, captions: list[str]) -> None:
    """However short all are; longer captions are cut; the mask is True at the words."""
    text = encoder.encode(captions)
    assert text.words.shape == (len(captions), MAX_WORDS, WIDTH)
    assert text.mask.shape == text.ids.shape == (len(captions), MAX_WORDS)
    lengths = [LENGTHS[CAPTIONS.index(caption)] for caption in captions]
    assert text.mask.tolist() == [[k < n for k in range(MAX_WORDS)] for n in lengths]
    for row, caption in enumerate(captions):
        ids = [VOCABULARY.index(word) + 3 for word in caption.split()][:MAX_WORDS] or [NULL]
        assert text.ids[row].tolist() == ids + [PAD] * (MAX_WORDS - len(ids))


def test_null_is_the_empty_caption(encoder: Any) -> None:
    """One token, and padding like that of any other caption."""
    null, empty = encoder.null(2), encoder.encode(["", " \n"])
    for part in ("words", "mask", "sentence", "ids"):
        assert torch.equal(getattr(null, part), getattr(empty, part)), part
    assert null.mask.sum(1).tolist() == [1, 1]
    assert null.words[0, 1:].abs().amax(1).min() > 0


def test_features_do_not_depend_on_the_batch(encoder: Any) -> None:
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        torch.testing.assert_close(alone.words[0], together.words[row])
        torch.testing.assert_close(alone.sentence[0], together.sentence[row])


def test_they_are_not_causal(encoder: Any) -> None:
    """A word depends on later ones, so that a prior that predicted captions would cheat."""
    assert not encoder.causal
    one, other = encoder.encode(["a red circle", "a red ring"]).words
    assert (one[0] - other[0]).abs().max() > 1e-3


# --- equality with torch's own layers ---------------------------------------------------------


def embedded(encoder: Any, ids: Tensor) -> Tensor:
    """Embeddings one by one; GLIDE's padding is a vector of the position."""
    rows = []
    for row in ids.tolist():
        vectors = []
        for place, token in enumerate(row):
            if token == PAD and isinstance(encoder, GlideEncoder):
                vectors.append(encoder.pad_emb[place])
            else:
                vectors.append(encoder.token_emb.weight[token] + encoder.pos_emb[place])
        rows.append(torch.stack(vectors))
    return torch.stack(rows)


@torch.no_grad()
def test_glide_equals_torchs_own_transformer() -> None:
    """Pre-norm, exact GELU, four times the width, no mask; a norm at the end."""
    encoder = make("glide", num_layers=3, num_heads=4)
    text = encoder.encode(CAPTIONS)
    x = embedded(encoder, text.ids)
    for block in encoder.blocks:
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        ).eval()
        attention, own = layer.self_attn, block.attn
        qkv = (own.to_q, own.to_k, own.to_v)
        attention.in_proj_weight.copy_(torch.cat([linear.weight for linear in qkv]))
        attention.in_proj_bias.copy_(torch.cat([linear.bias for linear in qkv]))
        pairs = [(attention.out_proj, own.to_out), (layer.norm1, block.norm1)]
        pairs += [(layer.norm2, block.norm2), (layer.linear1, block.mlp[0])]
        for theirs, ours in [*pairs, (layer.linear2, block.mlp[2])]:
            theirs.load_state_dict(ours.state_dict())
        x = layer(x)
    x = F.layer_norm(x, (WIDTH,), encoder.norm.weight, encoder.norm.bias)
    torch.testing.assert_close(text.words, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text.sentence, x[:, MAX_WORDS - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bert_by_hand() -> None:
    """Eight heads of 64, whatever the width and `num_heads`, without biases of queries, keys and
    values; the sentence is the mean of the words."""
    encoder = make("bert", num_heads=5)
    text = encoder.encode(CAPTIONS)
    assert not any(f"attn.to_{x}.bias" in "".join(encoder.state_dict()) for x in "qkv")
    for row in range(len(CAPTIONS)):
        x = embedded(encoder, text.ids)[row]
        for block in encoder.blocks:
            own = block.attn
            weights = (own.to_q.weight, own.to_k.weight, own.to_v.weight)
            assert all(w.shape == (512, WIDTH) for w in weights)
            assert own.to_out.weight.shape == (WIDTH, 512)
            h = F.layer_norm(x, (WIDTH,), block.norm1.weight, block.norm1.bias)
            heads = []
            for head in range(8):
                at = slice(64 * head, 64 * (head + 1))
                q, k, v = (h @ w[at].T for w in weights)
                heads.append((q @ k.T / 8).softmax(1) @ v)
            x = x + torch.cat(heads, 1) @ own.to_out.weight.T + own.to_out.bias
            h = F.layer_norm(x, (WIDTH,), block.norm2.weight, block.norm2.bias)
            h = h @ block.mlp[0].weight.T + block.mlp[0].bias
            h = h / 2 * (1 + (h / 2**0.5).erf())
            x = x + h @ block.mlp[2].weight.T + block.mlp[2].bias
        x = F.layer_norm(x, (WIDTH,), encoder.norm.weight, encoder.norm.bias)
        torch.testing.assert_close(text.words[row], x, atol=1e-4, rtol=1e-4)
        mean = x[: LENGTHS[row]].mean(0)
        torch.testing.assert_close(text.sentence[row], mean, atol=1e-4, rtol=1e-4)


# --- padding ----------------------------------------------------------------------------------


def changed(encoder: Any, name: str, rows: slice | int) -> tuple[Tensor, Tensor]:
    """Change of each word, and of the sentence, when some rows of a parameter change."""
    before = encoder.encode([SHORT, FULL])
    with torch.no_grad():
        moved = encoder.get_parameter(name)[rows]
        moved += torch.randn_like(moved)
    after = encoder.encode([SHORT, FULL])
    words = (after.words - before.words).abs().amax(2)
    return words, (after.sentence - before.sentence).abs().amax(1)


@torch.no_grad()
def test_berts_words_attend_to_the_padding() -> None:
    """Its embedding reaches the words before it; a caption of full length has none."""
    words, sentence = changed(make("bert"), "token_emb.weight", PAD)
    assert words[0].min() > 1e-4 and sentence[0] > 1e-4
    assert not words[1].any() and not sentence[1].any()


@torch.no_grad()
def test_glides_padding_is_a_vector_of_each_position() -> None:
    """Those behind the words count, those at the words do not, the embedding of PAD never."""
    words, sentence = changed(make("glide"), "pad_emb", 5)
    assert words[0].min() > 1e-4 and sentence[0] > 1e-4
    assert not words[1].any() and not sentence[1].any()
    for name, rows in (("pad_emb", slice(0, 3)), ("token_emb.weight", PAD)):
        words, sentence = changed(make("glide"), name, rows)
        assert not words.any() and not sentence.any()
    words, _ = changed(make("glide"), "pos_emb", slice(3, None))
    assert not words[0].any() and words[1].min() > 1e-4


def test_padding_is_learnt() -> None:
    """From the gradient of the words alone."""
    cases = (("bert", "token_emb.weight", PAD), ("glide", "pad_emb", slice(3, 7)))
    for name, padding, rows in cases:
        encoder = make(name)
        encoder.encode([SHORT]).words[:, :3].square().sum().backward()
        grad = encoder.get_parameter(padding).grad
        assert grad is not None and grad[rows].abs().max() > 1e-6
        if name == "glide":
            assert not grad[:3].any() and not encoder.token_emb.weight.grad[PAD].any()


def test_every_position_attends_to_every_position(encoder: Any) -> None:
    """Behind it and before it, words and padding alike."""
    inputs: list[Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    text = encoder.encode([SHORT])
    for place in range(MAX_WORDS):
        target = text.words[0, place].square().sum()
        (grad,) = torch.autograd.grad(target, inputs[0], retain_graph=True)
        assert grad[0].abs().amax(1).min() > 1e-7


def test_glides_sentence_is_the_last_position_even_if_it_is_a_word() -> None:
    text = make("glide").encode(CAPTIONS)
    assert torch.equal(text.sentence, text.words[:, -1])


# --- sizes ------------------------------------------------------------------------------------


def size_of(encoder: nn.Module) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


def test_the_encoder_of_latent_diffusion_has_as_many_parameters() -> None:
    """Its text-to-image model of 1.45 billion parameters, without the head that predicts BERT's
    tokens."""
    vocab_size = 30_522
    config = TextConfig(width=1280, max_words=77, num_layers=32, vocab_size=vocab_size)
    tokenizer = WordTokenizer([f"w{k}" for k in range(vocab_size - 3)])
    with torch.device("meta"):
        encoder = BertEncoder(config, tokenizer)
    assert size_of(encoder) == 581_994_042 - (1280 + 1) * vocab_size


@pytest.mark.parametrize(("width", "num_layers", "max_words"), [(8, 1, 3), (12, 2, 9), (16, 3, 1)])
def test_sizes_by_hand(width: int, num_layers: int, max_words: int) -> None:
    """Embeddings and final norm; attention, perceptron and two norms in each block."""
    vocab_size = len(VOCABULARY) + 3
    sizes = {"width": width, "num_layers": num_layers, "max_words": max_words}
    shared = (vocab_size + max_words + 2) * width + num_layers * (8 * width**2 + 9 * width)
    glide = make("glide", **sizes, num_heads=2)
    assert size_of(glide) == shared + max_words * width + num_layers * 4 * (width**2 + width)
    bert = make("bert", **sizes)
    assert size_of(bert) == shared + num_layers * (4 * 512 * width + width)
