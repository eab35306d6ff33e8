"""Text encoders of diffusion models that read the padding too: every caption is `words` tokens
long, each token sees all others, and what stands behind the last word is there to be attended to.

    bert   the encoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, table 17): a
           transformer after BERT's tokens, trained with the denoiser. It has no sentence; the mean
           of its words stands for one.
    glide  the encoder of GLIDE (Nichol et al. 2021, arXiv:2112.10741, section 4): padding is a
           vector of its own at each place, and the sentence is the last place.

Axes: B captions, L words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.nn.attention import Attention
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import PAD, Tokenizer
from lineage.text.tokens import TokenEncoder

BERT_HEADS, BERT_HEAD = 8, 64  # whatever the width


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `attention` is one of a sequence to itself."""

    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PaddedEncoder(TokenEncoder):
    """Tokens at their places, transformer blocks, a last norm."""

    padded = True

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        width = config.width
        self.position = nn.Parameter(torch.randn(config.words, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width, self.attention()) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def attention(self) -> Attention:
        """One block's attention."""
        return Attention(self.config.width, self.config.heads)

    def _features(self, rows: list[list[int]]) -> TextFeatures:
        found = [row + [PAD] * (self.config.words - len(row)) for row in rows]
        ids = torch.tensor(found).to(self.table.weight.device, non_blocking=True)
        words, sentence = self(ids, ids != PAD)
        return TextFeatures(words, ids != PAD, sentence, ids)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        # the padding's vector is learnt too, so the table is looked up without `padding_idx`
        return F.embedding(ids, self.table.weight) + self.position

    def sentence(self, words: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return (words * share[..., None]).sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, D), sentence (B, D)."""
        x = self.embed(ids, mask)
        for block in self.blocks:
            x = block(x)
        words = self.norm(x)
        return words, self.sentence(words, mask)


class BertEncoder(PaddedEncoder):
    """Latent diffusion's: heads of 64 without biases."""

    def attention(self) -> Attention:
        return Attention(self.config.width, BERT_HEADS, inner=BERT_HEADS * BERT_HEAD, bias=False)


class GlideEncoder(PaddedEncoder):
    """GLIDE's: padding is a vector for each place."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.padding = nn.Parameter(torch.randn(config.words, config.width) * 0.01)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], super().embed(ids, mask), self.padding)

    def sentence(self, words: Tensor, mask: Tensor) -> Tensor:
        return words[:, -1]
