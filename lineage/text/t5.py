"""`t5`: the encoder of T5 (Raffel et al. 2020, arXiv:1910.10683), and of its version 1.1 with gated
feed-forward layers (Shazeer 2020, arXiv:2002.05202).

The text encoder of Imagen (Saharia et al. 2022, arXiv:2205.11487), Stable Diffusion 3 and Flux.
Words attend to words in both directions. The order of the words enters through distances only: a
learnt number for each range of distances is added to the scores of attention.

    T5, section 2.1     norm without mean and bias, before each half         `RMSNorm`, `T5Block`
                        ranges of distances, up to 128                `relative_position_bucket`
                        one number a range and head, for all blocks      `T5Stack.position_bias`
                        scores that are not divided by sqrt(d)                     `T5Attention`
    GLU, equation 2     W_2 max(W_1 x, 0)                                      `ReLUFeedForward`
    GLU, equation 6     W_2 (GELU(W x) * V x)                                 `GatedFeedForward`

No layer has a bias. H heads of width d together need not be as wide as the words: H d = 384 for the
512 of T5 1.1 small, 16384 for the 1024 of T5 11B. sqrt(d) stands in the initial weights of the
queries, so that a division of the scores would come on top of it.

Sizes: `width`, `num_layers`, `num_heads`, `feed_forward` (`gated` is version 1.1). `head_dim` and
`ff_dim` follow from them, by the rules of most published models, and can be set for the others.

Departures: T5 has no vector of the sentence; the mean of the words over the mask takes its place,
as in Imagen. Vectors of the padding are zero. The encoder is trained with the system that uses it,
on the tokens of the run, which have no end token; a frozen T5 is `pretrained:NAME`. There is no
dropout, as in the pre-training of version 1.1.

Axes: B captions, L words, D width, H heads, d width of a head, F width inside a feed-forward layer.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Depth, Dim, PositiveFloat, PositiveInt
from lineage.config import TextConfig, configuration
from lineage.errors import UserError
from lineage.text.token_encoder import TokenEncoder
from lineage.text.tokenizer import Tokenizer


@configuration
class T5Config:
    """Sizes of the blocks; the last three are the same in all published models.

    Attributes:
        width: D, width of the words [d_model].
        num_layers: Number of blocks.
        num_heads: H, number of heads of attention.
        head_dim: d, width of a head [d_kv].
        ff_dim: F, width inside a feed-forward layer [d_ff].
        feed_forward: Kind of the feed-forward layers: `relu`, or `gated`, as version 1.1.
        num_buckets: Number of ranges of distances, half of them for words on each side.
        max_distance: Distance from which on all are in the last range.
        eps: Number that is added to the mean square in the norms.
    """

    width: Dim
    num_layers: Depth
    num_heads: Depth
    head_dim: Dim
    ff_dim: Dim
    feed_forward: Literal["relu", "gated"] = "gated"
    num_buckets: PositiveInt = 32
    max_distance: PositiveInt = 128
    eps: PositiveFloat = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= self.num_buckets // 4 < self.max_distance:
            raise UserError(
                f"num_buckets={self.num_buckets} must be at least 4, and a quarter of it below "
                f"max_distance={self.max_distance}."
            )


# --- norm and positions ---------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own type if that is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: a layer norm without mean and bias.

    The mean square is computed in float32. It can be beyond the range of float16.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        mean_square = at_least_float32(x).square().mean(-1, keepdim=True)  # (..., 1)
        normed = x * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(self.weight.dtype)


def relative_position_bucket(
    relative_position: Tensor,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Tensor:
    """Range of each relative position, int64 from 0 to `num_buckets` - 1.

    Of n ranges, the first n / 2 are single distances; the others grow like the logarithm of the
    distance, and the last has all distances from `max_distance` on.

    Args:
        relative_position: Whole numbers, position of the key minus position of the query.
        bidirectional: If true, keys after the query have the upper half of the ranges, all others
            the lower half, as in the encoder. If false, keys before the query have all ranges, and
            keys after it are at distance 0, as in the decoder.
        num_buckets: Number of ranges.
        max_distance: Distance from which on all are in the last range.
    """
    if bidirectional:
        num_buckets = num_buckets // 2
        first = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        first = torch.zeros_like(relative_position, dtype=torch.long)
        distance = (-relative_position).clamp(min=0)
    num_exact = num_buckets // 2
    # in float32, in the order of the official code: a rounding moves a distance by one range
    ratio = torch.log(distance.clamp(min=num_exact).float() / num_exact)
    growth = ratio / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    grown = (num_exact + growth.long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < num_exact, distance.long(), grown)


# --- the halves of a block ------------------------------------------------------------------------


class T5Attention(nn.Module):
    """softmax(Q K^T + position bias) V, multi-head, without division by sqrt(d)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width, inner_dim = config.width, config.num_heads * config.head_dim
        self.to_q = nn.Linear(width, inner_dim, bias=False)
        self.to_k = nn.Linear(width, inner_dim, bias=False)
        self.to_v = nn.Linear(width, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, width, bias=False)
        nn.init.normal_(self.to_q.weight, std=(width * config.head_dim) ** -0.5)
        nn.init.normal_(self.to_k.weight, std=width**-0.5)
        nn.init.normal_(self.to_v.weight, std=width**-0.5)
        nn.init.normal_(self.to_out.weight, std=inner_dim**-0.5)

    def forward(self, x: Tensor, position_bias: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D), position_bias (1, H, L, L), mask (B, L), True = word -> (B, L, D)."""
        probs = self.attention_probs(x, position_bias, mask)
        attended = probs @ self._heads(self.to_v(x))  # (B, H, L, d)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def attention_probs(self, x: Tensor, position_bias: Tensor, mask: Tensor | None) -> Tensor:
        """Weight of each key for each query, (B, H, L, L); a row sums to 1."""
        scores = self._heads(self.to_q(x)) @ self._heads(self.to_k(x)).mT + position_bias
        if mask is not None:
            # not -inf: a caption without any word gets equal weights in place of 0 / 0
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask[:, None, None, :], lowest)
        return at_least_float32(scores).softmax(-1).to(scores.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, H d) -> (B, H, L, d)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class ReLUFeedForward(nn.Module):
    """W_2 max(W_1 x, 0), of the first T5."""

    def __init__(self, width: int, ff_dim: int) -> None:
        super().__init__()
        self.wi = _linear(width, ff_dim)
        self.wo = _linear(ff_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(F.relu(self.wi(x)))


class GatedFeedForward(nn.Module):
    """W_2 (GELU(W x) * V x), of version 1.1, with the GELU's tanh approximation."""

    def __init__(self, width: int, ff_dim: int) -> None:
        super().__init__()
        self.wi_0 = _linear(width, ff_dim)
        self.wi_1 = _linear(width, ff_dim)
        self.wo = _linear(ff_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


FEED_FORWARD: dict[str, type[ReLUFeedForward] | type[GatedFeedForward]] = {
    "relu": ReLUFeedForward,
    "gated": GatedFeedForward,
}
"""Kinds of feed-forward layers by name."""


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, with weights N(0, 1 / inputs)."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


def clamp_float16(x: Tensor) -> Tensor:
    """x, in float16 with its values clamped if one of them is infinite.

    T5 was trained in bfloat16, and the residual stream of the published models goes beyond the
    65504 of float16. Infinity would become NaN in the next norm.
    """
    if x.dtype != torch.float16 or not bool(x.isinf().any()):
        return x
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(-limit, limit)


# --- blocks ---------------------------------------------------------------------------------------


class T5Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attn = T5Attention(config)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.ff = FEED_FORWARD[config.feed_forward](config.width, config.ff_dim)

    def forward(self, x: Tensor, position_bias: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D), position_bias (1, H, L, L), mask (B, L), True = word -> (B, L, D)."""
        x = self.attention_half(x, position_bias, mask)
        return clamp_float16(x + self.ff(self.norm2(x)))

    def attention_half(self, x: Tensor, position_bias: Tensor, mask: Tensor | None) -> Tensor:
        """The residual stream after attention, (B, L, D)."""
        return clamp_float16(x + self.attn(self.norm1(x), position_bias, mask))


class T5Stack(nn.Module):
    """Blocks and a final norm; vectors of words in, vectors of words out.

    Args:
        config: Sizes.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        nn.init.normal_(self.relative_attention_bias.weight, std=config.width**-0.5)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D) and mask (B, L), True = word -> (B, L, D).

        No word attends to a position outside of the mask. Vectors there are computed all the same.
        Without a mask the padding is attended to, as in Stable Diffusion 3 and Flux.
        """
        position_bias = self.position_bias(x.shape[1])
        for block in self.blocks:
            x = block(x, position_bias, mask)
        return self.norm(x)

    def position_bias(self, length: int) -> Tensor:
        """What all blocks add to the scores of `length` words, (1, H, L, L)."""
        position = torch.arange(length, device=self.relative_attention_bias.weight.device)
        buckets = relative_position_bucket(
            position[None, :] - position[:, None],  # (L, L), key minus query
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]


def to_float16(stack: T5Stack) -> T5Stack:
    """Convert `stack` to float16, except for the last layer of each feed-forward, whose sums are
    the ones that go beyond the range of float16.
    """
    stack.half()
    for module in stack.modules():
        if isinstance(module, ReLUFeedForward | GatedFeedForward):
            module.wo.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return stack


# --- the text encoder -----------------------------------------------------------------------------


def default_sizes(config: TextConfig) -> T5Config:
    """Sizes of the blocks for `encoder.…` of a run.

    Where `head_dim` is 0, the heads together are as wide as the words. Where `ff_dim` is 0, it is
    4 D for `relu`, and 8 D / 3 for `gated`, whose three matrices then have as many weights as two
    of 4 D (Shazeer 2020, section 2). Both are the sizes of the published base models.
    """
    relu_dim, gated_dim = 4 * config.width, 8 * config.width // 3
    return T5Config(
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim or max(1, config.width // config.num_heads),
        ff_dim=config.ff_dim or (relu_dim if config.feed_forward == "relu" else gated_dim),
        feed_forward=config.feed_forward,
    )


class T5Encoder(TokenEncoder):
    """Embeddings of tokens, neither scaled nor with positions, and the blocks.

    Args:
        config: Sizes of the encoder.
        tokenizer: Tokeniser of the run.
        sizes: Sizes of the blocks; None for those of `config`.
    """

    def __init__(
        self, config: TextConfig, tokenizer: Tokenizer, sizes: T5Config | None = None
    ) -> None:
        super().__init__(config, tokenizer)
        self.stack = T5Stack(default_sizes(config) if sizes is None else sizes)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        words = self.stack(self.token_emb(ids), mask) * mask[..., None]  # (B, L, D)
        return words, words.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
