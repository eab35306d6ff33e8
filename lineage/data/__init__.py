"""Captioned data sets, and the one function that loads any of them.

    load_dataset("shapes")                       the procedural world, endless, needs no files
    load_dataset("shapes:hard", split="heldout") `easy` (the default), `medium` or `hard`
    load_dataset("folder:my/pictures")           pictures, each with a .txt of captions beside it
    load_dataset("imagefolder:my/set")           the Hugging Face layout, metadata.jsonl or .csv
    load_dataset("my/pictures")                  a bare path, recognised by what lies there

A spec is `kind`, `kind:rest` or a path. A kind has at least two letters, so the drive in
`C:\\pictures` is none. To read a folder that is named like a kind, write `./shapes`.

Splits are `train`, `validation` (`val`, `valid`, `dev` mean the same in files) and `test`; data
sets on a disk also answer to `all`, `shapes` to `heldout`.

Modules: `contract` (what a data set is), `shapes*` (the procedural world), `pictures` (what all
data sets on a disk share), one file for each layout, `tools` (look at a data set, check it, write
it).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lineage.data.contract import Batch, CaptionedDataset, Example, Skipped
from lineage.errors import UserError, nearest

__all__ = ["KINDS", "Batch", "CaptionedDataset", "Example", "Skipped", "load_dataset", "parse_spec"]

Loader = Callable[[str, str, int, int], CaptionedDataset]
"""(what follows the colon, split, size, seed) -> data set."""


def _shapes(level: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.shapes import Shapes

    return Shapes(level or "easy", split, size, seed)


def _folder(path: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.folder import load

    return load(path, split, size)


def _imagefolder(path: str, split: str, size: int, seed: int) -> CaptionedDataset:
    from lineage.data.imagefolder import load

    return load(path, split, size)


KINDS: dict[str, Loader] = {
    "shapes": _shapes,
    "folder": _folder,
    "imagefolder": _imagefolder,
}
"""Every kind of data set and its loader. They import late, so `import lineage.data` stays light."""

ENDLESS = frozenset({"shapes"})
"""Kinds that need no path and have no split `all`."""


def load_dataset(
    spec: str, split: str = "train", size: int = 32, seed: int = 0
) -> CaptionedDataset:
    """Load one split of a data set.

    Args:
        spec: `shapes`, `shapes:LEVEL`, `KIND:PATH` or a path; see the head of this module.
        split: `train`, `validation`, `test`, or what else the data offers.
        size: side of the square pictures in pixels; other pictures are cropped to the centred
            square and resized.
        seed: of the procedural world; data on a disk does not depend on it.

    Raises:
        UserError: the spec, the path, the split or the size is wrong, or nothing could be loaded.
    """
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0.")
    kind, rest = parse_spec(spec)
    return KINDS[kind](rest, split, size, seed)


def parse_spec(spec: str) -> tuple[str, str]:
    """`folder:a/b` -> ("folder", "a/b"); a bare path -> the kind that lies there, and the path.

    Raises:
        UserError: an unknown kind, a kind without its path, or a path where nothing lies.
    """
    kind, colon, rest = spec.partition(":")
    if kind in KINDS and (rest or kind in ENDLESS):
        return kind, rest
    if kind in KINDS and colon:
        raise UserError(f"{spec!r} names no folder; write {kind}:PATH.")
    path = Path(spec).expanduser()
    if spec and path.exists():
        return recognise(path), spec
    if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", kind):
        raise UserError(f"there is no kind of data set {kind!r}: {nearest(kind, KINDS)}")
    hint = nearest(spec, KINDS) if re.fullmatch(r"\w*", spec) else "check the spelling."
    raise UserError(f"there is no data set or folder {spec!r}: {hint}")


def recognise(path: Path) -> str:
    """Which kind of data set lies in a folder.

    Raises:
        UserError: it is no folder.
    """
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is a file; name the folder that it lies in.")
    from lineage.data.imagefolder import has_metadata, misnamed_metadata

    if has_metadata(path):
        return "imagefolder"
    # A misnamed metadata file is better explained by the reader that would have wanted it.
    return "imagefolder" if misnamed_metadata(path) and not any(path.rglob("*.txt")) else "folder"
