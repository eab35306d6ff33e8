"""Tables of metadata, `metadata.jsonl`, `.csv` and `.parquet`: rows with the line of each.

A table is UTF-8, or UTF-16 with a byte order mark; a `file_name` may have other bytes, as its file
has. A row that cannot be read is reported with its line, and the rows after it are read.

JSON: one object on each line. Numbers that JSON has no way to write (`NaN`, `Infinity`, `1e999`)
are faults.

CSV: a head with the names of the columns, cells separated by commas, semicolons, tabs or bars. A
cell may stand in double quotes and then hold separators and line ends; a double quote in it is
written twice. A cell with a list is a list: in JSON (`["a dog", "a cat"]`), or as pandas and NumPy
write it (`['a dog', 'a cat']`).

Parquet needs pyarrow, which `lineage-t2i[hub]` installs. Values that JSON has no way to write, such
as dates, are read as texts.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import Any, NoReturn

from lineage.characters import decoded, valid
from lineage.data.contract import Skipped
from lineage.files import check_regular, check_stand_in, read_regular, read_span

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_BYTES = 1_000_000_000
"""Largest size of a table."""
MAX_DEPTH = 50
"""Largest number of lists and objects inside one another in a cell."""

_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"
_TABLE = r"\.(json\w*|ndjson|csv\w*|tsv|xlsx?|parquet)(\.(gz|bz2|xz|zst|zip|txt|bak))?"
_SIMILAR = re.compile(rf".*metadata.*{_TABLE}|metadata", re.IGNORECASE)
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass
class Row:
    """One row of a table.

    Attributes:
        where: File and line, for messages.
        folder: Folder of the table, relative to the root.
        values: Cells by column. All text in them can be written as UTF-8, save `file_name`, which
            may hold bytes of a file's name that are not UTF-8.
    """

    where: str
    folder: str
    values: dict[str, Any]


def is_table(path: str) -> bool:
    """Whether a path has the name of a table of metadata."""
    return path.endswith(NAMES) and basename(path) in NAMES


def is_misnamed(path: str) -> bool:
    """Whether a file was probably meant to be a table, but has a name that is not read."""
    if "metadata" not in path.lower() or is_table(path):
        return False
    return bool(_SIMILAR.fullmatch(basename(path)))


def has_table_ending(path: str) -> bool:
    """Whether a file may be a table by the end of its name alone."""
    return bool(re.search(_TABLE + "$", path, re.IGNORECASE))


def why_misnamed(path: str) -> str:
    """End of a sentence that starts with the path of a table that has another name."""
    name = basename(path).lower()
    packed = name.endswith((".gz", ".bz2", ".xz", ".zst", ".zip"))
    must = "must be unpacked and named" if packed else "must be named"
    if ".parquet" in name:
        return f"{must} metadata.parquet."
    if ".xls" in name:
        return "cannot be read, write its table as metadata.csv."
    if ".csv" in name or ".tsv" in name:
        return f"{must} metadata.csv."
    return f"{must} metadata.jsonl and have one JSON object on each line."


def read_table(
    root: Path, table: str, skipped: list[Skipped], is_csv: bool | None = None
) -> Iterator[Row]:
    """Rows of the table at `root / table`; what cannot be read is added to `skipped`.

    Args:
        is_csv: Whether it is CSV, not JSON; None to read it from the name.
    """
    folder = str(PurePosixPath(table).parent)
    try:
        if table.endswith(".parquet"):
            check_regular(root / table, MAX_BYTES)
            check_stand_in(read_span(root / table, 0, 512))
            for line, values in _parquet_rows(root / table):
                if isinstance(values, str):
                    skipped.append(Skipped(table, values))
                else:
                    yield Row(f"{table}:{line}", folder, values)
            return
        raw = read_regular(root / table, MAX_BYTES)
    except OSError as error:
        skipped.append(Skipped(table, f"the metadata cannot be read: {error.strerror}"))
        return
    try:
        text = decoded(raw)
    except UnicodeDecodeError:  # only the lines with wrong bytes are left out
        if 4 * raw.count(0) > len(raw):
            skipped.append(Skipped(table, "the metadata are not UTF-8; save the file as UTF-8"))
            return
        text = raw.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    is_csv = table.endswith(".csv") if is_csv is None else is_csv
    parse = _csv_rows if is_csv else _json_rows
    for line, values in parse(text):
        if isinstance(values, str):
            skipped.append(Skipped(table, f"line {line} {values}"))
        else:
            yield Row(f"{table}:{line}", folder, values)


# --- JSON -----------------------------------------------------------------------------------------


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and cells of each row, or what is wrong with the line."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip().lstrip("\ufeff")  # files with byte order marks may be joined
        if not line:
            continue
        try:
            if not _is_utf8(line):
                raise ValueError("it is not UTF-8; save the file as UTF-8")
            yield number, json_object(line)
        except NotAnObjectError:
            yield number, "is not a JSON object; write one object on each line"
        except json.JSONDecodeError as error:
            reason = f"{error.msg} (column {error.colno})"
            yield number, f"is not valid JSON: {reason}; write one object on each line"
        except ValueError as error:
            yield number, f"is not valid JSON: {error}"


def _is_utf8(line: str) -> bool:
    """Whether a line of JSON has no other bytes, save in a `file_name`, as file systems may."""
    if not _NOT_UTF8.search(line):
        return True
    try:
        values = _json(line)
    except ValueError:
        return False
    if not isinstance(values, dict):
        return False
    rest = {key: value for key, value in values.items() if key != "file_name"}
    return not _NOT_UTF8.search(json.dumps(rest, ensure_ascii=False))


class NotAnObjectError(ValueError):
    """A value of JSON that is no object."""


def json_object(text: str) -> dict[str, Any]:
    """The object of a text in JSON, with valid text and bounded depth.

    Raises:
        NotAnObjectError: The text is another value.
        ValueError: The text is not JSON, or is nested too deep, or holds no finite number.
    """
    values = _json(text)
    if not isinstance(values, dict):
        raise NotAnObjectError("it is not an object")
    return _checked(values)


def _json(text: str) -> Any:
    """The value of a text in JSON.

    Raises:
        ValueError: The text is not JSON, or is nested too deep, or holds no finite number.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's limit for whole numbers
            raise ValueError("it holds a number of more than 4,000 digits") from None
        raise


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON; write null")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:20])


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The cells of a row with valid text; a cell that is nested too deep raises `ValueError`."""
    # An exported set holds the columns of a row one level deeper, in `meta`.
    return {
        valid(column): cell
        if column == "file_name" and isinstance(cell, str)
        else _bounded(cell, MAX_DEPTH + (column == "meta"))
        for column, cell in values.items()
    }


def _bounded(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return valid(value)
    if not isinstance(value, (list, dict)):
        return value
    if depth == 0:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, list):
        return [_bounded(item, depth - 1) for item in value]
    return {valid(key): _bounded(item, depth - 1) for key, item in value.items()}


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and cells of each row, or what is wrong with the line."""
    separator = _separator(text.lstrip().split("\n", 1)[0])
    is_odd = bool(_NOT_UTF8.search(text))
    head: list[str] | None = None
    for line, cells, fault in _csv_records(text, separator):
        if head is None and cells[0] == "sep=":  # Excel's own line before the head
            continue
        if is_odd and _has_odd_cell(head or [""] * len(cells), cells):
            fault = "is not UTF-8; save the table as UTF-8"
        if fault:
            yield line, fault
            if head is None:
                return
        elif head is None:
            head = [cell.strip().lstrip("\ufeff") for cell in cells]
            if twice := next((name for name in head if name and head.count(name) > 1), None):
                yield (
                    line,
                    f"names the column {twice!r} twice; write text_0, text_1, ...",
                )
                return
        elif any(cells[len(head) :]):
            yield (
                line,
                f"has {len(cells)} cells and the head has {len(head)}; put double quotes around a "
                f"cell that holds {separator!r}",
            )
        else:
            cells += [""] * (len(head) - len(cells))
            try:
                yield line, _checked(dict(zip(head, map(_cell, cells), strict=False)))
            except ValueError as error:
                yield line, f"is not a row: {error}"


def _has_odd_cell(head: list[str], cells: list[str]) -> bool:
    """Whether a cell is not UTF-8, save a `file_name`, which has the bytes of the file system."""
    named = zip(head, cells, strict=False)
    return any(name != "file_name" and _NOT_UTF8.search(cell) for name, cell in named)


def _separator(head: str) -> str:
    """The separator that is most frequent in the first line, outside of quotes."""
    bare = re.sub(r'"[^"]*"', "", head)
    return max(",;\t|", key=bare.count)


def _csv_records(text: str, separator: str) -> Iterator[tuple[int, list[str], str]]:
    """Line, cells and fault ("" for none) of each record; blank lines are left out."""
    quoted_cell = rf' *"([^"]*(?:""[^"]*)*)" *(?=[{separator}\n]|\Z)'
    cell = re.compile(rf"{quoted_cell}|([^{separator}\n]*)")
    start, line = 0, 1
    while start < len(text):
        cells, fault, at = [], "", start
        while True:
            found = cell.match(text, at)
            assert found is not None  # the second form matches any text, also none
            quoted, bare = found.groups()
            if quoted is None and bare.lstrip().startswith('"') and bare.count('"') % 2:
                fault = "has a double quote that never closes; write it twice inside a quoted cell"
            cells.append(bare if quoted is None else quoted.replace('""', '"'))
            at = found.end()
            if at == len(text) or text[at] == "\n":
                break
            at += 1
        record = text[start:at]
        if fault or record.strip():
            yield line, cells, fault
        line += record.count("\n") + 1
        start = at + 1


_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ITEM = re.compile(rf"\s*(?:np\.str_\(({_TEXT})\)|u?({_TEXT})|None|nan)\s*,?", re.DOTALL)


def _cell(text: str) -> Any:
    """A CSV cell; a list or an object in JSON, and a list of texts in Python, is parsed."""
    bare = text.strip()
    if not bare.startswith(("[", "{", "(")):
        return text
    try:
        return _json(bare)
    except ValueError:
        texts = _python_list(bare)
        return text if texts is None else texts


def _python_list(text: str) -> list[str] | None:
    """The texts in `['a dog', 'a cat']` or `('a dog', 'a cat')`; None if it is no such list."""
    texts, at = [], 1
    while item := _ITEM.match(text, at):
        try:
            if literal := item[1] or item[2]:
                texts.append(ast.literal_eval(literal))
        except (SyntaxError, ValueError):
            return None
        at = item.end()
    return texts if text[0] + text[at:].strip() in ("[]", "()") else None


# --- Parquet --------------------------------------------------------------------------------------

MAX_ROWS = 20_000_000
"""Largest number of rows of a table in Parquet, which compresses them."""


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number, from 1, and cells of each row, or what is wrong with the file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        yield 0, "Parquet needs pyarrow: pip install 'lineage-t2i[hub]', or write metadata.csv"
        return
    number = 0
    try:
        with ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                yield 0, f"it has more than {MAX_ROWS:,} rows; write several tables"
                return
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    try:
                        yield number, _checked({k: _as_json(v) for k, v in values.items()})
                    except ValueError as error:
                        yield number, f"row {number} cannot be read: {error}"
    except Exception as error:  # pyarrow raises errors of many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        yield number, f"the table is damaged after row {number} ({reason}); copy it again"


def _as_json(value: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
