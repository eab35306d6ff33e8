"""A folder that keeps features of captions, of one encoder, between runs (`train.text_cache`).

    DIR/<hash of the encoder>/<hash of the captions>.safetensors     a shard of some captions

A shard has, for N captions with L_1 + ... + L_N = T words:

    caption   (N, 16) uint8     hash of each caption
    length    (N,) int64        number of words of each
    check     (N,) int64        CRC-32 of each one's features
    index     (16,) uint8       hash of the three above
    words (T, Dw), mask (T,), ids (T,), sentence (N, Ds)   the features, in full precision

A shard is whole or absent, so that a killed run loses at most the captions since the last one. A
damaged shard is deleted, and its captions are encoded again. Several runs may share a folder. A
folder that cannot be written costs time, not results.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lineage.cache import without_advice
from lineage.errors import UserError, say_once
from lineage.text.contract import TextFeatures
from lineage.training.store import save_tensors

SHARD_BYTES = 2**25
"""Number of bytes of new features that are written together."""

SAVE_SECONDS = 60.0
"""Number of seconds after which they are written if they are fewer."""

OPEN_SHARDS = 64
"""Number of shards that stay open."""

PARTIAL_SECONDS = 3600.0
"""Age of a temporary file that a killed process has left."""


class Place(NamedTuple):
    """Where the features of one caption are.

    Attributes:
        path: Shard.
        row: Number of the caption in it.
        start, end: Rows of its words.
        check: CRC-32 of its features.
    """

    path: Path
    row: int
    start: int
    end: int
    check: int


class CaptionStore:
    """Features of one encoder in a folder.

    Args:
        folder: Folder of that encoder; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writable = True
        self._places: dict[bytes, Place] = {}
        self._files: dict[Path, Any] = {}
        self._pending: dict[bytes, TextFeatures] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        for path in sorted(folder.glob("*.safetensors")):
            self._index(path)
        for path in folder.glob(".*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                    path.unlink()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, caption: str) -> TextFeatures | None:
        """Features (1, L) of a caption, on the CPU; None if the folder lacks them."""
        key = caption_hash(caption)
        if key in self._pending:
            return self._pending[key]
        place = self._places.get(key)
        if place is None:
            return None
        try:
            file = self._open(place.path)
            words, mask, ids = (
                file.get_slice(name)[place.start : place.end][None]
                for name in ("words", "mask", "ids")
            )
            sentence = file.get_slice("sentence")[place.row : place.row + 1]
            features = TextFeatures(words, mask, sentence, ids)
            if checksum(features) != place.check:
                raise ValueError("its features are not those that were written")
        except (OSError, SafetensorError, ValueError, IndexError):
            self._drop(place.path)
            return None
        return features

    def put(self, caption: str, features: TextFeatures) -> None:
        """Keep the features (1, L) of a new caption; they are written with others."""
        if not self.writable:
            return
        if not self._pending:
            self._pending_since = time.monotonic()
        own = TextFeatures(*(p.cpu().clone() for p in parts_of(features).values()))
        self._pending[caption_hash(caption)] = own
        self._pending_bytes += own.words.numel() * own.words.element_size()
        waited = time.monotonic() - self._pending_since
        if self._pending_bytes >= SHARD_BYTES or waited >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the new features; if that is not possible, say so once and go on without."""
        if not self._pending:
            return
        names, rows = list(self._pending), list(self._pending.values())
        index = {
            "caption": torch.tensor([list(name) for name in names], dtype=torch.uint8),
            "length": torch.tensor([row.ids.shape[1] for row in rows]),
            "check": torch.tensor([checksum(row) for row in rows]),
        }
        whole = {
            "words": torch.cat([row.words[0] for row in rows]),
            "mask": torch.cat([row.mask[0] for row in rows]),
            "ids": torch.cat([row.ids[0] for row in rows]),
            "sentence": torch.cat([row.sentence for row in rows]),
        }
        path = self.folder / f"{hashlib.blake2b(b''.join(names), digest_size=12).hexdigest()}"
        path = path.with_suffix(".safetensors")
        self._pending, self._pending_bytes = {}, 0
        try:
            save_tensors(path, {**index, "index": index_hash(index), **whole})
        except UserError as error:
            self.writable = False
            say_once(
                f"{without_advice(error)}: going on without new features in this folder; "
                "train.text_cache names another one."
            )
            return
        self._index(path)

    def _open(self, path: Path) -> Any:
        """A shard, mapped into memory; some stay open."""
        if path not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                self._files.clear()
            self._files[path] = safe_open(path, "pt")
        return self._files[path]

    def _index(self, path: Path) -> None:
        """Note which captions a shard holds."""
        try:
            with safe_open(path, "pt") as file:
                index = {name: file.get_tensor(name) for name in ("caption", "length", "check")}
                fits = file.get_tensor("index").equal(index_hash(index))
            if not fits:
                raise ValueError("its index is not the one that was written")
        except (OSError, SafetensorError, ValueError):
            self._drop(path)
            return
        end = 0
        entries = zip(*(index[name].tolist() for name in index), strict=True)
        for row, (name, length, check) in enumerate(entries):
            start, end = end, end + length
            self._places[bytes(name)] = Place(path, row, start, end, check)

    def _drop(self, path: Path) -> None:
        """Forget and delete a damaged shard."""
        say_once(f"{path} is damaged: its captions are encoded again.")
        self._files.pop(path, None)
        self._places = {name: at for name, at in self._places.items() if at.path != path}
        with contextlib.suppress(OSError):
            path.unlink()


def caption_hash(caption: str) -> bytes:
    """A hash of 16 bytes."""
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def parts_of(features: TextFeatures) -> dict[str, Tensor]:
    """The tensors of features by name."""
    names = ("words", "mask", "sentence", "ids")
    return {name: getattr(features, name) for name in names}


def checksum(features: TextFeatures) -> int:
    """CRC-32 of all tensors."""
    value = 0
    for part in parts_of(features).values():
        value = zlib.crc32(part.contiguous().numpy().tobytes(), value)
    return value


def index_hash(index: dict[str, Tensor]) -> Tensor:
    """(16,) uint8 hash of a shard's index."""
    digest = hashlib.blake2b(digest_size=16)
    for part in index.values():
        digest.update(part.contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
