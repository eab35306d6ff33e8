"""`joined:NAME+NAME`: several text encoders as one, as SDXL and SD3 condition on them.

    channels  SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.1 and table 1): word l is
              [w_1(l); w_2(l); ...], the encoders' vectors along the channels; Dw is the sum.
    sequence  SD3 (Esser et al. 2024, arXiv:2403.03206, section 4): the words of one encoder after
              those of the other, narrower vectors filled up with zeros; Dw is the largest.

`encoder.join` chooses. The sentence is [s_1; s_2; ...] in both. All encoders have the sizes of
`encoder`; NAME@WIDTH gives one a width of its own, as two pretrained models need:

    text=joined:pretrained:FOLDER@768+pretrained:FOLDER@1280

Departures: SDXL's sentence is that of its second encoder alone. SD3 joins its two CLIP models along
the channels before T5 follows in the sequence, and takes the sentence from the CLIP models. In
`sequence` the words of all encoders come first and the padding of all of them last, so that the
mask stays one run of True; attention without position embeddings ignores that order.

Axes: B captions, L words, Dw width of a word, Ds width of a sentence.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import TextConfig, to_dict
from lineage.text.contract import Overflow, TextEncoder, TextFeatures, content_hash

JOINED = "joined:"


def split_names(name: str, width: int) -> list[tuple[str, int]]:
    """Name and width of each encoder of `joined:...`; `width` where the name states none."""
    parts = []
    for part in name.removeprefix(JOINED).split("+"):
        base, _, digits = part.rpartition("@")
        parts.append((base, int(digits)) if base and digits.isdecimal() else (part, width))
    return parts


class JoinedEncoder(TextEncoder):
    """Several encoders of the same captions, trained together.

    ids         Those of the encoders' words; in `channels`, of the first encoder with a word there.
    vocab_size  That of the encoders if it is the same for all, else 0.
    causal      True in `channels` if all encoders are causal. (In `sequence` the caption is
                repeated, so that there is nothing to predict.)
    padded      True if one encoder is: then all captions have the same length.

    Args:
        encoders: The encoders, in order.
        config: `join` says how the words are put together.
    """

    def __init__(self, encoders: list[TextEncoder], config: TextConfig) -> None:
        super().__init__()
        self.config, self.encoders = config, nn.ModuleList(encoders)
        self.channels = config.join == "channels"
        word_dims = [encoder.word_dim for encoder in encoders]
        self.word_dim = sum(word_dims) if self.channels else max(word_dims)
        self.sentence_dim = sum(encoder.sentence_dim for encoder in encoders)
        vocab_sizes = {encoder.vocab_size for encoder in encoders}
        self.vocab_size = vocab_sizes.pop() if len(vocab_sizes) == 1 else 0
        self.causal = self.channels and all(encoder.causal for encoder in encoders)
        self.padded = any(encoder.padded for encoder in encoders)

    def encode(self, captions: list[str]) -> TextFeatures:
        return self._join([encoder.encode(captions) for encoder in self._encoders()])

    def null(self, count: int) -> TextFeatures:
        return self._join([encoder.null(count) for encoder in self._encoders()])

    def tokens(self, caption: str) -> list[str]:
        """In `channels`, the different texts of one place with `/` between them."""
        rows = [encoder.tokens(caption) for encoder in self._encoders()]
        if not self.channels:
            return [token for row in rows for token in row]
        return ["/".join(dict.fromkeys(filter(None, place))) for place in zip_longest(*rows)]

    def check(self) -> None:
        for encoder in self._encoders():
            encoder.check()

    def num_words(self, caption: str) -> tuple[int, ...]:
        return sum((encoder.num_words(caption) for encoder in self._encoders()), ())

    def fingerprint(self) -> str:
        own = [type(self).__qualname__, to_dict(self.config)]
        return content_hash([*own, *(encoder.fingerprint() for encoder in self._encoders())])

    def unknown(self, captions: list[str], length: int | None = None) -> list[str]:
        """Words that no encoder has a token for."""
        first, *others = (encoder.unknown(captions, length) for encoder in self._encoders())
        return [word for word in first if all(word in other for other in others)]

    def overflow(self, caption: str, length: int | None = None) -> Overflow | None:
        """What no encoder reads."""
        ends = [encoder.overflow(caption, length) for encoder in self._encoders()]
        return min(ends, key=lambda end: len(end.text) if end else 0)

    def _encoders(self) -> list[TextEncoder]:
        return list(self.encoders)  # type: ignore[arg-type]

    def _join(self, parts: list[TextFeatures]) -> TextFeatures:
        if self.padded:
            parts = [p.padded(max(p.ids.shape[1], self.config.max_words)) for p in parts]
        words, mask, ids = (_along_channels if self.channels else _along_sequence)(parts)
        return TextFeatures(words, mask, torch.cat([p.sentence for p in parts], dim=1), ids)


def _along_channels(parts: list[TextFeatures]) -> tuple[Tensor, Tensor, Tensor]:
    """Words (B, L, sum Dw), mask and ids (B, L); L is that of the longest part."""
    length = max(part.ids.shape[1] for part in parts)
    parts = [part.padded(length) for part in parts]
    ids = torch.zeros_like(parts[0].ids)
    for part in reversed(parts):
        ids = torch.where(part.mask, part.ids, ids)
    mask = torch.stack([part.mask for part in parts]).any(0)
    return torch.cat([part.words for part in parts], dim=2), mask, ids


def _along_sequence(parts: list[TextFeatures]) -> tuple[Tensor, Tensor, Tensor]:
    """Words (B, sum L, max Dw), mask and ids (B, sum L)."""
    width = max(part.words.shape[2] for part in parts)
    words = torch.cat([F.pad(p.words, (0, width - p.words.shape[2])) for p in parts], dim=1)
    mask = torch.cat([part.mask for part in parts], dim=1)
    ids = torch.cat([part.ids * part.mask for part in parts], dim=1)
    order = (~mask).int().argsort(dim=1, stable=True)  # words first, padding last
    words = words.gather(1, order[..., None].expand_as(words))
    return words, mask.gather(1, order), ids.gather(1, order)
