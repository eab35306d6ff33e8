"""A data set whose batches carry what a frozen network computes from each picture: codes, latents.

`CachedDataset` wraps a data set and adds one tensor to `Batch.extra`. It encodes each picture once,
as far as its cache has room. Wrappers may be nested.

Axes: B pictures of a batch, n of a chunk, S side in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lineage.data.contract import Batch, CaptionedDataset, Example
from lineage.threads import use_threads

CHUNK = 32
"""Number of pictures that are encoded at once."""


class FeatureCache:
    """Cache of per-image tensors, keyed by example id; threads may share it.

    Args:
        size: Number of tensors after which the cache is full; it never replaces one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tensors: dict[str, Tensor] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._tensors)

    def put(self, ids: Sequence[str], values: Tensor) -> None:
        """Copy the values (B, ...) of new ids into the cache, as long as there is room."""
        with self._lock:
            for example_id, value in zip(ids, values, strict=True):
                if example_id not in self._tensors and len(self) < self.size:
                    self._tensors[example_id] = value.clone()

    def get(self, example_id: str) -> Tensor | None:
        """The value of one id, or None if it is not in the cache."""
        return self._tensors.get(example_id)


class CachedDataset(CaptionedDataset):
    """A data set whose batches have `extra[name]`, computed from their pictures.

    Everything else is the wrapped data set's own. Pictures of an endless data set do not come
    again, and those of random crops come in other parts, so their values are not cached.

    Args:
        dataset: Data set to wrap.
        name: Key of the values in `Batch.extra`.
        encode: Function from pictures (n, 3, S, S) float32 in [-1, 1] on the CPU to values
            (n, ...) on any device. It is called without gradients, always with `CHUNK` pictures.
        cache_size: Number of pictures whose values are cached.
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        name: str,
        encode: Callable[[Tensor], Tensor],
        cache_size: int,
    ) -> None:
        self.dataset, self.extra_name, self.encode = dataset, name, encode
        self.name, self.split, self.size = dataset.name, dataset.split, dataset.size
        self.skipped, self.endless, self.varies = dataset.skipped, dataset.endless, dataset.varies
        self._cache_size = cache_size if self.comes_again else 0
        self.cache = FeatureCache(self._cache_size)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # a copy looks for attributes before it has any
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, int]:
        return self.dataset.shape

    @cached_property
    def parts(self) -> list[CaptionedDataset]:
        parts = self.dataset.parts
        if len(parts) == 1:
            return [self]
        shares = [self._cache_size * len(part) // len(self.dataset) for part in parts]
        return [
            CachedDataset(part, self.extra_name, self.encode, share)
            for part, share in zip(parts, shares, strict=True)
        ]

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index]

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        batch = self.dataset.batch(indices, epochs, seed)
        extra = {**batch.extra, self.extra_name: self.values(batch)}
        return dataclasses.replace(batch, extra=extra)

    @property
    def comes_again(self) -> bool:
        """Whether another visit of an id has the same picture."""
        return not (self.endless or self.varies)

    def values(self, batch: Batch) -> Tensor:
        """Values (B, ...) of the batch's pictures on the CPU, from the cache or computed."""
        if not self.comes_again:
            with use_threads(None):
                return encode_in_chunks(batch.image, self.encode)
        values = {i: value for i in batch.id if (value := self.cache.get(i)) is not None}
        rows = {i: row for row, i in enumerate(batch.id) if i not in values}
        if rows:
            with use_threads(1):  # a cached value has no step of its own
                encoded = encode_in_chunks(batch.image[list(rows.values())], self.encode)
            self.cache.put(list(rows), encoded)
            values.update(zip(rows, encoded, strict=True))
        return torch.stack([values[i] for i in batch.id])

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        return self.dataset.all_captions(limit)

    def showcase(self, count: int) -> list[Example]:
        return self.dataset.showcase(count)


@torch.no_grad()
def encode_in_chunks(images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Values (B, ...) of pictures (B, 3, S, S), encoded `CHUNK` at a time.

    The last chunk is filled up by repeating a picture: kernels round differently for different
    shapes, and the value of a picture must not depend on its batch.
    """
    values = []
    for chunk in images.split(CHUNK):
        filling = chunk[-1:].expand(CHUNK - len(chunk), -1, -1, -1)
        values.append(encode(torch.cat([chunk, filling]))[: len(chunk)].cpu())
    return torch.cat(values)
