"""Scores in other languages: the prompts and the scorer are those of the data's languages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lineage.data import load_dataset
from lineage.evaluation import real, scorer
from lineage.evaluation import run as module
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import make_prompts, read_prompts
from lineage.evaluation.real import PromptSet, prompt_set


def prompts_of(spec: str) -> PromptSet:
    prompts = prompt_set(load_dataset(spec, "validation", 32), None, Judge.load(), 0)
    assert prompts is not None
    return prompts


@pytest.mark.parametrize(
    ("spec", "languages", "source"),
    [
        ("shapes:easy", ("en",), "lineage.evaluation.prompts"),
        ("shapes:medium?lang=zh", ("zh",), "lineage.evaluation.prompts zh"),
        ("shapes:easy:all", ("en", "zh", "ru"), "lineage.evaluation.prompts en,zh,ru"),
    ],
)
def test_prompts_are_in_the_languages_of_the_data(
    spec: str, languages: tuple[str, ...], source: str
) -> None:
    prompts = prompts_of(spec)
    level = "medium" if "medium" in spec else "easy"
    assert prompts.prompts == make_prompts(level, languages)
    assert prompts.protocol()["prompts"] == source
    assert prompts.protocol()["level"] == level


def test_the_judge_accepts_the_same_real_pictures_in_every_language() -> None:
    """Pictures of the prompts and verdicts do not depend on words."""
    english, russian = prompts_of("shapes:easy"), prompts_of("shapes:easy:ru")
    assert english.fingerprint != russian.fingerprint
    assert torch.equal(english.pictures, russian.pictures)
    detections = english.judge.detect(english.pictures[:40])
    for one, own, other in zip(detections, english.prompts, russian.prompts, strict=False):
        assert verdict(one, own) == verdict(one, other)


def test_the_shipped_scorer_reads_english_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It knows no Chinese word, and would call every caption the same."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path))
    trained: list[str] = []

    def train(key: str, **options: Any) -> None:
        trained.append(options["data"])

    def clip_scorer(run: Any, device: Any = "cpu") -> Any:
        return SimpleNamespace(name=str(run))

    monkeypatch.setattr(scorer, "train", train)
    monkeypatch.setattr(scorer, "clip_scorer", clip_scorer)

    def name(spec: str) -> str:
        data = load_dataset(spec, "train", 16)
        return scorer.scorer_for(spec, data, data.name).name

    for spec in ("shapes", "shapes?lang=en", "shapes:easy:en"):
        assert name(spec) == "pretrained:clip"
    assert not trained
    folders = [name(spec) for spec in ("shapes?lang=zh", "shapes:easy:zh", "shapes:easy:ru")]
    assert folders[0] == folders[1] != folders[2]
    assert trained == ["shapes?lang=zh", "shapes:easy:zh", "shapes:easy:ru"]
    assert name("shapes:hard") not in ("pretrained:clip", *folders)


def test_the_program_prints_prompts_in_a_language(tmp_path: Path) -> None:
    """In UTF-8, whatever the terminal; and `--prompts` reads them."""
    command = [sys.executable, "-m", "lineage.evaluation.prompts", "zh"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    printed = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(printed)
    easy = [prompt for prompt in read_prompts(path) if prompt.level == "easy"]
    assert easy == make_prompts("easy", ("zh",))
    assert "红色".encode() in printed  # not escaped


@pytest.mark.slow
def test_a_run_is_scored_in_a_language_it_was_not_trained_on(
    smoke_run: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "TRAINING_PICTURES", 80)
    monkeypatch.setattr(real, "exam", lambda *_: {})
    monkeypatch.setattr(module, "cached_cost", lambda *_: {})
    folder = smoke_run("retrieval").folder
    document = module.evaluate(folder, data="shapes:easy:ru", pictures=80, scorer="none")
    assert document["data"] == "shapes:easy:ru"
    assert document["protocol"]["composition"]["prompts"] == "lineage.evaluation.prompts ru"
    failed = document["runs"][0]["failed"]
    russian = {prompt.prompt for prompt in make_prompts("easy", ("ru",))}
    assert failed and {row["prompt"] for row in failed} <= russian
