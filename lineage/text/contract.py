"""The text contract: what a text encoder gives to every family.

Axes: B captions, L words (or subword tokens) of the longest caption in the batch, Dw width of a
word's vector, Ds width of a sentence's.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.characters import well_formed
from lineage.config import to_dict
from lineage.errors import UserError


def caption_list(captions: str | Sequence[str]) -> list[str]:
    """Captions in a list, all valid as UTF-8; one string is one caption, not its letters.

    Raises:
        UserError: they are not strings.
    """
    listed = [captions] if isinstance(captions, str) else captions
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise UserError(f"Captions must be a string or a list of strings, not {captions!r:.80}.")
    return [well_formed(text) for text in listed]


@dataclass
class TextFeatures:
    """B encoded captions.

    Attributes:
        words: (B, L, Dw) one vector a word.
        mask: (B, L) bool, True where there is a word, False on padding.
        sentence: (B, Ds) one vector a caption.
        ids: (B, L) int64 token numbers, 0 on padding.
    """

    words: Tensor
    mask: Tensor
    sentence: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TextFeatures:
        return TextFeatures(*map(change, (self.words, self.mask, self.sentence, self.ids)))

    def detach(self) -> TextFeatures:
        """The same features, through which no gradient flows."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device) -> TextFeatures:
        """The same features on `device`."""
        return self._map(lambda part: part.to(device))

    def __getitem__(self, rows: Tensor | slice) -> TextFeatures:
        """Features of some rows, by number (from 0), slice or mask, in the order of `rows`."""
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

    def truncated(self, length: int) -> TextFeatures:
        """The same features with the first `length` words of each caption."""
        return TextFeatures(
            self.words[:, :length], self.mask[:, :length], self.sentence, self.ids[:, :length]
        )

    def where(self, keep: Tensor, other: TextFeatures) -> TextFeatures:
        """Row b of these features where `keep[b]` (B,) is True, else row b of `other`."""
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
        """Rows of several batches, one after the other."""
        length = max(part.ids.shape[1] for part in parts)
        same = [part.padded(length) for part in parts]
        return TextFeatures(
            torch.cat([part.words for part in same]),
            torch.cat([part.mask for part in same]),
            torch.cat([part.sentence for part in same]),
            torch.cat([part.ids for part in same]),
        )


class Overflow(NamedTuple):
    """The end of a caption, which an encoder does not read.

    Attributes:
        limit: How much it reads, as in "32 words".
        text: The words that follow.
    """

    limit: str
    text: str


class TextEncoder(nn.Module):
    """The contract of every text encoder.

    Attributes:
        word_dim: Dw, width of a word's vector.
        sentence_dim: Ds, width of a sentence's vector.
        vocab_size: Number of different token ids; 0 if `ids` are no tokens to predict.
        causal: If true, a word's vector depends on no later word, so that a model may learn to
            predict the caption from it.
        padded: If true, every caption has the same number of words, padding among them, as models
            that attend to the padding were trained with.
    """

    word_dim: int
    sentence_dim: int
    vocab_size: int = 0
    causal: bool = False
    padded: bool = False

    @abstractmethod
    def encode(self, captions: list[str]) -> TextFeatures:
        """Features of B captions of any length and any words, the empty caption among them; one
        string is one caption.
        """

    @abstractmethod
    def null(self, count: int) -> TextFeatures:
        """Features of "no caption", `count` times, for guidance and caption dropout."""

    @abstractmethod
    def tokens(self, caption: str) -> list[str]:
        """The text of each of the L words of `caption`, as a label under a picture."""

    def check(self) -> None:
        """Raise `UserError` if files that the encoder needs are missing."""

    def num_words(self, caption: str) -> tuple[int, ...]:
        """Number of positions that `caption` takes, for each encoder that this one is made of.
        Captions with the same numbers are encoded together without more padding.
        """
        return (len(self.tokens(caption)),)

    def fingerprint(self) -> str:
        """Hash of all that the features depend on beside the caption: class, `config`, `tokenizer`
        and `state_dict`. An encoder that depends on more overrides this.
        """
        config, tokenizer = getattr(self, "config", None), getattr(self, "tokenizer", None)
        settings = [
            type(self).__qualname__,
            None if config is None else to_dict(config),
            None if tokenizer is None else tokenizer.to_json(),
        ]
        return content_hash(settings, self.state_dict())

    def unknown(self, captions: list[str], length: int | None = None) -> list[str]:
        """Words that are read but have no token, in order, each once.

        Args:
            length: Number of the words' vectors that are used; None for all.
        """
        return []

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        """The end of a caption that is too long to be read; None if all of it is read.

        Args:
            length: Number of the words' vectors that are used; None for all.
        """
        return None


class FrozenEncoder(TextEncoder):
    """A text encoder that is never trained: features of "no caption" are computed once."""

    _null: TextFeatures | None = None

    @torch.no_grad()
    def null(self, count: int) -> TextFeatures:
        """Features of the empty caption, `count` times."""
        device = device_of(self)
        if self._null is None or self._null.ids.device != device:
            self._null = self.encode([""])
        return self._null[torch.zeros(count, dtype=torch.int64, device=device)]


def device_of(text: TextEncoder) -> torch.device:
    """Device of an encoder's weights and buffers; the CPU if it has none."""
    tensors: Iterator[Tensor] = chain(text.parameters(), text.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def content_hash(settings: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Hash of JSON values and of tensors by name."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12)
    for name, tensor in sorted((tensors or {}).items()):
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
