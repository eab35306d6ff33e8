"""Pictures from files: what every data set that lies on a disk shares.

A reader (`folder`, `imagefolder` and those for the official layouts) lists `Record`s;
`PictureDataset` takes those of one split, decodes each picture once and keeps them all as bytes in
memory, so a batch is one indexed copy.

What happens to a picture, in this order:
    turned upright where EXIF says how the camera was held;
    transparency laid on white, any colour mode turned into RGB, the first frame taken of several;
    **not square: the largest centred square is kept**, so nothing is stretched;
    resized to (size, size) with Lanczos. A picture of this size already keeps its exact pixels.

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
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped, caption_number, to_unit
from lineage.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"})
"""What a picture's name ends with, in small letters."""

SIZES = range(8, 1025)
IN_MEMORY = 2 * 1024**3  # bytes of pixels; more than this go to a temporary file
BAR_FROM = 2_000  # pictures from which on loading shows a progress bar

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
"""Names that a split goes by, and the one that it has here."""


@dataclass(frozen=True)
class Record:
    """One picture as a reader lists it, not opened yet.

    Attributes:
        id: unique within the data set.
        path: of the picture, relative to the data set's folder, with forward slashes.
        captions: at least one, stripped, no two alike.
        label: class index, or None.
        split: name of the split that it belongs to.
        meta: what else is known of it.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    label: int | None = None
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)


def split_name(name: str) -> str:
    """`val`, `valid` and `dev` -> `validation`, and so on; any other name, stripped, is its own."""
    return SPLIT_NAMES.get(name.strip().lower(), name.strip())


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Stripped, without blanks and repetitions, in order, and always writable as UTF-8."""
    whole = (text.encode("utf-8", "replace").decode("utf-8").strip() for text in texts)
    return tuple(dict.fromkeys(text for text in whole if text))


def list_files(root: Path, skipped: list[Skipped]) -> list[str]:
    """Every file below `root`, as sorted relative paths with forward slashes.

    Hidden files and what macOS puts into archives (`._*`, `__MACOSX`) are left out. Folders that
    cannot be opened are added to `skipped`. Linked folders are followed, each real folder once.
    """

    def closed(error: OSError) -> None:
        place = os.path.relpath(error.filename or root, root)
        skipped.append(Skipped(place, f"the folder cannot be opened: {error.strerror}"))

    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [str(here / name) for name in files if not _hidden(name)]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_picture(path: str) -> bool:
    """Whether the name is that of a picture; says nothing of what is inside."""
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def decode(file: Path, size: int) -> NDArray[np.uint8]:
    """One picture file -> (3, S, S). Raises what Pillow raises for a broken file."""
    with Image.open(file) as opened:
        # A JPEG of many times the size is decoded at a fraction, at least twice what is needed.
        opened.draft("RGB", (2 * size, 2 * size))
        square = ImageOps.fit(
            _rgb(ImageOps.exif_transpose(opened)), (size, size), Image.Resampling.LANCZOS
        )
    return np.asarray(square, np.uint8).transpose(2, 0, 1)  # (S, S, 3) -> (3, S, S)


def _rgb(image: Image.Image) -> Image.Image:
    """Any colour mode -> RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        image = Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        )
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def why_broken(error: Exception, file: Path) -> str:
    """What to tell the user of a picture that could not be decoded."""
    if isinstance(error, PermissionError):
        return "the picture cannot be opened: permission denied"
    if file.is_file() and file.stat().st_size == 0:
        return "the picture's file is empty; copy it again"
    if isinstance(error, Image.UnidentifiedImageError):
        return (
            "this is no picture that can be read, whatever its name says; copy or convert it again"
        )
    return f"the picture is broken ({error}); copy it again"


class PictureDataset(CaptionedDataset):
    """The pictures of one split, decoded once.

    Args:
        name: the spec that loads it again.
        root: the data set's folder.
        records: of all splits; their ids are unique.
        split: one of the records' splits, or `all`.
        size: side of the square pictures.
        skipped: what the reader left out; pictures that cannot be decoded are added.
        mend: for an empty data set, how its folder should look.

    Attributes:
        records: those whose pictures are here, in order.
        images: (N, 3, S, S) uint8, row i the picture of `records[i]`.
        labels: (N,) int64, or None where not every record has a label.

    `Example.meta` holds the record's, plus `source` (the picture's path in the folder) and `split`.

    Raises:
        UserError: no such split, no such size, or nothing to load.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        records: Sequence[Record],
        split: str = "train",
        size: int = 32,
        skipped: Iterable[Skipped] = (),
        mend: str = "",
    ) -> None:
        if size not in SIZES:
            raise UserError(f"pictures are loaded at {SIZES[0]} to {SIZES[-1]} pixels, not {size}.")
        self.name, self.root, self.size = name, root, size
        self.split = split_name(split)
        self.skipped = list(skipped)
        if not records:
            raise EmptyDatasetError(name, self.skipped, mend)
        chosen = self._of_split(records)
        self.records, pixels = self._decode(chosen)
        if not self.records:
            raise EmptyDatasetError(name, self.skipped, mend)
        self.images: Tensor = torch.from_numpy(pixels)
        labels = [record.label for record in self.records]
        whole = all(label is not None for label in labels)
        self.labels = torch.tensor(labels, dtype=torch.int64) if whole else None

    def _of_split(self, records: Sequence[Record]) -> list[Record]:
        chosen = [r for r in records if self.split in ("all", r.split)]
        if not chosen:
            counts = Counter(r.split for r in records)
            has = ", ".join(f"{split} ({count:,})" for split, count in counts.items())
            raise UserError(f"{self.name} has no split {self.split!r}: it has {has}, and 'all'.")
        return chosen

    def _decode(self, records: list[Record]) -> tuple[list[Record], NDArray[np.uint8]]:
        """Records -> those whose picture is whole, and their pixels (N, 3, S, S)."""
        pixels = self._room(len(records))

        def fill(row: int) -> Skipped | None:
            path = records[row].path
            try:
                pixels[row] = decode(self.root / path, self.size)
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                return Skipped(path, why_broken(error, self.root / path))
            return None

        pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        try:
            faults = list(
                tqdm(
                    pool.map(fill, range(len(records))),
                    f"reading {self.name}",
                    total=len(records),
                    disable=len(records) <= BAR_FROM or None,  # None: only on a terminal
                    unit=" pictures",
                    leave=False,
                )
            )
        finally:
            pool.shutdown(cancel_futures=True)
        self.skipped += [fault for fault in faults if fault is not None]
        whole = [row for row, fault in enumerate(faults) if fault is None]
        for new, old in enumerate(whole):  # in place: the array may be larger than memory
            if new != old:
                pixels[new] = pixels[old]
        return [records[row] for row in whole], pixels[: len(whole)]

    def _room(self, count: int) -> NDArray[np.uint8]:
        """An array (N, 3, S, S) for the pixels: in memory or, if very large, in a file."""
        shape = (count, 3, self.size, self.size)
        room = count * 3 * self.size * self.size
        if room <= IN_MEMORY:
            return np.empty(shape, np.uint8)
        try:
            file = tempfile.TemporaryFile(prefix="lineage-pixels-")  # noqa: SIM115 - kept open
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not while writing
                os.posix_fallocate(file.fileno(), 0, room)
            else:
                file.truncate(room)
            return np.memmap(file, np.uint8, "r+", shape=shape)
        except OSError as error:
            raise UserError(
                f"the pixels of {self.name} need {room / 1e9:.1f} GB in {tempfile.gettempdir()}: "
                f"{error.strerror}; free some space, set TMPDIR to another disk, or load smaller."
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
            meta={"source": record.path, "split": record.split} | record.meta,
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
        """A hash of ids, captions and pixels: two data sets with the same one train alike."""
        digest = hashlib.blake2b(digest_size=16)
        for record, image in zip(self.records, self.images, strict=True):
            for text in (record.id, *record.captions):
                raw = text.encode("utf-8", "surrogateescape")
                digest.update(len(raw).to_bytes(4, "little") + raw)
            digest.update(b"\0\0\0\0" + image.numpy().tobytes())
        return digest.hexdigest()


class EmptyDatasetError(UserError):
    """A data set without a single usable picture; `skipped` says why, file by file."""

    def __init__(self, name: str, skipped: Sequence[Skipped], mend: str) -> None:
        self.skipped = list(skipped)
        why = "no picture lies there"
        if skipped:
            others = f" (and {len(skipped) - 1:,} more left out)" if len(skipped) > 1 else ""
            why = f"{skipped[0].path}: {skipped[0].reason}{others}"
        super().__init__(f"nothing could be loaded from {name}: {why}; {mend}".rstrip("; "))


def open_root(path: str) -> Path:
    """The data set's folder, or a UserError if there is none."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"there is no folder {path!r}; check the spelling and the current folder.")
    if not root.is_dir():
        raise UserError(f"{path!r} is a file, not a folder with pictures.")
    return root
