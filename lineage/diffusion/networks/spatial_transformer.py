"""The spatial transformer of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.3
and appendix E.2.1): pixels attend to each other and to the words.

    group norm, 1 x 1 convolution,
    `depth` times   x + self-attention, x + attention to the words, x + feed-forward, each after a
                    layer norm
    1 x 1 convolution, + input

Axes: B pictures, C channels, H W, N = H W, L words, D width of the text.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.attention import Attention


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202): half of a layer, gated by the GELU of the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # two products, since on a CPU two smaller results are biased and gated faster than one
        halves = zip(self.enter.weight.chunk(2), self.enter.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return self.leave(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the words, feed-forward."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.pixels = Attention(width, heads, bias=False)
        self.words = Attention(width, heads, text_width, bias=False)
        self.feed = FeedForward(width)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, C), words (B, L, D) -> (B, N, C)."""
        x = x + self.pixels(self.norm1(x))
        x = x + self.words(self.norm2(x), words, mask)
        return x + self.feed(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a feature map.

    Args:
        depth: how many.
    """

    def __init__(self, channels: int, heads: int, depth: int, text_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.enter, self.leave = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, text_width) for _ in range(depth)
        )
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), words (B, L, D), mask over (B, heads, N, L) -> (B, C, H, W)."""
        places = self.enter(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.blocks:
            places = block(places, words, mask)
        return x + self.leave(places.transpose(1, 2).unflatten(2, x.shape[2:]))
