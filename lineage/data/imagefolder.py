"""`imagefolder:PATH`: the Hugging Face layout, listed in `metadata.jsonl`, `.csv` or `.parquet`.

    metadata.jsonl            {"file_name": "images/a.png", "text": "a red kite", "split": "train"}
    images/a.png
or
    train/metadata.jsonl      {"file_name": "a.png", "text": "a red kite"}
    train/a.png
    test/metadata.jsonl  ...

`file_name` is relative to its metadata file, which may lie in any folder of the set; an absolute
path inside the folder is taken too. Accents may be written in it as one character or as two.

Captions are read from the columns `text`, `caption`, `captions`, `prompt`, `text_0`, `caption_0`
and so on, and `alt_texts`, in this order; each holds a string, a number or a list of them. The
captions of several rows of one picture are joined.

The split of a picture is its row's `split`; else the first folder of its path that has the name of
a split (`train`, `validation` or `val`, `valid`, `dev`, `test`); else `train`. The column `label`
becomes the label if it has a whole number in every row. The column `crop_box` (left, top, right,
bottom in pixels) is the square that the crop `box` takes, the default where there is one. All other
columns go into `Example.meta`; an object in the column `meta`, as exported data sets have it, is
merged into it.

An example's id is its path without the suffix, or with it where two paths differ in nothing else;
bytes that are not UTF-8 are escaped in it.

Left out and reported: a row that cannot be read, or has no `file_name`, no caption, a path outside
the folder or a label of more than 64 bits; a row whose picture is missing or broken, or that puts a
picture into a second split; a picture that no row names; a table under a name that is not read.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import Any

from lineage.characters import plain, same_name
from lineage.data.contract import Skipped
from lineage.data.decoding import Box
from lineage.data.folder import count_pairs
from lineage.data.records import Record, clean_captions, is_picture, unique_ids
from lineage.data.splits import SPLIT_NAMES, split_name
from lineage.data.tables import Row, is_misnamed, is_table, read_table, why_misnamed
from lineage.errors import UserError

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
NUMBERED = re.compile(r"(?:caption|text)_([0-9]{1,9})")
ALTERNATIVES = "alt_texts"  # read last, because evaluation uses the first caption
ALL_COLUMNS = (*CAPTION_COLUMNS, "caption_0 ...", "text_0 ...", ALTERNATIVES)

OPTIONS: dict[str, tuple[str, ...]] = {"crop": ("box",)}
LAYOUT_HINT = (
    "the folder needs a metadata.jsonl with a line for each picture, such as "
    '{"file_name": "images/a.png", "text": "a red kite"}.'
)


@dataclass
class Entry:
    """All rows of one picture, joined."""

    path: str
    split: str
    captions: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def resembles(root: Path, files: list[str]) -> bool:
    """Whether there is a table, and it lists as many pictures as have texts beside them.

    A table of a wrong name counts too, where no picture has a text: the reader of tables explains
    it better.
    """
    if pairs := count_pairs(files):
        return count_listed(root, files) >= pairs
    return any(is_table(file) or is_misnamed(file) for file in files)


def count_listed(root: Path, files: Sequence[str]) -> int:
    """Number of pictures that the tables among the files list with a caption."""
    names = PictureNames(root, files)
    rows = (row for table in files if is_table(table) for row in read_table(root, table, []))
    paths = (names.find(row) for row in rows if captions_in(row.values))
    return len({path for path in paths if isinstance(path, str)})


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records of a folder in the order of their rows; what is left out is added to `skipped`.

    Raises:
        UserError: There is no metadata file, or none of them has a caption column.
    """
    tables = [f for f in files if is_table(f)]
    misnamed = [f for f in files if is_misnamed(f)]
    if not tables:
        message = f"There is no metadata.jsonl, .csv or .parquet in {plain(root)}"
        hint = f"{plain(misnamed[0])} {why_misnamed(misnamed[0])}" if misnamed else LAYOUT_HINT
        raise UserError(f"{message}; {hint}")
    rows = [row for table in tables for row in read_table(root, table, skipped)]
    columns = {column for row in rows for column in row.values}
    if rows and not any(_is_caption(column) for column in columns):
        raise UserError(
            f"{tables[0]} in {root} has no column of captions: it has "
            f"{_listed(columns)}; name the caption column one of {', '.join(ALL_COLUMNS)}."
        )
    names = PictureNames(root, files)
    entries = _entries(names, rows, skipped)
    skipped += [
        Skipped(f, "no row of the metadata names this picture")
        for f in files
        if is_picture(f) and f not in names.found
    ]
    skipped += [Skipped(f, f"the table is not read: it {why_misnamed(f)[:-1]}") for f in misnamed]
    skipped += _without_label(entries)
    return _records(entries)


def _without_label(entries: Sequence[Entry]) -> list[Skipped]:
    """A report of the first picture without a whole number as label, where others have one."""
    odd = [entry for entry in entries if _whole_number(entry.values.get("label")) is None]
    if len(odd) in (0, len(entries)):
        return []
    others = f", as those of {len(odd) - 1:,} other pictures" if len(odd) > 1 else ""
    reason = f"its label is no whole number{others}: no label of this data set is used"
    return [Skipped(odd[0].path, reason)]


def _listed(columns: Iterable[str]) -> str:
    """Names of columns for a sentence, as many as fit."""
    names = sorted(plain(column)[:40] for column in columns)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _is_caption(column: str) -> bool:
    return column in CAPTION_COLUMNS or column == ALTERNATIVES or bool(NUMBERED.fullmatch(column))


def captions_in(values: dict[str, Any]) -> tuple[str, ...]:
    """Every caption of a row, in the order of columns of the module's header."""
    numbered = sorted(
        (column for column in values if NUMBERED.fullmatch(column)),
        key=lambda column: int(column.rsplit("_", 1)[1]),
    )
    texts: list[str] = []
    for column in (*CAPTION_COLUMNS, *numbered, ALTERNATIVES):
        value = values.get(column)
        items = value if isinstance(value, list) else [value]
        numbers = [str(v) for v in items if isinstance(v, (int, float)) and not isinstance(v, bool)]
        # Where there is no text, numbers are texts, as in a CSV file.
        texts += [v for v in items if isinstance(v, str)] or numbers
    return clean_captions(texts)


class PictureNames:
    """The pictures that the rows of a folder's tables name.

    Args:
        root: Folder of the data set.
        files: Relative paths of the files in it.

    Attributes:
        found: Every path that `find` has returned or reported as missing.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.found: set[str] = set()
        self._by_name = {same_name(path): path for path in reversed(files)}

    def find(self, row: Row) -> str | Skipped:
        """Path of the row's picture relative to the root, or why there is none."""
        name = row.values.get("file_name")
        if name is not None and not isinstance(name, str):
            return Skipped(row.where, f"the row has no file_name: {str(name)[:40]} is no text")
        if name is None or not name.strip():
            has = _listed(column for column in row.values if column != "file_name") or "nothing"
            return Skipped(row.where, f"the row has no file_name (it has {has})")
        path = name
        try:
            path = self._relative(row.folder, name)
            if not os.path.lexists(self.root / path):
                path = self._relative(row.folder, name.strip())
            is_drive = re.match(r"[A-Za-z]:", path) and not os.path.lexists(self.root / path)
            if path == ".." or path.startswith(("../", "/")) or is_drive:
                return Skipped(name, f"the file_name leads out of the folder ({row.where})")
            if not os.path.lexists(self.root / path):
                path = self._by_name.get(same_name(path), path)
            self.found.add(path)
            is_folder = stat.S_ISDIR(os.stat(self.root / path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return Skipped(path, f"the picture is missing ({row.where})")
        except OSError as error:
            return Skipped(path, f"the picture cannot be opened: {error.strerror} ({row.where})")
        except ValueError:  # the character 0, or half a surrogate pair
            return Skipped(path, f"no file can have this file_name ({row.where})")
        if is_folder:
            return Skipped(path, f"the file_name is the name of a folder ({row.where})")
        return path

    def _relative(self, folder: str, name: str) -> str:
        """`name` as a path relative to the root; outside, it is absolute or starts with `..`."""
        if "\\" in name and not os.path.exists(self.root / folder / name):
            name = name.replace("\\", "/")  # written on Windows
        if os.path.isabs(name):
            root = os.path.abspath(self.root)
            return os.path.relpath(name, root).replace(os.sep, "/")
        return os.path.normpath(PurePosixPath(folder, name)).replace(os.sep, "/")


def _entries(names: PictureNames, rows: Iterable[Row], skipped: list[Skipped]) -> list[Entry]:
    """One entry for each picture of `rows`."""
    entries: dict[str, Entry] = {}
    for row in rows:
        path = names.find(row)
        if isinstance(path, Skipped):
            skipped.append(path)
            continue
        captions = captions_in(row.values)
        if not captions:
            skipped.append(Skipped(path, f"the row has no caption ({row.where})"))
            continue
        if is_too_large(row.values.get("label")):
            reason = f"the label is no number of 64 bits; write another number ({row.where})"
            skipped.append(Skipped(path, reason))
            continue
        split = _split(row, path)
        entry = entries.setdefault(path, Entry(path, split))
        if entry.split != split:
            reason = (
                f"a later row puts it into {split!r} too ({row.where}); it stays in {entry.split!r}"
            )
            skipped.append(Skipped(path, reason))
            continue
        entry.captions += captions
        entry.values = row.values | entry.values
    return list(entries.values())


def _split(row: Row, path: str) -> str:
    """The row's `split`; else the first folder with the name of a split; else `train`."""
    if own := split_in(row.values):
        return own
    folders = (*PurePosixPath(row.folder).parts, *PurePosixPath(path).parent.parts)
    return next(
        (split_name(folder) for folder in folders if folder.lower() in SPLIT_NAMES), "train"
    )


def _records(entries: list[Entry]) -> list[Record]:
    """Records of the entries, with ids, labels and meta."""
    stems = [splitext(entry.path)[0] for entry in entries]
    counts = Counter(stems)
    paths = [
        stem if counts[stem] == 1 else entry.path
        for stem, entry in zip(stems, entries, strict=True)
    ]
    labels = [_whole_number(entry.values.get("label")) for entry in entries]
    labelled = all(label is not None for label in labels)
    return [
        Record(
            id=example_id,
            path=entry.path,
            captions=clean_captions(entry.captions),
            label=label if labelled else None,
            split=entry.split,
            meta=meta_in(entry.values, drop_label=labelled),
            box=_box(entry.values.get("crop_box")),
        )
        for example_id, entry, label in zip(unique_ids(paths), entries, labels, strict=True)
    ]


def _box(value: object) -> Box | None:
    """The four numbers of a box; None for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [side for side in value if isinstance(side, (int, float)) and abs(side) < 1e6]
    if len(numbers) != 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    left, top, right, bottom = map(float, numbers)
    return left, top, right, bottom


def split_in(values: dict[str, Any]) -> str | None:
    """The split of a row; None if it has none."""
    own = values.get("split")
    return split_name(own) if isinstance(own, str) and own.strip() else None


def label_in(values: dict[str, Any]) -> int | None:
    """The label of a row; None if it is no whole number of 64 bits."""
    label = values.get("label")
    return None if is_too_large(label) else _whole_number(label)


def _whole_number(value: object) -> int | None:
    """A number, or the text "3" of a CSV file, as an int; None for anything else.

    pandas writes 3.0 where another row has none.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+(\.0*)?\s*", value):
        # The first digits are enough to see that it is too large.
        return int(value.partition(".")[0].strip()[:40])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_too_large(label: object) -> bool:
    """Whether a label is a whole number that a tensor cannot hold."""
    number = _whole_number(label)
    return number is not None and not -(2**63) <= number < 2**63


def meta_in(values: dict[str, Any], drop_label: bool) -> dict[str, Any]:
    """All other columns; an object in `meta` is merged into them."""
    used = {"file_name", "split", "crop_box"} | ({"label"} if drop_label else set())
    rest = {k: v for k, v in values.items() if k not in used and not _is_caption(k)}
    nested = rest.pop("meta") if isinstance(rest.get("meta"), dict) else {}
    return rest | nested
