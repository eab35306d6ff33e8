"""The catalogue: its rows agree with each other and with the files, and it is quick to print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lineage
from lineage.catalog import (
    CATALOG,
    FAMILIES,
    PRESETS,
    as_json,
    as_table,
    as_tree,
    lookup,
    working,
)
from lineage.errors import UserError

PACKAGE = Path(lineage.__file__).parent
TESTS = Path(__file__).parent


def test_keys_are_unique_and_valid_module_names() -> None:
    rows = as_json()
    assert len({row["key"] for row in rows}) == len(rows) == len(CATALOG)
    assert len({row["title"] for row in rows}) == len(rows)
    assert all(key.isidentifier() and key == key.lower() for key in CATALOG)


def test_rows_are_in_historical_order_and_build_on_older_ones() -> None:
    years = [row.year for row in CATALOG.values()]
    assert years == sorted(years)
    order = list(CATALOG)
    for row in CATALOG.values():
        assert len(set(row.builds_on)) == len(row.builds_on)
        for parent in row.builds_on:
            assert parent in CATALOG, (row.key, parent)
            assert order.index(parent) < order.index(row.key), (row.key, parent)


@pytest.mark.parametrize("key", list(CATALOG))
def test_each_row_is_complete(key: str) -> None:
    row = CATALOG[key]
    assert row.key == key
    assert row.family in FAMILIES
    assert row.status in ("works", "planned")
    assert row.stages and len(set(row.stages)) == len(row.stages)
    assert list(row.presets) == [preset for preset in PRESETS if preset in row.presets]
    assert bool(row.presets) == row.works
    assert row.idea.endswith(".") and row.idea[0].isupper()


@pytest.mark.parametrize("key", list(CATALOG))
def test_the_arxiv_number_agrees_with_the_year(key: str) -> None:
    row = CATALOG[key]
    for number in re.findall(r"arXiv:(\S+)", row.paper):
        year, month = re.fullmatch(r"(\d\d)(\d\d)\.\d{5}[;,]?", number).groups()
        assert 1 <= int(month) <= 12
        assert row.year == 2000 + int(year) or re.search(r"20\d\d", row.paper.split("arXiv")[-1])


NO_OFFICIAL_CODE = {
    "retrieval": "the authors published no code",
    "dreambooth": "the authors published no code; losses of diffusers' script: official/lora.py",
    "gan_int_cls": "the authors' code is written in Lua (Torch), not in PyTorch",
}
"""Systems without a module in `lineage.official`, and the reason."""


@pytest.mark.parametrize("key", working())
def test_each_system_has_its_files_under_its_key(key: str) -> None:
    family = CATALOG[key].family
    for path in (
        PACKAGE / family / ("adapters" if CATALOG[key].adapts else "") / f"{key}.py",
        PACKAGE / "recipes" / f"{key}.py",
        TESTS / family / f"test_{key}.py",
    ):
        assert path.is_file(), f"{path} is missing"
    official = PACKAGE / "official" / f"{key}.py"
    assert official.is_file() != (key in NO_OFFICIAL_CODE), official


def test_the_exceptions_are_systems_of_the_catalogue() -> None:
    assert set(NO_OFFICIAL_CODE) <= set(working())


def test_lookup_returns_a_row_or_explains_why_not() -> None:
    assert lookup("ddpm").paper.endswith("arXiv:2006.11239")
    with pytest.raises(UserError, match="did you mean 'ddpm'"):
        lookup("ddmp")
    with pytest.raises(UserError, match="lineage list"):
        lookup("xyzzy")
    planned = next(key for key, row in CATALOG.items() if not row.works)
    with pytest.raises(UserError, match="planned") as caught:
        lookup(planned)
    assert all(key in str(caught.value) for key in working())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [as_table(), as_tree()], ids=["table", "tree"])
def test_a_printed_form_has_every_system_in_80_columns(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    words = re.findall(r"\w+", text)
    assert all(key in words for key in CATALOG)


def test_the_tree_has_each_system_once() -> None:
    keys = re.findall(r"\((\w+)\)(?: \*)?(?: \+.*)?$", as_tree(), re.MULTILINE)
    assert sorted(keys) == sorted(CATALOG)


def test_the_json_form_is_plain() -> None:
    rows = as_json()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["key"] for row in rows] == list(CATALOG)


def test_printing_imports_no_heavy_package() -> None:
    code = (
        "import sys; from lineage import catalog; catalog.as_table(); catalog.as_tree();"
        "print([m for m in ('torch', 'numpy', 'PIL', 'einops') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
