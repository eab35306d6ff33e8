"""The notebooks: built from their sources, small, quiet, and running from top to bottom as they
stand.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from lineage.catalog import CATALOG, working
from lineage.course.checking import exercises
from lineage.course.grading import grade

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
LARGEST = 500_000  # bytes of a notebook
LARGEST_OUTPUT = 200_000  # characters of one output
LINES = 25  # of a cell
PRINTED_LINES = 40  # of a cell's text
WIDEST = 1100  # pixels of a picture


def _build() -> Any:
    spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()
NAMES = build.names()


def saved(name: str, folder: Path = NOTEBOOKS) -> Any:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def content(notebook: Any) -> list[tuple[Any, ...]]:
    """Everything of a notebook but outputs."""
    return [(c.id, c.cell_type, c.source, c.metadata) for c in notebook.cells]


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[str]:
    """Kinds of a cell's outputs, such as `image/png`."""
    return {kind for output in cell.outputs for kind in output.get("data", {output.get("name"): 0})}


def test_every_source_has_its_notebooks_and_none_is_left_over() -> None:
    assert NAMES
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"):
        assert sorted(path.stem for path in folder.glob("*.ipynb")) == NAMES
    modules = {one.module for one in exercises().values()}
    assert modules == {name[3:] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_says(name: str) -> None:
    """`python notebooks/build.py NAME` writes both again."""
    whole = build.solution(name)
    solutions = NOTEBOOKS / "solutions"
    assert content(saved(name, solutions)) == content(build.one_folder_down(whole))
    assert content(saved(name)) == content(build.student(whole))


@pytest.mark.parametrize("name", NAMES)
def test_a_students_copy_holds_no_solution(name: str) -> None:
    cells = code(saved(name))
    assert not any("SOLUTION" in cell.source for cell in cells)
    stubs = [c for c in cells if "raise NotImplementedError" in c.source]
    assert 3 <= len(stubs) <= 5
    checked = [cell.source for cell in cells if cell.metadata.lineage.role == "check"]
    names = [one.name for one in exercises().values() if one.module == name[3:]]
    assert sorted(checked) == sorted(f"check.{one}({one})" for one in names)


@pytest.mark.parametrize("folder", [NOTEBOOKS, NOTEBOOKS / "solutions"], ids=["page", "solutions"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_are_small_and_quiet(name: str, folder: Path) -> None:
    assert (folder / f"{name}.ipynb").stat().st_size <= LARGEST
    for cell in code(saved(name, folder)):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.get("text")
            text = output.get("text", "")
            assert text.count("\n") <= PRINTED_LINES, text
            for data in output.get("data", {}).values():
                assert len(data) <= LARGEST_OUTPUT, cell.source
            if png := output.get("data", {}).get("image/png"):
                assert Image.open(io.BytesIO(base64.b64decode(png))).width <= WIDEST
    text = (folder / f"{name}.ipynb").read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text.replace("~", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_in_every_cell_and_speaks_enough(name: str) -> None:
    notebook = build.solution(name)
    lines = [cell.source.splitlines() for cell in code(notebook)]
    assert max(map(len, lines)) <= LINES
    number = sum(1 for cell in lines for line in cell if line.strip())
    words = sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown")
    assert 3 <= words / number <= 7
    assert "begin(" in lines[0][-1] and f'"{name}"' in lines[0][-1]
    pictures = [cell for cell in code(saved(name)) if "image/png" in kinds(cell)]
    assert len(pictures) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"):
        for cell in saved(name, folder).cells:
            if cell.cell_type == "markdown":
                for link in re.findall(r"\]\(([^)#]+)", cell.source):
                    assert link.startswith("https://") or (folder / link).exists(), link


def test_every_system_has_a_place_in_a_notebook() -> None:
    text = "\n".join(path.read_text() for path in (NOTEBOOKS / "solutions").glob("*.py"))
    packaged = [key for key in working() if not CATALOG[key].adapts]
    assert {key for key in packaged if f'"pretrained:{key}"' not in text} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_blank_copy_earns_nothing_and_the_solutions_all(name: str) -> None:
    blank = grade(NOTEBOOKS / f"{name}.ipynb")
    assert blank.points == 0 and blank.notes == []
    assert all(q.reason == f"{q.name} is not written yet." for q in blank.questions)
    solved = grade(NOTEBOOKS / "solutions" / f"{name}.ipynb")
    assert solved.points == solved.of == blank.of > 0, solved.to_json()
    assert solved.notes == []


SHORT_TRAINING = """
import lineage.stepping
whole = lineage.stepping.training_steps
def short(*arguments, steps=None, settings=None, **options):
    steps = None if steps is None else max(steps // {share}, min(steps, 30))
    settings = {{**(settings or {{}}), "train.batch_size": 8}}
    return whole(*arguments, steps=steps, settings=settings, **options)
lineage.stepping.training_steps = short
"""
"""What a kernel runs first: live training of one step in `share`, with few pictures each."""
NUMBERED = ("05_vqvae", "07_clip")
"""Notebooks that look at steps of certain numbers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_it_stands(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a fresh kernel, without errors or warnings, and with outputs of the same kinds. Its live
    training is short here; `notebooks/build.py` runs it whole.
    """
    startup = tmp_path / "profile_default" / "startup" / "short.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(SHORT_TRAINING.format(share=1 if name in NUMBERED else 10))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("LINEAGE_STILL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = saved(name)
    before = [kinds(cell) for cell in code(notebook)]
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    ).execute()
    for cell, expected in zip(code(notebook), before, strict=True):
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.get("text")
        assert kinds(cell) == expected, cell.source


def test_a_stub_keeps_the_rest_of_its_cell() -> None:
    body = "    ### BEGIN SOLUTION\n    z = y\n\n    return z\n    ### END SOLUTION\n"
    source = f"def f(x):\n    y = 1\n{body}"
    stub = "def f(x):\n    y = 1\n    # YOUR CODE HERE\n    raise NotImplementedError\n"
    assert build.stub(source) == stub
    assert build.stub(source + source) == stub + stub


if sys.platform == "win32":  # its event loop needs another policy for kernels
    import asyncio

    asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
