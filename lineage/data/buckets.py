"""Which pictures of a data set have which shape: `SPEC?crop=buckets`.

A system that takes any shape trains on pictures that are hardly cropped: each one in the shape of
`bucket_shapes` that is most like it, and each batch of pictures of one shape (SDXL: Podell et al.
2023, arXiv:2307.01952, section 2.3). Whatever else reads the data set gets the centred squares.

Shapes are read from the heads of the files, and kept beside the pixels of the squares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lineage.cache import cached
from lineage.data.contract import bucket_shapes, nearest_shape
from lineage.errors import UserError
from lineage.files import write_bytes

RARE = 1_000
"""A shape that fewer than one in so many pictures have is not used: they become squares."""
PROGRESS_FROM = 20_000
"""Number of pictures above which reading their shapes shows a progress bar."""

Members = dict[tuple[int, int], NDArray[np.int64]]


def members(
    size: int, count: int, file_size: Callable[[int], tuple[int, int]], path: Path | None
) -> Members:
    """Indices of the pictures of each shape, (height, width), that some have.

    Args:
        size: Side of the squares with about as many pixels.
        count: Number of pictures, N.
        file_size: Function from a picture's index to width and height in its file; it may raise
            what Pillow's decoders raise.
        path: File of a byte a picture, its index in `bucket_shapes`; None for no such file.
    """
    shapes = bucket_shapes(size)
    place = {shape: number for number, shape in enumerate(shapes)}
    square = place[size, size]

    def read(path: Path) -> NDArray[np.uint8]:
        numbers = np.frombuffer(path.read_bytes(), np.uint8)
        if len(numbers) != count or numbers.max(initial=0) >= len(shapes):
            raise UserError(f"The list of shapes {path} is damaged; delete it.")
        return numbers

    def compute() -> NDArray[np.uint8]:
        numbers = np.full(count, square, np.uint8)
        # None: only on a terminal
        hidden = None if count > PROGRESS_FROM else True
        for index in tqdm(range(count), "reading shapes", unit=" pictures", disable=hidden):
            with contextlib.suppress(Exception):  # a broken file is left out where it is decoded
                width, height = file_size(index)
                numbers[index] = place[nearest_shape(width / height, size)]
        return numbers

    if path is None:
        numbers = compute()
    else:
        numbers = cached(path, read, compute, lambda path, new: write_bytes(path, new.tobytes()))
    counts = np.bincount(numbers, minlength=len(shapes))
    rare = (counts < count / RARE)[numbers]
    numbers = np.where(rare, square, numbers)
    rows_of = {shape: np.flatnonzero(numbers == number) for shape, number in place.items()}
    return {shape: rows for shape, rows in rows_of.items() if len(rows)}
