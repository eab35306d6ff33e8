"""Cached results on the disk. A cache is no requirement: without it, things take longer.

$LINEAGE_CACHE, or ~/.cache/lineage
    pixels/      decoded pictures (`lineage.data.pixels`)
    shards/      lists of what is in shards (`lineage.data.shard_index`)
    stages/      finished stages of runs
    parts/       earlier stages out of the runs that come with the package
    scorers/     scorers that were trained for a data set
    evaluate/    features and scores
    search/      embeddings of searched pictures
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lineage.errors import UserError, say_once
from lineage.files import expanded

T = TypeVar("T")


def cache_folder(kind: str) -> Path:
    """The folder of cached results of a kind, in `$LINEAGE_CACHE` or `~/.cache/lineage`."""
    return expanded(os.environ.get("LINEAGE_CACHE") or "~/.cache/lineage") / kind


def cached(
    path: Path,
    read: Callable[[Path], T],
    compute: Callable[[], T],
    write: Callable[[Path, T], None],
) -> T:
    """The value in a file of the cache; computed and written if the file is missing or damaged.

    A cache that cannot be written costs time, not results.
    """
    if os.path.isfile(path):
        try:
            return read(path)
        except UserError as error:
            say_once(f"{without_advice(error)}: it is computed again.")
    value = compute()
    write_cache(lambda: write(path, value))
    return value


def write_cache(write: Callable[[], None]) -> None:
    """Call `write`; if what it caches cannot be written, say so once and go on."""
    try:
        write()
    except UserError as error:
        say_once(
            f"{without_advice(error)}: going on without this cache; LINEAGE_CACHE sets another "
            "folder for it."
        )


def without_advice(error: UserError) -> str:
    """The first clause of an error's sentence."""
    return str(error).split("; ")[0].rstrip(".")
