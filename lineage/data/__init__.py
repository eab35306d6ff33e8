"""Captioned data sets, and `load_dataset`, which loads any of them.

    load_dataset("shapes")                       the procedural world, endless, needs no files
    load_dataset("shapes:hard", split="heldout") `easy` (the default), `medium` or `hard`
    load_dataset("shapes:easy:zh")               Chinese captions; see `shapes_languages`
    load_dataset("folder:my/pictures")           pictures, each with a .txt of captions beside it
    load_dataset("imagefolder:my/set")           the Hugging Face layout, metadata.jsonl or .csv
    load_dataset("cub:birds")                    CUB-200-2011; also `flowers`, `coco`, `flickr8k`
    load_dataset("wds:shards/{00..09}.tar")      WebDataset
    load_dataset("hub:user/set")                 the Hugging Face hub, or a folder of its library
    load_dataset("emoji")                        the emoji of the system's font, or `emoji:FONT`
    load_dataset("my/pictures")                  a bare path; its layout is recognised
    load_dataset("my/pictures?crop=pad")         options of the layouts; see `layouts`

A spec is `kind`, `kind:rest` or a path. A kind has at least two letters, so the drive letter in
`C:\\pictures` is not a kind. To read a folder that has the name of a kind, write `./shapes`.

Splits are `train`, `validation` (in files also `val`, `valid`, `dev`) and `test`. Data sets on a
disk also have `all`, `shapes` has `heldout`.

Modules: `contract` (what a data set is), `shapes*` (the procedural world), `layouts` (what lies on
a disk) with one file for each, `hub*` (the Hugging Face hub), `emoji` and `colr` (fonts), `records`
and `pictures` (what they share), `pixels` (decoded pictures on the disk), `decoding` (one file ->
pixels), `tables` (rows of metadata), `reed` (captions of CUB and the flowers), `shard_index`,
`splits`, `buckets` (shapes beside the square), `cached` (adds what a network computes from each
picture), `tools` (contact sheet, check, export), `stats` (what is in it, as a page), `near` and
`cleaning*` (what is removed from it, and what is left).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lineage.bounds import Int, Seed
from lineage.config import typed
from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped
from lineage.errors import UserError, nearest
from lineage.files import expanded

__all__ = ["KINDS", "Batch", "CaptionedDataset", "Example", "Skipped", "load_dataset", "parse_spec"]

Loader = Callable[[str, str, int, int], CaptionedDataset]
"""(text after the colon, split, size, seed) -> data set."""


def _shapes(rest: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.shapes import Shapes
    from lineage.data.shapes_languages import parse_rest

    level, languages = parse_rest(rest)
    return Shapes(level, split, size, seed, languages)


def _layout(kind: str) -> Loader:
    def load(rest: str, split: str, size: int, seed: int) -> CaptionedDataset:
        from lineage.data import layouts

        return layouts.load(kind, rest, split, size)

    return load


def _hub(rest: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.hub import load

    return load(rest, split, size)


def _emoji(rest: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.emoji import load

    return load(rest, split, size)


LAYOUTS = ("cub", "flowers", "coco", "flickr8k", "wds", "imagefolder", "folder")
"""Layouts on a disk, in the order in which a folder is compared with them; see `layouts`."""

KINDS: dict[str, Loader] = {
    "shapes": _shapes,
    "emoji": _emoji,
    "hub": _hub,
    **{kind: _layout(kind) for kind in LAYOUTS},
}
"""Loader of each kind of data set. Loaders import late, so that `import lineage.data` is quick."""

NO_PATH = frozenset({"shapes", "emoji"})
"""Kinds that need no path."""

ENDLESS = frozenset({"shapes"})
"""Kinds that need no path and have no split `all`."""


def load_dataset(
    spec: str | Path, split: str = "train", size: int = 32, seed: int = 0
) -> CaptionedDataset:
    """Load one split of a data set.

    Args:
        spec: `shapes`, `shapes:LEVEL`, `shapes:LEVEL:LANGUAGE`, `KIND:PATH` or a path; see the head
            of this module.
        split: Name of the split: `train`, `validation`, `test`, or another that the data has.
        size: Side of the square pictures in pixels. Files are cropped to a square (see `layouts`)
            and resized.
        seed: Seed of the procedural world; data on a disk does not depend on it.

    Raises:
        UserError: The spec, the path, the split or the size is wrong, or nothing can be loaded.
    """
    seed, size = typed(Seed, seed, "seed"), typed(Int, size, "size")
    kind, rest = parse_spec(typed(str, os.fspath(spec) if isinstance(spec, Path) else spec, "data"))
    return KINDS[kind](rest, typed(str, split, "split"), size, seed)


def parse_spec(spec: str) -> tuple[str, str]:
    """Kind and path of a spec: `folder:a/b` -> ("folder", "a/b"); a bare path keeps its name. What
    follows a kind without files may begin with a `?`: `shapes?lang=zh` -> ("shapes", "?lang=zh").

    Raises:
        UserError: The kind is unknown or lacks its path, or the path does not exist.
    """
    kind, colon, rest = spec.partition(":")
    if "?" in kind and kind.partition("?")[0] in NO_PATH:
        kind, _, options = spec.partition("?")
        return kind, f"?{options}"
    if kind in KINDS and (rest or kind in NO_PATH):
        return kind, rest
    if kind in KINDS and colon:
        raise UserError(f"{spec!r} lacks a folder; write {kind}:PATH.")
    from lineage.data.layouts import recognise, split_options

    path = expanded(split_options(spec)[0]) if spec else Path(spec)
    if spec and os.path.exists(path):  # false, too, for a name that no file can have
        return recognise(path), spec
    if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", kind):
        raise UserError(f"There is no kind of data set {kind!r}: {nearest(kind, KINDS)}")
    hint = nearest(spec, KINDS) if re.fullmatch(r"\w*", spec) else "check the spelling."
    raise UserError(f"There is no data set or folder {spec!r}: {hint}")
