"""Pictures from files: what all data sets on a disk share.

A reader (`folder`, `imagefolder`, ...) lists `Record`s. `PictureDataset` decodes the pictures of
one split once and stores them as bytes in memory, so that a batch is one indexed copy.

Paths are as the operating system has them, where Python holds a byte that is not UTF-8 as a lone
surrogate. Ids and everything that is shown have such bytes escaped (`characters.plain`).

Axes: N pictures, B of a batch, 3 channels, S = `size`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.characters import plain, valid
from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped, caption_number, to_unit
from lineage.data.decoding import decode, why_broken
from lineage.errors import UserError
from lineage.files import expanded

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"})
"""Suffixes of pictures in lower case."""

SIZES = range(8, 1025)
MAX_IN_MEMORY = 2 * 1024**3
"""Number of bytes of pixels above which they are stored in a temporary file."""
PROGRESS_FROM = 2_000
"""Number of pictures above which loading shows a progress bar."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "heldout",
}
"""Names of splits in files, and the name of each in this package."""


@dataclass(frozen=True)
class Record:
    """One picture as a reader lists it; its file is not opened yet.

    Attributes:
        id: Name that is unique within the data set.
        path: Path of the picture relative to the data set's folder, with forward slashes.
        captions: One caption or more, stripped and all different.
        label: Class index, or None.
        split: Name of the split that it belongs to.
        meta: Further information about it.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    label: int | None = None
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)


def split_name(name: str) -> str:
    """This package's name of a split: `val` -> `validation`; an unknown name is only stripped."""
    return SPLIT_NAMES.get(name.strip().lower(), name.strip())


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Stripped captions in order, without empty and repeated ones, always valid as UTF-8."""
    stripped = (valid(text).strip() for text in texts)
    return tuple(dict.fromkeys(text for text in stripped if text))


def unique_ids(paths: Sequence[str]) -> list[str]:
    """Ids from different paths: what cannot be shown is escaped, and no two are equal."""
    shown = [plain(path) for path in paths]
    first = set(shown)
    ids: dict[str, None] = {}
    for name in shown:
        own, copy = name, 1
        while own in ids or (copy > 1 and own in first):
            copy += 1
            own = f"{name}-{copy}"
        ids[own] = None
    return list(ids)


def list_files(root: Path, skipped: list[Skipped]) -> list[str]:
    """Every file below `root`, as sorted relative paths with forward slashes.

    Hidden files and those that macOS adds to archives (`._*`, `__MACOSX`) are ignored. Folders that
    cannot be opened are added to `skipped`. Links are followed, but each real folder is read once.
    """
    paths: list[str] = []
    visited: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder)
        try:
            info = os.stat(path)
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            reason = f"the folder cannot be opened: {error.strerror}"
            skipped.append(Skipped(folder or ".", reason))
            continue
        if (info.st_dev, info.st_ino) in visited:
            continue
        visited.add((info.st_dev, info.st_ino))
        for entry in inside:
            if not _hidden(entry.name):
                relative = f"{folder}/{entry.name}" if folder else entry.name
                (folders if _is_folder(entry) else paths).append(relative)
    return sorted(paths)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link or a file of a failing disk; the reader of files reports it
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_picture(path: str) -> bool:
    """Whether a path has the suffix of a picture; the file is not opened."""
    return PurePosixPath(path).suffix.lower() in SUFFIXES


class PictureDataset(CaptionedDataset):
    """The pictures of one split, decoded once.

    Args:
        name: Spec that loads the data set again.
        root: Folder of the data set.
        records: Records of all splits; their ids are unique.
        split: Name of one of the records' splits, or `all`.
        size: Side of the square pictures in pixels.
        skipped: Files that the reader left out; pictures that cannot be decoded are added.
        layout_hint: Layout that the folder should have; part of the error for an empty data set.

    Attributes:
        records: Records whose pictures are decoded, in order.
        images: (N, 3, S, S) uint8; row i is the picture of `records[i]`.
        labels: (N,) int64, or None if a record lacks a label.

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
    ) -> None:
        if size not in SIZES:
            raise UserError(f"size={size} must be between {SIZES[0]} and {SIZES[-1]} pixels.")
        self.name, self.root, self.size = name, root, size
        self.split = split_name(split)
        self.skipped = list(skipped)
        if not records:
            raise EmptyDatasetError(name, self.skipped, layout_hint)
        self.records, pixels = self._decode(self._of_split(records))
        if not self.records:
            raise EmptyDatasetError(name, self.skipped, layout_hint)
        self.images: Tensor = torch.from_numpy(pixels)
        labels = [record.label for record in self.records]
        labelled = all(label is not None for label in labels)
        self.labels = torch.tensor(labels, dtype=torch.int64) if labelled else None

    def _of_split(self, records: Sequence[Record]) -> list[Record]:
        chosen = [r for r in records if self.split in ("all", r.split)]
        if not chosen:
            counts = Counter(r.split for r in records)
            has = ", ".join(f"{plain(split)} ({count:,})" for split, count in counts.items())
            raise UserError(f"{self.name} has no split {self.split!r}: it has {has}, and 'all'.")
        return chosen

    def _decode(self, records: list[Record]) -> tuple[list[Record], NDArray[np.uint8]]:
        """Records whose picture can be decoded, and their pixels (N, 3, S, S)."""
        pixels = self._allocate(len(records))

        def fill(row: int) -> Skipped | None:
            path = records[row].path
            try:
                pixels[row] = decode(self.root / path, self.size)
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                return Skipped(path, why_broken(error, self.root / path))
            return None

        pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        try:
            errors = list(
                tqdm(
                    pool.map(fill, range(len(records))),
                    f"reading {plain(self.name)}",
                    total=len(records),
                    disable=len(records) <= PROGRESS_FROM or None,  # None: only on a terminal
                    unit=" pictures",
                    leave=False,
                )
            )
        finally:
            pool.shutdown(cancel_futures=True)
        self.skipped += [error for error in errors if error is not None]
        decoded = [row for row, error in enumerate(errors) if error is None]
        for new, old in enumerate(decoded):  # in place: the array may be larger than memory
            if new != old:
                pixels[new] = pixels[old]
        return [records[row] for row in decoded], pixels[: len(decoded)]

    def _allocate(self, count: int) -> NDArray[np.uint8]:
        """An array (N, 3, S, S) for the pixels: in memory or, if very large, in a file."""
        shape = (count, 3, self.size, self.size)
        num_bytes = count * 3 * self.size * self.size
        if num_bytes <= MAX_IN_MEMORY:
            return np.empty(shape, np.uint8)
        try:
            file = tempfile.TemporaryFile(prefix="lineage-pixels-")  # noqa: SIM115 - stays open
            if hasattr(os, "posix_fallocate"):  # a full disk raises here, not while writing
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
            return np.memmap(file, np.uint8, "r+", shape=shape)
        except OSError as error:
            raise UserError(
                f"The pixels of {self.name} need {num_bytes / 1e9:.1f} GB in "
                f"{tempfile.gettempdir()}: {error.strerror}; free some space, set TMPDIR to "
                "another disk, or choose a smaller size."
            ) from error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        return Example(
            id=record.id,
            image=self.images[index].clone(),
            captions=record.captions,
            label=record.label,
            meta={"source": plain(record.path)} | record.meta | {"split": record.split},
        )

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        records = [self.records[i] for i in indices]
        return Batch(
            to_unit(self.images[rows]),
            [
                r.captions[caption_number(seed, epoch, r.id, len(r.captions))]
                for r, epoch in zip(records, epochs, strict=True)
            ],
            None if self.labels is None else self.labels[rows],
            [r.id for r in records],
        )

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        for record in self.records[:limit]:
            yield from record.captions

    def fingerprint(self) -> str:
        """Hash of ids, captions and pixels; equal hashes mean equal training data."""
        digest = hashlib.blake2b(digest_size=16)
        for record, image in zip(self.records, self.images, strict=True):
            for text in (record.id, *record.captions):
                raw = text.encode("utf-8", "surrogateescape")
                digest.update(len(raw).to_bytes(4, "little") + raw)
            digest.update(b"\0\0\0\0" + image.numpy().tobytes())
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


def open_root(path: str) -> Path:
    """Folder of the data set; raises `UserError` if it does not exist."""
    root = expanded(path)
    if not os.path.exists(root):  # also false for a name that no file can have
        raise UserError(f"There is no folder {path!r}; check the spelling and the current folder.")
    if not root.is_dir():
        raise UserError(f"{path!r} is a file, not a folder with pictures.")
    return root
