"""Training, one step at a time, in memory: for notebooks, where one looks on and may stop at any
moment. `lineage.train` trains the same stages in a run folder.

    for step in lineage.training_steps("ddpm", minutes=1):
        if step.number % 100 == 0:
            print(step.number, step.losses)
            pictures = step.draw(["a red circle"])
    system = step.system
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lineage.config import RunConfig
from lineage.data import load_dataset
from lineage.errors import CheckFailed, UserError
from lineage.nn.noise import seed_weights
from lineage.options import configure
from lineage.plan import check_weights, plan, source_of
from lineage.system import System, Trainable
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.stage import Stage, keep_average, load_weights


@dataclass(frozen=True)
class TrainingStep:
    """One step of training that has just been taken.

    Attributes:
        stage: Name of the stage.
        number: Number of the step in its stage, from 1.
        spent: Share of the stage's budget that is spent, from 0 to 1 or a little more.
        values: Loss terms as `<group>/<term>`, gradient norms as `gradient/<group>`, and, at some
            steps, metrics as `metric/<name>`.
        trainer: Trainer of the stage.
    """

    stage: str
    number: int
    spent: float
    values: Mapping[str, Tensor]
    trainer: Trainer

    @property
    def system(self) -> Trainable:
        """The system that is trained: the stage's own, which `generate`s only in the last stage."""
        return self.trainer.system

    @property
    def losses(self) -> dict[str, float]:
        """Loss terms as numbers.

        Raises:
            CheckFailed: one is not finite.
        """
        groups = self.trainer.groups
        losses = {n: float(v) for n, v in self.values.items() if n.split("/")[0] in groups}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise CheckFailed(f"Step {self.number} of {self.stage}: {name} became {value}.")
        return losses

    def draw(self, captions: str | Sequence[str], *, seed: int = 0, **options: Any) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] by the averaged weights; no part of the budget.

        Raises:
            UserError: the stage's system draws no captions, or an option does not fit.
        """
        with self.trainer.outside_budget(), self.trainer.averaged() as system:
            if not isinstance(system, System):
                raise UserError(f"Stage {self.stage} draws no captions: wait for the last stage.")
            return system.generate(captions, seed=seed, **options)


def training_steps(
    key: str,
    *,
    data: str | None = None,
    preset: str = "tiny",
    minutes: float | None = None,
    cpu_minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
    stages_from: Mapping[str, str | Path] | None = None,
) -> Iterator[TrainingStep]:
    """Train a system in memory, and stop after each step.

    The arguments are those of `lineage.train`. After the last step, and between two stages, the
    system has its averaged weights.

    Raises:
        UserError: an argument does not fit.
    """
    options = {
        "data": data,
        "minutes": minutes,
        "cpu_minutes": cpu_minutes,
        "steps": steps,
        "seed": seed,
        "device": device,
    }
    config = configure(key, preset_name=preset, settings=settings, **options)
    sources = {name: source_of(run, name) for name, run in (stages_from or {}).items()}
    return _steps(config, sources)


def _steps(config: RunConfig, sources: Mapping[str, Any]) -> Iterator[TrainingStep]:
    dataset, encoder = load_dataset(config.data, "train", config.size, config.seed), config.encoder
    tokenizer = make_tokenizer(encoder.tokenizer, dataset.all_captions(), encoder.vocab_size)
    stages: list[Stage] = plan(config, tokenizer, sources)
    for stage in stages:
        seed_weights(config.seed)
        system = stage.construct()
        if stage.weights is not None:
            check_weights([stage])
            load_weights(system, stage.weights)
        elif stage.trains:
            trainer = stage.trainer(dataset, config.seed)
            trainer.choose_threads()
            for values in trainer.steps():
                yield TrainingStep(stage.name, trainer.step, trainer.spent(), values, trainer)
            trainer.captions.save()
            system = keep_average(trainer)
        stage.system = system.eval()
