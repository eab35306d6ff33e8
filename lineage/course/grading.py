"""Grading of submitted notebooks: each in a process of its own, with limits of time and memory.

A submission's exercise cells, the cells that its author added, and the imports of its first cell
are run, in order. Nothing else of it is: the page's own cells take minutes, and its copies of the
checks may have been changed. Then the package's checks are called on the functions that are left. A
cell or a check that does not end is stopped, and the rest is graded without it.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lineage.course.checking import exercises
from lineage.errors import UserError
from lineage.files import read_regular

LARGEST = 20 * 2**20  # bytes of a notebook
SECONDS = 20.0
"""Seconds that one cell or one check may take."""
START = 60.0  # seconds until the process has imported PyTorch
RESTARTS = 20


@dataclass
class Question:
    """One exercise of a submission.

    Attributes:
        name: Name of the exercise.
        points: Points earned.
        of: Points of a right answer.
        reason: What the check said.
    """

    name: str
    points: int
    of: int
    reason: str


@dataclass
class Graded:
    """One submission.

    Attributes:
        file: The submitted file.
        notebook: Name of the notebook, without its number; empty if it is none of the course.
        questions: Its exercises, in their order.
        notes: What its grader should know.
    """

    file: str
    notebook: str = ""
    questions: list[Question] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(question.points for question in self.questions)

    @property
    def of(self) -> int:
        return sum(question.of for question in self.questions)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "points": self.points, "of": self.of}


def submissions(paths: Iterable[Path]) -> list[Path]:
    """The notebooks among `paths`, and below its folders.

    Raises:
        UserError: a path does not exist, or a folder holds no notebook.
    """
    notebooks: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                one for one in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in one.parts
            )
            if not inside:
                raise UserError(f"{path} holds no notebook (.ipynb).")
            notebooks += inside
        elif path.exists():
            notebooks.append(path)
        else:
            raise UserError(f"There is no notebook {path}.")
    return list(dict.fromkeys(notebooks))


def grade(path: Path, seconds: float = SECONDS) -> Graded:
    """Grade one submission; whatever it holds, the result says what it earned and why.

    Args:
        path: The submitted notebook.
        seconds: Seconds that one cell or one check may take.
    """
    graded = Graded(str(path))
    try:
        document = json.loads(read_regular(path, LARGEST))
        cells = [_cell(one) for one in document["cells"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        graded.notes.append(f"The file is no notebook ({_first(error)}).")
        return graded
    graded.notebook = _name(path, document, cells)
    own = [one for one in exercises().values() if one.module == graded.notebook]
    if not own:
        graded.notes.append("It is no notebook of this course: its exercises are not known.")
        return graded
    sources = [
        (number, _imports(cell.source) if cell.role == "setup" else cell.source)
        for number, cell in enumerate(cells, 1)
        if _runs(cell, own)
    ]
    points = _run(sources, [one.name for one in own], seconds, graded.notes)
    for one in own:
        earned, reason = points.get(one.name, (0, "was not reached."))
        graded.questions.append(Question(one.name, earned, one.points, reason))
    return graded


@dataclass
class _Cell:
    kind: str
    source: str
    role: str  # in the page as it was handed out; empty for a cell that was added


def _cell(one: dict[str, Any]) -> _Cell:
    source, metadata = one.get("source", ""), one.get("metadata", {})
    text = "".join(source) if isinstance(source, list) else str(source)
    mark = metadata.get("lineage", {}) if isinstance(metadata, dict) else {}
    role = mark.get("role", "") if isinstance(mark, dict) else ""
    return _Cell(str(one.get("cell_type")), text, str(role))


def _name(path: Path, document: dict[str, Any], cells: Sequence[_Cell]) -> str:
    """Name of the notebook without its number: from its metadata, its file or its exercises."""
    modules = {one.module for one in exercises().values()}
    metadata = document.get("metadata", {})
    mark = metadata.get("lineage", {}) if isinstance(metadata, dict) else {}
    stated = str(mark.get("notebook", "")) if isinstance(mark, dict) else ""
    for name in (stated, path.stem):
        for module in modules:
            if re.search(rf"(^|[^a-z]){module}([^a-z]|$)", name):
                return module
    text = "\n".join(cell.source for cell in cells if cell.kind == "code")
    for one in exercises().values():
        if re.search(rf"^def {one.name}\(", text, re.MULTILINE):
            return one.module
    return ""


def _runs(cell: _Cell, own: Sequence[Any]) -> bool:
    """Whether a cell is run: an exercise, a cell that was added, or one that defines an answer."""
    if cell.kind != "code" or cell.role == "check":
        return False
    defines = any(re.search(rf"^def {one.name}\(", cell.source, re.MULTILINE) for one in own)
    return defines or cell.role in ("", "setup", "exercise")


def _imports(source: str) -> str:
    """The imports of a notebook's first cell."""
    try:
        nodes = ast.parse(source).body
    except SyntaxError:
        return source  # which says so when it is run
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(map(ast.unparse, imports))


def _run(
    cells: Sequence[tuple[int, str]], names: Sequence[str], seconds: float, notes: list[str]
) -> dict[str, tuple[int, str]]:
    """Points and reasons by exercise. What does not end is left out of the next attempt."""
    cells, left, points = list(cells), list(names), dict[str, tuple[int, str]]()
    for _ in range(RESTARTS):
        errors: dict[str, str] = {}
        stuck, how = "", ""
        for message in _messages(cells, left, seconds):
            if "stopped" in message:
                how = message["stopped"]
            elif "begin" in message:
                stuck = message["begin"]
            elif "end" in message:
                stuck = ""
                if "points" in message:
                    points[message["end"]] = message["points"], message["sentence"]
                    left.remove(message["end"])
                elif message.get("error"):
                    errors[message["end"]] = message["error"]
            elif message.get("changed"):
                notes.append("It changes the checks, which was undone.")
        if not stuck:
            notes += [f"{cell} raises {error}" for cell, error in errors.items()]
            if how:
                notes.append(f"Its process {how}.")
            return points
        if stuck in left:
            points[stuck] = 0, f"{stuck} {how}."
            left.remove(stuck)
        else:
            notes.append(f"{stuck} {how}, and is left out.")
            cells = [(n, source) for n, source in cells if f"cell {n}" != stuck]
    notes.append("Too many of its cells do not end.")
    return points


def _messages(
    cells: Sequence[tuple[int, str]], names: Sequence[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Messages of a worker, and at last, if it did not end by itself, `stopped` and why."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lineage_grade_") as folder:
        worker = subprocess.Popen(
            [sys.executable, "-m", "lineage.course.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            encoding="utf-8",
            errors="replace",
        )
        assert worker.stdin is not None and worker.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True)
        reader.start()
        try:
            task = {"cells": list(cells), "names": list(names), "secret": secret}
            worker.stdin.write(json.dumps(task))
            worker.stdin.close()
            limit, done = START, False
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    yield {"stopped": f"did not end within {seconds:g} seconds"}
                    return
                if line is None:
                    break
                if line.startswith(secret):
                    message = json.loads(line[len(secret) :])
                    done = done or message.get("done", False)
                    yield message
                    limit = seconds
            if not done:
                yield {"stopped": "ended its process"}
        except BrokenPipeError:
            yield {"stopped": "ended its process"}
        finally:
            worker.kill()
            worker.wait()
            reader.join(timeout=5)
            worker.stdout.close()


def _environment(folder: str) -> dict[str, str]:
    """Variables of a worker: none of ours but those with which Python finds its packages."""
    names = ("PATH", "PYTHONPATH", "SYSTEMROOT", "VIRTUAL_ENV", "LANG", "LD_LIBRARY_PATH")
    own = {name: os.environ[name] for name in names if name in os.environ}
    return {**own, "HOME": folder, "LINEAGE_CACHE": folder, "OMP_NUM_THREADS": "1"}


def _read(pipe: Any, lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


# --- tables ---------------------------------------------------------------------------------------


def as_text(graded: Sequence[Graded]) -> str:
    """Points and reasons of all submissions, for people."""
    blocks = []
    for one in graded:
        lines = [f"{one.file}: {one.points} of {one.of} points"]
        lines += [f"  {q.points}/{q.of}  {q.reason}" for q in one.questions]
        blocks.append("\n".join(lines + [f"  note: {note}" for note in one.notes]))
    return "\n".join(blocks)


def as_csv(graded: Sequence[Graded]) -> str:
    """A row for each submission: its points a question, their sum, and what was wrong."""
    names = list(dict.fromkeys(q.name for one in graded for q in one.questions))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "notebook", *names, "points", "of", "reasons"])
    for one in graded:
        earned = {q.name: q.points for q in one.questions}
        reasons = [q.reason for q in one.questions if q.points < q.of] + one.notes
        row = [one.file, one.notebook, *(earned.get(name, "") for name in names)]
        table.writerow([_plain(cell) for cell in [*row, one.points, one.of, " ".join(reasons)]])
    return text.getvalue()


def _plain(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@") else cell
