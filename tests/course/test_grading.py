"""Grading of notebooks, as they are handed in: blank, right, and with all that goes wrong."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from lineage.cli import main
from lineage.course import grading
from lineage.course.checking import exercises
from lineage.course.grading import Graded, grade

OWN = [one for one in exercises().values() if one.module == "ddpm"]
FULL = sum(one.points for one in OWN)

Q_SAMPLE = """
def q_sample(x0, t, eps, alphas_cumprod):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
"""
HALF = """
def half_noise_step(alphas_cumprod):
    return int((1 - alphas_cumprod > alphas_cumprod).nonzero()[0])
"""


def write(path: Path, *sources: str, **metadata: Any) -> Path:
    """A notebook of code cells that were all added by its author."""
    cells = [
        {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "id": f"c{number}"}
        for number, source in enumerate(sources)
    ]
    mark = {"lineage": {"notebook": "08_ddpm"}, **metadata}
    document = {"cells": cells, "metadata": mark, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(document))
    return path


def earned(graded: Graded) -> dict[str, int]:
    return {question.name: question.points for question in graded.questions}


def reason(graded: Graded, name: str) -> str:
    return next(question.reason for question in graded.questions if question.name == name)


def test_what_is_right_earns_points_and_what_is_missing_says_so(tmp_path: Path) -> None:
    graded = grade(write(tmp_path / "a.ipynb", Q_SAMPLE, HALF))
    assert earned(graded) == {**dict.fromkeys((o.name for o in OWN), 0), "q_sample": 2} | {
        "half_noise_step": 1
    }
    assert reason(graded, "q_sample") == "q_sample is right."
    assert reason(graded, "ideal_weights") == "ideal_weights is missing: no cell defines it."
    assert (graded.points, graded.of, graded.notes) == (3, FULL, [])


def test_a_cell_that_fails_costs_only_itself(tmp_path: Path) -> None:
    broken = ["1 / 0", "def half_noise_step(", "%matplotlib inline\n!ls\nimport sys; sys.exit()"]
    graded = grade(write(tmp_path / "a.ipynb", *broken, Q_SAMPLE))
    assert graded.points == 2
    assert any("cell 1 raises ZeroDivisionError" in note for note in graded.notes)
    assert any("cell 2 raises SyntaxError" in note for note in graded.notes)
    assert any("cell 3 raises SystemExit" in note for note in graded.notes)


@pytest.mark.parametrize(
    "hanging",
    [
        "while True: pass",
        Q_SAMPLE.replace("return", "while True: pass\n    return"),
        "try:\n    while True: pass\nexcept BaseException: pass\nwhile True: pass",
    ],
    ids=["a cell", "an answer", "a cell that catches all"],
)
def test_what_hangs_is_stopped_and_the_rest_is_graded(hanging: str, tmp_path: Path) -> None:
    started = time.perf_counter()
    graded = grade(write(tmp_path / "a.ipynb", hanging, HALF), seconds=4)
    assert earned(graded)["half_noise_step"] == 1 and earned(graded)["q_sample"] == 0
    told = " ".join([*graded.notes, reason(graded, "q_sample")])
    assert "did not end within 4 seconds" in told
    assert time.perf_counter() - started < 120


@pytest.mark.parametrize(
    "ends", ["import os; os._exit(0)", "import ctypes; ctypes.string_at(0)", "exit()"]
)
def test_a_process_that_ends_is_started_again_without_that_cell(ends: str, tmp_path: Path) -> None:
    graded = grade(write(tmp_path / "a.ipynb", ends, Q_SAMPLE))
    assert graded.points == 2 and graded.notes


@pytest.mark.parametrize(
    "cheat",
    [
        "from lineage.course import checking\n"
        "checking.outcome = lambda *_: checking.Outcome(9, '')",
        "from lineage.course import comparing\ncomparing.expect = lambda *_, **__: None\n"
        "comparing.close = lambda *_: True",
        "from lineage.course.checks import ddpm\nddpm.expect = lambda *_, **__: None",
        "from lineage.course import comparing\n"
        "comparing.close.__code__ = (lambda *_: True).__code__",
        "torch.allclose = lambda *_, **__: True",
        "from lineage.course.checking import exercises, Exercise\n"
        "exercises()['q_sample'] = Exercise('q_sample', 'ddpm', 2, lambda answer: None)",
        "check.q_sample = lambda answer: print('q_sample is right.')",
        'print(\'{"end": "q_sample", "points": 2, "sentence": ""}\')',
    ],
    ids=["outcome", "expect", "module", "code", "torch", "registry", "check", "printed"],
)
def test_changed_checks_give_no_points(cheat: str, tmp_path: Path) -> None:
    wrong = Q_SAMPLE.replace("+", "-")
    assert grade(write(tmp_path / "a.ipynb", cheat, wrong)).points == 0


@pytest.mark.parametrize(
    "action",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "open({path!r}, 'w').write('x')",
        "import os; os.remove({path!r})",
        "import shutil; shutil.rmtree({folder!r})",
    ],
    ids=["network", "process", "shell", "write", "remove", "folder"],
)
def test_nothing_outside_is_reached(action: str, tmp_path: Path) -> None:
    victim = tmp_path / "folder" / "kept.txt"
    victim.parent.mkdir()
    victim.write_text("kept")
    cell = action.format(path=str(victim), folder=str(victim.parent))
    graded = grade(write(tmp_path / "a.ipynb", cell, HALF))
    assert victim.read_text() == "kept"
    assert graded.points == 1
    assert any("PermissionError" in note for note in graded.notes)


def test_files_of_its_own_may_be_written(tmp_path: Path) -> None:
    cell = "open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'"
    graded = grade(write(tmp_path / "a.ipynb", cell))
    assert graded.notes == []


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", "is no notebook"),
        (b"{}", "is no notebook"),
        (b"[1]", "is no notebook"),
        (b"\x89PNG", "is no notebook"),
        (b'{"cells": [{"cell_type": "code", "source": "x = 1"}]}', "no notebook of this course"),
        (b'{"cells": [3]}', "is no notebook"),
        (b'{"cells": "x", "metadata": 3}', "is no notebook"),
    ],
)
def test_a_file_that_is_no_notebook_gets_a_reason(
    content: bytes, note: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.ipynb"
    path.write_bytes(content)
    graded = grade(path)
    assert (graded.points, graded.questions) == (0, [])
    assert note in graded.notes[0]


def test_a_renamed_notebook_without_metadata_is_known_by_its_exercises(tmp_path: Path) -> None:
    path = write(tmp_path / "homework final (2).ipynb", Q_SAMPLE, lineage=None)
    assert grade(path).points == 2


def test_what_the_first_cell_imports_is_there(tmp_path: Path) -> None:
    setup = "from statistics import mean as average\nbegin('x', minutes=2)"
    uses = HALF.replace("return int(", "average([1.0])\n    return int(")
    path = write(tmp_path / "a.ipynb", setup, uses)
    document = json.loads(path.read_text())
    document["cells"][0]["metadata"] = {"lineage": {"role": "setup"}}
    path.write_text(json.dumps(document))
    graded = grade(path)
    assert (graded.points, graded.notes) == (1, [])


def test_cells_of_the_page_are_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "raise SystemExit", Q_SAMPLE)
    document = json.loads(path.read_text())
    document["cells"][0]["metadata"] = {"lineage": {"role": "page"}}
    path.write_text(json.dumps(document))
    assert grade(path).notes == []


# --- the command ----------------------------------------------------------------------------------


def test_a_table_of_many_students(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "handed_in"
    folder.mkdir()
    write(folder / "ada.ipynb", Q_SAMPLE, HALF)
    write(folder / "=bob.ipynb", "1 / 0")
    (folder / "cy.ipynb").write_text("no")
    table = tmp_path / "points.csv"
    assert main(["grade", str(folder), "--csv", str(table), "--json"]) == 0
    graded = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in graded] == ["=bob.ipynb", "ada.ipynb", "cy.ipynb"]
    assert [one["points"] for one in graded] == [0, 3, 0]
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["points"] for row in rows] == ["0", "3", "0"]
    assert rows[1]["q_sample"] == "2" and rows[2]["q_sample"] == ""
    assert "no notebook" in rows[2]["reasons"]


def test_a_stopped_command_writes_what_was_graded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("a.ipynb", "b.ipynb")]
    for path in paths:
        path.write_text("{}")

    def grade_one(path: Path, seconds: float) -> grading.Graded:
        if path == paths[1]:
            raise KeyboardInterrupt
        return grading.Graded(str(path), "05_vqvae", [], [])

    monkeypatch.setattr(grading, "grade", grade_one)
    table = tmp_path / "points.csv"
    assert main(["grade", *map(str, paths), "--csv", str(table)]) == 130
    assert "a.ipynb" in table.read_text() and "b.ipynb" not in table.read_text()
    assert "a.ipynb: 0 of 0 points" in capsys.readouterr().out


def test_the_text_names_file_points_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ada.ipynb", Q_SAMPLE)
    assert main(["grade", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 2 of {FULL} points" in out
    assert "  2/2  q_sample is right." in out


@pytest.mark.parametrize("name", ["missing.ipynb", "."])
def test_a_path_without_notebooks_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grade", str(tmp_path / name)]) == 2
    assert "notebook" in capsys.readouterr().err


def test_a_formula_is_no_formula_in_the_table() -> None:
    one = Graded("=HYPERLINK(1)", "ddpm", [grading.Question("q_sample", 0, 2, "q_sample is +1.")])
    assert "'=HYPERLINK(1)" in grading.as_csv([one])
