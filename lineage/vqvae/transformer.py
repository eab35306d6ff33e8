"""A decoder-only transformer (Radford et al. 2019, GPT-2): each token attends to itself and to the
tokens before it.

    Block          x + attention(norm(x)), then x + mlp(norm(x))
    Transformer    blocks and a final norm; vectors in, vectors out
    KVCache        keys and values of the tokens so far, so that the next costs one position only
    GPT            a transformer with embeddings of tokens and positions, and a head

`Transformer` models the codes of `vqvae`, `dalle` and `vqgan` (`ar_prior.py`); `GPT` is GPT-2, and
the minGPT of VQGAN's authors.

Axes: B rows, N positions (n of them new), D width, H heads, d width of a head, V tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lineage.bounds import Depth, Dim, Fraction
from lineage.config import configuration
from lineage.errors import UserError
from lineage.nn.attention import attend


@configuration
class TransformerConfig:
    """Sizes of a transformer.

    Attributes:
        width: D, width of the vectors.
        num_layers: Number of blocks.
        num_heads: H, number of heads; must divide `width`.
        gelu: Kind of the GELU: `tanh`, the approximation of GPT-2, or `exact`.
        dropout: Share of activations that each branch of a block drops in training.
    """

    width: Dim = 128
    num_layers: Depth = 5
    num_heads: Depth = 4
    gelu: Literal["tanh", "exact"] = "tanh"
    dropout: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"transformer.width={self.width} cannot be shared by {self.num_heads} heads."
            )


class KVCache:
    """Keys and values of all blocks.

    Args:
        config: Sizes of the transformer.
        batch_size: Number of rows.
        max_length: Number of positions that fit in.
        like: Tensor whose type and device the cache has.

    Attributes:
        length: Number of positions that are filled.
    """

    def __init__(
        self, config: TransformerConfig, batch_size: int, max_length: int, like: Tensor
    ) -> None:
        heads, head_dim = config.num_heads, config.width // config.num_heads
        shape = (config.num_layers, 2, batch_size, heads, max_length, head_dim)
        self.keys_values = like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, keys_values: Tensor) -> Tensor:
        """Store keys and values (2, B, H, n, d) of new positions; returns those of all positions.

        `length` counts the new positions only after all blocks have stored theirs.
        """
        end, max_length = self.length + keys_values.shape[3], self.keys_values.shape[4]
        if end > max_length:
            raise UserError(f"{end} positions do not fit into a cache of {max_length}.")
        self.keys_values[layer, :, :, :, self.length : end] = keys_values
        return self.keys_values[layer, :, :, :, :end]


def causal_mask(
    length: int, new: int | None = None, *, num_prefix: int = 0, device: torch.device | None = None
) -> Tensor:
    """(n, N) bool, True where a new position may attend to a position.

    Args:
        length: N, number of all positions.
        new: n, number of the last ones that are new; None for all.
        num_prefix: Number of first positions that all attend to each other [n_unmasked].
        device: Device of the mask.
    """
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:num_prefix, :num_prefix] = True
    return mask if new is None else mask[length - new :]


class SelfAttention(nn.Module):
    """Multi-head attention with queries, keys and values from one product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, n, D) -> (B, n, D); `mask` broadcasts to (B, H, n, N)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, keys_values = qkv[0], qkv[1:]  # (B, H, n, d) and (2, B, H, n, d)
        if cache is not None:
            keys_values = cache.append(layer, keys_values)
        attended = attend(query, keys_values[0], keys_values[1], mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(config)
        gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        x = x + self.dropout(self.attn(self.ln1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Transformer(nn.Module):
    """Blocks and a final norm.

    Initial weights are GPT-2's: N(0, 0.02), and in the last layer of each branch a standard
    deviation smaller by sqrt(2 num_layers), so that the sum of all branches keeps its scale.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width)
        branch_std = 0.02 / (2 * config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends_branch = name.endswith(("attn.proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=branch_std if ends_branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, n, D) -> (B, n, D).

        Args:
            x: Vectors of the new positions.
            cache: Keys and values of the positions before; those of the new ones are added.
            mask: Mask that broadcasts to (B, H, n, N), True where a new position may attend to a
                position; None is `causal_mask`.
        """
        new = x.shape[1]
        length = new if cache is None else cache.length + new
        if mask is None and new > 1:  # a single new position attends to all positions anyway
            mask = causal_mask(length, new, device=x.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length = length
        return self.ln_f(x)


class GPT(nn.Module):
    """Tokens in, logits of each next token out.

    Args:
        config: Sizes of the transformer.
        vocab_size: V, number of tokens.
        max_length: Largest number of positions.
        tied: If true, the head has the weights of the token embedding.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, max_length: int, tied: bool = True
    ) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, config.width)
        self.pos_emb = nn.Embedding(max_length, config.width)
        self.transformer = Transformer(config)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        for layer in (self.tok_emb, self.pos_emb, self.head):
            nn.init.normal_(layer.weight, std=0.02)
        if tied:
            self.head.weight = self.tok_emb.weight

    def embed(self, ids: Tensor, position_ids: Tensor | None = None, first: int = 0) -> Tensor:
        """Tokens (B, n) at `position_ids` (B, n), or at positions from `first` on -> (B, n, D)."""
        if position_ids is None:
            position_ids = torch.arange(first, first + ids.shape[1], device=ids.device)
        return self.tok_emb(ids) + self.pos_emb(position_ids)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, n) -> logits (B, n, V)."""
        x = self.embed(ids, position_ids, 0 if cache is None else cache.length)
        return self.head(self.transformer(x, cache, mask))
