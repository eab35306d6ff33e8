"""Decoded pictures on the disk, so that each is decoded once, whatever runs read it.

    $LINEAGE_CACHE/pixels/KEY/pixels    (M, 3, S, S) bytes, a row a picture
    $LINEAGE_CACHE/pixels/KEY/sums      (M,) checksum of each row; 0 where it is not decoded yet

KEY is a hash of all that the pixels depend on: names, sizes and dates of the files, the part of
each that is taken, the size S, and Pillow's version. A file that changes gets a new date
(`st_ctime`, which no program can set), and so new pixels.

All stores together have at most `LIMIT` bytes: a new one removes those that were not used for the
longest time, and of one that is too large alone the first M pictures are stored. A process that is
killed, or two that fill one store, do no harm: a row without its checksum is decoded again.

Axes: N pictures of a data set, M of them with a row, n asked for, 3 channels, S side in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from lineage.cache import cache_folder, without_advice
from lineage.errors import UserError, say_once
from lineage.files import unwritable

VERSION = 1
"""Number of the way in which pictures are decoded; another one makes all stores anew."""
LIMIT = 10 * 1024**3
"""Number of bytes of all stores together; LINEAGE_PIXELS_GB sets another."""
SMALL = 2 * 1024**3
"""Number of bytes up to which all pictures of a data set are stored, if need be for one run."""
RELEASE_AFTER = 256 * 1024**2
"""Number of bytes after which pages that were read are given back to the system."""


class PixelStore:
    """Pictures of one data set at one size.

    Args:
        folder: Folder of the store; None for a file that is deleted when the program ends.
        count: Number of pictures, N.
        side: S.
        rows: Number of pictures that are stored, M.

    Raises:
        OSError: The folder cannot be written, or its disk is full.
    """

    def __init__(self, folder: Path | None, count: int, side: int, rows: int) -> None:
        self.count, self.side, self.rows = count, side, rows
        self.folder = folder
        self._pixels = _mapped(folder, "pixels", (rows, 3, side, side), np.uint8)
        self._sums = _mapped(folder, "sums", (rows,), np.uint32)
        self._touched = 0

    def __len__(self) -> int:
        return self.count

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Store the pixels (3, S, S) of a picture, if it has a row."""
        if row < self.rows:
            self._pixels[row] = pixels
            self._sums[row] = _sum(pixels)
            self._release(pixels.nbytes)

    def get(self, row: int) -> NDArray[np.uint8] | None:
        """A copy of the pixels (3, S, S) of a picture; None if they are not stored, or damaged."""
        if row >= self.rows or not self._sums[row]:
            return None
        pixels: NDArray[np.uint8] = np.array(self._pixels[row])
        self._release(pixels.nbytes)
        return pixels if _sum(pixels) == self._sums[row] else None

    def missing(self) -> list[int]:
        """Every picture that `get` has no pixels of; all of them are read."""
        return [row for row in range(self.count) if self.get(row) is None]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels (n, 3, S, S) of pictures that are stored and known to be sound."""
        pixels: NDArray[np.uint8] = self._pixels[rows]
        self._release(pixels.nbytes)
        return pixels

    def _release(self, num_bytes: int) -> None:
        """Count bytes that were touched, and give their pages back, so that memory stays bounded:
        the system keeps them as it does those of any file.
        """
        self._touched += num_bytes
        pages = getattr(self._pixels, "_mmap", None)
        if self._touched > RELEASE_AFTER and hasattr(mmap, "MADV_DONTNEED") and pages is not None:
            self._touched = 0
            pages.madvise(mmap.MADV_DONTNEED)


def open_store(key: str, count: int, side: int) -> PixelStore:
    """The store of a data set in the cache; where there can be none, a file of this process.

    Args:
        key: Hash of what the pixels depend on, of `key_of`.
        count: Number of pictures.
        side: Side of the pictures in pixels.

    Raises:
        UserError: A temporary file cannot be written either.
    """
    row_bytes = 3 * side * side
    rows = min(count, max(1, limit() // row_bytes))
    try:
        if rows < count and count * row_bytes <= SMALL:
            return PixelStore(None, count, side, count)
        folder = cache_folder("pixels") / key
        _make_room(folder, rows * row_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        store = PixelStore(folder, count, side, rows)
        os.utime(folder)
        return store
    except (OSError, UserError) as error:
        reason = unwritable(folder, error) if isinstance(error, OSError) else error
        say_once(
            f"{without_advice(reason)}: pictures are decoded anew in each run; LINEAGE_CACHE sets "
            "another folder."
        )
    try:
        return PixelStore(None, count, side, rows)
    except OSError as error:
        raise UserError(
            f"The pixels of {count:,} pictures need {rows * row_bytes / 1e9:.1f} GB in "
            f"{tempfile.gettempdir()}: {error.strerror}; free some space, set TMPDIR to another "
            "disk, or choose a smaller size."
        ) from error


def key_of(files: Iterable[tuple[str, Any]], root: Path, **inputs: Any) -> str:
    """Hash of what the pixels of some files depend on.

    Args:
        files: Path of each picture's file, relative to the root, and what is taken of it.
        root: Folder of the data set.
        inputs: Further inputs of decoding, for all pictures.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([VERSION, PIL.__version__, inputs], sort_keys=True).encode())
    base, last, state = str(root), "", ""
    for path, part in files:
        if path != last:
            last, state = path, _state(os.path.join(base, path))
        text = f"{path}\0{state}\0{part}\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _state(path: str) -> str:
    """Size and dates of a file, as a text that changes when the file does."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return "-"
    return f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def limit() -> int:
    """Number of bytes of all stores together.

    Raises:
        UserError: LINEAGE_PIXELS_GB is no number.
    """
    text = os.environ.get("LINEAGE_PIXELS_GB", "").strip()
    try:
        gigabytes = float(text) if text else LIMIT / 1024**3
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes <= 1e6:
        raise UserError(f"LINEAGE_PIXELS_GB={text[:40]} is no number of gigabytes, such as 10.")
    return int(gigabytes * 1024**3)


def stores() -> list[tuple[Path, int, float]]:
    """Folder, number of bytes on the disk and time of last use of each store, the oldest first."""
    used = []
    with contextlib.suppress(OSError):
        for folder in cache_folder("pixels").iterdir():
            with contextlib.suppress(OSError):
                sizes = [_allocated(file) for file in folder.iterdir()]
                used.append((folder, sum(sizes), folder.stat().st_mtime))
    return sorted(used, key=lambda store: store[2])


def remove(folder: Path) -> None:
    """Delete a store; a process that reads it keeps its files until it ends."""
    shutil.rmtree(folder, ignore_errors=True)


def _allocated(file: Path) -> int:
    info = file.stat()
    return int(getattr(info, "st_blocks", info.st_size / 512) * 512)


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove the stores that were not used for the longest time, until a new one fits."""
    others = [store for store in stores() if store[0] != folder]
    room = limit() - num_bytes - sum(size for _, size, _ in others)
    for other, size, _ in others:
        if room >= 0:
            break
        remove(other)
        room += size


def _sum(pixels: NDArray[np.uint8]) -> int:
    """Checksum of some pixels, never 0."""
    return zlib.crc32(np.ascontiguousarray(pixels).data) or 1


def _mapped(
    folder: Path | None, name: str, shape: Sequence[int], dtype: type[np.generic]
) -> NDArray[Any]:
    """An array in a file of a folder, or in a temporary one; new parts of it are zero."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    file: Any
    if folder is None:
        file = tempfile.TemporaryFile(prefix="lineage-pixels-")  # noqa: SIM115 - stays open
    else:
        file = open(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
    if os.fstat(file.fileno()).st_size < num_bytes:  # never made shorter: another may read it
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, not while writing
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.truncate(num_bytes)
    return np.memmap(file, dtype, "r+", shape=tuple(shape))
