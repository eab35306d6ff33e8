"""Training in memory, one step at a time: the same steps as in a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lineage
from lineage.errors import CheckFailed, UserError
from lineage.stepping import TrainingStep
from lineage.training.store import load_tensors

SMOKE = {"preset": "smoke", "steps": 6}


def test_steps_give_the_weights_of_a_run(tmp_path: Path) -> None:
    settings = {"train.checkpoint_every": 0, "train.sample_every": 0}
    folder = lineage.train("ddpm", out=tmp_path / "run", settings=settings, **SMOKE)
    *_, last = lineage.training_steps("ddpm", **SMOKE)
    weights = load_tensors(folder / "model.safetensors")
    system = last.system.state_dict()
    assert weights.keys() == system.keys()
    assert all(torch.equal(weights[name], system[name]) for name in weights)


def test_looking_on_changes_nothing() -> None:
    *_, undisturbed = lineage.training_steps("ddpm", **SMOKE)
    for step in lineage.training_steps("ddpm", **SMOKE):
        assert step.draw(["a red circle"], sampling_steps=2).shape == (1, 3, 16, 16)
        assert all(value == value for value in step.losses.values())
    for one, other in zip(undisturbed.system.parameters(), step.system.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_stage_is_stepped_through_in_order() -> None:
    steps = list(lineage.training_steps("vqvae", **SMOKE))
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["codec", "prior"]
    for stage in stages:
        own = [step for step in steps if step.stage == stage]
        assert [step.number for step in own] == list(range(1, len(own) + 1))
        assert own[-1].spent == 1.0
    assert {name.split("/")[0] for name in steps[0].losses} == {"codec"}


def test_a_stage_that_draws_no_captions_says_so() -> None:
    first = next(iter(lineage.training_steps("vqvae", **SMOKE)))
    with pytest.raises(UserError, match="Stage codec draws no captions"):
        first.draw(["a red circle"])


def test_drawing_is_no_part_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    steps = lineage.training_steps("ddpm", preset="smoke", minutes=1)
    step = next(steps)
    monkeypatch.setattr("lineage.training.loop.time.perf_counter", lambda: clock[0])
    step.trainer._clock = (0.0, 0.0)
    before, generate = step.trainer.seconds, type(step.system).generate

    def slow(*arguments: object, **options: object) -> object:
        clock[0] += 50.0
        return generate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(step.system), "generate", slow)
    step.draw(["a red circle"], sampling_steps=1)
    assert step.trainer.seconds == before
    next(steps)  # which counts the time since the last one
    assert step.trainer.seconds == before


def test_a_loss_that_is_no_number_ends_it() -> None:
    step = next(iter(lineage.training_steps("ddpm", **SMOKE)))
    broken = TrainingStep(
        step.stage, 1, 0.1, {"denoiser/mse": torch.tensor(float("nan"))}, step.trainer
    )
    with pytest.raises(CheckFailed, match="denoiser/mse became nan"):
        _ = broken.losses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"key": "ddmp"}, "did you mean"),
        ({"key": "ddpm", "preset": "huge"}, "no preset"),
        ({"key": "ddpm", "settings": {"optim.lrr": 1}}, "lrr"),
        ({"key": "vqvae", "stages_from": {"codec": "pretrained:nothing"}}, "no trained run"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lineage.training_steps(**{"steps": 1, **arguments})  # type: ignore[arg-type]
