"""The README says what the files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lineage import catalog

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", ["demo/scores.md", "long.md", "five_minutes.md"])
def test_the_tables_are_the_measured_ones(table: str) -> None:
    """Numbers are generated, never typed."""
    assert (ROOT / "results" / table).read_text(encoding="utf-8").strip() in README


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()


@pytest.mark.parametrize("key", catalog.working())
def test_every_working_system_is_named(key: str) -> None:
    assert f"`{key}`" in README


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README)
