"""Base of the encoders that are trained with a system: tokeniser, embedding table, padding.

The caption without words is one `<null>` token, so that attention always has a key.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lineage.config import TextConfig
from lineage.text.contract import Overflow, TextEncoder, TextFeatures, caption_list
from lineage.text.tokenizer import NULL, PAD, Tokenizer

UNITS = {"word": "words", "bpe": "tokens", "clip": "tokens"}
"""What the tokens of each kind of tokeniser are called."""


class TokenEncoder(TextEncoder):
    """Captions -> token ids, cut after `max_words` and padded; a subclass encodes the ids.

    Args:
        config: Sizes of the encoder.
        tokenizer: Tokeniser of the run.
        embed_dim: Width of the embedding table; 0 is `config.width`.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, embed_dim: int = 0) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.word_dim = self.sentence_dim = config.width
        self.vocab_size = len(tokenizer)
        self.token_emb = nn.Embedding(self.vocab_size, embed_dim or config.width, padding_idx=PAD)
        nn.init.normal_(self.token_emb.weight)
        with torch.no_grad():
            self.token_emb.weight[PAD].zero_()

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask -> words (B, L, Dw), sentence (B, Ds)."""

    def encode(self, captions: list[str]) -> TextFeatures:
        return self._features([self._ids(caption) for caption in caption_list(captions)])

    def null(self, count: int) -> TextFeatures:
        return self._features([[NULL]] * count)

    def tokens(self, caption: str) -> list[str]:
        return [self.tokenizer.decode([i]).strip() or "<null>" for i in self._ids(caption)]

    def unknown(self, captions: list[str], length: int | None = None) -> list[str]:
        length = min(length or self.config.max_words, self.config.max_words)
        words = (
            word
            for caption in caption_list(captions)
            for word in self.tokenizer.unknown(caption, length)
        )
        return list(dict.fromkeys(words))

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        length = min(length or self.config.max_words, self.config.max_words)
        text = self.tokenizer.rest(caption, length)
        return Overflow(f"{length} {UNITS[self.tokenizer.kind]}", text) if text else None

    def _ids(self, caption: str) -> list[int]:
        return self.tokenizer.encode(caption)[: self.config.max_words]

    def _features(self, rows: list[list[int]]) -> TextFeatures:
        length = self.config.max_words if self.padded else max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])  # (B, L)
        ids = ids.to(self.token_emb.weight.device, non_blocking=True)
        mask = ids != PAD
        words, sentence = self(ids, mask)
        return TextFeatures(words, mask, sentence, ids)
