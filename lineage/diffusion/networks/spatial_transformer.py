"""The spatial transformer of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3
and appendix E.2.1): pixels attend to each other and to the words.

    group norm, 1 x 1 convolution,
    `depth` times   x + self-attention, x + attention to the words, x + feed-forward, each after a
                    layer norm
    1 x 1 convolution, + input

Axes: B pictures, C channels, H W, N = H W pixels, L words, Dw width of a word.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lineage.diffusion.networks.attention_blocks import to_map, to_sequence
from lineage.diffusion.networks.layers import zero_module
from lineage.nn.attention import Attention
from lineage.nn.fast import GroupNorm, linear_chunks


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202): (x W + b) * GELU(x V + c), then a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = linear_chunks(x, self.proj_in, 2)  # self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the words, feed-forward."""

    def __init__(self, width: int, num_heads: int, word_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = Attention(width, num_heads, bias=False)
        self.cross_attn = Attention(width, num_heads, context_dim=word_dim, bias=False)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, C), words (B, L, Dw) -> (B, N, C)."""
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), words, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    Args:
        channels: Number of channels.
        num_heads: Number of heads of every attention.
        word_dim: Dw.
        depth: Number of transformer blocks.
        norm_groups: Number of groups of the group norm.
    """

    def __init__(
        self, channels: int, num_heads: int, word_dim: int, depth: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, word_dim) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), words (B, L, Dw), mask over (B, heads, N, L) -> (B, C, H, W)."""
        pixels = to_sequence(self.proj_in(self.norm(x)))  # (B, N, C)
        for block in self.transformer_blocks:
            pixels = block(pixels, words, mask)
        return x + self.proj_out(to_map(pixels, x))
