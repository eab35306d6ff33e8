"""Text encoders of diffusion models that attend to the padding: `bert` and `glide`.

Every caption has `max_words` tokens, and each token attends to all others. The vectors behind the
last word are part of the result, for networks that attend to them.

    bert   Encoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, table 17): a
           transformer on BERT's tokens, trained with the denoiser. It has no sentence vector; the
           mean of its words takes that place.
    glide  Encoder of GLIDE (Nichol et al. 2021, arXiv:2112.10741, section 4): the padding is a
           learnt vector of each position, and the sentence is the vector at the last position.

Axes: B captions, L = `max_words` positions, D width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.nn.transformer import TransformerBlock
from lineage.text.token_encoder import TokenEncoder
from lineage.text.tokenizer import Tokenizer

BERT_HEADS, BERT_HEAD_DIM = 8, 64
"""Heads of latent diffusion's encoder at every width."""


class PaddedEncoder(TokenEncoder):
    """Embeddings of tokens and positions, transformer blocks, a final norm."""

    padded = True

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.pos_emb = nn.Parameter(torch.randn(config.max_words, config.width) * 0.01)
        self.blocks = nn.ModuleList(self.block() for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def num_words(self, caption: str) -> tuple[int, ...]:
        return (self.config.max_words,)

    @abstractmethod
    def block(self) -> TransformerBlock:
        """A new block."""

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and mask -> (B, L, D)."""
        # `self.token_emb(ids)` would give the vector of the padding no gradient
        return F.embedding(ids, self.token_emb.weight) + self.pos_emb

    @abstractmethod
    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        """Words (B, L, D) and mask -> sentence (B, D)."""

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids, mask)
        for block in self.blocks:
            x = block(x)
        words = self.norm(x)
        return words, self.pool(words, mask)


class BertEncoder(PaddedEncoder):
    """Encoder of latent diffusion."""

    def block(self) -> TransformerBlock:
        inner_dim = BERT_HEADS * BERT_HEAD_DIM
        return TransformerBlock(self.config.width, BERT_HEADS, inner_dim=inner_dim, bias=False)

    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return (words * share[..., None]).sum(1)


class GlideEncoder(PaddedEncoder):
    """Encoder of GLIDE."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.pad_emb = nn.Parameter(torch.randn(config.max_words, config.width) * 0.01)

    def block(self) -> TransformerBlock:
        return TransformerBlock(self.config.width, self.config.num_heads)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], super().embed(ids, mask), self.pad_emb)

    def pool(self, words: Tensor, mask: Tensor) -> Tensor:
        return words[:, -1]
