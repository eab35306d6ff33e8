"""The text tower of CLIP: a naive computation, what it attends to, layers, start and end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.clip_text import CLIPTextEncoder, CLIPTextTower
from lineage.text.clip_tokenizer import CLIPTokenizer
from lineage.text.encoders import make_encoder
from lineage.text.tokenizer import NULL, PAD, Tokenizer, make_tokenizer

SHORT = "a red circle"
LONG = "two small yellow stars to the left of a large purple ring"
MAX_WORDS = 8
SIZES: dict[str, Any] = {"width": 12, "num_layers": 3, "num_heads": 2, "max_words": MAX_WORDS}


def words_of(kind: str = "word") -> Tokenizer:
    if kind == "clip":
        return CLIPTokenizer([("r", "e"), ("re", "d</w>")])
    return make_tokenizer(kind, [SHORT, LONG], 300)


def make(kind: str = "word", **sizes: Any) -> CLIPTextEncoder:
    encoder = make_encoder("clip", TextConfig(**{**SIZES, **sizes}), words_of(kind))
    assert isinstance(encoder, CLIPTextEncoder)
    with torch.no_grad():  # trained weights are larger than initial ones
        for parameter in encoder.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return encoder.eval()


# --- the transformer ------------------------------------------------------------------------------


def normed(x: Tensor, norm: Any) -> Tensor:
    x = x - x.mean()
    return norm.weight * x / (x.square().mean() + 1e-5).sqrt() + norm.bias


def naive(tower: CLIPTextTower, ids: list[int], gelu: str) -> list[Tensor]:
    """States of one caption, a token and a head at a time."""
    x = [tower.token_emb.weight[i] + tower.pos_emb[place] for place, i in enumerate(ids)]
    states = [torch.stack(x)]
    for block in tower.blocks:
        attn: Any = block.attn
        heads, d = attn.num_heads, len(x[0]) // attn.num_heads
        h = [normed(one, block.norm1) for one in x]
        query, key, value = ([f(one) for one in h] for f in (attn.to_q, attn.to_k, attn.to_v))
        for place in range(len(x)):
            out = []
            for head in range(heads):
                part = slice(d * head, d * head + d)
                scores = [query[place][part] @ key[k][part] for k in range(place + 1)]
                weights = (torch.stack(scores) / math.sqrt(d)).softmax(0)
                out.append(sum(w * value[k][part] for k, w in enumerate(weights)))
            x[place] = x[place] + attn.to_out(torch.cat(out))  # type: ignore[arg-type]
        for place in range(len(x)):
            inner = block.mlp[0](normed(x[place], block.norm2))
            if gelu == "gelu":
                inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            else:
                inner = inner / (1 + torch.exp(-1.702 * inner))
            x[place] = x[place] + block.mlp[2](inner)
        states.append(torch.stack(x))
    return states


@pytest.mark.parametrize("gelu", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_the_tower_equals_a_naive_computation(gelu: Any) -> None:
    """States of every layer, the layers that systems use, and the sentence."""
    encoder = make(gelu=gelu, projection_dim=5).double()
    tower, ids = encoder.tower, encoder.encode([SHORT]).ids
    expected = naive(tower, ids[0].tolist(), gelu)
    states = tower.hidden_states(ids)
    assert len(states) == 4
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs)
    norm = tower.norm
    for layer, one in {
        "last": [normed(x, norm) for x in expected[-1]],
        "penultimate": [normed(x, norm) for x in expected[-2]],
        "penultimate_raw": list(expected[-2]),
    }.items():
        torch.testing.assert_close(tower.words(states, layer)[0], torch.stack(one))
        other = make_encoder("clip", TextConfig(**SIZES, gelu=gelu, projection_dim=5, layer=layer),
                             words_of()).double()  # fmt: skip
        other.load_state_dict(encoder.state_dict())
        text = other.encode([SHORT])
        torch.testing.assert_close(text.words[0], torch.stack(one))
        sentence = normed(expected[-1][-1], norm) @ tower.text_proj  # whatever the layer
        torch.testing.assert_close(text.sentence[0], sentence)
    assert encoder.sentence_dim == 5 and encoder.word_dim == 12


@torch.no_grad()
def test_padding_behind_the_end_changes_nothing() -> None:
    """Neither in a batch nor as ids of another kind: published models pad with 0 or the end."""
    encoder = make().double()
    alone, together = encoder.encode([SHORT]), encoder.encode([SHORT, LONG])
    length = alone.ids.shape[1]
    torch.testing.assert_close(together.words[0, :length], alone.words[0])
    torch.testing.assert_close(together.sentence[0], alone.sentence[0])
    assert not together.words[0, length:].any() and (together.ids[0, length:] == PAD).all()
    padded = F.pad(alone.ids, (0, 3), value=encoder.end_id)
    mask = F.pad(alone.mask, (0, 3))
    words, sentence = encoder(padded, mask)
    torch.testing.assert_close(sentence, alone.sentence)
    torch.testing.assert_close(words[:, :length], alone.words)


@torch.no_grad()
def test_a_masked_key_is_not_attended_to() -> None:
    """Beside the causal mask; the position that is masked is the only one that may matter."""
    tower, ids = make().tower, torch.tensor([[1, 2, 3, 4]])
    mask = torch.tensor([[True, False, True, True]])
    one = tower.hidden_states(ids, mask)[-1]
    other = tower.hidden_states(torch.tensor([[1, 5, 3, 4]]), mask)[-1]
    torch.testing.assert_close(one[:, [0, 2, 3]], other[:, [0, 2, 3]])
    assert (tower.hidden_states(ids)[-1] - one)[:, 2:].abs().max() > 1e-3


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["word", "bpe", "clip"])
def test_start_and_end_have_the_largest_ids(kind: str) -> None:
    encoder = make(kind)
    size = len(encoder.tokenizer)
    assert (encoder.start_id, encoder.end_id, encoder.vocab_size) == (size, size + 1, size + 2)
    assert encoder.tower.token_emb.num_embeddings == size + 2
    for caption in (SHORT, "", "red " * 50, "👩‍👩‍👧"):
        ids = encoder.encode([caption]).ids[0].tolist()
        own = encoder.tokenizer.encode(caption)[: MAX_WORDS - 2]
        assert ids == [size, *own, size + 1]  # a long caption keeps its end


@torch.no_grad()
def test_a_long_caption_is_cut_before_its_end() -> None:
    encoder = make()
    whole, cut = encoder.encode([LONG]), encoder.encode([" ".join(LONG.split()[:6])])
    assert torch.equal(whole.ids, cut.ids) and whole.ids.shape == (1, MAX_WORDS)
    torch.testing.assert_close(whole.sentence, cut.sentence)


@pytest.mark.parametrize("kind", ["word", "clip"])
@torch.no_grad()
def test_null_is_the_empty_caption(kind: str) -> None:
    """Start and end, and between them the word of our own tokenisers that stands for nothing."""
    encoder = make(kind)
    null, empty = encoder.null(2), encoder.encode(["", " \n"])
    for a, b in zip(vars(null).values(), vars(empty).values(), strict=True):
        assert torch.equal(a, b)
    between = [NULL] if kind == "word" else []
    assert null.ids[0].tolist() == [encoder.start_id, *between, encoder.end_id]
    assert null.mask.all()


def test_tokens_unknown_words_and_overflow() -> None:
    encoder = make()
    assert encoder.tokens("A zorp ring") == ["<start>", "a", "<unk>", "ring", "<end>"]
    assert encoder.tokens("") == ["<start>", "<null>", "<end>"]
    assert make("clip").tokens("red cat") == ["<start>", "red", "c", "a", "t", "<end>"]
    assert encoder.unknown(["a zorp", "quux zorp"]) == ["zorp", "quux"]
    caption = "two small yellow stars to the left zorp"
    assert encoder.overflow(caption) == ("6 words", "left zorp")
    assert encoder.unknown([caption]) == []  # not read
    assert encoder.overflow(" ".join(caption.split()[:6])) is None
    assert make("clip").overflow("red red redred dd") == ("6 tokens", "d")


@torch.no_grad()
def test_what_overflows_is_what_does_not_reach_the_first_vectors() -> None:
    """A system may use the first few vectors: the start is one of them, the end need not be."""
    encoder = make().double()
    for length in range(1, MAX_WORDS + 3):
        used = encoder.encode([LONG]).truncated(length).words
        rest = encoder.overflow(LONG, length)
        assert rest is not None
        count = len(LONG.split()) - len(rest.text.split())
        assert rest.limit.startswith(f"{count} ")
        for place in range(7):
            words = LONG.split()
            words[place] = "circle"
            changed = encoder.encode([" ".join(words)]).truncated(length).words
            assert (not torch.allclose(changed, used)) == (place < count), (length, place)
        assert encoder.unknown(["zorp " * 12], length) == ["zorp"][:count]


@pytest.mark.parametrize("max_words", [1, 2])
def test_without_room_for_a_word_it_is_refused(max_words: int) -> None:
    with pytest.raises(UserError, match=f"encoder.max_words={max_words} must be at least 3"):
        make(max_words=max_words)


@torch.no_grad()
def test_the_smallest_context_reads_one_word() -> None:
    encoder = make(max_words=3)
    assert encoder.encode([LONG]).ids.shape == (1, 3)
    one, other = encoder.encode(["red a", "ring a"]).sentence
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "name"), [({"gelu": "relu"}, "gelu"), ({"layer": "first"}, "layer")]
)
def test_impossible_settings_raise_a_sentence(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        TextConfig(**change)
    assert "\n" not in str(caught.value)


# --- transformers, and full size ------------------------------------------------------------------


@pytest.mark.parametrize("gelu", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_states_are_those_of_transformers(gelu: Any) -> None:
    library: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    from lineage.official.clip import text_tower

    config = library.CLIPTextConfig(
        vocab_size=40, hidden_size=24, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=9, projection_dim=10, hidden_act=gelu,
        bos_token_id=38, eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    theirs = library.CLIPTextModelWithProjection(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(0.5 * torch.randn_like(parameter) + (parameter.dim() == 1))
    ids = torch.tensor([[38, 3, 4, 5, 39, 0, 0, 0, 0], [38, 7, 8, 9, 10, 11, 12, 13, 39]])
    output = theirs(input_ids=ids, output_hidden_states=True)
    tower = text_tower(theirs.state_dict(), 3, gelu)
    states = tower.hidden_states(ids)
    for ours, own in zip(states, output.hidden_states, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower.words(states), output.last_hidden_state, atol=1e-5, rtol=1e-5)
    pooled = tower.pool(states, torch.tensor([4, 8]))
    torch.testing.assert_close(pooled, output.text_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "projection", "count"),
    [
        (768, 12, 12, 768, 123_060_480 + 768 * 768),  # ViT-L/14; Stable Diffusion 1 without W
        (512, 12, 8, 512, 63_165_952 + 512 * 512),  # ViT-B/32
    ],
)
def test_published_numbers_of_parameters(
    width: int, layers: int, heads: int, projection: int, count: int
) -> None:
    with torch.device("meta"):
        tower = CLIPTextTower(
            vocab_size=49_408, context_length=77, width=width, num_layers=layers,
            num_heads=heads, projection_dim=projection,
        )  # fmt: skip
    assert sum(p.numel() for p in tower.parameters()) == count
