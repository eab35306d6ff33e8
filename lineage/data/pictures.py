"""Pictures from files: what all data sets on a disk share.

A reader (`folder`, `imagefolder`, ...) lists `Record`s. `PictureDataset` decodes the pictures of
one split once, for this run and later ones, and stores them as bytes, so that a batch is one
indexed copy (`pixels`). Of more than `STREAM_FROM` pictures, each is decoded when it is due.

Axes: N pictures, B of a batch, 3 channels, H and W pixels, which are `size` but in `parts`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.characters import plain
from lineage.data.buckets import members
from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped, caption_number, to_unit
from lineage.data.decoding import MAX_BYTES, decode, shown_size, why_broken
from lineage.data.pixels import SHAPES, key_of, open_store, state_of
from lineage.data.records import Record, read_captions
from lineage.data.splits import split_name
from lineage.errors import UserError
from lineage.files import read_regular, read_span

SIZES = range(8, 1025)
STREAM_FROM = 50_000
"""Number of pictures above which none is decoded before it is due."""
CHUNK = 1_000
"""Number of pictures that are handed to the threads at once."""
PROGRESS_FROM = 2_000
"""Number of pictures above which loading shows a progress bar."""

MARGIN = 76 / 64
"""Side of a stored picture as a multiple of the data set's size, where crops are random (StackGAN:
76 pixels for pictures of 64)."""


class PictureDataset(CaptionedDataset):
    """The pictures of one split.

    Args:
        name: Spec that loads the data set again.
        root: Folder of the data set.
        records: Records of all splits; their ids are unique.
        split: Name of one of the records' splits, or `all`.
        size: Side of the square pictures in pixels.
        skipped: Files that the reader left out; pictures that cannot be decoded are added.
        layout_hint: Layout that the folder should have; part of the error for an empty data set.
        crop: How a picture becomes a square: `centre`, `pad`, `box`, or `random`, which takes
            another part of the centred square at each visit, and its middle elsewhere; or
            `buckets`, which has the centred square, and `parts` of other shapes for training.

    Attributes:
        records: Records of the split, in order; unless `streamed`, those with a good picture.
        labels: (N,) int64, or None if a record lacks a label.
        has_files: If true, each picture is a file, or a part of one, that can be copied.
        streamed: If true, a picture is decoded when it is due. In place of a record without a
            picture or a caption that can be read comes the next one that has both.

    `Example.meta` is the record's, with `source` (path of the picture in the folder) and `split`.

    Raises:
        UserError: The split or the size does not exist, or nothing can be loaded.
    """

    has_files = True

    def __init__(
        self,
        name: str,
        root: Path,
        records: Sequence[Record],
        split: str = "train",
        size: int = 32,
        skipped: Iterable[Skipped] = (),
        layout_hint: str = "",
        crop: str = "centre",
    ) -> None:
        if size not in SIZES:
            raise UserError(f"size={size} must be between {SIZES[0]} and {SIZES[-1]} pixels.")
        self.name, self.root, self.size, self.crop = name, root, size, crop
        self.varies = crop == "random"
        self.split = split_name(split)
        self.skipped, self.layout_hint = list(skipped), layout_hint
        if not records:
            raise EmptyDatasetError(name, self.skipped, layout_hint)
        rows = self._of_split(records)
        side = math.ceil(size * MARGIN) if self.varies else size
        parts = ((record.path, self._part(record)) for record in records)
        self._key = key_of(parts, root, side=side, pad=crop == "pad")
        large = len(rows) > STREAM_FROM
        self._store = open_store(self._key, len(records), (side, side), required=not large)
        self.records = [records[row] for row in rows]
        self._rows = np.array(rows)
        self.streamed = large or self._store.rows < len(records)
        self._broken: set[int] = set()
        if not self.streamed:
            self.decode_all()

    def _part(self, record: Record) -> object:
        """What is taken of the record's file; other parts have other pixels."""
        return record.span, record.box

    def _of_split(self, records: Sequence[Record]) -> list[int]:
        rows = [row for row, r in enumerate(records) if self.split in ("all", r.split)]
        if not rows:
            counts = Counter(r.split for r in records)
            has = ", ".join(f"{plain(split)} ({count:,})" for split, count in counts.items())
            raise UserError(f"{self.name} has no split {self.split!r}: it has {has}, and 'all'.")
        return rows

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size) if self.varies else self._store.shape

    @cached_property
    def parts(self) -> list[CaptionedDataset]:
        if self.crop != "buckets":
            return [self]
        key = hashlib.blake2b(
            self._rows.tobytes(), key=self._key.encode(), digest_size=16
        ).hexdigest()
        folder = self._store.folder
        path = None if folder is None else folder / f"{SHAPES}{key}"
        shapes = members(self.size, len(self), self.file_size, path)
        return [self._part_of(rows, shape, key) for shape, rows in shapes.items()]

    def _part_of(self, rows: NDArray[np.int64], shape: tuple[int, int], key: str) -> PictureDataset:
        """The pictures at some indices, in one shape."""
        part = copy.copy(self)
        for name in ("parts", "labels"):
            part.__dict__.pop(name, None)
        part.crop, part.records, part._broken = "centre", [self.records[i] for i in rows], set()
        part._rows = self._rows[rows]
        if shape == self._store.shape:
            return part
        part._rows = np.arange(len(rows))
        part._key = hashlib.blake2b(f"{key} {shape}".encode(), digest_size=16).hexdigest()
        part._store = open_store(part._key, len(rows), shape, required=not self.streamed)
        part.streamed = self.streamed or part._store.rows < len(rows)
        if not part.streamed:
            part.decode_all()
        return part

    @cached_property
    def labels(self) -> Tensor | None:
        labels = [record.label for record in self.records]
        return None if None in labels else torch.tensor(labels, dtype=torch.int64)

    # --- decoding ---------------------------------------------------------------------------------

    def decode_all(self, count: int | None = None) -> None:
        """Decode every picture and read every caption, and leave out the records without them.

        Args:
            count: If it is a number, only so many records are read, and the rest is dropped.

        Raises:
            UserError: No record has both.
        """
        self.records, self._rows = self.records[:count], self._rows[:count]
        due = self._store.missing(self._rows)
        pixels = iter(self._decode(due, len(due) > PROGRESS_FROM))
        rest = set(due)
        good = []
        for index, record in enumerate(self.records):
            fault = next(pixels) if index in rest else None
            captions = self.captions_of(index)
            faults = [one for one in (fault, captions) if isinstance(one, Skipped)]
            self.skipped += faults[:1]
            if not faults and not isinstance(captions, Skipped):
                good.append(index)
                if record.text:
                    self.records[index] = replace(record, captions=captions, text="")
        self.records, self._rows = [self.records[i] for i in good], self._rows[good]
        self._broken.clear()
        self.streamed = self._store.rows < self._store.count
        self.__dict__.pop("labels", None)
        if not self.records:
            raise EmptyDatasetError(self.name, self.skipped, self.layout_hint)

    def _decode(
        self, indices: Sequence[int], progress: bool = False
    ) -> Iterator[NDArray[np.uint8] | Skipped]:
        """Pixels of pictures, which are stored too, or why there are none."""
        if len(indices) == 1:
            yield self._stored(indices[0])
            return
        pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        bar = tqdm(
            total=len(indices),
            desc=f"reading {plain(self.name)}",
            disable=not progress or None,  # None: only on a terminal
            unit=" pictures",
            leave=False,
        )
        try:
            with bar:
                for first in range(0, len(indices), CHUNK):
                    for pixels in pool.map(self._stored, indices[first : first + CHUNK]):
                        bar.update()
                        yield pixels
        finally:
            pool.shutdown(cancel_futures=True)

    def _stored(self, index: int) -> NDArray[np.uint8] | Skipped:
        """Decode one picture and store it."""
        pixels = self._decoded(index)
        if not isinstance(pixels, Skipped):
            self._store.put(int(self._rows[index]), pixels)
        return pixels

    def _decoded(self, index: int) -> NDArray[np.uint8] | Skipped:
        """Pixels of one picture from its file, or why there are none."""
        record = self.records[index]
        try:
            file = self._file(record)
            return decode(file, self._store.shape, record.box, whole=self.crop == "pad")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            if record.span is not None:
                return Skipped(f"{record.path}: {record.id}", why_broken(error, None))
            return Skipped(record.path, why_broken(error, self.root / record.path))

    def _visited(self, indices: Sequence[int]) -> tuple[list[int], Tensor, list[tuple[str, ...]]]:
        """The indices, with pictures (B, 3, H, W) and captions; of a streamed data set, each one
        without them replaced by the next that has both.

        Raises:
            UserError: No record has both.
        """
        indices = [range(len(self))[index] for index in indices]
        if not self.streamed:
            pixels = torch.from_numpy(self._store.take(self._rows[indices]))
            return indices, pixels, [self.records[i].captions for i in indices]
        known: dict[int, NDArray[np.uint8] | Skipped | None] = {
            i: self._store.get(int(self._rows[i])) for i in dict.fromkeys(indices)
        }
        due = [i for i, stored in known.items() if stored is None and i not in self._broken]
        known.update(zip(due, self._decode(due), strict=True))
        rows = [self._next_sound(index, known) for index in indices]
        pictures = torch.from_numpy(np.stack([pixels for _, pixels, _ in rows]))
        return [index for index, _, _ in rows], pictures, [captions for _, _, captions in rows]

    def _next_sound(
        self, first: int, known: Mapping[int, NDArray[np.uint8] | Skipped | None]
    ) -> tuple[int, NDArray[np.uint8], tuple[str, ...]]:
        """The first record from `first` on that has a picture and captions, with both."""
        for step in range(len(self)):
            index = (first + step) % len(self)
            if index in self._broken:
                continue
            pixels = known.get(index)
            if pixels is None:
                pixels = self._store.get(int(self._rows[index]))
            if pixels is None:
                pixels = self._stored(index)
            captions = self.captions_of(index)
            if not isinstance(pixels, Skipped) and not isinstance(captions, Skipped):
                return index, pixels, captions
            self._broken.add(index)
            self.skipped.append(pixels if isinstance(pixels, Skipped) else captions)  # type: ignore
        raise EmptyDatasetError(self.name, self.skipped, "")

    def _file(self, record: Record) -> Path | bytes:
        """A record's picture file, or its bytes where the file holds others too."""
        path = self.root / record.path
        return path if record.span is None else read_span(path, *record.span)

    def source(self, index: int) -> bytes:
        """Bytes of a record's picture file. Raises `OSError`."""
        file = self._file(self.records[index])
        return file if isinstance(file, bytes) else read_regular(file, MAX_BYTES)

    def file_size(self, index: int) -> tuple[int, int]:
        """Width and height of a record's upright picture in its file. Raises as `decode`."""
        return shown_size(self._file(self.records[index]))

    def captions_of(self, index: int) -> tuple[str, ...] | Skipped:
        """Captions of a record, or why they cannot be read."""
        record = self.records[index]
        return record.captions or read_captions(self.root, record.text)

    # --- the contract -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        (index,), images, (captions,) = self._visited([index])
        record = self.records[index]
        return Example(
            id=record.id,
            image=(self._middle(images[0]) if self.varies else images[0]).clone(),
            captions=captions,
            label=record.label,
            meta={"source": plain(record.path)} | record.meta | {"split": record.split},
        )

    def __iter__(self) -> Iterator[Example]:
        """Every example once: one that is replaced in `batch` is left out here."""
        for index in range(len(self)):
            example = self[index]
            if example.id == self.records[index].id:
                yield example

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        indices, images, captions = self._visited(indices)
        ids = [self.records[i].id for i in indices]
        if self.varies:
            visits = zip(images, epochs, ids, strict=True)
            images = torch.stack(
                [self._visit(image, f"{seed}/{epoch}/{name}") for image, epoch, name in visits]
            )
        return Batch(
            to_unit(images),
            [
                own[caption_number(seed, epoch, name, len(own))]
                for own, epoch, name in zip(captions, epochs, ids, strict=True)
            ],
            None if self.labels is None else self.labels[indices],
            ids,
        )

    def _middle(self, image: Tensor) -> Tensor:
        """The centred part (3, S, S) of a picture with its margin."""
        edge = (image.shape[-1] - self.size) // 2
        return image[:, edge : edge + self.size, edge : edge + self.size]

    def _visit(self, image: Tensor, visit: str) -> Tensor:
        """The part (3, S, S) of a picture that a visit shows: a function of `visit` alone."""
        digest = hashlib.blake2b(visit.encode(), digest_size=8).digest()
        number, places = int.from_bytes(digest, "little"), image.shape[-1] - self.size + 1
        top, left = number % places, number // places % places
        return image[:, top : top + self.size, left : left + self.size]

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        for index in range(min(limit, len(self))):
            captions = self.captions_of(index)
            if not isinstance(captions, Skipped):
                yield from captions

    def fingerprint(self) -> str:
        """Hash of ids, captions, labels and pixels; equal hashes mean equal training data.

        Of a streamed data set, in place of captions and pixels that are not read yet, names, sizes
        and dates of their files.
        """
        digest = hashlib.blake2b(digest_size=16)
        for record, row in zip(self.records, self._rows, strict=True):
            texts = [record.id, *record.captions]
            texts += [] if record.label is None else [f"label {record.label}"]
            if self.streamed:
                files = [os.path.join(self.root, p) for p in (record.path, record.text) if p]
                texts += [repr(self._part(record)), *map(state_of, files)]
            for text in texts:
                raw = text.encode("utf-8", "surrogateescape")
                digest.update(len(raw).to_bytes(4, "little") + raw)
            digest.update(b"\0\0\0\0")
            if not self.streamed:
                digest.update(self._store.take(row).tobytes())
        return digest.hexdigest()


class EmptyDatasetError(UserError):
    """A data set without a usable picture; `skipped` has the reason for each file."""

    def __init__(self, name: str, skipped: Sequence[Skipped], layout_hint: str) -> None:
        self.skipped, self.layout_hint = list(skipped), layout_hint
        reason = "it contains no picture"
        if skipped:
            others = f" (and {len(skipped) - 1:,} more left out)" if len(skipped) > 1 else ""
            reason = f"{skipped[0].path}: {skipped[0].reason}{others}"
        message = f"Nothing can be loaded from {plain(name)}: {reason}; {layout_hint}"
        super().__init__(message.rstrip("; "))
