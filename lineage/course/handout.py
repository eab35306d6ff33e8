"""The folder that a lecturer hands out: `lineage course DIR`.

NN_name.ipynb        the students' notebooks, with stubs for the exercises
requirements.txt     pins of all packages, and this one as a file beside it
lineage-t2i-*.zip    this package
README.md            one page: install, open, check, hand in
schedule.md          which notebook in which week, minutes of work and of computing
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lineage
from lineage.course.checking import exercises
from lineage.errors import UserError
from lineage.files import check_output, write_bytes

PACKAGE = Path(lineage.__file__).parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
ARCHIVE = f"lineage-t2i-{lineage.__version__}.zip"
PINNED = (
    *("torch", "numpy", "pillow", "matplotlib", "tqdm", "safetensors", "einops", "jinja2"),
    *("pydantic", "cyclopts", "jupyterlab", "ipykernel", "ipywidgets"),
)
WORDS_A_MINUTE, MINUTES_A_POINT = 60, 12
"""Reading of text beside code, and work on an exercise: estimates for the schedule."""


@dataclass(frozen=True)
class Lesson:
    """One notebook in a course.

    Attributes:
        name: Name of the notebook.
        title: Its first heading.
        points: Points of its exercises.
        work: Minutes of reading and of work on the exercises, an estimate.
        computing: Minutes that its cells take on two cores.
    """

    name: str
    title: str
    points: int
    work: int
    computing: float


def write_course(folder: Path) -> list[Path]:
    """Write the folder; returns its files.

    Raises:
        UserError: the notebooks are not there, a file cannot be written, or the folder holds
            notebooks already, which may be somebody's work.
    """
    sources = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise UserError(
            f"{NOTEBOOKS} holds no notebooks: run this in a clone of the project, where the "
            "package is installed with `pip install -e`."
        )
    check_output(folder, folder=True)
    for path in (folder / source.name for source in sources):
        if path.exists():
            raise UserError(f"{path} exists already, and may hold work: choose another folder.")
    documents = {path: json.loads(path.read_text(encoding="utf-8")) for path in sources}
    lessons = [_lesson(path.stem, document) for path, document in documents.items()]
    files = {path.name: _handed_out(document) for path, document in documents.items()}
    files |= {
        ARCHIVE: _archive(),
        "requirements.txt": _requirements().encode(),
        "schedule.md": _schedule(lessons).encode(),
        "README.md": _instructions(lessons).encode(),
    }
    for name, data in files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in files]


def _handed_out(document: dict[str, Any]) -> bytes:
    """A notebook whose links into the project, which students do not have, are names of files."""
    for cell in document["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            cell["source"] = re.sub(r"\[[^\]]+\]\(\.\./([^)]+)\)", r"`\1`", text)
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _lesson(name: str, document: dict[str, Any]) -> Lesson:
    text = ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "markdown"]
    code = ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "code"]
    words = sum(len(part.split()) for part in text) + sum(len(part.split()) for part in code)
    points = sum(one.points for one in exercises().values() if one.module == name[3:])
    computing = re.search(r"begin\([^)]*minutes=([\d.]+)", "\n".join(code))
    return Lesson(
        name=name,
        title=text[0].splitlines()[0].lstrip("# "),
        points=points,
        work=5 * round((words / WORDS_A_MINUTE + MINUTES_A_POINT * points) / 5),
        computing=float(computing[1]) if computing else 2.0,
    )


def _archive() -> bytes:
    """The package as pip installs it from a file."""
    data = io.BytesIO()
    root = PACKAGE.parent
    paths = [root / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    paths += [p for p in sorted(PACKAGE.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            name = f"lineage-t2i-{lineage.__version__}/{path.relative_to(root).as_posix()}"
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))  # the same bytes every time
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return data.getvalue()


def _requirements() -> str:
    pins = []
    for name in PINNED:
        try:
            pins.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            raise UserError(
                f"{name} is not installed, so that its version cannot be pinned: "
                'pip install -e ".[notebooks]".'
            ) from None
    head = "# pip install -r requirements.txt, in the folder that holds this file"
    return "\n".join([head, f"./{ARCHIVE}", *pins]) + "\n"


def _schedule(lessons: list[Lesson]) -> str:
    rows = [
        f"| {week} | [{one.title}]({one.name}.ipynb) | {one.work} | {one.computing:g} "
        f"| {one.points} |"
        for week, one in enumerate(lessons, start=1)
    ]
    return "\n".join(
        [
            "# Schedule",
            "",
            "| week | notebook | minutes of work | minutes of computing | points |",
            "|---|---|---|---|---|",
            *rows,
            f"| | all | {sum(one.work for one in lessons)} "
            f"| {sum(one.computing for one in lessons):g} | {sum(one.points for one in lessons)} |",
            "",
            f"Minutes of work are an estimate: {WORDS_A_MINUTE} words of text and code a minute, "
            f"and {MINUTES_A_POINT} minutes a point. Minutes of computing are those of two "
            "processor cores without a GPU. Two short notebooks fit into one week.",
            "",
        ]
    )


def _instructions(lessons: list[Lesson]) -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"""# Text-to-image generation, step by step

{len(lessons)} notebooks go through the history of text-to-image generation. Each trains one system
on your computer, in a minute or two, without a GPU. [schedule.md](schedule.md) has the order.

## Install, once

Python {python}, with which the versions in requirements.txt were tested. In this folder:

    python3 -m venv .venv
    .venv/bin/pip install -r requirements.txt        (Windows: .venv\\Scripts\\pip)
    .venv/bin/jupyter lab                            (Windows: .venv\\Scripts\\jupyter)

## Work

1. Open a notebook and run all cells (menu Run, Run All Cells). It runs as it is.
2. Read it from the top. The exercises are at the end: replace `raise NotImplementedError`.
3. Run the cell below, `check.NAME(NAME)`. It says that the answer is right, or what is wrong.
4. You may add cells. Keep the functions' names.

## Hand in

Save the notebook and hand in the file. See your points before you do:

    .venv/bin/lineage grade {lessons[-1].name}.ipynb

Only the functions of the exercises count: cells that are deleted, or that fail, cost nothing else.
"""
