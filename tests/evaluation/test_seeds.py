"""Scores over several seeds, differences between systems, and scored runs in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lineage.evaluation import scored
from lineage.evaluation.intervals import mean_score, seeds_score
from lineage.evaluation.scored import from_tensors, scored_once, to_tensors
from lineage.evaluation.scoring import Failure, ScoredRun
from lineage.evaluation.seeds import difference, over_seeds, quantile, runs_score, tasks_of


def run_of(*tasks: str, fid: float = 2.0, seconds: float = 4.0, steps: int = 10) -> dict[str, Any]:
    """The scores of a run whose verdicts in each task are given as digits."""
    verdicts = dict(zip(("colors", "position"), tasks, strict=True))
    shares = [mean_score(values) for values in tasks_of(verdicts)]
    section = {
        "tasks": dict(zip(verdicts, shares, strict=True)),
        "overall": {},
        "verdicts": verdicts,
    }
    return {
        "run": "somewhere",
        "system": "ddpm",
        "composition": {"test": section},
        "quality": {"fid": {"value": fid, "interval": [fid - 1, fid + 1], "n": 50}},
        "cost": {"training": {"one": {"seconds": seconds, "steps": steps, "finished": True}}},
    }


def test_one_run_keeps_its_scores() -> None:
    run = run_of("0110", "11")
    assert over_seeds([run]) == run


def test_several_runs_have_means_and_intervals_over_runs() -> None:
    runs = [
        run_of("0110", "11", fid=1.0, seconds=2.0, steps=10),
        run_of("1111", "10", fid=2.0, seconds=3.0, steps=13),
        run_of("0010", "11", fid=6.0, seconds=4.0, steps=10),
    ]
    merged = over_seeds(runs)
    test = merged["composition"]["test"]
    colors = [[[0, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 1, 0]]]
    assert test["tasks"]["colors"] == seeds_score(colors)
    means = [(0.5 + 1 + 0.25) / 3, (1 + 0.5 + 1) / 3]
    assert test["overall"]["value"] == pytest.approx(sum(means) / 2, abs=1e-4)
    assert test["overall"]["runs"] == 3 and test["overall"]["n"] == 6
    fid = merged["quality"]["fid"]
    half = 4.303 * 7**0.5 / 3**0.5  # of 1, 2 and 6: mean 3, variance 7
    assert fid["value"] == 3 and fid["runs"] == 3 and fid["n"] == 50
    assert fid["interval"] == pytest.approx([3 - half, 3 + half], rel=1e-3)
    assert merged["cost"]["training"]["one"] == {"seconds": 3.0, "steps": 11, "finished": True}
    assert merged["system"] == "ddpm"


def test_a_score_that_one_run_lacks_is_left_out() -> None:
    other = run_of("1111", "10")
    other["quality"] = {"reason": "too few"}
    assert "fid" not in over_seeds([run_of("0110", "11"), other])["quality"]


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_quantiles_are_those_of_student(freedom: int, value: float) -> None:
    assert quantile(freedom) == pytest.approx(value, abs=3e-3)


def test_runs_that_are_alike_have_an_interval_without_width() -> None:
    assert runs_score([0.5, 0.5], 9)["interval"] == [0.5, 0.5]


def test_a_difference_is_paired_by_prompts() -> None:
    """A system that is right wherever another is, and at six of 40 prompts more, differs from it;
    one that is right as often, but at other prompts, does not.
    """
    base = "10" * 20
    same = [run_of(base, base)]
    better = [run_of("1" * 12 + base[12:], "1" * 12 + base[12:])]
    ahead = difference(better, same)
    assert ahead["value"] == pytest.approx(6 / 40) and ahead["interval"][0] > 0
    behind = difference(same, better)
    assert behind["value"] == -ahead["value"] and behind["interval"][1] < 0
    low, high = difference([run_of("01" * 20, "01" * 20)], same)["interval"]
    assert low < 0 < high
    assert difference(same, same)["interval"] == [0.0, 0.0]


def test_a_difference_is_paired_by_seeds() -> None:
    """As many runs as both have; the ups and downs of a seed that both share cancel out."""
    low, high = "1000" * 5, "1110" * 5
    one = [run_of(low, low), run_of(high, high)]
    assert difference(one, one)["interval"] == [0.0, 0.0]
    assert difference(one, one[:1])["runs"] == 1


# --- the cache --------------------------------------------------------------------------------


def example() -> ScoredRun:
    picture = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    return ScoredRun(
        {"quality": {"fid": {"value": 1.5}}, "system": "dé"},
        [Failure("colors", "a red circle", "nothing", picture)],
        [(picture, picture + 1), (picture + 2, picture)],
    )


@pytest.mark.parametrize("one", [example(), ScoredRun({"a": 1}, [], [])], ids=["full", "empty"])
def test_a_scored_run_comes_back_whole(one: ScoredRun) -> None:
    back = from_tensors(to_tensors(one))
    assert back.scores == one.scores and len(back.nearest) == len(one.nearest)
    for mine, other in zip(back.failures, one.failures, strict=True):
        assert mine[:3] == other[:3] and torch.equal(mine.picture, other.picture)
    for pair, expected in zip(back.nearest, one.nearest, strict=True):
        assert all(torch.equal(*both) for both in zip(pair, expected, strict=True))


def test_a_run_is_scored_again_only_if_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    run, count = tmp_path / "run", 0
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"one")

    def compute() -> ScoredRun:
        nonlocal count
        count += 1
        return ScoredRun({"count": count}, [], [])

    def score(**settings: Any) -> int:
        return int(scored_once(run, settings, compute).scores["count"])

    assert [score(seed=0), score(seed=0), score(seed=1), score(seed=0)] == [1, 1, 2, 1]
    (run / "model.safetensors").write_bytes(b"two")
    assert score(seed=0) == 3
    (run / "tokenizer.json").write_text("{}")
    assert score(seed=0) == 4
    monkeypatch.setattr(scored, "source_hash", lambda: "a student's own sampler")
    assert [score(seed=0), score(seed=0)] == [5, 5]


def test_the_hash_of_the_source_changes_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "PACKAGE", tmp_path)
    hashes = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b/c.py", "2"), ("d.txt", "2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        scored.source_hash.cache_clear()
        hashes.append(scored.source_hash())
    scored.source_hash.cache_clear()
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]
