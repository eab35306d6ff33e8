"""Layouts of captioned pictures on a disk: which there are, how one is recognised, and loading.

A layout is a module of its name with

    LAYOUT_HINT    what a folder needs, the end of the sentence about an empty data set
    OPTIONS        what may follow the path, beside the options of all layouts
    locate         folder and files of a path, where it may be more than a folder
    resembles      whether files are of this layout
    read           its `Record`s

so that a new layout is a file, and a name in `LAYOUTS` of the package.

What follows the path of a spec, as in `cub:birds?splits=class&crop=centre`:

    crop      how a picture becomes a square: `centre` (the default), `pad` (the whole picture on
              white), `random` (another part at each visit), `box` (the default where there are
              boxes, of `cub`, or a column `crop_box` of `imagefolder`), `buckets` (for training
              nearly the whole picture, in a shape that is like its own; see `buckets`)
    splits    `seeded`: a tenth is `validation` and a tenth `test`; `class`: a quarter of the
              classes is `test`; `list`: those of the data set's own lists
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from lineage.characters import plain
from lineage.data import LAYOUTS, parse_spec
from lineage.data.contract import Skipped
from lineage.data.pictures import PictureDataset
from lineage.data.records import Record, list_files, open_root
from lineage.data.splits import class_split, seeded_split
from lineage.errors import UserError, nearest
from lineage.files import expanded

COMMON = {"crop": ("centre", "pad", "random", "buckets"), "splits": ("seeded", "class")}
"""Options of all layouts, with their values."""

_OPTIONS = re.compile(r"(.*)\?([^?/\\]*)", re.DOTALL)


class Layout(Protocol):
    """What a module of this package provides to be a layout."""

    LAYOUT_HINT: str
    OPTIONS: Mapping[str, tuple[str, ...]]

    def resembles(self, root: Path, files: list[str]) -> bool:
        """Whether the files below a folder are of this layout."""

    def read(
        self, root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
    ) -> list[Record]:
        """Records of all splits; what is left out is added to `skipped`."""


def layout(kind: str) -> Layout:
    """The layout of this name."""
    return cast(Layout, import_module(f"lineage.data.{kind}"))


def load(kind: str, rest: str, split: str, size: int) -> PictureDataset:
    """Load one split of a data set on a disk.

    Args:
        kind: Name of the layout.
        rest: Path with its options.
        split: Name of a split, or `all`.
        size: Side of the square pictures in pixels.

    Raises:
        UserError: The folder, an option or the split does not exist, or nothing can be loaded.
    """
    module = layout(kind)
    path, options = split_options(rest)
    own = module.OPTIONS
    known = {name: (*own.get(name, ()), *COMMON.get(name, ())) for name in {**COMMON, **own}}
    check_options(kind, options, known)
    skipped: list[Skipped] = []
    root, files = getattr(module, "locate", open_folder)(path, skipped)
    records = module.read(root, files, skipped, options)
    if options.get("splits") not in own.get("splits", ()):
        records = divided(records, options.get("splits"))
    crop = options.get("crop", "box" if any(r.box for r in records) else "centre")
    if records and crop == "box" and not any(r.box for r in records):
        raise UserError(f"{plain(path)} has no boxes: leave crop=box out.")
    if crop != "box":
        records = [replace(r, box=None) if r.box else r for r in records]
    name = f"{kind}:{rest}"
    return PictureDataset(name, root, records, split, size, skipped, module.LAYOUT_HINT, crop)


def open_folder(path: str, skipped: list[Skipped]) -> tuple[Path, list[str]]:
    """A folder, and the files below it."""
    root = open_root(path)
    return root, list_files(root, skipped)


def split_options(rest: str) -> tuple[str, dict[str, str]]:
    """Path and options of what follows the kind in a spec: `birds?crop=pad` -> `birds`, {...}.

    A path that exists has no options, whatever characters it holds.
    """
    parts = None if _exists(rest) else _OPTIONS.fullmatch(rest)
    if parts is None:
        return rest, {}
    options: dict[str, str] = {}
    for option in parts[2].split("&"):
        name, _, value = option.partition("=")
        if name in options:
            raise UserError(f"{plain(rest)!r} has the option {name!r} twice.")
        options[name] = value
    return parts[1], options


def square_spec(spec: str) -> str:
    """The spec of the same pictures as squares alone, for what cannot learn from other shapes."""
    kind, rest = parse_spec(spec)
    path, options = split_options(rest)
    if options.get("crop") != "buckets":
        return spec
    own = {**options, "crop": "centre"}
    return f"{kind}:{path}?" + "&".join(f"{name}={value}" for name, value in own.items())


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(expanded(path))


def check_options(
    kind: str, options: Mapping[str, str], known: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise `UserError` for an option or a value that a kind of data set does not have."""
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{kind} has no option {name!r}: {nearest(name, known)}")
        if value not in known[name]:
            has = ", ".join(known[name])
            raise UserError(f"{kind} has no {name}={plain(value)}: it has {has}.")


def divided(records: list[Record], splits: str | None) -> list[Record]:
    """The records with splits by picture (`seeded`) or by class (`class`); None for as they are.

    Raises:
        UserError: `class`, and a picture has no class.
    """
    if splits == "seeded":
        return [replace(record, split=seeded_split(record.id)) for record in records]
    if splits is None:
        return records
    if any(record.label is None for record in records):
        raise UserError("splits=class needs a class for each picture, and some have none.")
    classes = class_split(str(record.label) for record in records)
    return [replace(record, split=classes[str(record.label)]) for record in records]


def recognise(path: Path) -> str:
    """Name of the layout of a folder.

    Raises:
        UserError: The path is a file, and no shard or font.
    """
    if not path.is_dir():
        if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            return "wds"
        if path.suffix.lower() in (".ttf", ".ttc", ".otf"):
            return "emoji"
        raise UserError(f"{str(path)!r} is a file; name the folder that contains it.")
    files = list_files(path, [])
    return next(kind for kind in LAYOUTS if layout(kind).resembles(path, files))
