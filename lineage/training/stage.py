"""Stages: a recipe is a list of them, and a finished one is found again by what it was built from.

A stage builds one system from its arguments, which may be earlier stages (`stage1 -> stage2`,
`damsm -> gan`, `codec -> prior`), and trains it. Its cache key is a hash of the name of `build`, of
all arguments (an earlier stage counts by its own key), of optimiser and budget, and of the data. A
later run whose stage has the same key loads the weights, whatever folder it trains in.

The last stage's system is the result of a run: it holds everything that generation needs, and is
saved in the run folder. `run_stages.py` trains the stages of a run there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lineage.characters import plain
from lineage.config import OptimConfig, TrainConfig, to_dict
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.system import Trainable
from lineage.threads import use_threads
from lineage.training.loop import Trainer
from lineage.training.machine import pick_device
from lineage.training.store import fingerprint, load_tensors

NOT_IN_KEY = (
    *("checkpoint_every", "sample_every", "log_every", "prefetch", "compile", "device"),
    *("cache_size", "text_cache", "snapshots", "count_flops"),
)
"""Settings on which a stage's result does not depend."""

Prepare = Callable[[CaptionedDataset, Any], CaptionedDataset]
"""(data set, system) -> the data set that the system trains on, such as one with cached codes."""


class Stage:
    """One system of a recipe: how it is built and how it is trained.

    Args:
        name: Name, unique in its recipe.
        build: Function that returns the untrained system.
        arguments: Keywords of `build`: configurations, numbers, text, encoder specs, and earlier
            stages, in whose place `build` receives their systems.
        optim: How each group is optimised.
        optim_setting: Name of the run's field that holds `optim`; empty if none does.
        train: How the stage is trained; its budget is the whole run's.
        share: Share of the run's budget; the shares of a recipe sum to 1.
        prepare: Function that wraps the data set for this stage.

    Attributes:
        system: The built system; None before `construct`.
        weights: File of finished weights, for a stage of another run; None if it is trained here.
        trains: If false, there is nothing to train; see `Assembly`.
    """

    trains = True

    def __init__(
        self,
        name: str,
        build: Callable[..., Trainable],
        arguments: Mapping[str, Any],
        *,
        optim: OptimConfig,
        optim_setting: str = "optim",
        train: TrainConfig,
        share: float = 1.0,
        prepare: Prepare | None = None,
    ) -> None:
        self.name, self.build, self.arguments = name, build, dict(arguments)
        self.optim, self.train, self.share, self.prepare = optim, train, share, prepare
        self.optim_setting = optim_setting
        self.system: Trainable | None = None
        self.weights: Path | None = None

    def earlier(self) -> list[Stage]:
        """Stages whose systems this one is built from."""
        return [value for value in self.arguments.values() if isinstance(value, Stage)]

    def construct(self) -> Trainable:
        """Build the untrained system, and those of earlier stages if they are not built yet."""
        arguments = {
            name: (value.system or value.construct()) if isinstance(value, Stage) else value
            for name, value in self.arguments.items()
        }
        self.system = self.build(**arguments)
        return self.system

    def clear(self) -> None:
        """Forget the built system, and those of earlier stages."""
        self.system = None
        for stage in self.earlier():
            stage.clear()

    def budgeted(self) -> TrainConfig:
        """`train` with this stage's share of the budget."""
        budget: dict[str, Any] = {}
        for name in ("minutes", "cpu_minutes", "max_steps", "max_pictures", "max_flops"):
            if (whole := getattr(self.train, name)) is not None:
                part = whole * self.share
                budget[name] = max(1, round(part)) if isinstance(whole, int) else part
        return replace(self.train, **budget)

    def trainer(
        self, dataset: CaptionedDataset, seed: int = 0, threads: int | None = None
    ) -> Trainer:
        """A trainer of the built system.

        Args:
            dataset: Data set of the run; what the stage makes of it is trained on.
            seed: Seed of data order, captions and noise.
            threads: Number of threads that the run keeps; None to measure.
        """
        train, system = self.budgeted(), self.system or self.construct()
        if self.prepare is not None:
            with use_threads(1):  # before the number is known, and the same when resumed
                dataset = self.prepare(dataset, system.to(pick_device(train.device)))
        return Trainer(
            system,
            dataset,
            self.optim,
            train,
            seed=seed,
            stage=self.name,
            optim_setting=self.optim_setting,
            threads=threads,
        )

    def key(self, data: Mapping[str, Any]) -> str:
        """Cache key of the stage's result.

        Args:
            data: Data set, size, seed and program version of the run.
        """
        if self.weights is not None:
            return f"{self.name}-{fingerprint(self.weights.read_bytes())}"
        train = {k: v for k, v in vars(self.budgeted()).items() if k not in NOT_IN_KEY}
        content = {
            "build": f"{self.build.__module__}.{self.build.__qualname__}",
            "arguments": {n: _plain(v, data) for n, v in self.arguments.items()},
            "optim": to_dict(self.optim),
            "train": train,
            "data": dict(data),
        }
        text = json.dumps(content, sort_keys=True)
        return f"{self.name}-{fingerprint(text.encode())}"


class Assembly(Stage):
    """The last stage of a recipe whose system is put together from trained stages, and has nothing
    to train itself.

    Args:
        name, build, arguments: As for `Stage`.
        train: The run's, for its device.
    """

    trains = False

    def __init__(
        self,
        name: str,
        build: Callable[..., Trainable],
        arguments: Mapping[str, Any],
        *,
        train: TrainConfig,
    ) -> None:
        super().__init__(
            name, build, arguments, optim=OptimConfig(), optim_setting="", train=train, share=0.0
        )

    def budgeted(self) -> TrainConfig:
        """No budget."""
        return TrainConfig(device=self.train.device)


def _plain(value: Any, data: Mapping[str, Any]) -> Any:
    """An argument of a stage as JSON values."""
    if isinstance(value, Stage):
        return value.key(data)
    if hasattr(value, "to_json"):
        return value.to_json()
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def replace_stage(stages: list[Stage], name: str, other: Stage) -> list[Stage]:
    """The stages of a recipe with `other` in place of the one called `name`; those that only the
    replaced one was built from are dropped, and the budget is shared by those that are trained.
    """
    old = next(stage for stage in stages if stage.name == name)
    for stage in stages:
        stage.arguments = {n: other if v is old else v for n, v in stage.arguments.items()}
    replaced = [other if stage is old else stage for stage in stages]
    needed, queue = {id(replaced[-1])}, [replaced[-1]]
    while queue:
        stage = queue.pop()
        earlier = [] if stage.weights is not None else stage.earlier()
        queue += [one for one in earlier if id(one) not in needed]
        needed |= {id(one) for one in earlier}
    remaining = [stage for stage in replaced if id(stage) in needed]
    trained = [stage for stage in remaining if stage.weights is None and stage.trains]
    total = sum(stage.share for stage in trained)
    for stage in trained:
        stage.share /= total
    return remaining


def keep_average(trainer: Trainer) -> Trainable:
    """The trained system, its averaged weights in place of the last ones."""
    with trainer.averaged() as averaged:
        final = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    trainer.system.load_state_dict(final)
    return trainer.system


def state_path(folder: Path, stage: Stage, stages: list[Stage]) -> Path:
    """File in a run folder of a stage's checkpoint."""
    last = stage is stages[-1]
    return (folder if last else folder / "stages" / stage.name) / "state.pt"


def finished_weights(folder: Path, name: str) -> Path:
    """File in a run folder of the weights of a finished stage other than the last."""
    return folder / "stages" / name / "model.safetensors"


def load_weights(system: Trainable, path: Path) -> None:
    """Load saved weights strictly.

    Raises:
        UserError: they are of another network, or some are no numbers.
    """
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path} holds weights that are no numbers (in {name}), so training "
                "has failed: train again with a lower rate."
            )
    try:
        system.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"{path} does not hold the weights of {type(system).__name__} "
            f"({plain((lines[1] if len(lines) > 1 else lines[0]).strip()[:120])})."
        ) from error
