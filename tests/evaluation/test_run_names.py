"""Names of the files of several runs, and what is told before runs are evaluated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lineage
from lineage.data import load_dataset
from lineage.errors import UserError
from lineage.evaluation.prompt_files import kind_seed
from lineage.evaluation.prompts import KINDS
from lineage.evaluation.run import run_names


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["m"], ["m"]),
        (["a/m", "b/n"], ["m", "n"]),
        (["a/m", "b/m"], ["a_m", "b_m"]),
        (["x/a/m", "y/a/m", "y/b/m"], ["x_a_m", "y_a_m", "y_b_m"]),
        (["a/M", "b/m"], ["a_M", "b_m"]),
        (["a_b/c", "a/b_c", "z/c"], ["a_b_c", "a_b_c", "z_c"]),
        (["a/../m", "b/m/"], ["m", "b_m"]),
    ],
)
def test_each_run_has_a_name_of_its_own(
    folders: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_names([Path(folder) for folder in folders])
    assert len({name.casefold() for name in found}) == len(folders)
    assert not any(set("/\\") & set(name) for name in found)
    if len(set(names)) == len(names) and ".." not in folders[0]:
        assert found == names


def test_the_current_folder_has_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert run_names([Path()]) == ["mine"]
    monkeypatch.chdir(tmp_path / "mine" / "inner")
    assert run_names([Path("..")]) == ["mine"]
    assert run_names([Path("/")]) == ["run"]


def test_a_run_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    os.symlink(tmp_path / "m", tmp_path / "link")
    for other in ("m/", "m/../m", "link"):
        with pytest.raises(UserError, match="are the same folder: name it once"):
            lineage.evaluate([tmp_path / "m", tmp_path / other])


def test_where_scores_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    """Before the run is even looked for."""
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "x", "/proc/x", ""):
        with pytest.raises(UserError, match=r"Could not write|out is empty"):
            lineage.evaluate("nowhere", out=out)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "x", None])
def test_one_rule_for_seeds(seed: object) -> None:
    """As for the command line; tests/test_system.py has `generate`."""
    with pytest.raises(UserError, match=r"^seed="):
        load_dataset("shapes", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^seed="):
        lineage.evaluate("nowhere", seed=seed)


def test_the_largest_seed_draws_data() -> None:
    dataset = load_dataset("shapes", "train", 16, 2**63 - 1)
    assert dataset[0].image.shape == (3, 16, 16)


def test_the_seeds_after_the_largest_are_seeds() -> None:
    assert [kind_seed(2**63 - 1, kind) for kind in KINDS] == [2**63 - 1, 0, 1]
    assert kind_seed(3, "sample") == 5
