"""One transformer block (Vaswani et al. 2017, arXiv:1706.03762), pre-norm as in GPT-2 (Radford et
al. 2019).

    x = x + Attention(LayerNorm(x))
    x = x + MLP(LayerNorm(x)),    MLP(h) = W_2 GELU(W_1 h), four times as wide inside

CLIP has `QuickGELU` in place of GELU.

Axes: B batch, N positions, H heads, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lineage.nn.attention import Attention


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return x * torch.sigmoid(1.702 * x)


GELUKind = Literal["gelu", "quick_gelu"]
GELUS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each behind a norm and beside a residual connection.

    Args:
        width: D.
        num_heads: Number of heads.
        inner_dim: Width of all heads together; None is `width`.
        bias: If true, the projections to queries, keys and values have a bias.
        mlp_dim: Width inside the perceptron; None is four times `width`.
        gelu: Activation of the perceptron: `gelu` or `quick_gelu`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        inner_dim: int | None = None,
        bias: bool = True,
        mlp_dim: int | None = None,
        gelu: GELUKind = "gelu",
    ) -> None:
        super().__init__()
        mlp_dim = 4 * width if mlp_dim is None else mlp_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, inner_dim=inner_dim, bias=bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_dim), GELUS[gelu](), nn.Linear(mlp_dim, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `mask` broadcasts to (B, H, N, N), True = attend."""
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))
