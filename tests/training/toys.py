"""A text encoder for the systems that the tests of the loop and of the stages train."""

from __future__ import annotations

import torch

from lineage.text.contract import TextEncoder, TextFeatures


class ZeroEncoder(TextEncoder):
    """Every caption is one word of zeros."""

    word_dim = sentence_dim = 2

    def encode(self, captions: list[str]) -> TextFeatures:
        count = len(captions)
        ids = torch.ones(count, 1, dtype=torch.int64)
        return TextFeatures(torch.zeros(count, 1, 2), ids > 0, torch.zeros(count, 2), ids)

    def null(self, count: int) -> TextFeatures:
        return self.encode([""] * count)

    def tokens(self, caption: str) -> list[str]:
        return ["zero"]
