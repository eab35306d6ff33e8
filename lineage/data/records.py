"""What readers of layouts have in common: `Record`s, and functions that list files and clean texts.

Paths are as the operating system has them, where Python holds a byte that is not UTF-8 as a lone
surrogate. Ids and everything that is shown have such bytes escaped (`characters.plain`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lineage.characters import decoded, plain, valid
from lineage.data.contract import Skipped
from lineage.data.decoding import Box
from lineage.errors import UserError
from lineage.files import expanded, read_regular

_READ = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".webp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
)
SUFFIXES = frozenset((*_READ, ".heic", ".heif"))  # no decoder reads the last two; they are named
"""Suffixes of pictures in lower case."""
_SUFFIXES = tuple(SUFFIXES)
MAX_TEXT = 1_000_000
"""Largest size of a text file with captions."""


@dataclass(frozen=True, slots=True)
class Record:
    """One picture as a reader lists it; its file is not opened yet.

    Attributes:
        id: Name that is unique within the data set.
        path: Path of the picture relative to the data set's folder, with forward slashes.
        captions: One caption or more, stripped and all different; none where they are in `text`.
        label: Class index, or None.
        split: Name of the split that it belongs to.
        meta: Further information about it.
        box: The square that `crop="box"` takes; it may leave the picture.
        span: Offset and length of the picture in its file, which holds others too.
        text: Path of a file with the captions, one a line, that is read when they are due.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    label: int | None = None
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)
    box: Box | None = None
    span: tuple[int, int] | None = None
    text: str = ""


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


def with_unique_ids(records: list[Record]) -> list[Record]:
    """The records with ids of `unique_ids`."""
    ids = unique_ids([record.id for record in records])
    return [
        record if record.id == name else replace(record, id=name)
        for record, name in zip(records, ids, strict=True)
    ]


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
            if not is_hidden(entry.name):
                relative = f"{folder}/{entry.name}" if folder else entry.name
                (folders if _is_folder(entry) else paths).append(relative)
    return sorted(paths)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link or a file of a failing disk; the reader of files reports it
        return False


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is ignored, as those that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(path: str) -> bool:
    """Whether a path has the suffix of a picture; the file is not opened."""
    return path[-6:].lower().endswith(_SUFFIXES)


def read_captions(root: Path, path: str) -> tuple[str, ...] | Skipped:
    """Captions in a text file, one on each line, or why there are none."""
    try:
        text = decoded(read_regular(root / path, MAX_TEXT))
    except UnicodeDecodeError as error:
        reason = f"the captions are not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        return Skipped(path, reason)
    except OSError as error:
        return Skipped(path, f"the captions cannot be read: {error.strerror}")
    captions = clean_captions(text.split("\n"))
    return captions or Skipped(path, "the file has no caption; write one on each line")


def open_root(path: str) -> Path:
    """Folder of the data set; raises `UserError` if it does not exist."""
    root = expanded(path)
    if not os.path.exists(root):  # also false for a name that no file can have
        raise UserError(f"There is no folder {path!r}; check the spelling and the current folder.")
    if not root.is_dir():
        raise UserError(f"{path!r} is a file, not a folder with pictures.")
    return root
