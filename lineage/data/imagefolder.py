"""`imagefolder:PATH`: the Hugging Face layout, listed in `metadata.jsonl` or `metadata.csv`.

    metadata.jsonl            {"file_name": "images/a.png", "text": "a red kite", "split": "train"}
    images/a.png
or
    train/metadata.jsonl      {"file_name": "a.png", "text": "a red kite"}
    train/a.png
    test/metadata.jsonl  ...

`file_name` is relative to its metadata file. Captions are read from the columns `text`, `caption`,
`captions`, `prompt`, `text_0`, `caption_0` and so on, and `alt_texts`, in this order; each holds a
string or a list of strings. The captions of several rows of one picture are joined.

The split of a picture is its row's `split`; else the first folder of its path that has the name of
a split (`train`, `validation` or `val`, `valid`, `dev`, `test`); else `train`. The column `label`
becomes the label if it has a whole number in every row. All other columns go into `Example.meta`;
an object in the column `meta`, as exported data sets have it, is merged into it.

An example's id is its path without the suffix, or with it where two paths differ in nothing else.

Left out and reported: a row that is not a JSON object, or has no `file_name`, no caption, or a path
outside the folder; a row whose picture is missing or broken, or that puts a picture into a second
split; a picture that no row names.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lineage.data.contract import Skipped
from lineage.data.pictures import (
    SPLIT_NAMES,
    PictureDataset,
    Record,
    clean_captions,
    is_picture,
    list_files,
    open_root,
    split_name,
)
from lineage.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
NUMBERED = re.compile(r"(?:caption|text)_(\d+)")
ALTERNATIVES = "alt_texts"  # read last, because evaluation uses the first caption
ALL_COLUMNS = (*CAPTION_COLUMNS, "caption_0 ...", "text_0 ...", ALTERNATIVES)

LAYOUT_HINT = (
    "the folder needs a metadata.jsonl with a line for each picture, such as "
    '{"file_name": "images/a.png", "text": "a red kite"}.'
)


@dataclass
class Row:
    """One row of a metadata file.

    Attributes:
        where: File and line, for messages.
        folder: Folder of the metadata file, relative to the root.
        values: Cells by column.
    """

    where: str
    folder: str
    values: dict[str, Any]


@dataclass
class Entry:
    """All rows of one picture, joined."""

    path: str
    split: str
    captions: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def load(path: str, split: str = "train", size: int = 32) -> PictureDataset:
    """Read a folder with metadata.

    Raises:
        UserError: The folder, the split, the metadata or a caption column does not exist, or
            nothing can be loaded.
    """
    root = open_root(path)
    skipped: list[Skipped] = []
    records = read(root, skipped)
    return PictureDataset(f"imagefolder:{path}", root, records, split, size, skipped, LAYOUT_HINT)


def has_metadata(root: Path) -> bool:
    """Whether the folder, or one directly below it, contains metadata."""
    return any(
        (folder / name).is_file()
        for folder in (root, *(f for f in sorted(root.iterdir()) if f.is_dir()))
        for name in METADATA
    )


def misnamed_metadata(root: Path) -> list[str]:
    """Files in the folder, or one level below, that were probably meant to be the metadata."""
    return sorted(
        f.relative_to(root).as_posix()
        for f in (*root.glob("*"), *root.glob("*/*"))
        if f.is_file() and f.name.lower().startswith("metadata.") and f.name not in METADATA
    )


def read(root: Path, skipped: list[Skipped]) -> list[Record]:
    """Records of a folder in the order of their rows; what is left out is added to `skipped`.

    Raises:
        UserError: There is no metadata file, or none of them has a caption column.
    """
    files = list_files(root, skipped)
    tables = [f for f in files if PurePosixPath(f).name in METADATA]
    if not tables:
        raise UserError(_no_metadata(root))
    rows = [row for table in tables for row in _rows(root, table, skipped)]
    columns = {column for row in rows for column in row.values}
    if rows and not any(_is_caption(column) for column in columns):
        raise UserError(
            f"{tables[0]} in {root} has no column of captions: it has "
            f"{', '.join(sorted(columns))}; name the caption column one of "
            f"{', '.join(ALL_COLUMNS)}."
        )
    named: set[str] = set()
    entries = _entries(root, rows, named, skipped)
    skipped += [
        Skipped(f, "no row of the metadata names this picture")
        for f in files
        if is_picture(f) and f not in named
    ]
    return _records(entries)


def _no_metadata(root: Path) -> str:
    message = f"There is no metadata.jsonl or metadata.csv in {root}"
    wrong = misnamed_metadata(root)
    if not wrong:
        return f"{message}; {LAYOUT_HINT}"
    if wrong[0].endswith(".parquet"):
        return f"{message}; {wrong[0]} cannot be read, write its table as metadata.csv."
    return (
        f"{message}; {wrong[0]} must be named metadata.jsonl and have one JSON object on each line."
    )


def _rows(root: Path, table: str, skipped: list[Skipped]) -> Iterator[Row]:
    """Rows of one metadata file."""
    try:
        raw = (root / table).read_bytes()
    except OSError as error:
        skipped.append(Skipped(table, f"the metadata cannot be read: {error.strerror}"))
        return
    folder = str(PurePosixPath(table).parent)
    parse = _csv_rows if table.endswith(".csv") else _json_rows
    for line, values in parse(raw.removeprefix(b"\xef\xbb\xbf"), table, skipped):
        yield Row(f"{table}:{line}", folder, values)


def _json_rows(
    raw: bytes, table: str, skipped: list[Skipped]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of the encoding or of the JSON
            skipped.append(Skipped(table, f"line {number} is not valid JSON: {error}"))
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            skipped.append(Skipped(table, f"line {number} is not a JSON object"))


def _csv_rows(
    raw: bytes, table: str, skipped: list[Skipped]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table with a header, separated by commas, semicolons or tabs."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        skipped.append(
            Skipped(table, f"the table is not UTF-8 (byte {error.start + 1}); save it as UTF-8")
        )
        return
    header = text.split("\n", 1)[0]
    separator = next((s for s in ",;\t" if s in header), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            # Cells beyond the header have the key None; missing cells of a row, the value None.
            yield (
                reader.line_num,
                {key.strip(): _cell(value or "") for key, value in row.items() if key is not None},
            )
    except csv.Error as error:
        skipped.append(Skipped(table, f"line {reader.line_num} is not valid CSV: {error}"))


def _cell(value: str) -> Any:
    """A CSV cell; a list or an object in JSON is parsed."""
    if value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _is_caption(column: str) -> bool:
    return column in CAPTION_COLUMNS or column == ALTERNATIVES or bool(NUMBERED.fullmatch(column))


def _captions(values: dict[str, Any]) -> tuple[str, ...]:
    """Every caption of a row, in the order of columns of the module's header."""
    numbered = sorted(
        (column for column in values if NUMBERED.fullmatch(column)),
        key=lambda column: int(column.rsplit("_", 1)[1]),
    )
    texts: list[str] = []
    for column in (*CAPTION_COLUMNS, *numbered, ALTERNATIVES):
        value = values.get(column)
        texts += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    return clean_captions(texts)


def _entries(
    root: Path, rows: Iterable[Row], named: set[str], skipped: list[Skipped]
) -> list[Entry]:
    """One entry for each picture of `rows`. Every path that a row names is added to `named`."""
    entries: dict[str, Entry] = {}
    for row in rows:
        name = row.values.get("file_name")
        if not isinstance(name, str) or not name.strip():
            has = ", ".join(sorted(row.values)) or "nothing"
            skipped.append(Skipped(row.where, f"the row has no file_name (it has {has})"))
            continue
        path = _inside(root, row.folder, name.strip())
        if path is None:
            skipped.append(Skipped(name, f"the file_name leads out of the folder ({row.where})"))
            continue
        named.add(path)
        if not (root / path).is_file():
            skipped.append(Skipped(path, f"the picture is missing ({row.where})"))
            continue
        captions = _captions(row.values)
        if not captions:
            skipped.append(Skipped(path, f"the row has no caption ({row.where})"))
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


def _inside(root: Path, folder: str, name: str) -> str | None:
    """`name` as a path relative to the root, or None if it lies outside."""
    if "\\" in name and not (root / folder / name).exists():
        name = name.replace("\\", "/")  # written on Windows
    path = os.path.normpath(PurePosixPath(folder, name)).replace(os.sep, "/")
    outside = path.startswith(("../", "/")) or path == ".." or PurePosixPath(path).is_absolute()
    return None if outside or re.match(r"[A-Za-z]:", path) else path


def _split(row: Row, path: str) -> str:
    """The row's `split`; else the first folder with the name of a split; else `train`."""
    own = row.values.get("split")
    if isinstance(own, str) and own.strip():
        return split_name(own)
    folders = (*PurePosixPath(row.folder).parts, *PurePosixPath(path).parent.parts)
    return next(
        (split_name(folder) for folder in folders if folder.lower() in SPLIT_NAMES), "train"
    )


def _records(entries: list[Entry]) -> list[Record]:
    """Records of the entries, with ids, labels and meta."""
    stems = [str(PurePosixPath(entry.path).with_suffix("")) for entry in entries]
    counts = Counter(stems)
    labels = [_whole_number(entry.values.get("label")) for entry in entries]
    labelled = all(label is not None for label in labels)
    return [
        Record(
            id=stem if counts[stem] == 1 else entry.path,
            path=entry.path,
            captions=clean_captions(entry.captions),
            label=label if labelled else None,
            split=entry.split,
            meta=_meta(entry.values, drop_label=labelled),
        )
        for entry, stem, label in zip(entries, stems, labels, strict=True)
    ]


def _whole_number(value: object) -> int | None:
    """A number, or the text "3" of a CSV file, as an int; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _meta(values: dict[str, Any], drop_label: bool) -> dict[str, Any]:
    """All other columns; an object in `meta` is merged into them."""
    used = {"file_name", "split"} | ({"label"} if drop_label else set())
    rest = {k: v for k, v in values.items() if k not in used and not _is_caption(k)}
    nested = rest.pop("meta") if isinstance(rest.get("meta"), dict) else {}
    return rest | nested
