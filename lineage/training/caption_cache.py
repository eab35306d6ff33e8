"""Features of captions that are encoded once, for a text encoder that is not trained.

The result of a step must not depend on what was encoded before it: a run that is resumed, or finds
a folder of features, ends with the same bits as one that encodes every caption. Kernels round
differently for other batches, so a caption's features must not depend on its neighbours:

    shape       On a CPU, captions are encoded one at a time: some kernels round a row differently
                at another place in the batch. On a GPU they are encoded in chunks, each of captions
                with the same number of words (all captions, for a padded encoder), so that no
                padding is added. The number of captions of a chunk is a function of their number of
                words (`chunk_size`); a chunk that is not full repeats its last caption.
    threads     One on a CPU, however many the step uses: some kernels split sums among threads.
    precision   float32, without autocast, as in sampling.

Axes: B captions, L words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor

from lineage.files import expanded
from lineage.text.contract import TextEncoder, TextFeatures, content_hash, device_of
from lineage.threads import use_threads
from lineage.training.caption_store import CaptionStore

CACHE_BYTES = 10**9
"""Number of bytes of features in memory, about; captions that find no room are encoded, or read
from the folder, each time."""

CHUNK_WORDS = {"cpu": 1}
"""Number of words that are encoded at once, by the kind of device; one caption at least."""
GPU_CHUNK_WORDS = 1024


class CaptionCache:
    """`text.encode`, faster when `text` is not trained: each caption is encoded once.

    Args:
        text: Text encoder, trained if one of its parameters requires a gradient; None for a system
            that reads no captions.
        folder: Folder that keeps the features for other runs, in full precision; empty for none.
    """

    def __init__(self, text: TextEncoder | None, folder: str = "") -> None:
        self.text = text
        self.frozen = text is not None and not any(p.requires_grad for p in text.parameters())
        self.folder = folder
        self._table = FeatureTable(CACHE_BYTES)
        self._store: CaptionStore | None = None
        self._started = False

    def encode(self, captions: list[str]) -> TextFeatures:
        """Features of `captions`; None for a system that reads none."""
        if self.text is None:
            return cast(TextFeatures, None)
        if not self.frozen:
            return self.text.encode(captions)
        if self.text.training:  # with the system that it is part of
            self.text.eval()
        if not self._started:
            self._start(self.text)
        others: dict[str, TextFeatures] = {}
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._table]
        for caption, row in self._find(new) if new else ():
            if not self._table.put(caption, row):
                others[caption] = row
        if not others:
            return self._table.take(captions)
        in_table = [caption for caption in captions if caption in self._table]
        rows = TextFeatures.cat(
            [*([self._table.take(in_table)] if in_table else []), *others.values()]
        )
        number = {caption: row for row, caption in enumerate([*in_table, *others])}
        return rows[torch.tensor([number[caption] for caption in captions]).to(rows.ids.device)]

    def save(self) -> None:
        """Write what the folder lacks."""
        if self._store is not None:
            self._store.save()

    def _start(self, text: TextEncoder) -> None:
        """Before the first caption, when the weights are those of the run: features of "no caption"
        as all others are made, and the folder.
        """
        self._started = True
        device = device_of(text)
        with reproducible(device):
            text.null(1)
        if self.folder:
            made_by = [
                torch.__version__,
                device.type,
                torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
                CHUNK_WORDS.get(device.type, GPU_CHUNK_WORDS),
            ]
            key = content_hash([text.fingerprint(), *made_by])
            self._store = CaptionStore(expanded(self.folder, "train.text_cache") / key)

    def _find(self, captions: list[str]) -> Iterator[tuple[str, TextFeatures]]:
        """Each caption with its row of features, (1, L), from the folder or encoded."""
        assert self.text is not None
        missing = []
        for caption in captions:
            row = self._store.get(caption) if self._store is not None else None
            if row is None:
                missing.append(caption)
            else:
                yield caption, row.to(device_of(self.text))
        for caption, row in encode_apart(self.text, missing):
            if self._store is not None:
                self._store.put(caption, row)
            yield caption, row


# --- encoding -------------------------------------------------------------------------------------


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """One thread, float32 and no gradient, whatever the step uses."""
    threads = use_threads(1) if device.type == "cpu" else nullcontext()
    with threads, torch.autocast(device.type, enabled=False), torch.no_grad():
        yield


def chunk_size(num_words: tuple[int, ...], device: torch.device) -> int:
    """Number of captions that are encoded together."""
    words = CHUNK_WORDS.get(device.type, GPU_CHUNK_WORDS)
    return max(1, words // max(1, sum(num_words)))


def encode_apart(text: TextEncoder, captions: list[str]) -> Iterator[tuple[str, TextFeatures]]:
    """Each caption with its features (1, L), which are a function of that caption alone."""
    device = device_of(text)
    same: dict[tuple[int, ...], list[str]] = {}
    for caption in captions:
        same.setdefault(text.num_words(caption), []).append(caption)
    for num_words, group in same.items():
        size = chunk_size(num_words, device)
        for first in range(0, len(group), size):
            chunk = group[first : first + size]
            with reproducible(device):
                features = text.encode(chunk + chunk[-1:] * (size - len(chunk)))
            lengths = features.mask.sum(1).tolist()
            for row, caption in enumerate(chunk):
                own = features[row : row + 1]
                yield caption, own if text.padded else own.truncated(lengths[row])


class FeatureTable:
    """Features of captions in memory, one row each, that grow as long as there is room.

    Args:
        size: Number of bytes after which it is full, about; it never replaces a row.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[str, int] = {}
        self._lengths: list[int] = []
        self._features: TextFeatures | None = None

    def __contains__(self, caption: str) -> bool:
        return caption in self._rows

    def put(self, caption: str, row: TextFeatures) -> bool:
        """Copy the features (1, L) of a new caption into the table; False if there is no room."""
        count, length = len(self._rows), row.ids.shape[1]
        table = row[torch.zeros_like(row.ids[0, :1])] if self._features is None else self._features
        if length > table.ids.shape[1]:
            table = table.padded(length)
        if count == len(table):
            room = min(2 * count, self.size // (_num_bytes(table) // count))
            if room <= count:
                return False
            table = table[torch.arange(room, device=table.ids.device) % count]
        self._features = table
        for whole, own in zip(_parts(table), _parts(row.padded(table.ids.shape[1])), strict=True):
            whole[count] = own[0]
        self._rows[caption] = count
        self._lengths.append(length)
        return True

    def take(self, captions: list[str]) -> TextFeatures:
        """Copies of the features of captions in the table, as long as the longest."""
        assert self._features is not None
        rows = [self._rows[caption] for caption in captions]
        longest = max([self._lengths[row] for row in rows])
        index = torch.tensor(rows).to(self._features.ids.device)
        return self._features.truncated(longest)[index]


def _parts(features: TextFeatures) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return features.words, features.mask, features.sentence, features.ids


def _num_bytes(features: TextFeatures) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(features))
