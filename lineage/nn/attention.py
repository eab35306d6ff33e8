"""Multi-head attention for text and pictures (Vaswani et al. 2017, arXiv:1706.03762).

    equation 1      softmax(Q K^T / sqrt(d)) V                                        `attend`
    section 3.2.2   H of them side by side, each on its own projection of the input   `Attention`

A mask is True where a query may attend to a key. Fused kernels cannot be differentiated twice: a
gradient penalty through them needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around it.

Axes: B batch, N queries, M keys, H heads, d width of a head, D width of the sequence.
"""

from __future__ import annotations

from torch import Tensor, nn

from lineage.errors import UserError
from lineage.nn.fast import parallel_linears, scaled_dot_product_attention


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V: (B, H, N, d), (B, H, M, d), (B, H, M, d) -> (B, H, N, d).

    `mask` broadcasts to (B, H, N, M). A query that may attend to no key gets zeros.
    """
    return scaled_dot_product_attention(query, key, value, mask)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to another one.

    Args:
        width: D, width of the queries' sequence and of the result.
        num_heads: Number of heads; must divide `inner_dim`.
        context_dim: Width of the keys' sequence; None attends to the sequence itself.
        inner_dim: Width of all heads together; None is `width`.
        bias: If true, the projections to queries, keys and values have a bias.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        inner_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = width if inner_dim is None else inner_dim
        context_dim = width if context_dim is None else context_dim
        if num_heads < 1 or inner_dim % num_heads:
            raise UserError(
                f"A width of {inner_dim} cannot be shared by {num_heads} heads of attention."
            )
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, inner_dim, bias)
        self.to_k = nn.Linear(context_dim, inner_dim, bias)
        self.to_v = nn.Linear(context_dim, inner_dim, bias)
        self.to_out = nn.Linear(inner_dim, width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, D), context (B, M, Dc) or None for x itself -> (B, N, D).

        `mask` broadcasts to (B, H, N, M).
        """
        if context is None:  # self.to_q(x), self.to_k(x), self.to_v(x)
            query, key, value = parallel_linears(x, self.to_q, self.to_k, self.to_v)
        else:  # self.to_q(x), self.to_k(context), self.to_v(context)
            query, (key, value) = self.to_q(x), parallel_linears(context, self.to_k, self.to_v)
        return self.multi_head(query, key, value, mask)

    def multi_head(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Projected queries (B, N, H d), keys and values (B, M, H d) -> (B, N, D)."""
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )  # (B, H, N, d), (B, H, M, d) twice
        return self.to_out(attend(query, key, value, mask).transpose(1, 2).flatten(2))
