"""What is in each shard of a WebDataset, in the cache, so that a second start opens no shard.

    $LINEAGE_CACHE/shards/KEY.json.gz    the records of one shard, and what was left out of it

KEY is a hash of the shard's place, size and dates. To list a shard reads the head of each of its
members: about ten seconds for 300,000 of them, against one from the cache. Shards of less than
`SMALL` bytes and those whose list is damaged are listed each time. Indexes that were not used for
the longest time are deleted where there are more than `LIMIT` bytes of them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lineage.cache import cache_folder, cached
from lineage.characters import plain
from lineage.data.contract import Skipped
from lineage.data.pixels import state_key
from lineage.data.records import Record
from lineage.errors import UserError
from lineage.files import write_bytes

VERSION = 1
"""Version of the reader of shards and of their rows, which is in `wds` and `imagefolder`; a new
number invalidates all indexes.
"""
SMALL = 1_000_000
LIMIT = 1_000_000_000

Listed = tuple[list[Record], list[Skipped]]


def indexed(root: Path, shard: str, list_shard: Callable[[], Listed]) -> Listed:
    """Records of a shard and what was left out, from the cache or by `list_shard`."""
    place = os.path.join(os.path.abspath(root), shard)
    state = state_key(place)
    if state == "-" or int(state.split()[0]) < SMALL:
        return list_shard()
    text = json.dumps([VERSION, os.path.abspath(root), shard, state])
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    path = cache_folder("shards") / f"{key}.json.gz"
    with contextlib.suppress(OSError):
        os.utime(path)  # it is in use
    return cached(
        path,
        lambda path: _read(path, shard),
        list_shard,
        lambda path, listed: _write(path, shard, listed),
    )


def _write(path: Path, shard: str, listed: Listed) -> None:
    """Write an index, unless the shard could not be read to its end: the next start tries again."""
    records, skipped = listed
    if plain(shard) in [one.path for one in skipped]:
        return
    rows = [[one.id, one.captions, one.label, one.split, one.meta, one.span] for one in records]
    content = {"records": rows, "skipped": [[one.path, one.reason] for one in skipped]}
    write_bytes(path, gzip.compress(json.dumps(content).encode(), 1))


def _read(path: Path, shard: str) -> Listed:
    """An index. Raises `UserError` if it is damaged."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        records = [_record(shard, *row) for row in content["records"]]
        return records, [Skipped(*row) for row in content["skipped"]]
    except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"The index {path} is damaged; delete it.") from error


def _record(
    shard: str,
    name: str,
    captions: list[str],
    label: int | None,
    split: str,
    meta: dict[str, Any],
    span: list[int],
) -> Record:
    offset, length = span
    return Record(name, shard, tuple(captions), label, split, meta, span=(offset, length))


def indexes() -> list[tuple[Path, int, float]]:
    """Path, number of bytes and time of last use of each index, the oldest first."""
    rows = []
    for path in cache_folder("shards").glob("*.json.gz"):
        with contextlib.suppress(OSError):  # another process has just deleted it
            info = path.stat()
            rows.append((path, info.st_size, info.st_mtime))
    return sorted(rows, key=lambda row: row[2])


def make_room() -> None:
    """Delete the indexes that were not used for the longest time, as far as there are too many."""
    rows = indexes()
    total = sum(size for _, size, _ in rows)
    for path, size, _ in rows:
        if total <= LIMIT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
