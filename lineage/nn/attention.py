"""Multi-head attention for text and pictures, with one mask convention: True = may be looked at.

The arithmetic is softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, equation 1). On a GPU it runs as
the fused kernel, and so it does on the CPU for many queries in float32; for few, and in bfloat16,
two matrix products are faster there. Fused kernels cannot be differentiated twice: a gradient
penalty through them needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around it.

Axes: B batch, N queries, M keys, H heads, d width of a head, D = H d.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError

LONG = 64  # queries from which the fused kernel is faster on the CPU


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, N, d), (B, H, M, d), (B, H, M, d) -> (B, H, N, d).

    `mask` broadcasts to (B, H, N, M), True = look. A query that may look nowhere gets zeros, as
    from the fused kernel.
    """
    in_full = query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if query.is_cuda or (in_full and query.shape[-2] >= LONG):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * (1.0 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)  # (B, H, N, M)
    if mask is not None:
        away = torch.zeros_like(mask, dtype=scores.dtype)
        scores = scores + away.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    if scores.dtype == torch.float32:
        attended = scores.softmax(-1).to(value.dtype) @ value
    else:  # bfloat16 is summed in float32 anyway, and need not become it
        with torch.autocast(query.device.type, enabled=False):
            attended = scores.softmax(-1).to(value.dtype) @ value
    seen = None if mask is None else mask.any(-1, keepdim=True)
    return attended if seen is None or bool(seen.all()) else attended * seen


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to another one.

    Args:
        width: D of the queries and of the result.
        heads: H; must divide `width`.
        context_width: width of the keys' sequence; None attends to the sequence itself.
        inner: H d, where it is not D.
        bias: of queries, keys and values.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        inner: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        if heads < 1 or inner % heads:
            raise UserError(f"A width of {inner} cannot be shared by {heads} heads of attention.")
        self.heads = heads
        self.query = nn.Linear(width, inner, bias)
        self.key_value = nn.Linear(context_width or width, 2 * inner, bias)
        self.out = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D), context (B, M, C) or None for x itself, mask bool over (B, H, N, M) -> (B,
        N, D).
        """
        return self.among(self.query(x), self.key_value(x if context is None else context), mask)

    def among(self, query: Tensor, pairs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, N, H d) to keys and values (B, M, 2 H d) -> (B, N, D)."""
        key, value = pairs.chunk(2, dim=2)
        heads = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        query, key, value = heads  # (B, H, N, d), (B, H, M, d) twice
        return self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))
