"""The encoder of T5: its parts by hand, padding, float16, sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.errors import UserError
from lineage.text.encoders import make_encoder
from lineage.text.t5 import (
    ReLUFeedForward,
    RMSNorm,
    T5Config,
    T5Encoder,
    T5Stack,
    clamp_float16,
    default_sizes,
    relative_position_bucket,
    to_float16,
)
from lineage.text.tokenizer import PAD, WordTokenizer

WIDTH, HEADS, HEAD_DIM, FF_DIM, LAYERS = 12, 3, 5, 7, 3
VOCABULARY = ["a", "red", "blue", "circle", "ring", "of", "left"]
SHORT, LONG = "a red circle", "a red circle left of a blue ring of a circle"
CAPTIONS = [SHORT, LONG, "", "ring"]
LENGTHS = [3, 11, 1, 1]
kinds = pytest.mark.parametrize("kind", ["relu", "gated"])


def randomise(module: nn.Module) -> Any:
    """No weight has a value that hides a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module.eval()


def make(**sizes: Any) -> Any:
    defaults = {"width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "head_dim": HEAD_DIM}
    config = TextConfig(**{**defaults, "ff_dim": FF_DIM, **sizes})
    return randomise(make_encoder("t5", config, WordTokenizer(VOCABULARY)))


def make_stack(**sizes: Any) -> Any:
    defaults = {"width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "head_dim": HEAD_DIM}
    return randomise(T5Stack(T5Config(**{**defaults, "ff_dim": FF_DIM, **sizes})))


# --- positions --------------------------------------------------------------------------------


def bucket_by_hand(position: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """Of one relative position, with Python's numbers."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if position > 0 else 0
        distance = abs(position)
    else:
        distance = max(0, -position)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)  # 0 to 1
    # a number that is whole up to rounding is that whole number
    return first + min(exact + int(share * (num_buckets - exact) + 1e-9), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (32, 20), (16, 20), (8, 128), (4, 9), (20, 50)])
def test_buckets_by_hand(bidirectional: bool, sizes: tuple[int, int]) -> None:
    positions = torch.arange(-200, 201)
    buckets = relative_position_bucket(
        positions, bidirectional=bidirectional, num_buckets=sizes[0], max_distance=sizes[1]
    )
    expected = [bucket_by_hand(k, bidirectional, *sizes) for k in positions.tolist()]
    assert buckets.dtype == torch.int64 and buckets.tolist() == expected
    assert buckets.min() == 0 and buckets.max() == sizes[0] - 1


def test_the_published_buckets() -> None:
    """Up to 7 each distance alone; then 8 to 11, 12 to 15, ..., and all from 91 on."""
    before = relative_position_bucket(-torch.tensor([0, 1, 7, 8, 11, 12, 15, 16, 90, 91, 5000]))
    assert before.tolist() == [0, 1, 7, 8, 8, 9, 9, 10, 14, 15, 15]
    after = relative_position_bucket(torch.tensor([1, 7, 8, 90, 91, 5000]))
    assert after.tolist() == [17, 23, 24, 30, 31, 31]
    causal = relative_position_bucket(-torch.tensor([-3, 0, 15, 16, 127, 128]), bidirectional=False)
    assert causal.tolist() == [0, 0, 15, 16, 31, 31]


def test_position_bias_is_the_number_of_key_minus_query() -> None:
    stack = make_stack(num_buckets=8, max_distance=6)
    bias = stack.position_bias(10)
    assert bias.shape == (1, HEADS, 10, 10)
    for query in range(10):
        for key in range(10):
            bucket = bucket_by_hand(key - query, True, 8, 6)
            expected = stack.relative_attention_bias.weight[bucket]
            assert torch.equal(bias[0, :, query, key], expected)


# --- norm -------------------------------------------------------------------------------------


def test_the_norm_keeps_the_mean() -> None:
    norm = randomise(RMSNorm(4, eps=0.5))
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    expected = x / math.sqrt(50 / 4 + 0.5) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_square_is_computed_in_float32(dtype: torch.dtype) -> None:
    """In float16, the square of 300 is infinite already, and that of 1e-4 zero."""
    norm = RMSNorm(4, eps=1e-12).to(dtype)
    for scale in (1e-4, 300.0, 60000.0):
        x = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype) * scale
        normed = norm(x)
        assert normed.dtype == dtype
        torch.testing.assert_close(normed.float(), x.float().sign(), atol=1e-2, rtol=0)


# --- the whole encoder by hand ----------------------------------------------------------------


def feed_forward_by_hand(ff: Any, h: Tensor) -> Tensor:
    if isinstance(ff, ReLUFeedForward):
        hidden = (h @ ff.wi.weight.T).clamp(min=0)
    else:
        gate = h @ ff.wi_0.weight.T
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
        hidden = gate / 2 * (1 + tanh) * (h @ ff.wi_1.weight.T)
    return hidden @ ff.wo.weight.T


def encoder_by_hand(encoder: Any, ids: list[int]) -> Tensor:
    """Words of one caption without padding, (L, D)."""

    def norm(x: Tensor, layer: Any) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * layer.weight

    stack, x = encoder.stack, encoder.token_emb.weight[ids]
    for block in stack.blocks:
        h, heads = norm(x, block.norm1), []
        for head in range(HEADS):
            rows = slice(HEAD_DIM * head, HEAD_DIM * (head + 1))
            layers = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
            q, k, v = (h @ layer.weight[rows].T for layer in layers)
            scores = q @ k.T  # not divided by sqrt(d)
            for i in range(len(ids)):
                for j in range(len(ids)):
                    bucket = bucket_by_hand(j - i, True, 32, 128)
                    scores[i, j] += stack.relative_attention_bias.weight[bucket, head]
            heads.append(scores.softmax(1) @ v)
        x = x + torch.cat(heads, 1) @ block.attn.to_out.weight.T
        x = x + feed_forward_by_hand(block.ff, norm(x, block.norm2))
    return norm(x, stack.norm)


@kinds
@torch.no_grad()
def test_the_encoder_by_hand(kind: str) -> None:
    """One caption at a time; the sentence is the mean of the words. Heads of 5 do not fill the
    width of 12, and one table of positions serves all blocks."""
    encoder = make(feed_forward=kind).double()
    assert isinstance(encoder, T5Encoder) and not encoder.causal and not encoder.padded
    text = encoder.encode(CAPTIONS)
    for row, length in enumerate(LENGTHS):
        expected = encoder_by_hand(encoder, text.ids[row, :length].tolist())
        torch.testing.assert_close(text.words[row, :length], expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(text.sentence[row], expected.mean(0), atol=1e-9, rtol=1e-9)


@kinds
def test_feed_forward_layers_have_no_bias(kind: str) -> None:
    names = [name for name, _ in make(feed_forward=kind).named_parameters()]
    assert not any(name.endswith("bias") for name in names)
    layers = {"relu": ("wi", "wo"), "gated": ("wi_0", "wi_1", "wo")}[kind]
    assert [n for n in names if ".0.ff." in n] == [f"stack.blocks.0.ff.{x}.weight" for x in layers]


# --- padding ----------------------------------------------------------------------------------


def test_no_word_attends_to_the_padding() -> None:
    """The embedding of the padding changes nothing; without a mask it changes all."""
    encoder = make()
    ids = torch.tensor([[4, 5, 6, PAD, PAD]])
    x = encoder.token_emb(ids)
    other = x + 3.0 * (ids == PAD)[..., None]
    with_mask, no_mask = (
        (encoder.stack(other, mask) - encoder.stack(x, mask)).abs().amax(2)[0, :3]
        for mask in (ids != PAD, None)
    )
    assert not with_mask.any() and no_mask.min() > 1e-3


def test_vectors_of_the_padding_are_computed_and_the_encoder_sets_them_to_zero() -> None:
    encoder = make()
    ids = torch.tensor([[4, 5, PAD], [4, 5, 6]])
    raw = encoder.stack(encoder.token_emb(ids), ids != PAD)
    words, sentence = encoder(ids, ids != PAD)
    assert raw[0, 2].abs().max() > 1e-3 and not words[0, 2].any()
    assert torch.equal(words[0, :2], raw[0, :2]) and torch.equal(words[1], raw[1])
    torch.testing.assert_close(sentence[0], raw[0, :2].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_caption_without_tokens_gets_uniform_attention(dtype: torch.dtype) -> None:
    """Also where scores of -40 on top of the lowest number would be minus infinity."""
    encoder = make().to(dtype)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    x = encoder.token_emb(torch.tensor([[4, 5, 6, 7], [4, 5, PAD, PAD]]))
    bias = encoder.stack.position_bias(4) - 40 * torch.eye(4, dtype=dtype)
    probs = encoder.stack.blocks[0].attn.attention_probs(x, bias, mask)
    assert torch.equal(probs[0], torch.full_like(probs[0], 0.25))
    assert not probs[1, :, :, 2:].any() and probs.dtype == dtype
    words, sentence = encoder(torch.tensor([[PAD, PAD], [4, PAD]]), torch.tensor([[False] * 2] * 2))
    assert not words.any() and not sentence.any()
    stream = encoder.stack(x, mask)
    stream.float().square().sum().backward()
    assert stream.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.stack.parameters())


def test_shorter_rows_are_no_parts_of_longer_ones_without_a_mask() -> None:
    stack, x = make_stack(), torch.randn(1, 6, WIDTH)
    assert (stack(x)[:, :4] - stack(x[:, :4])).abs().max() > 1e-3


# --- float16 ----------------------------------------------------------------------------------


def test_an_infinite_stream_is_clamped_and_no_other() -> None:
    inf = float("inf")
    x = torch.tensor([1.5, inf, -inf, 65504.0, -3.0], dtype=torch.float16)
    assert clamp_float16(x).tolist() == [1.5, 64512.0, -64512.0, 64512.0, -3.0]
    finite = torch.tensor([1.5, 65504.0, -65504.0], dtype=torch.float16)
    assert torch.equal(clamp_float16(finite), finite)
    for dtype in (torch.float32, torch.bfloat16):
        assert clamp_float16(x.to(dtype)).tolist() == x.to(dtype).tolist()


@pytest.mark.parametrize("layer", ["attn.to_out", "ff.wo"])
def test_float16_stays_finite_after_each_half(layer: str) -> None:
    """A stream beyond 65504 would be NaN in the next norm."""
    stack = make_stack()
    with torch.no_grad():
        stack.blocks[0].get_submodule(layer).weight.mul_(2e4)
    x, bias = torch.randn(2, 4, WIDTH), stack.position_bias(4)
    assert stack.blocks[0](x, bias, None).abs().max() > 65504
    stack.half()
    assert stack.blocks[0](x.half(), bias.half(), None).abs().max() == 64512
    assert stack(x.half()).isfinite().all()


@kinds
def test_to_float16_keeps_the_last_layer_of_each_feed_forward(kind: str) -> None:
    """With sums beyond 65504 the result is near that of float32; float16 alone is off by 1."""
    stack = make_stack(feed_forward=kind)
    with torch.no_grad():
        for block in stack.blocks:
            block.ff.wo.weight.mul_(2e4)
        for parameter in stack.parameters():
            parameter.copy_(parameter.half())
    x = torch.randn(2, 4, WIDTH).half()
    exact = stack(x.float())
    assert stack.blocks[0](x.float(), stack.position_bias(4), None).abs().max() > 65504
    half = to_float16(stack)
    kept = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"blocks.{k}.ff.wo.weight" for k in range(LAYERS)}
    result = half(x)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), exact, atol=0.2, rtol=0)


# --- sizes and initial weights ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "head_dim", "ff_dim"),
    [
        ({"width": 768, "num_heads": 12, "feed_forward": "relu"}, 64, 3072),  # T5 base
        ({"width": 768, "num_heads": 12, "feed_forward": "gated"}, 64, 2048),  # T5 1.1 base
        ({"width": 12, "num_heads": 5}, 2, 32),
        ({"width": 2, "num_heads": 5}, 1, 5),
        ({"width": 12, "num_heads": 5, "head_dim": 7, "ff_dim": 3}, 7, 3),
    ],
    ids=str,
)
def test_sizes_follow_from_the_width(config: dict[str, Any], head_dim: int, ff_dim: int) -> None:
    sizes = default_sizes(TextConfig(num_layers=2, **config))
    assert (sizes.head_dim, sizes.ff_dim) == (head_dim, ff_dim)
    assert (sizes.width, sizes.num_layers, sizes.num_heads) == (
        config["width"],
        2,
        config["num_heads"],
    )
    assert (sizes.num_buckets, sizes.max_distance, sizes.eps) == (32, 128, 1e-6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_buckets": 3}, "num_buckets=3"),
        ({"num_buckets": 32, "max_distance": 8}, "max_distance=8"),
        ({"feed_forward": "silu"}, "feed_forward"),
        ({"eps": 0}, "eps"),
    ],
    ids=str,
)
def test_impossible_sizes_raise_a_sentence(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name) as caught:
        make_stack(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"feed_forward": "gelu"}, {"head_dim": -1}, {"ff_dim": -1}], ids=str
)
def test_impossible_settings_raise_a_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        TextConfig(**change)


@kinds
def test_initial_weights_are_t5s(kind: str) -> None:
    """sqrt(d) is in the queries: the scores of normed words have a variance of 1 without it."""
    width, heads, head_dim, ff_dim = 96, 4, 16, 160
    config = T5Config(
        width=width, num_layers=1, num_heads=heads, head_dim=head_dim, ff_dim=ff_dim,
        feed_forward=kind, num_buckets=400, max_distance=500,
    )  # fmt: skip
    stack = T5Stack(config)
    block: Any = stack.blocks[0]
    expected = {
        block.attn.to_q: (width * head_dim) ** -0.5,
        block.attn.to_k: width**-0.5,
        block.attn.to_v: width**-0.5,
        block.attn.to_out: (heads * head_dim) ** -0.5,
        block.ff.wo: ff_dim**-0.5,
        stack.relative_attention_bias: width**-0.5,
    }
    inner = (block.ff.wi,) if kind == "relu" else (block.ff.wi_0, block.ff.wi_1)
    expected |= dict.fromkeys(inner, width**-0.5)
    for layer, deviation in expected.items():
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.08), layer
    x = torch.randn(1, 60, width)
    query, key = (
        layer(x).unflatten(2, (heads, -1)) for layer in (block.attn.to_q, block.attn.to_k)
    )
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    assert scores.std().item() == pytest.approx(1.0, rel=0.1)
