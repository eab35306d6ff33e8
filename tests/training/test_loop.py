"""The loop on a system small enough to work out by hand: budget, rate, average, log, faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ZeroEncoder

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import CheckFailed, UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextFeatures
from lineage.training.log import Log, read_log
from lineage.training.loop import Trainer
from lineage.training.store import load_state, save_state


class Hill(System):
    """Minimises 10 w^2 / 2 over its weights, with one term for the weight and one for the bias."""

    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        self.text, self.size = ZeroEncoder(), 4
        self.point = nn.Linear(3, 1)
        self.poison, self.calls = poison, 0
        self.noise: list[float] = []
        self.dropout: list[float] = []
        with torch.no_grad():
            self.point.weight.copy_(torch.tensor([[3.0, -4.0, 0.5]]))
            self.point.bias.fill_(1.0)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"point": [self.point]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        self.calls += 1
        self.noise += noise.rand().tolist()
        self.dropout.append(torch.rand(()).item())
        scale = math.nan if self.calls == self.poison else 10.0
        terms = {
            "weight": scale * self.point.weight.square().sum() / 2,
            "bias": 10.0 * self.point.bias.square().sum() / 2,
        }
        yield Turn("point", terms)

    def sample(self, captions: list[str], noise: NoiseStreams) -> Tensor:
        return torch.zeros(len(captions), 3, 4, 4)


PLAIN: dict[str, Any] = {
    "warmup": 0,
    "decay": "none",
    "ema_decay": 0.0,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
}


def trainer(
    data: CaptionedDataset, system: System | None = None, optim: Any = None, **train: Any
) -> Trainer:
    settings = {"batch_size": 4, "precision": "fp32", "log_every": 0, "checkpoint_every": 0} | train
    config = OptimConfig(**(PLAIN | {"lr": 0.1} | (optim or {})))
    return Trainer(system or Hill(), data, config, TrainConfig(sample_every=0, **settings))


# --- budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_pictures": 20}, 5),
        ({"max_pictures": 21}, 6),  # rounded up to whole batches
        ({"max_steps": 3, "max_pictures": 400}, 3),
        ({"max_steps": 300, "max_pictures": 8}, 2),
    ],
)
def test_a_budget_in_steps_or_pictures_is_spent_exactly(
    budget: dict[str, int], steps: int, shapes: CaptionedDataset
) -> None:
    one = trainer(shapes, **budget)
    one.run()
    assert one.step == steps
    one.run()  # a run that is done does nothing more
    assert one.step == steps


def test_a_budget_in_minutes_is_spent(shapes: CaptionedDataset) -> None:
    one = trainer(shapes, minutes=0.3 / 60)
    one.run()
    assert 0.3 <= one.seconds < 1.5
    assert one.step > 3
    assert one.cpu_seconds > 0


def test_sheets_and_checkpoints_cost_no_training_time(shapes: CaptionedDataset) -> None:
    """Otherwise a system that samples slowly would be trained less in a comparison."""
    import time

    one = trainer(shapes, max_steps=4, checkpoint_every=1)
    one.run(checkpoint=lambda: time.sleep(0.1))
    assert one.seconds < 0.3


def test_checkpoints_and_sheets_come_when_they_are_due(shapes: CaptionedDataset) -> None:
    saved: list[int] = []
    sampled: list[int] = []
    one = trainer(shapes, max_steps=7, checkpoint_every=3)
    one.train = TrainConfig(
        batch_size=4, max_steps=7, checkpoint_every=3, sample_every=2, precision="fp32"
    )
    one.run(checkpoint=lambda: saved.append(one.step), sample=lambda: sampled.append(one.step))
    assert saved == [3, 6, 7]
    assert sampled == [2, 4, 6]


# --- rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (
            "cosine",
            [min(1, (k + 1) / 4) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)],
        ),
    ],
)
def test_the_rate_warms_up_and_decays(
    decay: str, expected: list[float], shapes: CaptionedDataset
) -> None:
    one = trainer(shapes, optim={"warmup": 4, "decay": decay, "lr": 0.1}, max_steps=8)
    used: list[float] = []
    for number in range(8):
        one.advance(one.loader.at(number))
        used.append(one.groups["point"].optimizers["optimizer"].param_groups[0]["lr"])
    assert used == pytest.approx([0.1 * share for share in expected])
    assert one._lr_factor() == pytest.approx(1.0 if decay == "none" else 0.0)


def test_a_group_may_have_a_rate_of_its_own(shapes: CaptionedDataset) -> None:
    one = trainer(shapes, optim={"lr_multipliers": {"point": 0.5}, "lr": 0.1})
    one.advance(one.loader.at(0))
    assert one.groups["point"].optimizers["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05)
    with pytest.raises(UserError, match=r"optim\.lr_multipliers\.generator.*point"):
        trainer(shapes, optim={"lr_multipliers": {"generator": 2.0}})


def test_weight_decay_is_for_matrices_alone(shapes: CaptionedDataset) -> None:
    """Decayed biases and norm scales are a well-known way to lose accuracy."""
    one = trainer(shapes, optim={"weight_decay": 0.3})
    decayed = {
        id(p): part["weight_decay"]
        for part in one.groups["point"].optimizers["optimizer"].param_groups
        for p in part["params"]
    }
    point = one.system.get_submodule("point")
    assert decayed == {id(point.weight): 0.3, id(point.bias): 0.0}


# --- one step ---------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_terms(shapes: CaptionedDataset) -> None:
    """The gradient of 10 w^2 / 2 is 10 w: (30, -40, 5) and, for the bias, 10."""
    one = trainer(shapes)
    values = one.advance(one.loader.at(0))
    assert values["point/weight"] == pytest.approx(5 * (9 + 16 + 0.25))
    assert values["point/bias"] == pytest.approx(5)
    norm = math.sqrt(30**2 + 40**2 + 5**2 + 10**2)
    assert values["gradient/point"] == pytest.approx(norm)


@pytest.mark.parametrize("clip", [0.0, 2.0, 1000.0])
def test_gradients_are_clipped_to_the_norm_that_is_set(
    clip: float, shapes: CaptionedDataset
) -> None:
    """The norm before clipping is logged, since it shows a diverging run."""
    one = trainer(shapes, optim={"grad_clip": clip})
    norm = one.advance(one.loader.at(0))["gradient/point"].item()
    parameters = one.groups["point"].parameters
    left = math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))
    assert norm == pytest.approx(math.sqrt(30**2 + 40**2 + 5**2 + 10**2))
    assert left == pytest.approx(2.0 if clip == 2.0 else norm, rel=1e-4)


def test_the_moving_average_is_the_naive_one(shapes: CaptionedDataset) -> None:
    """average <- d average + (1 - d) weights, where d grows to its value from a short memory."""
    one = trainer(shapes, optim={"ema_decay": 0.3, "lr": 0.3})
    system = one.system
    naive = [p.detach().clone() for p in system.parameters()]
    for k in range(12):
        one.advance(one.loader.at(k))
        weights = [p.detach().clone() for p in system.parameters()]
        d = min(0.3, (1 + k) / (10 + k))
        naive = [d * a + (1 - d) * w for a, w in zip(naive, weights, strict=True)]
        with one.averaged() as averaged:
            for parameter, expected in zip(averaged.parameters(), naive, strict=True):
                torch.testing.assert_close(parameter.detach(), expected)
        for parameter, expected in zip(system.parameters(), weights, strict=True):
            assert torch.equal(parameter, expected)
    assert not torch.allclose(naive[0], weights[0], atol=1e-4)


def test_without_an_average_the_weights_are_sampled_from(shapes: CaptionedDataset) -> None:
    one = trainer(shapes)
    one.advance(one.loader.at(0))
    before = [p.detach().clone() for p in one.system.parameters()]
    with one.averaged() as averaged:
        for p, b in zip(averaged.parameters(), before, strict=True):
            assert torch.equal(p, b)


def test_noise_is_a_function_of_seed_and_step(shapes: CaptionedDataset) -> None:
    """Rows of a step, and steps, have noise of their own; a resumed run has the same again."""
    systems = [Hill(), Hill(), Hill()]
    first, second, other = (trainer(shapes, system) for system in systems)
    other.seed = 1
    for k in range(3):
        first.advance(first.loader.at(k))
        other.advance(first.loader.at(k))
    second.step = 2
    second.advance(second.loader.at(2))
    assert systems[1].noise == systems[0].noise[8:12]
    assert systems[1].dropout == systems[0].dropout[2:]
    assert len(set(systems[0].noise + systems[2].noise)) == 24
    assert len(set(systems[0].dropout)) == 3


# --- log and faults ---------------------------------------------------------------------------


def test_a_line_holds_the_means_since_the_line_before(
    shapes: CaptionedDataset, tmp_path: Path
) -> None:
    one = trainer(shapes, max_steps=7, log_every=3)
    losses: list[float] = []
    original = one.advance

    def advance(batch: Batch, collect_metrics: bool) -> dict[str, Tensor]:
        values = original(batch, collect_metrics)
        losses.append(values["point/weight"].item())
        return values

    one.advance = advance  # type: ignore[method-assign]
    log = Log(tmp_path)
    one.run(log)
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["pictures"] for line in lines] == [12, 24, 28]
    for line, part in zip(lines, (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert line["point/weight"] == pytest.approx(sum(part) / len(part), rel=1e-5)
        assert line["stage"] == "model"
        named = {"seconds", "cpu_seconds", "pictures_per_second", "lr", "gradient/point"}
        assert named <= line.keys()
    assert lines == sorted(lines, key=lambda line: line["seconds"])


@pytest.mark.parametrize(
    ("poison", "last", "phrase"),
    [(8, 6, "the last good checkpoint is from step 6"), (2, None, "there is no checkpoint yet")],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    poison: int, last: int | None, phrase: str, shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """The state on the disk must be from before: resuming from NaN is resuming from nothing."""
    path = tmp_path / "state.pt"
    one = trainer(shapes, Hill(poison), max_steps=20, log_every=20, checkpoint_every=3)
    with pytest.raises(CheckFailed) as caught:
        one.run(checkpoint=lambda: save_state(path, one.state()))
    message = str(caught.value)
    assert f"Step {poison} of model" in message
    assert "point/weight" in message and "nan" in message and phrase in message
    assert caught.value.exit_code == 1
    if last is None:
        assert not path.exists()
    else:
        state = load_state(path)
        assert state["step"] == last
        assert all(torch.isfinite(w).all() for w in state["weights"].values())


def test_a_gradient_that_is_not_finite_is_named(shapes: CaptionedDataset) -> None:
    """The loss itself may still be finite when the gradient overflows."""

    class Cliff(Hill):
        def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
            root = (self.point.weight - self.point.weight.detach()).abs().sum().sqrt()
            yield Turn("point", {"root": root})

    with pytest.raises(CheckFailed, match="the gradient of point became"):
        trainer(shapes, Cliff(), max_steps=2).run()


@pytest.mark.parametrize(
    ("setting", "precision", "advice"),
    [
        ("codec_optim", "fp32", "--resume --set codec_optim.lr=0.001."),
        ("optim", "bf16", "--resume --set optim.lr=0.001 or --set train.precision=fp32."),
        ("", "bf16", "--resume --set train.precision=fp32."),
        ("", "fp32", "Train again with another --seed."),
    ],
)
def test_the_advice_on_a_loss_that_is_not_finite_has_an_effect(
    setting: str, precision: Any, advice: str, shapes: CaptionedDataset
) -> None:
    """The rate of the stage that failed, and full precision where it was not full."""
    train = TrainConfig(max_steps=2, batch_size=4, precision=precision)
    optim = OptimConfig(lr=0.1)
    with pytest.raises(CheckFailed) as caught:
        Trainer(Hill(1), shapes, optim, train, optim_setting=setting).run()
    assert str(caught.value).endswith(advice)


class Measured(Hill):
    """A system with one metric: the number of the step."""

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        number = torch.tensor(float(self.calls))
        for turn in super().losses(batch, text, noise):
            yield replace(turn, metrics=lambda: {"number": number})


@pytest.mark.parametrize(
    ("log_every", "measured"),
    [
        (1, [[0], [1], [2]]),  # numbers of the steps with metrics, by line
        (4, [[0, 1, 2, 3], [4, 5]]),
        (10, [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18], [20]]),
        (13, [[0, 2, 4, 6, 8, 10, 12], [13]]),
        (11, [[0, 2, 4, 6, 8, 10], [11, 13]]),
        (20, [[0, 4, 8, 12, 16], [20]]),
    ],
)
def test_metrics_are_collected_on_some_steps_of_each_line(
    log_every: int, measured: list[list[int]], shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """Every line has some, the last too, and no value is counted twice."""
    one = trainer(shapes, Measured(), max_steps=measured[-1][-1] + 1, log_every=log_every)
    one.run(Log(tmp_path))
    lines = read_log(tmp_path / "metrics.jsonl")
    assert len(lines) == len(measured)
    for line, numbers in zip(lines, measured, strict=True):
        assert line["metric/number"] == pytest.approx(sum(numbers) / len(numbers))


def test_a_resumed_run_collects_metrics_on_its_first_step(
    shapes: CaptionedDataset, tmp_path: Path
) -> None:
    first = trainer(shapes, Measured(), max_steps=21, log_every=20)
    first.run()
    second = trainer(shapes, Measured(), max_steps=24, log_every=20)
    second.load_state(first.state())
    second.run(Log(tmp_path))
    (line,) = read_log(tmp_path / "metrics.jsonl")
    assert line["step"] == 24 and line["metric/number"] == 0.0  # the first call of its own system


def test_a_single_step_has_metrics_unless_they_are_declined(shapes: CaptionedDataset) -> None:
    one = trainer(shapes, Measured(), log_every=20)
    for number in range(3):
        assert one.advance(one.loader.at(number))["metric/number"] == number
    values = one.advance(one.loader.at(3), collect_metrics=False)
    assert "metric/number" not in values and "gradient/point" in values
    assert one.advance(one.loader.at(4))["metric/number"] == 4


def test_state_of_another_network_is_refused(shapes: CaptionedDataset) -> None:
    state = trainer(shapes).state()
    for change in (
        {"weights": {}},
        {"groups": {}},
        {"step": "many"},
        {"groups": {"point": {"optimizer": {}, "ema_decay": None}}},
    ):
        with pytest.raises(UserError, match="does not fit this configuration") as caught:
            trainer(shapes).load_state({**state, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not fit"):  # a run without an average
        trainer(shapes, optim={"ema_decay": 0.9}).load_state(state)


class Sometimes(Hill):
    """A term that appears in every third step only, with the value 6."""

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        for turn in super().losses(batch, text, noise):
            rare = {"penalty": 6.0 + 0.0 * self.point.bias.sum()} if self.calls % 3 == 1 else {}
            yield Turn(turn.group, {**turn.terms, **rare})


def test_a_rare_term_is_averaged_over_the_steps_that_have_it(
    shapes: CaptionedDataset, tmp_path: Path
) -> None:
    """A lazy penalty divided by all steps would look as many times smaller as it is rare."""
    trainer(shapes, Sometimes(), max_steps=6, log_every=6).run(Log(tmp_path))
    assert read_log(tmp_path / "metrics.jsonl")[-1]["point/penalty"] == pytest.approx(6.0)
