"""`metadata.jsonl` and `metadata.csv`: every row is read, or named with its line."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lineage.data import load_dataset, tables
from lineage.data.contract import Skipped
from lineage.data.tables import is_misnamed, is_table, read_table
from lineage.errors import UserError


def read(folder: Path, name: str, text: str | bytes) -> tuple[list[Any], list[str]]:
    """Cells of the rows of a table, and what was said of the others."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(raw)
    skipped: list[Skipped] = []
    rows = list(read_table(folder, name, skipped))
    assert all(s.path == name for s in skipped)
    return [row.values for row in rows], [s.reason for s in skipped]


def texts(folder: Path, body: str) -> list[str]:
    """Cells of the column `text` of a CSV table, where all rows are good."""
    rows, faults = read(folder, "metadata.csv", "file_name,text\n" + body)
    assert faults == []
    return [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("a dog", "a dog"),
        ('"a dog"', "a dog"),
        ('"a ""big"" dog, brown"', 'a "big" dog, brown'),
        ('"two\nlines"', "two\nlines"),
        ('5" pipe', '5" pipe'),
        ('"a dog" ', "a dog"),
        ('"red" cat', '"red" cat'),
        ('""', ""),
        ("x" * 200_000, "x" * 200_000),
        ('"' + "x, " * 100_000 + '"', "x, " * 100_000),
        ("\"['a dog', 'a cat']\"", ["a dog", "a cat"]),
        ("\"['a dog' 'a cat'\n 'a cow']\"", ["a dog", "a cat", "a cow"]),
        ('"[\'it\'\'s\', ""it\'s""]"', ["it", "s", "it's"]),
        (r'''"['it\'s', 'caf\xe9']"''', ["it's", "café"]),
        ('"[""a dog"", ""a cat""]"', ["a dog", "a cat"]),
        ("\" ['a dog', 'a cat'] \"", ["a dog", "a cat"]),
        ("\"('a dog', 'a cat')\"", ["a dog", "a cat"]),
        ("\"[np.str_('a dog'), np.str_('a cat')]\"", ["a dog", "a cat"]),
        ("\"[u'a dog', None, nan]\"", ["a dog"]),
        ("(a dog)", "(a dog)"),
        ("('a dog']", "('a dog']"),
        ("['a dog']", ["a dog"]),
        ("[]", []),
        ("[sic] a dog", "[sic] a dog"),
        ("['a dog'", "['a dog'"),
        ("\"['a dog', 3]\"", "['a dog', 3]"),
        ("[__import__('os')]", "[__import__('os')]"),
        ("a \0 dog", "a \ufffd dog"),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)
def test_a_cell_of_csv_is_read(tmp_path: Path, cell: str, value: object) -> None:
    assert texts(tmp_path, f"a.png,{cell}\nb.png,last\n") == [value, "last"]


@pytest.mark.parametrize(
    "head",
    [
        'file_name;"text"',
        'file_name;text;"note, or none"',
        "file_name|text",
        "sep=;\nfile_name;text",
        "\ufeff\ufefffile_name;text",
    ],
)
def test_the_separator_is_the_head_s(tmp_path: Path, head: str) -> None:
    mark = "|" if "|" in head else ";"
    rows, faults = read(tmp_path, "metadata.csv", f"{head}\na.png{mark}a dog, brown\n")
    assert faults == [] and len(rows) == 1
    assert (rows[0]["file_name"], rows[0]["text"]) == ("a.png", "a dog, brown")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('b.png,"a dog', "line 3 has a double quote that never closes"),
        ('"b.png,a dog', "line 3 has a double quote that never closes"),
        ("b.png,a dog, brown", "line 3 has 3 cells and the head has 2"),
    ],
)
@pytest.mark.parametrize("last", ['c.png,"a cat"', "c.png,a cat", 'c.png,"a cat"\nd.png,"x, y"'])
def test_a_wrong_row_of_csv_does_not_swallow_the_next(
    tmp_path: Path, row: str, words: str, last: str
) -> None:
    text = f"file_name,text\na.png,a dog\n{row}\n{last}\n"
    rows, faults = read(tmp_path, "metadata.csv", text)
    names = [row["file_name"] for row in rows]
    assert names == ["a.png", "c.png", "d.png"][: len(names)] and len(names) >= 2
    assert rows[1]["text"] == "a cat" and len(faults) == 1 and words in faults[0]


def test_lines_are_counted_from_the_first_line_of_each_row(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\n \na.png,"two\nlines"\r\nb.png,x\rc.png,"y\n'
    )
    skipped: list[Skipped] = []
    rows = list(read_table(tmp_path, "metadata.csv", skipped))
    assert [row.where for row in rows] == ["metadata.csv:3", "metadata.csv:5"]
    assert "line 6 " in skipped[0].reason


def test_cells_at_the_end_of_a_row_may_be_absent_or_empty(tmp_path: Path) -> None:
    rows, faults = read(tmp_path, "metadata.csv", "file_name , text\na.png\nb.png,x,,\n")
    assert rows == [{"file_name": "a.png", "text": ""}, {"file_name": "b.png", "text": "x"}]
    assert faults == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    table = end.join(["file_name\ttext", "a.png\tcafé", "b.png\tЮ", ""])
    assert read(tmp_path, "metadata.csv", table.encode(encoding)) == (
        [{"file_name": "a.png", "text": "café"}, {"file_name": "b.png", "text": "Ю"}],
        [],
    )
    lines = end.join(['{"text": "café"}', '{"text": "Ю\u2028"}'])
    expected = [{"text": "café"}, {"text": "Ю\u2028"}]
    assert read(tmp_path, "metadata.jsonl", lines.encode(encoding)) == (expected, [])


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("metadata.csv", b"text\nfirst\ncaf\xe9\n\xff\nlast\n"),
        ("metadata.jsonl", b'\n{"text": "first"}\n{"text": "caf\xe9"}\n\xff\n{"text": "last"}\n'),
    ],
)
def test_only_the_lines_that_are_not_utf8_are_left_out(
    tmp_path: Path, name: str, raw: bytes
) -> None:
    rows, faults = read(tmp_path, name, raw)
    assert [row["text"] for row in rows] == ["first", "last"]
    assert [fault.split(" is ")[0] for fault in faults] == ["line 3", "line 4"]
    assert all("UTF-8" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [
        ("metadata.csv", b"file_name,text\ncaf\xe9.png,x", [b"a.png,caf\xe9", b"\xe9.png,\xe9"]),
        (
            "metadata.jsonl",
            b'{"file_name": "caf\xe9.png", "text": "x"}',
            [b'{"file_name": "a.png", "text": "\xe9"}', b'["\xe9"]', b'{"\xe9": 1}'],
        ),
    ],
)
def test_a_file_name_may_have_the_bytes_of_its_file(
    tmp_path: Path, name: str, first: bytes, others: list[bytes]
) -> None:
    rows, faults = read(tmp_path, name, b"\n".join([first, *others]))
    assert rows == [{"file_name": "caf\udce9.png", "text": "x"}]
    assert len(faults) == len(others) and all("UTF-8" in fault for fault in faults)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_table_of_zero_bytes_is_named_once(tmp_path: Path, name: str, encoding: str) -> None:
    text = 'file_name,text\na.png,é\nb.png,"{x}"\n'
    rows, faults = read(tmp_path, name, text.encode(encoding))
    assert rows == [] and faults == ["the metadata are not UTF-8; save the file as UTF-8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "x"}]', "line 1 is not a JSON object; write one object on each line"),
        ('{"text": "x"}{"text": "y"}', "Extra data (column 14); write one object on each line"),
        ("{'text': 'x'}", "double quotes (column 2); write one object on each line"),
    ],
)
def test_other_forms_of_json_are_named_with_the_mend(tmp_path: Path, text: str, words: str) -> None:
    rows, faults = read(tmp_path, "metadata.jsonl", text)
    assert rows == [] and len(faults) == 1 and words in faults[0]


def test_joined_files_may_hold_byte_order_marks(tmp_path: Path) -> None:
    text = '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n'
    assert read(tmp_path, "metadata.jsonl", text) == ([{"text": "a"}, {"text": "b"}], [])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested deeper"),
        ("[" * 51 + "]" * 51, "nested deeper"),
        ("9" * 5000, "more than 4,000 digits"),
        ("NaN", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("1e999", "1e999 is no number of JSON"),
        ("", "Expecting value"),
        ('"a" "b"', "delimiter"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_line_that_is_not_bounded_json_is_named(tmp_path: Path, cell: str, words: str) -> None:
    text = f'{{"text": "first"}}\n{{"text": "x", "n": {cell}}}\n{{"text": "last"}}\n'
    rows, faults = read(tmp_path, "metadata.jsonl", text)
    assert [row["text"] for row in rows] == ["first", "last"]
    assert (
        len(faults) == 1 and faults[0].startswith("line 2 is not valid JSON") and words in faults[0]
    )


def test_a_cell_may_be_nested_and_meta_one_level_more(tmp_path: Path) -> None:
    cell: Any = "\ud800"
    for _ in range(tables.MAX_DEPTH):
        cell = [cell]
    row = {"k\udc00": cell, "meta": {"k": cell}}
    rows, faults = read(tmp_path, "metadata.jsonl", json.dumps(row))
    assert faults == []
    assert json.dumps(rows[0], ensure_ascii=False).encode().count("\ufffd".encode()) == 3


def test_only_file_names_keep_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    row = {"file_name": "caf\udce9.png", "text": "caf\udce9"}
    rows, _ = read(tmp_path, "metadata.jsonl", json.dumps(row))
    assert rows == [{"file_name": "caf\udce9.png", "text": "caf\ufffd"}]


def test_a_table_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "metadata.csv")
    (tmp_path / "metadata.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.setattr(tables, "MAX_BYTES", 10)
    skipped: list[Skipped] = []
    for name in ("metadata.csv", "metadata.jsonl", "x/metadata.csv"):
        assert list(read_table(tmp_path, name, skipped)) == []
    words = ("it is a pipe, not a file", "are more than", "No such file")
    assert [s.path for s in skipped] == ["metadata.csv", "metadata.jsonl", "x/metadata.csv"]
    assert all(word in s.reason for word, s in zip(words, skipped, strict=True))


@pytest.mark.parametrize(
    ("path", "table", "misnamed"),
    [
        ("a/metadata.jsonl", True, False),
        ("metadata.csv", True, False),
        ("Metadata.JSONL", False, True),
        ("a/metadata1000.jsonl", False, True),
        ("metadata.json", False, True),
        ("metadata.json1", False, True),
        ("metadata (2).csv", False, True),
        ("metadata.parquet", True, False),
        ("metadata1.parquet", False, True),
        ("metadata.jsonl.gz", False, True),
        ("metadata.csv.txt", False, True),
        ("metadata.ndjson", False, True),
        ("metadata", False, True),
        ("train_metadata.csv", False, True),
        ("metadata.png", False, False),
        ("metadata.txt", False, False),
        ("captions.jsonl", False, False),
    ],
)
def test_names_of_tables(path: str, table: bool, misnamed: bool) -> None:
    assert (is_table(path), is_misnamed(path)) == (table, misnamed)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metadata.csv.gz", "must be unpacked and named metadata.csv"),
        ("metadata.json", "must be named metadata.jsonl and have one JSON object on each line"),
        ("labels.tsv", "must be named metadata.csv"),
        ("train-00000-of-00001.parquet", "must be named metadata.parquet"),
        ("captions.xlsx", "cannot be read, write its table as metadata.csv"),
        ("data.jsonl.zip", "must be unpacked and named metadata.jsonl"),
    ],
)
def test_a_table_under_any_name_is_named_where_nothing_else_is(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.json").write_bytes(b"{}")  # of one picture, no table
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{name}.*{words}"):
        load_dataset(str(tmp_path))


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    day = datetime.date(2020, 1, 2)
    rows = [
        {"file_name": "a.png", "text": ["x", "y"], "day": day, "score": math.nan, "n": 3},
        {"file_name": "b.png", "text": None, "day": None, "score": 0.5, "n": None},
    ]
    file = tmp_path / "metadata.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    skipped: list[Skipped] = []
    table = list(read_table(tmp_path, "metadata.parquet", skipped))
    assert [row.where for row in table] == ["metadata.parquet:1", "metadata.parquet:2"]
    assert table[0].values == {
        **rows[0],
        "day": "2020-01-02",
        "score": None,
    }
    assert table[1].values == rows[1] and skipped == []
    raw = file.read_bytes()
    for damaged in (b"", raw[:-9], b"PAR1" + raw[60:], raw[:30] + b"zzzz" + raw[34:]):
        file.write_bytes(damaged)
        list(read_table(tmp_path, "metadata.parquet", skipped))
    assert skipped and all("damaged" in s.reason for s in skipped)


def test_without_pyarrow_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    skipped: list[Skipped] = []
    assert list(read_table(tmp_path, "metadata.parquet", skipped)) == []
    assert "pip install 'lineage-t2i[hub]'" in skipped[0].reason
