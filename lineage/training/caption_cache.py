"""Features of captions that are encoded once, for a text encoder that is not trained.

A GAN's step encodes its captions with a finished encoder. After `CACHE_SIZE` captions, the first
`CACHE_SIZE` different ones of the data set are encoded together, and later batches are looked up.
Which step looks up which caption is a function of data set and step alone, so that a resumed run
computes exactly what an unstopped one does.
"""

from __future__ import annotations

import torch

from lineage.data.contract import CaptionedDataset
from lineage.text.contract import TextEncoder, TextFeatures

CACHE_SIZE = 20_000  # captions
CHUNK = 256  # captions encoded at once


class CaptionCache:
    """`text.encode` for the captions of a data set, faster when `text` is not trained.

    Args:
        text: Text encoder; it is trained if one of its parameters requires a gradient. Features of
            a padded encoder are not cached: they are large, and may not be cut to their words.
        dataset: Data set whose captions are cached.
    """

    def __init__(self, text: TextEncoder, dataset: CaptionedDataset) -> None:
        self.text, self.dataset = text, dataset
        trained = any(p.requires_grad for p in text.parameters())
        self.frozen = not trained and not text.padded
        self._rows: dict[str, int] = {}
        self._features: TextFeatures | None = None
        self._lengths: list[int] = []

    def encode(self, captions: list[str], num_before: int) -> TextFeatures:
        """Features of `captions`.

        Args:
            num_before: Number of captions that earlier steps have encoded.
        """
        if not self.frozen:
            return self.text.encode(captions)
        if self.text.training:  # with the system that it is part of
            self.text.eval()
        if num_before >= CACHE_SIZE and not self._rows:
            self._rows = {caption: row for row, caption in enumerate(self._first_captions())}
        rows = [self._rows.get(caption, -1) for caption in captions]
        if -1 in rows:
            return self.text.encode(captions)
        if self._features is None:
            self._features = self._encode_all(list(self._rows))
            self._lengths = self._features.mask.sum(1).tolist()
        longest = max([self._lengths[row] for row in rows])
        index = torch.tensor(rows).to(self._features.ids.device)
        return self._features.truncated(longest)[index]

    def _first_captions(self) -> list[str]:
        """The first `CACHE_SIZE` different captions of the data set."""
        different: dict[str, None] = {}
        for caption in self.dataset.all_captions(CACHE_SIZE):
            different[caption] = None
            if len(different) == CACHE_SIZE:
                break
        return list(different)

    @torch.no_grad()
    def _encode_all(self, captions: list[str]) -> TextFeatures:
        parts = range(0, len(captions), CHUNK)
        return TextFeatures.cat([self.text.encode(captions[i : i + CHUNK]) for i in parts])
