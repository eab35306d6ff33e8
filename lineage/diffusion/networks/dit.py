"""The network of the diffusion transformer (Peebles and Xie 2023, arXiv:2212.09748).

    section 3.2, patchify     `DiT.tokens`, with a fixed table of sinusoids for the positions
    figure 3, adaLN-Zero      `Block`: with (gamma, beta, alpha) for each half from the condition c,
                              x + alpha * f(norm(x) * (1 + gamma) + beta),
                              first with attention for f, then with an MLP
    decoder                   `DiT.proj_out`

Departure: c is the time plus the sentence, where the paper adds the class; and the words stand
before the patches as tokens of their own (section 3.2, in-context conditioning), unless `max_words`
is 0. Then it is the paper's network and can take its weights.

Axes: B pictures, C H W latents, P patch, N = H W / P^2 patches, L words, D width, Dw and Ds widths
of a word and of the sentence.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import Depth, Dim, DimFromZero, Float
from lineage.config import configuration
from lineage.diffusion.networks.layers import timestep_embedding, zero_module
from lineage.errors import UserError
from lineage.nn.attention import Attention
from lineage.text.contract import TextFeatures

TIMESTEP_DIM = 256
"""Width of the timestep embedding before its layers."""
EPSILON = 1e-6
"""Epsilon of the layer norms."""


@configuration
class DiTConfig:
    """Sizes of a diffusion transformer.

    Attributes:
        width: D, width of a token; a multiple of 4, for the table of positions.
        depth: Number of blocks.
        num_heads: Number of heads of each attention.
        patch_size: P, side of a patch of latents.
        mlp_ratio: Width inside the MLPs, as a multiple of `width`.
        max_words: Number of words before the patches, at most; longer captions are cut. 0 leaves
            the text to the sentence.
        gelu: Kind of GELU: `tanh`, as the authors', or `exact`.
    """

    width: Dim = 1152
    depth: Depth = 28
    num_heads: Depth = 16
    patch_size: Dim = 2
    mlp_ratio: Annotated[Float, Field(gt=0, le=64)] = 4.0
    max_words: DimFromZero = 64
    gelu: Literal["tanh", "exact"] = "tanh"

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.width % 4:
            raise UserError(
                f"net.width={self.width} must be a multiple of 4, for the table of positions, and "
                f"of net.num_heads={self.num_heads}."
            )


SIZES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}
"""Table 1 of the paper."""


def sincos_pos_emb(dim: int, rows: int, columns: int) -> Tensor:
    """Position table (rows columns, D): sines and cosines of the column in the first half, of the
    row in the second.
    """

    def along(positions: Tensor) -> Tensor:
        exponents = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
        angles = positions.double()[:, None] * 10_000**-exponents
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([along(column.flatten()), along(row.flatten())], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens x (B, N, D), scaled and shifted by (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Figure 3, adaLN-Zero: attention and an MLP, each modulated before and gated after."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON) for _ in range(2)
        )
        self.attn = Attention(width, config.num_heads)
        gelu = nn.GELU("tanh" if config.gelu == "tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(width, hidden), gelu, nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D), condition c (B, D) after its SiLU -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), mask=mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """z_t, t and text -> a tensor of the shape of z_t.

    Args:
        config: Sizes.
        word_dim: Dw.
        sentence_dim: Ds.
        shape: (C, H, W) of z_t.
        out_channels: Number of channels of the result.
    """

    grid_pos_emb: Tensor

    def __init__(
        self,
        config: DiTConfig,
        word_dim: int,
        sentence_dim: int,
        shape: tuple[int, int, int],
        out_channels: int,
    ) -> None:
        super().__init__()
        channels, height, across = shape
        patch, width = config.patch_size, config.width
        self.config, self.grid = config, (height // patch, across // patch)
        self.check_shape(height, across)
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        grid_pos_emb = sincos_pos_emb(width, *self.grid)
        self.register_buffer("grid_pos_emb", grid_pos_emb, persistent=False)
        self.time_embed = nn.Sequential(
            nn.Linear(TIMESTEP_DIM, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.sentence_proj = nn.Linear(sentence_dim, width)
        self.word_proj, self.word_pos_emb = None, None
        if config.max_words:
            self.word_proj = nn.Linear(word_dim, width)
            self.word_pos_emb = nn.Embedding(config.max_words, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.modulation = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch**2 * out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """The authors' initial weights: every block is the identity, the result is zero."""
        qkv_bound = math.sqrt(6 / (4 * self.config.width))  # theirs are one layer of 3 D outputs
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.endswith((".to_q", ".to_k", ".to_v")):
                    nn.init.uniform_(module.weight, -qkv_bound, qkv_bound)
                if name.endswith("modulation"):
                    zero_module(module)
        zero_module(self.proj_out)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        for layer in (self.time_embed[0], self.time_embed[2], self.sentence_proj):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        if self.word_pos_emb is not None:
            nn.init.normal_(self.word_pos_emb.weight, std=0.02)

    def condition(self, t: Tensor, text: TextFeatures) -> Tensor:
        """c: time and sentence as one vector, (B, D)."""
        time = self.time_embed(timestep_embedding(t, TIMESTEP_DIM))
        return time + self.sentence_proj(text.sentence)

    def check_shape(self, height: int, width: int) -> None:
        """Raise `UserError` if latents of this height and width do not divide into patches."""
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise UserError(
                f"Latents of {height} x {width} do not divide into patches of "
                f"net.patch_size={patch}."
            )

    def tokens(self, z_t: Tensor) -> Tensor:
        """Patches with their positions, (B, N, D)."""
        patches = self.patch_embed(z_t)  # (B, D, rows, columns)
        rows, columns = patches.shape[2:]
        pos_emb = self.grid_pos_emb
        if (rows, columns) != self.grid:
            pos_emb = sincos_pos_emb(self.config.width, rows, columns).to(pos_emb)
        return patches.flatten(2).transpose(1, 2) + pos_emb

    def forward(self, z_t: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """z_t (B, C, H, W), t (B,) -> (B, C', H, W)."""
        c = F.silu(self.condition(t, text))  # (B, D)
        x, mask, num_words = self.tokens(z_t), None, 0
        if self.word_proj is not None and self.word_pos_emb is not None:
            text = text.truncated(self.config.max_words)
            num_words = text.words.shape[1]
            words = self.word_proj(text.words) + self.word_pos_emb.weight[:num_words]
            x = torch.cat([words, x], dim=1)  # (B, L + N, D)
            mask = F.pad(text.mask, (0, x.shape[1] - num_words), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, c, mask)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x[:, num_words:]), shift, scale))  # (B, N, P P C')
        patch = self.config.patch_size
        height = z_t.shape[2] // patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)
