"""Properties of data sets on a disk, for names, captions and tables of any content.

What `check` accepts, every later step accepts; every picture is loaded or named; an exported set
loads again equal.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lineage.characters import plain, valid
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.data.decoding import decode, why_broken
from lineage.data.pictures import PictureDataset
from lineage.data.tables import read_table
from lineage.data.tools import check, export
from lineage.errors import UserError

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def red_png() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


PNG = red_png()


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def equal(one: CaptionedDataset, other: CaptionedDataset) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.image == b.image).all()
        assert (a.captions, a.label, a.meta) == (b.captions, b.label, b.meta)


def every_step(root: Path, spec: str, pictures: set[str]) -> CaptionedDataset | None:
    """The data set of `root` after every step that reads it; None if nothing in it is usable.

    Args:
        root: Folder of the data set, in a folder that the export is written to.
        spec: Spec of the data set.
        pictures: Shown path of each picture; each must be loaded or named.
    """
    try:
        report = check(spec, 8)
    except UserError:
        return None
    named = {s["path"] for s in report["skipped"]}
    assert all(plain(text) == text for s in report["skipped"] for text in s.values())
    if not report["loaded"]:
        assert pictures <= named
        return None
    data = load_dataset(spec, "all", 8)
    assert isinstance(data, PictureDataset)
    assert pictures <= named | {plain(record.path) for record in data.records}
    assert report["loaded"] == len(data) == len({e.id for e in data})
    data.fingerprint().encode()
    data.batch(range(len(data)), [0] * len(data), seed=0)
    json.dumps([(e.id, e.captions, e.meta) for e in data], ensure_ascii=False).encode()
    export(data, root.parent / "out")
    again = load_dataset(str(root.parent / "out"), "all", 8)
    assert again.skipped == []
    equal(data, again)
    return data


def is_usable(name: bytes) -> bool:
    return name[:1] != b"." and b"/" not in name and b"\0" not in name and name != b"__MACOSX"


file_names = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.text(min_size=1, max_size=12).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([rb"caf\xe9", b"caf\xe9", "è".encode(), "e\u0300".encode()]),
).filter(is_usable)


@given(names=st.lists(file_names, min_size=1, max_size=5, unique=True), inner=st.booleans())
@quick
def test_names_of_any_bytes_load_and_are_exported(names: list[bytes], inner: bool) -> None:
    with folder() as top:
        root = top / "in"
        paths = [name + (b"/a" if inner else b"") for name in names]
        for path in paths:
            place = os.fsencode(root) + b"/" + path
            os.makedirs(os.path.dirname(place), exist_ok=True)
            Path(os.fsdecode(place + b".png")).write_bytes(PNG)
            Path(os.fsdecode(place + b".txt")).write_text("x")
        data = every_step(root, str(root), {plain(os.fsdecode(p + b".png")) for p in paths})
        assert data is not None and len(data) == len(names) and data.skipped == []


@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    )
)
@quick
def test_a_text_of_any_bytes_is_read_or_named(raw: bytes) -> None:
    with folder() as top:
        root = top / "in"
        root.mkdir()
        (root / "a.png").write_bytes(PNG)
        (root / "a.txt").write_bytes(raw)
        data = every_step(root, f"folder:{root}", set())
        if data is None:
            assert {s["path"] for s in check(f"folder:{root}", 8)["skipped"]} == {"a.txt"}


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(
            [2**63, -(2**64), float("nan"), float("inf"), "\ud800", "a\0b", "\ud83d\ude00"]
        ),
        st.floats(),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    ["text", "caption", "captions", "text_0", "alt_texts", "label", "split", "meta", "source", "k"]
)
names_in_rows = st.one_of(
    st.sampled_from(["a.png", "b.png", "./a.png", "sub/c.png", "sub\\c.png", "gone.png"]),
    st.text(max_size=8),
    values,
)
rows = st.lists(
    st.tuples(names_in_rows, st.dictionaries(columns, values, max_size=4), st.booleans()),
    min_size=1,
    max_size=5,
)


@given(rows=rows)
@quick
def test_a_table_of_any_values_is_read_or_named(
    rows: list[tuple[Any, dict[str, Any], bool]],
) -> None:
    with folder() as top:
        root = top / "in"
        (root / "sub").mkdir(parents=True)
        names = {"a.png", "b.png", "sub/c.png"}
        for name in names:
            (root / name).write_bytes(PNG)
        lines = [
            json.dumps({"file_name": name, **({"text": "x"} if sound else {}), **cells})
            for name, cells, sound in rows
        ]
        (root / "metadata.jsonl").write_text("\n".join(lines))
        every_step(root, f"imagefolder:{root}", names)


@given(
    raw=st.one_of(
        st.binary(max_size=80), st.text("ab\",;\t\n\r[]{}'\\x", max_size=80).map(str.encode)
    )
)
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@quick
def test_a_table_of_any_bytes_ends_in_rows_or_words(name: str, raw: bytes) -> None:
    with folder() as root:
        (root / name).write_bytes(raw)
        skipped: list[Any] = []
        for row in read_table(root, name, skipped):
            json.dumps(row.values, ensure_ascii=False)
            assert row.where.startswith(f"{name}:")


cells = st.text(max_size=12).filter(lambda text: text[:1] not in ("[", "{") and "\r" not in text)


@given(body=st.lists(st.tuples(cells, cells), min_size=1, max_size=6), mark=st.sampled_from(",;\t"))
@quick
def test_every_cell_that_python_writes_is_read(body: list[tuple[str, str]], mark: str) -> None:
    with folder() as root:
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=mark, quoting=csv.QUOTE_ALL)
        writer.writerows([("one", "two"), *body])
        raw = file.getvalue().encode("utf-8", "replace")
        (root / "metadata.csv").write_bytes(raw)
        skipped: list[Any] = []
        read = [tuple(r.values.values()) for r in read_table(root, "metadata.csv", skipped)]
        expected = [tuple(valid(cell) for cell in row) for row in body]
        assert read == expected and skipped == []


@given(
    cut=st.integers(0, len(PNG)),
    changes=st.lists(st.tuples(st.integers(0, len(PNG) - 1), st.integers(0, 255)), max_size=4),
)
@quick
def test_a_damaged_picture_is_decoded_or_named(cut: int, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(PNG)
    for place, value in changes:
        raw[place] = value
    with folder() as root:
        file = root / "a.png"
        file.write_bytes(raw[:cut] if cut % 2 else raw)
        try:
            assert decode(file, 8).shape == (3, 8, 8)
        except Exception as error:
            words = why_broken(error, file)
            assert "picture" in words and plain(words) == words
