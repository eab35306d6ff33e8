"""Captions that are encoded once: the answers of a text encoder that is not trained.

A GAN's step reads its captions with a finished encoder. Once `KEPT` captions have been read, the
first `KEPT` different ones of the data set are encoded in one go, and a batch of such is looked up
from then on. What is looked up when is a function of data set and step alone, so that a run that is
resumed computes exactly what one does that was never stopped.
"""

from __future__ import annotations

import torch

from lineage.data.contract import CaptionedDataset
from lineage.text.contract import TextEncoder, TextFeatures

KEPT = 20_000  # captions
AT_ONCE = 256


class Reader:
    """`text.encode` for the captions of a data set, faster when `text` is not trained.

    Args:
        text: the encoder; it is not trained if none of its parameters asks for a gradient. What a
            padded one says is not kept: its features are large, and may not be cut to their words.
        dataset: whose captions to keep.
    """

    def __init__(self, text: TextEncoder, dataset: CaptionedDataset) -> None:
        self.text, self.dataset = text, dataset
        trained = any(p.requires_grad for p in text.parameters())
        self.frozen = not trained and not text.padded
        self._rows: dict[str, int] = {}
        self._kept: TextFeatures | None = None
        self._lengths: list[int] = []

    def read(self, captions: list[str], before: int) -> TextFeatures:
        """The features of `captions`; `before` captions have been read in earlier steps."""
        if not self.frozen or not self.text.width:
            return self.text.encode(captions)
        if self.text.training:  # with the system that it is part of
            self.text.eval()
        if before >= KEPT and not self._rows:
            self._rows = {caption: row for row, caption in enumerate(self._captions())}
        rows = [self._rows.get(caption, -1) for caption in captions]
        if -1 in rows:
            return self.text.encode(captions)
        if self._kept is None:
            self._kept = self._encoded(list(self._rows))
            self._lengths = self._kept.mask.sum(1).tolist()
        longest = max([self._lengths[row] for row in rows])
        return self._kept.shortened(longest)[torch.tensor(rows).to(self._kept.ids.device)]

    def _captions(self) -> list[str]:
        """The first `KEPT` different captions of the data set."""
        different: dict[str, None] = {}
        for caption in self.dataset.all_captions(KEPT):
            different[caption] = None
            if len(different) == KEPT:
                break
        return list(different)

    @torch.no_grad()
    def _encoded(self, captions: list[str]) -> TextFeatures:
        parts = range(0, len(captions), AT_ONCE)
        return TextFeatures.cat([self.text.encode(captions[i : i + AT_ONCE]) for i in parts])
