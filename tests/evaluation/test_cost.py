"""The machine that numbers were measured on: the commit of the package, and whether it is clean."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lineage.evaluation import cost


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one file, in a repository with one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text("a = 1\n")
    git(folder.parent, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_the_commit_of_a_clean_tree(package: Path) -> None:
    assert cost.source(package) == {"commit": git(package, "rev-parse", "HEAD"), "clean": True}


def test_a_changed_or_new_file_is_not_clean(package: Path) -> None:
    first = git(package, "rev-parse", "HEAD")
    (package / "other.py").write_text("b = 1\n")
    assert cost.source(package) == {"commit": first, "clean": False}
    git(package, "add", ".")
    assert not cost.source(package)["clean"]
    git(package, "commit", "--quiet", "--message", "second")
    second = cost.source(package)
    assert second["clean"] and second["commit"] != first
    (package / "module.py").write_text("a = 2\n")
    assert cost.source(package) == {**second, "clean": False}


def test_results_beside_the_package_do_not_count(package: Path) -> None:
    """A program that writes several results does not make its own tree unclean."""
    (package.parent / "result.json").write_text("{}\n")
    assert cost.source(package)["clean"]


def test_a_folder_outside_of_a_repository_has_no_commit(package: Path, tmp_path: Path) -> None:
    installed = package.parent / "site-packages"
    for folder in (tmp_path, tmp_path / "none", installed):
        assert cost.source(folder) == {"commit": None, "clean": None}
    installed.mkdir()  # an untracked copy in another repository
    (installed / "module.py").write_text("a = 1\n")
    assert cost.source(installed) == {"commit": None, "clean": None}


def test_no_commit_without_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cost.source(package) == {"commit": None, "clean": None}


def test_a_repository_without_a_commit(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "module.py").write_text("a = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    assert cost.source(tmp_path) == {"commit": None, "clean": None}


def test_the_machine_names_the_commit_of_this_package() -> None:
    machine = cost.machine()
    assert {name: machine[name] for name in ("commit", "clean")} == cost.source(cost.PACKAGE)
    assert machine["torch"] and machine["threads"] >= 1
