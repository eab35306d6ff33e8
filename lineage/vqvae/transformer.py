"""A decoder-only transformer (Radford et al. 2019, GPT-2): each place looks at itself and before.

The network that writes pictures token by token in `vqvae`, `dalle` and `vqgan`. It maps vectors to
vectors; what they stand for, and where, is its user's.

    Block        x + attention(norm(x)), then x + mlp(norm(x))
    Transformer  blocks and a last norm
    Cache        keys and values of the places so far, so that the next one costs one place only
    GPT          with a table of tokens, one of places and a head: GPT-2, and taming's minGPT

Axes: B rows, N places, D width, H heads, d width of a head, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.errors import UserError
from lineage.nn.attention import attend


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes.

    Attributes:
        width, layers, heads: D, number of blocks, H.
        gelu: `tanh`, GPT-2's approximation, or `exact`.
        dropout: of attention's and the mlp's results while learning.
    """

    width: int = 128
    layers: int = 5
    heads: int = 4
    gelu: str = "tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads"):
            at_least(f"transformer.{name}", getattr(self, name), 1)
        one_of("transformer.gelu", self.gelu, ("tanh", "exact"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"transformer.dropout={self.dropout} must be from 0 to below 1.")
        if self.width % self.heads:
            raise UserError(
                f"transformer.width={self.width} cannot be shared by {self.heads} heads."
            )


class Cache:
    """Keys and values of all blocks for `length` places, of which `used` are written."""

    def __init__(self, config: TransformerConfig, rows: int, length: int, like: Tensor) -> None:
        shape = (config.layers, 2, rows, config.heads, length, config.width // config.heads)
        self.kept = like.new_empty(shape)
        self.used = 0

    def put(self, layer: int, pairs: Tensor) -> Tensor:
        """Write the next places' keys and values (2, B, H, n, d); returns those of all places."""
        end, length = self.used + pairs.shape[3], self.kept.shape[4]
        if end > length:
            raise UserError(f"{end} places do not fit a cache of {length}.")
        self.kept[layer, :, :, :, self.used : end] = pairs
        return self.kept[layer, :, :, :, :end]


class SelfAttention(nn.Module):
    """Query, key and value in one product; each place looks where `mask` is True."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, n, D), mask over (B, H, n, N) -> (B, n, D)."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, pairs = split[0], split[1:]  # (B, H, n, d) and (2, B, H, n, d)
        if cache is not None:
            pairs = cache.put(layer, pairs)
        seen = attend(query, pairs[0], pairs[1], mask)
        return self.proj(seen.transpose(1, 2).flatten(2))


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
        self, x: Tensor, mask: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        x = x + self.dropout(self.attn(self.ln1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Transformer(nn.Module):
    """Blocks and a last norm, with GPT-2's weights at the start: N(0, 0.02), and the branches'
    last layers smaller by the root of twice their number.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("attn.proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        open_places: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, n, D) -> (B, n, D).

        Args:
            cache: of the places before these; gets these too.
            open_places: the first so many places see each other whole.
            mask: (B, N) True where a place may be looked at; None for all.
        """
        return self.states(x, cache, open_places, mask)[-1]

    def states(
        self,
        x: Tensor,
        cache: Cache | None = None,
        open_places: int = 0,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """What goes into each block, and what comes out of the last norm."""
        past = cache.used if cache is not None else 0
        count = x.shape[1]
        given = None  # a single place sees all that the cache holds
        if count > 1 or mask is not None:
            look = torch.ones(past + count, past + count, dtype=torch.bool, device=x.device).tril()
            look[:open_places, :open_places] = True
            given = look[past:] if mask is None else look[past:] & mask[:, None, None, :]  # (n, N)
        states = []
        for layer, block in enumerate(self.blocks):
            states.append(x)
            x = block(x, given, cache, layer)
        if cache is not None:
            cache.used += count
        return [*states, self.ln_f(x)]


class GPT(nn.Module):
    """Tokens in, logits of the next token out.

    Args:
        tokens: V.
        places: the most there can be.
        tied: the head is the table of tokens.
    """

    def __init__(
        self, config: TransformerConfig, tokens: int, places: int, tied: bool = True
    ) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = (
            nn.Embedding(tokens, config.width),
            nn.Embedding(places, config.width),
        )
        self.transformer = Transformer(config)
        self.head = nn.Linear(config.width, tokens, bias=False)
        for table in (self.tok_emb, self.pos_emb, self.head):
            nn.init.normal_(table.weight, std=0.02)
        if tied:
            self.head.weight = self.tok_emb.weight

    def embed(self, ids: Tensor, place: Tensor | None = None, first: int = 0) -> Tensor:
        """(B, n) tokens at `place` (B, n), or at places `first` and on -> (B, n, D)."""
        if place is None:
            place = torch.arange(first, first + ids.shape[1], device=ids.device)
        return self.tok_emb(ids) + self.pos_emb(place)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        open_places: int = 0,
        mask: Tensor | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """(B, n) -> logits (B, n, V)."""
        x = self.embed(ids, place, cache.used if cache is not None else 0)
        return self.head(self.transformer(x, cache, open_places, mask))

    @torch.no_grad()
    def greedy(self, ids: Tensor, length: int, cached: bool = True) -> Tensor:
        """(B, n) -> (B, length): the likeliest next token, again and again."""
        config = self.transformer.config
        cache = Cache(config, len(ids), length, self.head.weight) if cached else None
        new = ids
        while ids.shape[1] < length:
            logits = self(new, cache)
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            new = ids[:, -1:] if cached else ids
        return ids


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it: (B, n, V), (B, n) -> scalar."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
