"""Build the notebooks from their sources.

    python notebooks/build.py [NAME ...]             all of them if left out, as in `08_ddpm`
    python notebooks/build.py --prose [NAME ...]     their prose alone; outputs stay

A source, `notebooks/solutions/NN_name.py`, is a notebook as text (percent format of jupytext), with
the solutions of its exercises between `### BEGIN SOLUTION` and `### END SOLUTION`. From it come

    notebooks/solutions/NN_name.ipynb    the same, run, with its outputs
    notebooks/NN_name.ipynb              the student's copy: stubs in place of the solutions
    notebooks/pictures/NN_name.png       its first picture, for the README

`tests/notebooks` hold the three together. Roles of cells are found by what stands in them: the
first code cell is the setup, one with a solution is an exercise, one that begins with `check.` is
its check, and all others are the page. Exercises and checks carry nbgrader's metadata.
"""

from __future__ import annotations

import base64
import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from lineage.course.checking import exercises

FOLDER = Path(__file__).parent
SOLUTIONS = FOLDER / "solutions"
PICTURES = FOLDER / "pictures"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
SECONDS = 3600  # that one cell may take on a machine that does much else
Notebook = Any  # nbformat's nodes are untyped


def names() -> list[str]:
    """Names of all notebooks, in order."""
    return sorted(path.stem for path in SOLUTIONS.glob("[0-9][0-9]_*.py"))


# --- from the source to notebooks without outputs -------------------------------------------------


def solution(name: str) -> Notebook:
    """The notebook with its solutions, without outputs."""
    text = (SOLUTIONS / f"{name}.py").read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.cells = [*notebook.cells, nbformat.v4.new_markdown_cell(_neighbours(name))]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
            "lineage": {"notebook": name},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for number, cell in enumerate(notebook.cells):
        role = "setup" if cell is setup else _role(cell)
        cell.id = f"{name[:2]}-{number:03d}"
        cell.metadata = nbformat.from_dict({"lineage": {"role": role}, **_nbgrader(cell, role)})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _role(cell: Notebook) -> str:
    if cell.cell_type == "code" and BEGIN in cell.source:
        return "exercise"
    if cell.cell_type == "code" and cell.source.startswith("check."):
        return "check"
    return "page"


def _nbgrader(cell: Notebook, role: str) -> dict[str, Any]:
    """Metadata by which nbgrader knows an exercise and its check."""
    if role not in ("exercise", "check"):
        return {}
    pattern = r"^def (\w+)\(" if role == "exercise" else r"^check\.(\w+)\("
    functions = re.findall(pattern, cell.source, re.MULTILINE)
    name = next(one for one in functions if one in exercises())
    mark = {
        "schema_version": 3,
        "solution": role == "exercise",
        "grade": role == "check",
        "locked": role == "check",
        "task": False,
        "grade_id": name if role == "exercise" else f"check_{name}",
    }
    return {"nbgrader": mark | ({"points": exercises()[name].points} if role == "check" else {})}


def student(notebook: Notebook) -> Notebook:
    """The student's copy: each solution becomes a stub, which `check` knows as not written yet."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        if cell.metadata.lineage.role == "exercise":
            cell.source = stub(cell.source)
    return copied


def one_folder_down(notebook: Notebook) -> Notebook:
    """A copy whose links lead to the same files from `notebooks/solutions`."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](../../")
    return copied


def stub(source: str) -> str:
    """A cell with every solution replaced by a line for the student's own."""
    pattern = rf"^( *){BEGIN}\n.*?^ *{END}$"
    text = r"\1# YOUR CODE HERE\n\1raise NotImplementedError"
    return re.sub(pattern, text, source, flags=re.MULTILINE | re.DOTALL)


def _neighbours(name: str) -> str:
    """Links to the notebooks before and after this one."""
    every = names()
    place = every.index(name)
    links = []
    if place > 0:
        links.append(f"Before: [{every[place - 1]}]({every[place - 1]}.ipynb).")
    if place + 1 < len(every):
        links.append(f"Next: [{every[place + 1]}]({every[place + 1]}.ipynb).")
    if name != every[0]:
        links.append(f"The map: [{every[0]}]({every[0]}.ipynb).")
    return "---\n" + " ".join(links)


# --- running --------------------------------------------------------------------------------------


def run(notebook: Notebook, blank: Notebook | None = None) -> None:
    """Run a notebook in a fresh kernel, in place.

    Args:
        notebook: Notebook to run; an error in a cell ends it.
        blank: Its student's copy, whose exercises and checks are run afterwards; its other cells
            receive the same outputs.
    """
    os.environ["LINEAGE_STILL"] = "1"
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        for number, cell in enumerate(blank.cells if blank else []):
            own = notebook.cells[number]
            if cell.metadata.lineage.role in ("exercise", "check"):
                client.execute_cell(cell, number)
            elif cell.cell_type == "code":
                cell.outputs = copy.deepcopy(own.outputs)
            notebook.cells[number] = own  # the client has put the cell that it ran there
    for one in (notebook, *([blank] if blank else [])):
        tidy(one)


def tidy(notebook: Notebook) -> None:
    """Counts from 1, neighbouring pieces of printed text joined, no state of one run."""
    count = 0
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        joined: list[Any] = []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            output.pop("transient", None)
            last = joined[-1] if joined else None
            if last is not None and output.get("name") and last.get("name") == output.get("name"):
                last.text += output.text
            else:
                joined.append(output)
        cell.outputs = joined


def first_picture(notebook: Notebook) -> bytes:
    """The first picture among the outputs, as a PNG file."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                return base64.b64decode(png)
    raise ValueError("the notebook shows no picture")


def with_outputs(notebook: Notebook, saved: Notebook) -> Notebook:
    """A notebook with the outputs of a saved one whose code is the same."""
    own, old = ([c for c in one.cells if c.cell_type == "code"] for one in (notebook, saved))
    if [cell.source for cell in own] != [cell.source for cell in old]:
        raise SystemExit("Its code has changed: build it without --prose.")
    for cell, before in zip(own, old, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return notebook


def main() -> None:
    arguments = sys.argv[1:]
    prose_alone = arguments[:1] == ["--prose"]
    for name in arguments[prose_alone:] or names():
        print(name, flush=True)
        whole = solution(name)
        blank = student(whole)
        places = SOLUTIONS / f"{name}.ipynb", FOLDER / f"{name}.ipynb"
        if prose_alone:
            for notebook, place in zip((whole, blank), places, strict=True):
                with_outputs(notebook, nbformat.read(place, as_version=4))
        else:
            run(whole, blank)
            PICTURES.mkdir(exist_ok=True)
            (PICTURES / f"{name}.png").write_bytes(first_picture(whole))
        for notebook, place in zip((one_folder_down(whole), blank), places, strict=True):
            nbformat.write(notebook, place)


if __name__ == "__main__":
    main()
