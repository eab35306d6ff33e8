"""The folder that a lecturer hands out."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

import lineage
from lineage.cli import main
from lineage.course import handout

NAMES = sorted(path.name for path in handout.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "autumn"
    assert main(["course", str(folder)]) == 0
    return folder


def test_the_folder_holds_what_students_need(folder: Path) -> None:
    others = [handout.ARCHIVE, "README.md", "requirements.txt", "schedule.md"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, *others])


def test_notebooks_hold_stubs_and_no_solution(folder: Path) -> None:
    for name in NAMES:
        document = json.loads((folder / name).read_text())
        sources = ["".join(cell["source"]) for cell in document["cells"]]
        assert any("raise NotImplementedError" in source for source in sources)
        assert not any("BEGIN SOLUTION" in source for source in sources)


def test_links_lead_to_files_of_the_folder(folder: Path) -> None:
    for name in NAMES:
        for cell in json.loads((folder / name).read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                for link in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                    assert link.startswith("https://") or (folder / link).exists(), link


def test_requirements_are_pinned_and_name_the_archive(folder: Path) -> None:
    lines = (folder / "requirements.txt").read_text().splitlines()[1:]
    assert lines[0] == f"./{handout.ARCHIVE}"
    assert all("==" in line and "+" not in line for line in lines[1:])
    assert any(line.startswith("torch==") for line in lines)


def test_the_archive_is_a_package_that_pip_can_build(folder: Path) -> None:
    with zipfile.ZipFile(folder / handout.ARCHIVE) as archive:
        names = archive.namelist()
    root = f"lineage-t2i-{lineage.__version__}"
    assert f"{root}/pyproject.toml" in names
    assert f"{root}/lineage/course/worker.py" in names
    assert f"{root}/lineage/pretrained/ddpm/model.safetensors" in names
    assert not any("__pycache__" in name for name in names)


def test_the_schedule_has_a_row_for_each_notebook(folder: Path) -> None:
    text = (folder / "schedule.md").read_text()
    for name in NAMES:
        assert f"({name})" in text
    lessons = [line.split("|") for line in text.splitlines() if ".ipynb" in line]
    assert all(int(row[3]) > 0 and float(row[4]) > 0 and int(row[5]) > 0 for row in lessons)


def test_work_that_is_there_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / NAMES[0]).write_text("somebody's work")
    assert main(["course", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (folder / NAMES[0]).read_text() == "somebody's work"


def test_without_the_notebooks_the_command_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(handout, "NOTEBOOKS", tmp_path / "none")
    assert main(["course", str(tmp_path / "out")]) == 2
    assert "clone of the project" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
