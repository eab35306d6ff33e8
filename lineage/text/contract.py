"""The text contract: what a text encoder gives to every family.

Axes: B captions, L words (or subword tokens) of the longest caption in the batch, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TextFeatures:
    """B encoded captions.

    Attributes:
        words: (B, L, D) one vector a word.
        mask: (B, L) bool, True where there is a word, False on padding.
        sentence: (B, D) one vector a caption.
        ids: (B, L) int64 token numbers, 0 on padding.
    """

    words: Tensor
    mask: Tensor
    sentence: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, change: object) -> TextFeatures:
        parts = (self.words, self.mask, self.sentence, self.ids)
        return TextFeatures(*(change(part) for part in parts))  # type: ignore[operator]

    def detach(self) -> TextFeatures:
        """The same features, through which no gradient flows."""
        return self._map(Tensor.detach)

    def __getitem__(self, rows: Tensor | slice) -> TextFeatures:
        """The features of some rows, in the order asked for, by number (from 0) or mask."""
        if isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 1:
            return self._map(lambda part: part.index_select(0, rows))  # twice as fast
        return self._map(lambda part: part[rows])

    def padded(self, length: int) -> TextFeatures:
        """The same features with padding up to `length` words."""
        more = length - self.ids.shape[1]
        return TextFeatures(
            F.pad(self.words, (0, 0, 0, more)),
            F.pad(self.mask, (0, more)),
            self.sentence,
            F.pad(self.ids, (0, more)),
        )

    def shortened(self, length: int) -> TextFeatures:
        """The same features with the first `length` words of each caption."""
        return TextFeatures(
            self.words[:, :length], self.mask[:, :length], self.sentence, self.ids[:, :length]
        )

    def where(self, keep: Tensor, other: TextFeatures) -> TextFeatures:
        """Row b of these features where `keep[b]` (B,) is True, of `other` where it is not."""
        length = max(self.ids.shape[1], other.ids.shape[1])
        mine, others = self.padded(length), other.padded(length)
        column, plane = keep[:, None], keep[:, None, None]
        return TextFeatures(
            torch.where(plane, mine.words, others.words),
            torch.where(column, mine.mask, others.mask),
            torch.where(column, mine.sentence, others.sentence),
            torch.where(column, mine.ids, others.ids),
        )

    @staticmethod
    def cat(parts: list[TextFeatures]) -> TextFeatures:
        """The rows of several batches, one after the other."""
        length = max(part.ids.shape[1] for part in parts)
        same = [part.padded(length) for part in parts]
        return TextFeatures(
            torch.cat([part.words for part in same]),
            torch.cat([part.mask for part in same]),
            torch.cat([part.sentence for part in same]),
            torch.cat([part.ids for part in same]),
        )


class TextEncoder(nn.Module):
    """The contract of every text encoder.

    Attributes:
        width: D, the width of words and sentence alike.
        tokens: how many different tokens `ids` may hold, if the vector of a place tells nothing of
            the places after it, so that a model may learn to write captions too; else 0.
        padded: whether every caption has the same number of places, padding among them, as models
            that attend to the padding were trained with.
    """

    width: int
    tokens: int = 0
    padded: bool = False

    @abstractmethod
    def encode(self, captions: list[str]) -> TextFeatures:
        """B captions of any length and any words, the empty one among them -> their features."""

    @abstractmethod
    def null(self, count: int) -> TextFeatures:
        """The features of "no caption", `count` times: what guidance and caption dropout use."""

    @abstractmethod
    def pieces(self, caption: str) -> list[str]:
        """What each of the L places of `words` stands for, to be written under a picture."""

    def check(self) -> None:
        """Raises `UserError` if what the encoder takes from elsewhere is not there."""

    def unknown(self, captions: list[str]) -> list[str]:
        """The words of `captions` that the encoder has never seen, in order, each once."""
        return []


class NoText(TextEncoder):
    """What a stage that reads no captions has for an encoder: vectors of no width, no words."""

    width = 0

    def encode(self, captions: list[str]) -> TextFeatures:
        return self.null(len(captions))

    def null(self, count: int) -> TextFeatures:
        return TextFeatures(
            torch.zeros(count, 0, 0),
            torch.zeros(count, 0, dtype=torch.bool),
            torch.zeros(count, 0),
            torch.zeros(count, 0, dtype=torch.int64),
        )

    def pieces(self, caption: str) -> list[str]:
        return []
