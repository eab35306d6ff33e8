"""Pictures from files: what all data sets on a disk share.

A reader (`folder`, `imagefolder`, ...) lists `Record`s. `PictureDataset` decodes the pictures of
one split once, for this run and later ones, and stores them as bytes, so that a batch is one
indexed copy (`pixels`). Of more than `STREAM_FROM` pictures, each is decoded when it is due.

Axes: N pictures, B of a batch, 3 channels, S = `size`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.characters import plain
from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped, caption_number, to_unit
from lineage.data.decoding import decode, why_broken
from lineage.data.pixels import key_of, open_store
from lineage.data.records import Record, read_captions
from lineage.data.splits import split_name
from lineage.errors import UserError
from lineage.files import read_span

SIZES = range(8, 1025)
STREAM_FROM = 50_000
"""Number of pictures above which none is decoded before it is due."""
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
            another part of the centred square at each visit, and its middle elsewhere.

    Attributes:
        records: Records of the split, in order; unless `streamed`, those with a good picture.
        labels: (N,) int64, or None if a record lacks a label.
        streamed: If true, a picture is decoded when it is due. In place of a record without a
            picture or a caption that can be read comes the next one that has both.

    `Example.meta` is the record's, with `source` (path of the picture in the folder) and `split`.

    Raises:
        UserError: The split or the size does not exist, or nothing can be loaded.
    """

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
        self.skipped = list(skipped)
        if not records:
            raise EmptyDatasetError(name, self.skipped, layout_hint)
        rows = self._of_split(records)
        side = math.ceil(size * MARGIN) if self.varies else size
        files = ((record.path, (record.span, record.box)) for record in records)
        self._key = key_of(files, root, side=side, pad=crop == "pad")
        self._store = open_store(self._key, len(records), side)
        self.records = [records[row] for row in rows]
        self._rows = np.array(rows)
        self.streamed = len(rows) > STREAM_FROM
        self._broken: set[int] = set()
        if not self.streamed:
            self.decode_all()
        if not self.records:
            raise EmptyDatasetError(name, self.skipped, layout_hint)

    def _of_split(self, records: Sequence[Record]) -> list[int]:
        rows = [row for row, r in enumerate(records) if self.split in ("all", r.split)]
        if not rows:
            counts = Counter(r.split for r in records)
            has = ", ".join(f"{plain(split)} ({count:,})" for split, count in counts.items())
            raise UserError(f"{self.name} has no split {self.split!r}: it has {has}, and 'all'.")
        return rows

    @cached_property
    def labels(self) -> Tensor | None:
        labels = [record.label for record in self.records]
        return None if None in labels else torch.tensor(labels, dtype=torch.int64)

    @property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8; row i is the picture of `records[i]`. Random crops have a margin."""
        return self._pixels(range(len(self)))

    # --- decoding ---------------------------------------------------------------------------------

    def decode_all(self) -> None:
        """Decode every picture, and leave out the records without a good one."""
        missing = set(self._store.missing())
        due = [i for i, row in enumerate(self._rows) if int(row) in missing]
        faults: list[object] = [None] * len(self)
        for i, fault in zip(due, self._decode(due, len(due) > PROGRESS_FROM), strict=True):
            faults[i] = fault
        if self.streamed:
            faults = [fault or self.captions_of(i) for i, fault in enumerate(faults)]
        bad = {i: fault for i, fault in enumerate(faults) if isinstance(fault, Skipped)}
        self.skipped += bad.values()
        good = [i for i in range(len(self)) if i not in bad]
        self.records, self._rows = [self.records[i] for i in good], self._rows[good]
        self.streamed = self.streamed and self._store.rows < self._store.count
        self.__dict__.pop("labels", None)

    def _decode(self, indices: Sequence[int], progress: bool = False) -> list[Skipped | None]:
        """Decode pictures and store them; the reason for each that is broken."""

        def fill(index: int) -> Skipped | None:
            pixels = self._decoded(index)
            if isinstance(pixels, Skipped):
                return pixels
            self._store.put(int(self._rows[index]), pixels)
            return None

        if len(indices) == 1:
            return [fill(indices[0])]
        pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        try:
            bar = tqdm(
                pool.map(fill, indices),
                f"reading {plain(self.name)}",
                total=len(indices),
                disable=not progress or None,  # None: only on a terminal
                unit=" pictures",
                leave=False,
            )
            return list(bar)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decoded(self, index: int) -> NDArray[np.uint8] | Skipped:
        """Pixels of one picture from its file, or why there are none."""
        record = self.records[index]
        path = self.root / record.path
        try:
            source = path if record.span is None else read_span(path, *record.span)
            return decode(source, self._store.side, record.box, whole=self.crop == "pad")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            shown = record.path if record.span is None else f"{record.path}: {record.id}"
            return Skipped(shown, why_broken(error, path if record.span is None else None))

    def _pixels(self, indices: Sequence[int]) -> Tensor:
        """Stored pictures (B, 3, S, S), with their margin."""
        if not self.streamed:
            return torch.from_numpy(self._store.take(self._rows[list(indices)]))
        pictures = []
        for index in indices:
            pixels = self._store.get(int(self._rows[index]))
            again = self._decoded(index) if pixels is None else pixels
            assert not isinstance(again, Skipped)  # `_good` has decoded it
            pictures.append(again)
        return torch.from_numpy(np.stack(pictures))

    def _good(self, indices: Sequence[int]) -> list[int]:
        """The indices; of a streamed data set, each one without a good picture and a caption
        replaced by the next that has both.

        Raises:
            UserError: No record has both.
        """
        if not self.streamed:
            return list(indices)
        due = [i for i in dict.fromkeys(indices) if self._store.get(int(self._rows[i])) is None]
        due = [i for i in due if i not in self._broken]
        for index, fault in zip(due, self._decode(due), strict=True):
            self._leave_out(index, fault)
        return [self._next_good(index) for index in indices]

    def _next_good(self, first: int) -> int:
        for step in range(len(self)):
            index = (first + step) % len(self)
            if step and index not in self._broken:
                is_stored = self._store.get(int(self._rows[index])) is not None
                self._leave_out(index, None if is_stored else self._decode([index])[0])
            if index not in self._broken:
                self._leave_out(index, self.captions_of(index))
            if index not in self._broken:
                return index
        raise EmptyDatasetError(self.name, self.skipped, "")

    def _leave_out(self, index: int, fault: object) -> None:
        if isinstance(fault, Skipped):
            self._broken.add(index)
            self.skipped.append(fault)

    def captions_of(self, index: int) -> tuple[str, ...] | Skipped:
        """Captions of a record, or why they cannot be read."""
        record = self.records[index]
        return record.captions or read_captions(self.root, record.text)

    def _captions(self, index: int) -> tuple[str, ...]:
        captions = self.captions_of(index)
        assert not isinstance(captions, Skipped)
        return captions

    # --- the contract -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        (index,) = self._good([range(len(self))[index]])
        record = self.records[index]
        return Example(
            id=record.id,
            image=self._middle(self._pixels([index])[0]).clone(),
            captions=self._captions(index),
            label=record.label,
            meta={"source": plain(record.path)} | record.meta | {"split": record.split},
        )

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        indices = self._good(indices)
        ids = [self.records[i].id for i in indices]
        images = self._pixels(indices)
        if self.varies:
            visits = zip(images, epochs, ids, strict=True)
            images = torch.stack(
                [self._visit(image, f"{seed}/{epoch}/{name}") for image, epoch, name in visits]
            )
        return Batch(
            to_unit(images),
            [
                captions[caption_number(seed, epoch, name, len(captions))]
                for captions, epoch, name in zip(
                    map(self._captions, indices), epochs, ids, strict=True
                )
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
        """Hash of ids, captions and pixels; equal hashes mean equal training data.

        Of a streamed data set, of ids and of the names, sizes and dates of its files.
        """
        digest = hashlib.blake2b(digest_size=16)
        if self.streamed:
            digest.update(f"{self._key} {self.split} {len(self)}".encode())
            for record in self.records:
                digest.update("\0".join((record.id, record.text, *record.captions)).encode())
            return digest.hexdigest()
        for record, row in zip(self.records, self._rows, strict=True):
            for text in (record.id, *record.captions):
                raw = text.encode("utf-8", "surrogateescape")
                digest.update(len(raw).to_bytes(4, "little") + raw)
            digest.update(b"\0\0\0\0" + self._store.take(row).tobytes())
        return digest.hexdigest()


class EmptyDatasetError(UserError):
    """A data set without a usable picture; `skipped` has the reason for each file."""

    def __init__(self, name: str, skipped: Sequence[Skipped], layout_hint: str) -> None:
        self.skipped = list(skipped)
        reason = "it contains no picture"
        if skipped:
            others = f" (and {len(skipped) - 1:,} more left out)" if len(skipped) > 1 else ""
            reason = f"{skipped[0].path}: {skipped[0].reason}{others}"
        message = f"Nothing can be loaded from {plain(name)}: {reason}; {layout_hint}"
        super().__init__(message.rstrip("; "))
