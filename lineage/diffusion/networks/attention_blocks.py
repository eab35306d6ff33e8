"""Attention blocks of a UNet: feature map, words and their mask -> feature map.

    `SelfAttentionBlock`    x + self-attention                    (DDPM, ADM)
    `CrossAttentionBlock`   and + attention to the words          (our own)
    `JointAttentionBlock`   one softmax over words and pixels     (GLIDE, section 4)

The fourth one, latent diffusion's, is `spatial_transformer.py`. Every block starts as the identity.

Axes: B pictures, C channels, H W, N = H W pixels, L words, Dw width of a word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.diffusion.networks.layers import zero_module
from lineage.nn.attention import Attention


def to_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(sequence: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W), H and W those of `like`."""
    return sequence.transpose(1, 2).unflatten(2, like.shape[2:])


class SelfAttentionBlock(nn.Module):
    """x + self-attention of the pixels.

    Args:
        channels: Number of channels.
        num_heads: Number of heads.
        norm: Norm before the attention.
    """

    def __init__(self, channels: int, num_heads: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.self_attn = Attention(channels, num_heads)
        zero_module(self.self_attn.to_out)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W); reads no words."""
        return x + to_map(self.self_attn(to_sequence(self.norm(x))), x)


class CrossAttentionBlock(SelfAttentionBlock):
    """x + self-attention, then + attention to the words.

    Args:
        word_dim: Dw.
    """

    def __init__(self, channels: int, num_heads: int, norm: nn.Module, word_dim: int) -> None:
        super().__init__(channels, num_heads, norm)
        self.cross_norm = nn.LayerNorm(channels)
        self.cross_attn = Attention(channels, num_heads, context_dim=word_dim)
        zero_module(self.cross_attn.to_out)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), words (B, L, Dw), mask over (B, heads, N, L) -> (B, C, H, W)."""
        pixels = to_sequence(x) + self.self_attn(to_sequence(self.norm(x)))  # (B, N, C)
        pixels = pixels + self.cross_attn(self.cross_norm(pixels), words, mask)
        return to_map(pixels, x)


class JointAttention(Attention):
    """Self-attention of the pixels, to whose keys and values those of the words are added."""

    def __init__(self, width: int, num_heads: int, word_dim: int) -> None:
        super().__init__(width, num_heads)
        self.add_k_proj = nn.Linear(word_dim, width)
        self.add_v_proj = nn.Linear(word_dim, width)

    def forward(  # type: ignore[override]
        self, x: Tensor, words: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D), words (B, L, Dw) -> (B, N, D); `mask` is of the words alone."""
        key = torch.cat([self.add_k_proj(words), self.to_k(x)], dim=1)  # (B, L + N, D)
        value = torch.cat([self.add_v_proj(words), self.to_v(x)], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, x.shape[1]), value=True)
        return self.multi_head(self.to_q(x), key, value, mask)


class JointAttentionBlock(nn.Module):
    """x + attention of the pixels to words and pixels at once.

    Args:
        channels: Number of channels.
        num_heads: Number of heads.
        norm: Norm before the attention.
        word_dim: Dw.
    """

    def __init__(self, channels: int, num_heads: int, norm: nn.Module, word_dim: int) -> None:
        super().__init__()
        self.norm = norm
        self.joint_attn = JointAttention(channels, num_heads, word_dim)
        zero_module(self.joint_attn.to_out)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), words (B, L, Dw), mask over (B, heads, N, L) -> (B, C, H, W)."""
        return x + to_map(self.joint_attn(to_sequence(self.norm(x)), words, mask), x)
