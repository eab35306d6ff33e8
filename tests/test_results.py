"""The pages of `results/` and `data/` name files that exist, and every result is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGE = (RESULTS / "README.md").read_text(encoding="utf-8")


def files_in_rows() -> list[str]:
    """Files and folders in the first column of the page's tables, with endings such as `.json`."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_result_is_named_on_the_page() -> None:
    names = files_in_rows()
    folders = tuple(name for name in names if name.endswith("/"))
    stems = {Path(name).stem for name in names}
    for path in RESULTS.rglob("*.*"):
        relative = path.relative_to(RESULTS).as_posix()
        known = relative.startswith((*folders, "demo/")) or path.stem in stems
        assert known or relative == "README.md", f"{relative} is not named in results/README.md"


@pytest.mark.parametrize("name", [name for name in files_in_rows() if "/" in name])
def test_every_file_on_the_page_exists(name: str) -> None:
    assert (RESULTS / name).exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"benchmarks/\w+\.py", PAGE))))
def test_every_program_on_the_page_exists(command: str) -> None:
    assert (ROOT / command).is_file()


@pytest.mark.parametrize(
    "page", ["data/README.md", "results/README.md", "tests/parity/README.md", "CONTRIBUTING.md"]
)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link
