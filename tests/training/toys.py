"""What the tests of the loop and of the stages train: systems that read no captions."""

from __future__ import annotations

import torch

from lineage.text.contract import TextEncoder, TextFeatures


class NoText(TextEncoder):
    """Every caption is one word of zeros."""

    width = 2

    def encode(self, captions: list[str]) -> TextFeatures:
        count = len(captions)
        ids = torch.ones(count, 1, dtype=torch.int64)
        return TextFeatures(torch.zeros(count, 1, 2), ids > 0, torch.zeros(count, 2), ids)

    def null(self, count: int) -> TextFeatures:
        return self.encode([""] * count)
