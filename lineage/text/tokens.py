"""What the encoders that are trained here have in common: a tokeniser, a table, and padding.

"No caption" is the caption without words: one `<null>` token, so that attention always has
something to look at.
"""

from __future__ import annotations

import torch
from torch import nn

from lineage.config import TextConfig
from lineage.text.contract import TextEncoder, TextFeatures
from lineage.text.tokenizer import NULL, PAD, Tokenizer


class TokenEncoder(TextEncoder):
    """What the encoders that are trained here have in common: tokeniser, word table, padding, cut.

    Subclasses implement `forward(ids, mask) -> (words, sentence)`.
    """

    in_order = False  # whether a word's vector knows no later word

    def __init__(self, config: TextConfig, tokenizer: Tokenizer, inputs: int = 0) -> None:
        super().__init__()
        self.config, self.tokenizer, self.width = config, tokenizer, config.width
        self.tokens = len(tokenizer) if self.in_order else 0
        self.table = nn.Embedding(len(tokenizer), inputs or config.width, padding_idx=PAD)
        nn.init.normal_(self.table.weight)
        with torch.no_grad():
            self.table.weight[PAD].zero_()

    def encode(self, captions: list[str]) -> TextFeatures:
        return self._features([self.tokenizer.encode(c)[: self.config.words] for c in captions])

    def null(self, count: int) -> TextFeatures:
        return self._features([[NULL]] * count)

    def pieces(self, caption: str) -> list[str]:
        ids = self.tokenizer.encode(caption)[: self.config.words]
        return [self.tokenizer.decode([number]).strip() or "<null>" for number in ids]

    def unknown(self, captions: list[str]) -> list[str]:
        return list(
            dict.fromkeys(w for caption in captions for w in self.tokenizer.unknown(caption))
        )

    def _features(self, rows: list[list[int]]) -> TextFeatures:
        length = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])  # (B, L)
        ids = ids.to(self.table.weight.device, non_blocking=True)
        mask = ids != PAD
        words, sentence = self(ids, mask)
        return TextFeatures(words, mask, sentence, ids)
