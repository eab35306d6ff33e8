"""Stages: one builds on another, and a finished one is found again by what it was built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ZeroEncoder

from lineage.cache import cache_folder
from lineage.catalog import working
from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.recipes import find_recipe, preset
from lineage.system import System, Turn
from lineage.text.contract import TextFeatures
from lineage.text.tokenizer import WordTokenizer
from lineage.training.log import read_log
from lineage.training.loop import Stopped, Trainer
from lineage.training.run_stages import RunStages
from lineage.training.stage import Stage, finished_weights, replace_stage
from lineage.training.store import load_tensors, read_json, save_state


class Mean(System):
    """Learns the mean colour of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.size = ZeroEncoder(), 4
        self.colour = nn.Linear(1, 3, bias=False)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"colour": [self.colour]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        difference = batch.image - self.colour.weight[None, :, :, None]
        yield Turn("colour", {"square": difference.square().mean()})

    def sample(self, captions: list[str], noise: NoiseStreams) -> Tensor:
        return self.colour.weight[None, :, :, None].expand(len(captions), 3, 4, 4)


class Spread(Mean):
    """Learns the mean squared rest of a finished `Mean`."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self.mean = mean.requires_grad_(False)

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        rest = (batch.image - self.mean.colour.weight[None, :, :, None]).square()
        difference = rest - self.colour.weight[None, :, :, None]
        yield Turn("colour", {"square": difference.square().mean()})


@pytest.mark.parametrize("key", working())
def test_each_stage_names_the_setting_of_its_optimiser(key: str, tokenizer: WordTokenizer) -> None:
    config: Any = preset(key, "smoke")
    for stage in find_recipe(key).stages(config, tokenizer):
        if stage.optim_setting:
            assert getattr(config, stage.optim_setting) is stage.optim, stage.name
        else:
            assert all(value is not stage.optim for value in vars(config).values()), stage.name


OPTIM = OptimConfig(lr=0.05, warmup=0, ema_decay=0.5)
TRAIN = TrainConfig(max_steps=20, batch_size=4, checkpoint_every=4, sample_every=0, log_every=2)
DATA = {"data": "shapes", "size": 16, "seed": 0}


@dataclass(frozen=True)
class Words:
    """An argument that describes itself, as an encoder's spec does."""

    words: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"words": self.words}


def mean_of(words: Words, model: int) -> Mean:
    return Mean()


def spread_of(mean: Mean, model: int) -> Spread:
    return Spread(mean)


def recipe(optim: OptimConfig = OPTIM, train: TrainConfig = TRAIN) -> list[Stage]:
    first = Stage(
        "mean", mean_of, {"words": Words(), "model": 1}, optim=optim, train=train, share=0.4
    )
    second = Stage(
        "spread", spread_of, {"mean": first, "model": 2}, optim=optim, train=train, share=0.6
    )
    return [first, second]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The stage of every training step, with a cache of the test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    steps: list[str] = []
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        steps.append(trainer.stage)
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "advance", advance)
    return steps


def run_in(folder: Path, data: CaptionedDataset, stages: list[Stage] | None = None) -> RunStages:
    folder.mkdir(exist_ok=True)
    return RunStages(
        folder=folder,
        stages=stages or recipe(),
        dataset=data,
        data=DATA,
        seed=0,
        seed_weights=lambda: torch.manual_seed(0) and None,
        sheet=lambda system, stage, step: None,
    )


def test_the_budget_is_shared_out_and_the_second_builds_on_the_first(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", shapes)
    system = run.run()
    assert trained == ["mean"] * 8 + ["spread"] * 12
    assert isinstance(system, Spread)
    cached = load_tensors(cache_folder("stages") / run.keys["mean"] / "model.safetensors")
    assert torch.equal(system.mean.colour.weight, cached["colour.weight"])
    saved = load_tensors(tmp_path / "run" / "model.safetensors")
    assert torch.equal(saved["mean.colour.weight"], cached["colour.weight"])
    assert torch.equal(saved["colour.weight"], system.colour.weight)  # averaged, both
    own = load_tensors(finished_weights(tmp_path / "run", "mean"))
    assert torch.equal(own["colour.weight"], cached["colour.weight"])  # for runs that take it
    cost = read_json(tmp_path / "run" / "cost.json")
    assert {name: c["steps"] for name, c in cost.items()} == {"mean": 8, "spread": 12}


def test_a_finished_stage_is_found_in_another_folder(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """And gives the same result as training it there."""
    first = run_in(tmp_path / "one", shapes).run()
    trained.clear()
    second = run_in(tmp_path / "two", shapes).run()
    assert trained == ["spread"] * 12
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_stage_with_other_settings_is_trained_again(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run_in(tmp_path / "one", shapes).run()
    trained.clear()
    run_in(tmp_path / "two", shapes, recipe(replace(OPTIM, lr=0.01))).run()
    assert trained == ["mean"] * 8 + ["spread"] * 12


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask to stop after `number` steps, all stages together."""
    original, count = Trainer.advance, [0]

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        values = original(trainer, *arguments)
        count[0] += 1
        if count[0] == number:
            trainer._stop_requested = True
        return values

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


def test_a_stop_at_the_very_end_of_a_stage_stops_the_run(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C the next stage must not begin."""
    stop_at(8, monkeypatch)
    with pytest.raises(Stopped):
        run_in(tmp_path / "run", shapes).run()
    assert "spread" not in trained


def key_of(
    optim: OptimConfig = OPTIM,
    train: TrainConfig = TRAIN,
    build: Callable[..., Mean] = mean_of,
    words: tuple[str, ...] = (),
    model: int = 1,
    share: float = 1.0,
    **data: Any,
) -> str:
    arguments = {"words": Words(words), "model": model}
    stage = Stage("mean", build, arguments, optim=optim, train=train, share=share)
    return stage.key({**DATA, **data})


@pytest.mark.parametrize(
    "change",
    [
        {"optim": replace(OPTIM, lr=0.04)},
        {"optim": replace(OPTIM, lr_multipliers={"colour": 2.0})},
        {"train": replace(TRAIN, max_steps=21)},
        {"train": replace(TRAIN, batch_size=8)},
        {"train": replace(TRAIN, precision="bf16")},
        {"build": Mean},
        {"model": 3},
        {"words": ("red",)},
        {"share": 0.5},
        {"data": "shapes:hard"},
        {"seed": 1},
        {"size": 32},
    ],
    ids=lambda change: ",".join(change),
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
    ids=lambda change: ",".join(change),
)
def test_the_key_does_not_change_with_what_it_does_not_depend_on(change: dict[str, Any]) -> None:
    """A key that is too long trains the same stage again for every new folder."""
    assert key_of(**change) == key_of()


def test_the_key_of_a_stage_changes_with_those_before_it() -> None:
    keys = {recipe(replace(OPTIM, lr=lr))[1].key(DATA) for lr in (0.1, 0.2)}
    first, second = recipe()
    first.optim = replace(OPTIM, lr=0.3)  # of the first stage alone
    assert len(keys | {second.key(DATA), recipe()[1].key(DATA)}) == 4


def test_a_stage_of_another_run_replaces_the_own_one(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """It is not trained, its weights are those of the file, and the rest gets the whole budget."""
    run_in(tmp_path / "one", shapes).run()
    trained.clear()
    other = recipe(replace(OPTIM, lr=0.2))[0]
    other.weights = finished_weights(tmp_path / "one", "mean")
    stages = replace_stage(recipe(), "mean", other)
    assert [stage.name for stage in stages] == ["mean", "spread"]
    assert stages[1].share == pytest.approx(1) and stages[1].earlier() == [other]
    system = run_in(tmp_path / "two", shapes, stages).run()
    assert trained == ["spread"] * 20
    assert isinstance(system, Spread)
    weight = load_tensors(other.weights)["colour.weight"]
    assert torch.equal(system.mean.colour.weight, weight)
    assert finished_weights(tmp_path / "two", "mean").exists()  # to be taken in turn


def test_stages_that_only_a_replaced_one_needs_are_dropped() -> None:
    first, second = recipe()
    third = Stage("third", spread_of, {"mean": second, "model": 3}, optim=OPTIM, train=TRAIN)
    other = recipe()[1]
    other.weights = Path("weights")
    assert replace_stage([first, second, third], "spread", other) == [other, third]


def test_a_checkpoint_of_an_unknown_stage_is_refused(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", shapes)
    save_state(
        tmp_path / "run" / "state.pt", {"step": 1, "stage": "gan", "weights": {}, "groups": {}}
    )
    with pytest.raises(UserError, match="'gan'"):
        run.run()


def test_a_damaged_cached_stage_is_trained_again(
    trained: list[str], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "one", shapes)
    run.run()
    cached = cache_folder("stages") / run.keys["mean"] / "model.safetensors"
    whole = cached.read_bytes()
    cached.write_bytes(whole[:20])
    trained.clear()
    run_in(tmp_path / "two", shapes).run()
    assert trained[0] == "mean" and cached.read_bytes() == whole
