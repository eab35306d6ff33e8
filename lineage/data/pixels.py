"""Decoded pictures on the disk, so that each is decoded once, whatever runs read it.

    $LINEAGE_CACHE/pixels/KEY/pixels    (M, 3, H, W) bytes, a row a picture
    $LINEAGE_CACHE/pixels/KEY/sums      (M,) checksum of each row; 0 where it is not decoded yet
    $LINEAGE_CACHE/pixels/KEY/shapes-*  shapes of the pictures of a split, for `buckets`

KEY is a hash of all that the pixels depend on: names, sizes and dates of the files, the part of
each that is taken, height and width, and Pillow's version. A file that changes gets a new date (on
Linux and macOS `st_ctime`, which no program can set), and so new pixels; so does the whole data
set, when a picture is added.

All stores together have at most `LIMIT` bytes: a new one removes those that were not used for the
longest time, and of one that is too large alone the first M pictures are stored. A process that is
killed, or two that fill one store, do no harm: a row without its checksum is decoded again.

Axes: N pictures of a data set, M of them with a row, n asked for, 3 channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
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
"""Version of the decoding; a new number invalidates all stores."""
FILES = ("pixels", "sums")
SHAPES = "shapes-"
"""What the names of files of `buckets` begin with, which lie beside them."""
BLOCK = 2**24
"""Number of zeros that are written at once."""
LIMIT = 10 * 1024**3
"""Number of bytes of all stores together; LINEAGE_PIXELS_GB sets another."""
SMALL = 2 * 1024**3
"""Number of bytes up to which all pictures of a data set are stored, if necessary in a temporary
file."""
RELEASE_AFTER = 256 * 1024**2
"""Number of bytes after which pages that were read are given back to the system."""


class PixelStore:
    """Pictures of one data set in one shape.

    Args:
        folder: Folder of the store; None for a file that is deleted when the program ends.
        count: Number of pictures, N.
        shape: (H, W).
        rows: Number of pictures that are stored, M.

    Raises:
        OSError: The folder cannot be written, or its disk is full.
    """

    def __init__(self, folder: Path | None, count: int, shape: tuple[int, int], rows: int) -> None:
        self.count, self.shape, self.rows = count, shape, rows
        self.folder = folder
        self._pixels = _mapped(folder, FILES[0], (rows, 3, *shape), np.uint8)
        self._sums = _mapped(folder, FILES[1], (rows,), np.uint32)
        self._touched = 0

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Store the pixels (3, H, W) of a picture, if it has a row."""
        if row < self.rows:
            self._pixels[row] = pixels
            self._sums[row] = _sum(pixels)
            self._release(pixels.nbytes)

    def get(self, row: int) -> NDArray[np.uint8] | None:
        """A copy of the pixels (3, H, W) of a picture; None if they are not stored, or damaged."""
        if row >= self.rows or not self._sums[row]:
            return None
        pixels: NDArray[np.uint8] = np.array(self._pixels[row])
        self._release(pixels.nbytes)
        return pixels if _sum(pixels) == self._sums[row] else None

    def missing(self, rows: NDArray[np.int64]) -> list[int]:
        """Places in `rows` of the pictures that `get` has no pixels of; all of them are read."""
        return [place for place, row in enumerate(rows) if self.get(int(row)) is None]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels (n, 3, H, W) of pictures that are stored and known to be sound."""
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
            if self.folder is not None:
                with contextlib.suppress(OSError):
                    os.utime(self.folder)  # it is in use


def open_store(key: str, count: int, shape: tuple[int, int], required: bool = True) -> PixelStore:
    """The store of a data set in the cache; where there can be none, a file of this process.

    Args:
        key: Hash of what the pixels depend on, of `key_of`.
        count: Number of pictures.
        shape: Height and width of the pictures in pixels.
        required: If false, the store may have no rows: pictures are decoded when they are due.

    Raises:
        UserError: A temporary file cannot be written either.
    """
    row_bytes = 3 * math.prod(shape)
    rows = min(count, limit() // row_bytes)
    folder = cache_folder("pixels") / key
    if required and rows < count and count * row_bytes <= SMALL:
        return _temporary(count, shape, count)
    try:
        if not required:  # half of what is free is left to others
            rows = min(rows, _free_bytes(folder) // 2 // row_bytes)
        _make_room(folder, rows * row_bytes)
        try:
            return _cached_store(folder, count, shape, rows)
        except OSError:  # once more, if another process has just removed it, or it is damaged
            if folder.exists() and not (_is_damaged(folder) and remove(folder)):
                raise
            return _cached_store(folder, count, shape, rows)
    except (OSError, UserError) as error:
        reason = unwritable(folder, error) if isinstance(error, OSError) else error
        say_once(
            f"{without_advice(reason)}: pictures are decoded again in each run; LINEAGE_CACHE sets "
            "another folder."
        )
    return _temporary(count, shape, rows if required else 0)


def _cached_store(folder: Path, count: int, shape: tuple[int, int], rows: int) -> PixelStore:
    """The store in a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    store = PixelStore(folder, count, shape, rows)
    os.utime(folder)
    return store


def _temporary(count: int, shape: tuple[int, int], rows: int) -> PixelStore:
    """A store in files that are deleted when the program ends."""
    try:
        return PixelStore(None, count, shape, rows)
    except OSError as error:
        needed = max(0.1, rows * 3 * math.prod(shape) / 1e9)
        raise UserError(
            f"The pixels of {count:,} pictures need up to {needed:.1f} GB in "
            f"{tempfile.gettempdir()}: {error.strerror}; free some space, set TMPDIR to another "
            "disk, or choose a smaller size."
        ) from error


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _is_damaged(folder: Path) -> bool:
    """Whether a folder of the cache holds something else in place of a store's files."""
    return any((folder / name).exists() and not (folder / name).is_file() for name in FILES)


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
            last, state = path, state_key(os.path.join(base, path))
        text = f"{len(path)} {path}\0{state}\0{part!r}\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def state_of(path: str) -> str:
    """Size and date of a file, as a text; `-` if there is none."""
    return _state(path, dates=("st_mtime_ns",))


def state_key(path: str) -> str:
    """The same, with the date of the last change of any kind, which cannot be set back."""
    return _state(path, dates=("st_mtime_ns", "st_ctime_ns"))


def _state(path: str, dates: Sequence[str]) -> str:
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return "-"
    return " ".join(str(getattr(info, name)) for name in ("st_size", *dates))


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
        raise UserError(f"LINEAGE_PIXELS_GB={text[:40]} is not a number of gigabytes, such as 10.")
    return int(gigabytes * 1024**3)


def stores() -> list[tuple[Path, int, float]]:
    """Folder, number of bytes on the disk and time of last use of each store, the oldest first.

    Whatever else lies there is no store.
    """
    rows = []
    with contextlib.suppress(OSError):
        for folder in cache_folder("pixels").iterdir():
            with contextlib.suppress(OSError):
                files = list(folder.iterdir()) if _is_store(folder) else []
                if files and all(f.name in FILES or f.name.startswith(SHAPES) for f in files):
                    size = sum(_allocated(file) for file in files)
                    rows.append((folder, size, folder.stat().st_mtime))
    return sorted(rows, key=lambda store: store[2])


def _is_store(folder: Path) -> bool:
    """Whether a path has the name of a store, and is a folder of its own."""
    is_key = re.fullmatch("[0-9a-f]{32}", folder.name)
    return bool(is_key) and folder.is_dir() and not folder.is_symlink()


def remove(path: Path) -> bool:
    """Delete a store, or a file, if the system allows it; false if it is still there."""
    if path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


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
        room += size if remove(other) else 0


def _sum(pixels: NDArray[np.uint8]) -> int:
    """Checksum of some pixels, never 0."""
    return zlib.crc32(np.ascontiguousarray(pixels).data) or 1


def _mapped(
    folder: Path | None, name: str, shape: Sequence[int], dtype: type[np.generic]
) -> NDArray[Any]:
    """An array in a file of a folder, or in a temporary one; new parts of it are zero."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not num_bytes:
        return np.zeros(shape, dtype)
    file: Any
    if folder is None:
        file = tempfile.TemporaryFile(prefix="lineage-pixels-")  # noqa: SIM115 - stays open
    else:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        file = open(os.open(folder / name, flags, 0o666), "r+b")  # noqa: SIM115
    size = os.fstat(file.fileno()).st_size
    if size < num_bytes:  # never made shorter: another process may read it
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, not while writing
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.seek(size)
            for first in range(size, num_bytes, BLOCK):
                file.write(bytes(min(BLOCK, num_bytes - first)))
            file.flush()
    return np.memmap(file, dtype, "r+", shape=tuple(shape))
