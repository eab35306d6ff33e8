"""Stages: one builds on another, and a finished one is found again by what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import NoText

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextFeatures
from lineage.training.log import read_log
from lineage.training.loop import Stopped, Trainer
from lineage.training.stage import Made, RunStages, Stage, content_key
from lineage.training.store import cache_folder, load_tensors, read_json, save_state


class Mean(System):
    """Learns the mean colour of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.text = NoText()
        self.colour = nn.Linear(1, 3, bias=False)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"colour": [self.colour]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        difference = batch.image - self.colour.weight[None, :, :, None]
        yield "colour", {"square": difference.square().mean()}

    def draw(self, captions: list[str], draws: NoiseStreams) -> Tensor:
        return self.colour.weight[None, :, :, None].expand(len(captions), 3, 4, 4)


class Spread(Mean):
    """Learns a factor for what a finished `Mean` left over."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self.mean = mean.requires_grad_(False)

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        rest = (batch.image - self.mean.colour.weight[None, :, :, None]).square()
        difference = rest - self.colour.weight[None, :, :, None]
        yield "colour", {"square": difference.square().mean()}


OPTIM = OptimConfig(lr=0.05, warmup=0, average=0.5)
TRAIN = TrainConfig(steps=20, batch=4, checkpoint_every=4, sample_every=0, log_every=2)
ORIGIN = {"data": "shapes", "size": 16, "seed": 0, "tokenizer": {"kind": "word", "words": []}}


def recipe(optim: OptimConfig = OPTIM, train: TrainConfig = TRAIN) -> list[Stage]:
    return [
        Stage("mean", lambda made: Mean(), optim, train, {"model": 1}, share=0.4),
        Stage(
            "spread",
            lambda made: Spread(_mean(made)),
            optim,
            train,
            {"model": 2},
            needs=("mean",),
            share=0.6,
        ),
    ]


def _mean(made: Made) -> Mean:
    mean = made["mean"]
    assert isinstance(mean, Mean)
    return mean


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The stage of every step that is taken, with a cache of the test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    steps: list[str] = []
    original = Trainer.advance

    def advance(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
        steps.append(trainer.stage)
        return original(trainer, batch)

    monkeypatch.setattr(Trainer, "advance", advance)
    return steps


def run_in(folder: Path, data: CaptionedDataset, stages: list[Stage] | None = None) -> RunStages:
    folder.mkdir(exist_ok=True)
    return RunStages(
        folder=folder,
        stages=stages or recipe(),
        dataset=data,
        origin=ORIGIN,
        seed=0,
        seeded=lambda: torch.manual_seed(0) and None,
        sheet=lambda system, stage, step: None,
    )


def test_the_budget_is_shared_out_and_the_second_builds_on_the_first(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", shapes)
    system = run.run()
    assert trained == ["mean"] * 8 + ["spread"] * 12
    assert isinstance(system, Spread)
    kept = load_tensors(cache_folder("stages") / run.keys["mean"] / "model.safetensors")
    assert torch.equal(system.mean.colour.weight, kept["colour.weight"])
    saved = load_tensors(tmp_path / "run" / "model.safetensors")
    assert torch.equal(saved["mean.colour.weight"], kept["colour.weight"])
    assert torch.equal(saved["colour.weight"], system.colour.weight)  # averaged, both
    cost = read_json(tmp_path / "run" / "cost.json")
    assert {name: c["steps"] for name, c in cost.items()} == {"mean": 8, "spread": 12}


def test_a_finished_stage_is_found_in_another_folder(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """And gives the same result as training it there would have."""
    first = run_in(tmp_path / "one", shapes).run()
    trained.clear()
    second = run_in(tmp_path / "two", shapes).run()
    assert trained == ["spread"] * 12
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_stage_made_otherwise_is_trained_again(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run_in(tmp_path / "one", shapes).run()
    trained.clear()
    run_in(tmp_path / "two", shapes, recipe(replace(OPTIM, lr=0.01))).run()
    assert trained == ["mean"] * 8 + ["spread"] * 12


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask to stop after `number` steps, all stages together."""
    original, count = Trainer.advance, [0]

    def advance(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
        seen = original(trainer, batch)
        count[0] += 1
        if count[0] == number:
            trainer._asked_to_stop = True
        return seen

    monkeypatch.setattr(Trainer, "advance", advance)


@pytest.mark.parametrize("number", [1, 4, 7, 9, 12, 19])
def test_a_run_goes_on_in_the_stage_in_which_it_stopped(
    number: int,
    trained: list[str],
    shapes: CaptionedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_in(tmp_path / "whole", shapes).run()
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "other"))
    trained.clear()
    with monkeypatch.context() as patched:
        stop_at(number, patched)
        with pytest.raises(Stopped):
            run_in(tmp_path / "run", shapes).run()
    resumed = run_in(tmp_path / "run", shapes).run()
    assert trained == ["mean"] * 8 + ["spread"] * 12  # nothing twice, nothing left out
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    steps = [(e["stage"], e["step"]) for e in read_log(tmp_path / "run" / "metrics.jsonl")]
    assert len(steps) == len(set(steps))


def test_a_stop_at_the_very_end_of_a_stage_is_heard(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presses Ctrl-C does not want the next stage to begin."""
    stop_at(8, monkeypatch)
    with pytest.raises(Stopped):
        run_in(tmp_path / "run", shapes).run()
    assert "spread" not in trained


def key_of(
    optim: OptimConfig = OPTIM,
    train: TrainConfig = TRAIN,
    settings: dict[str, Any] | None = None,
    needs: dict[str, str] | None = None,
    **origin: Any,
) -> str:
    stage = Stage(
        "mean",
        lambda made: Mean(),
        optim,
        train,
        settings or {"model": 1},
        needs=tuple(needs or {}),
    )
    return content_key(stage, {**ORIGIN, **origin}, needs or {})


@pytest.mark.parametrize(
    "change",
    [
        {"optim": replace(OPTIM, lr=0.04)},
        {"optim": replace(OPTIM, rates={"colour": 2.0})},
        {"train": replace(TRAIN, steps=21)},
        {"train": replace(TRAIN, batch=8)},
        {"train": replace(TRAIN, precision="bf16")},
        {"settings": {"model": 3}},
        {"needs": {"codec": "codec-1"}},
        {"data": "shapes:hard"},
        {"seed": 1},
        {"size": 32},
        {"tokenizer": {"kind": "word", "words": ["red"]}},
    ],
    ids=str,
)
def test_the_key_changes_with_what_the_result_depends_on(change: dict[str, Any]) -> None:
    """A key that is too short hands one experiment the weights of another."""
    assert key_of(**change) != key_of()


@pytest.mark.parametrize(
    "change",
    [
        {"train": replace(TRAIN, log_every=7)},
        {"train": replace(TRAIN, checkpoint_every=9, sample_every=1)},
        {"train": replace(TRAIN, device="cpu")},
        {"train": replace(TRAIN, prefetch=0)},
    ],
    ids=str,
)
def test_the_key_does_not_change_with_what_it_does_not_depend_on(change: dict[str, Any]) -> None:
    """A key that is too long trains the same stage again for every new folder."""
    assert key_of(**change) == key_of()


def test_the_key_of_a_stage_changes_with_those_before_it() -> None:
    assert key_of(needs={"codec": "codec-1"}) != key_of(needs={"codec": "codec-2"})


def test_a_checkpoint_of_a_stage_that_there_is_not_is_told(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", shapes)
    save_state(tmp_path / "run" / "state.pt", {"step": 1, "stage": "gan", "weights": {}})
    with pytest.raises(UserError, match="'gan'"):
        run.run()


def test_a_kept_stage_that_is_damaged_is_told(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "one", shapes)
    run.run()
    kept = cache_folder("stages") / run.keys["mean"] / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:20])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run_in(tmp_path / "two", shapes).run()
