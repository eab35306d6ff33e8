"""The study of text encoders: order and resumption of trials, paired differences, tables, plot."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lineage.evaluation.prompts import SPLITS, TASKS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND = "python benchmarks/encoders.py"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The programs `encoders` and `encoder_tables`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("encoders"), importlib.import_module("encoder_tables")


def line(encoder: str, seed: int, verdicts: str, family: str = "vqvae") -> dict[str, Any]:
    """A trial in which each task has the same verdicts in both splits."""
    score = {"value": 0.5}
    return {
        "family": family,
        "encoder": encoder,
        "seed": seed,
        "cpu_minutes": 1.0,
        "steps": 100 + seed,
        "encoding_share": 0.1,
        "word_width": 8,
        "encoder_trained": True,
        "parameters": {"encoder": 1234, "all": 9999, "prior": 5678},
        "verdicts": {split: dict.fromkeys(TASKS, verdicts) for split in SPLITS},
        "scores": {split: {"overall": score} for split in SPLITS},
        "machine": {"commit": "abc"},
    }


def test_trials_are_ordered_by_seed(programs: tuple[ModuleType, ModuleType]) -> None:
    """A study that is stopped has all encoders of the first seed, and both families of each."""
    trials = list(programs[0].planned(["vqvae", "ldm"], ["bag", "t5"], [3, 4]))
    assert [str(t) for t in trials[:5]] == [
        *("vqvae bag 3", "ldm bag 3", "vqvae t5 3", "ldm t5 3", "vqvae bag 4")
    ]
    assert len(trials) == 8


def test_an_encoder_that_is_not_installed_is_left_out(
    programs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = programs[0]
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    assert "pip install" in encoders.reason_to_skip("minilm")
    assert encoders.reason_to_skip("clip:no/such/run") is not None
    assert [t.encoder for t in encoders.planned(["ldm"], ["minilm", "bag"], [0])] == ["bag"]


def test_differences_are_of_the_same_seed_and_prompt(
    programs: tuple[ModuleType, ModuleType],
) -> None:
    """Means differ by 1/6 over the seeds that both have, though not over all."""
    ours = [line("bag", 1, "110"), line("bag", 0, "010"), line("bag", 2, "111")]
    base = [line("transformer", 0, "010"), line("transformer", 1, "100")]
    entry = programs[1].scored(ours, base)["test"]["position"]
    assert entry["difference"]["value"] == pytest.approx(1 / 6, abs=1e-4)
    assert entry["difference"]["runs"] == 2
    assert entry["value"] == pytest.approx(2 / 3, abs=1e-4) and entry["runs"] == 3
    assert entry["of_seeds"] == {1: 0.6667, 0: 0.3333, 2: 1.0}
    assert "difference" not in programs[1].scored(base, base)["test"]["position"]


def test_finished_trials_are_not_run_again(
    programs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failed trial is run again, and its line replaced; other budgets are other trials."""
    encoders = programs[0]
    study = encoders.Study(1.0, 2.0, tmp_path / "runs", tmp_path / "out")
    failed = {**vars(encoders.Trial("vqvae", "t5", 0)), "cpu_minutes": 1.0, "failed": "killed"}
    other = {**line("lstm", 0, "1"), "cpu_minutes": 3.0}
    study.file.parent.mkdir()
    study.file.write_text(
        "".join(json.dumps(o) + "\n" for o in (line("bag", 0, "1"), failed, other))
    )
    started: list[str] = []

    def start(job: str, label: str, *rest: Any) -> tuple[str, str | None]:
        started.append(label)
        encoder = "" if job == "vqvae" else json.loads(job)["encoder"]
        fault = "out of memory" if encoder == "lstm" else None
        return json.dumps(line(encoder, 0, "0")), fault

    monkeypatch.setattr(encoders, "start", start)
    monkeypatch.setattr(encoders, "write_results", lambda *arguments: None)
    trials = list(encoders.planned(["vqvae"], ["bag", "t5", "lstm"], [0]))
    encoders.run_all(trials, study, 1, COMMAND)
    assert started == ["vqvae", "vqvae t5 0", "vqvae lstm 0"]
    lines = encoders.read_lines(study.file)
    assert [(o["encoder"], o["cpu_minutes"], o.get("failed")) for o in lines] == [
        ("bag", 1.0, None),
        ("lstm", 3.0, None),
        ("t5", 1.0, None),
        ("lstm", 1.0, "out of memory"),
    ]


def test_tables_and_plot_of_an_unfinished_study(
    programs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoders, _ = programs
    study = encoders.Study(1.0, 2.0, tmp_path / "runs", tmp_path / "out")
    rows = [line("bag", 0, "0010"), line("transformer", 0, "0111"), line("bag", 0, "1111", "ldm")]
    study.file.parent.mkdir()
    study.file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    encoders.write_results(study, COMMAND)
    text = (study.out / "encoders.md").read_text()
    assert "## `vqvae`" in text and "| `bag` | 0.25 (" in text and "| -0.50 (" in text
    assert COMMAND in text and "abc" in text and "1,234" in text
    document = json.loads((study.out / "encoders.json").read_text())
    assert len(document["rows"]) == 3 and document["command"] == COMMAND
    assert (study.out / "encoders.png").stat().st_size > 10_000
