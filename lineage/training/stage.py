"""Stages: a recipe is a list of them, and a finished one is found again by what it was built from.

A stage builds one system from its arguments, which may be earlier stages (`stage1 -> stage2`,
`damsm -> gan`, `codec -> prior`), and trains it. Its cache key is a hash of the name of `build`, of
all arguments (an earlier stage counts by its own key), of optimiser and budget, and of the data. A
later run whose stage has the same key loads the weights, whatever folder it trains in.

The last stage's system is the result of a run: it holds everything that generation needs, and is
saved in the run folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lineage.characters import plain
from lineage.config import OptimConfig, TrainConfig, to_dict
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError, say_once
from lineage.system import System, Trainable
from lineage.threads import use_threads
from lineage.training.cost import write_cost
from lineage.training.log import Log
from lineage.training.loop import Trainer
from lineage.training.machine import Distributed, pick_device
from lineage.training.stopping import Stopped
from lineage.training.store import (
    cache_folder,
    fingerprint,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
    without_advice,
    write_cache,
)

NOT_IN_KEY = (
    *("checkpoint_every", "sample_every", "log_every", "prefetch", "compile", "device"),
    *("cache_size", "text_cache"),
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
    """

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
        for name in ("minutes", "cpu_minutes", "max_steps", "max_pictures"):
            if (whole := getattr(self.train, name)) is not None:
                part = whole * self.share
                budget[name] = part if name.endswith("minutes") else max(1, round(part))
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
    trained = [stage for stage in remaining if stage.weights is None]
    total = sum(stage.share for stage in trained)
    for stage in trained:
        stage.share /= total
    return remaining


@dataclass
class RunStages:
    """Trains the stages of one run in its folder.

    Attributes:
        folder: Run folder.
        stages: Stages in order; the last one's system is the run's result.
        dataset: Data set to train on.
        data: Data set, size, seed and program version, for the cache keys.
        seed: Seed of data order and noise.
        seed_weights: Function that sets the random state from which every system is built.
        sheet: Function that draws a sample sheet of a system, given stage and step.
        write_settings: Function that writes the run's first files, given `threads`; called once
            all is known to fit, and whenever `threads` may have changed.
        threads: Number of threads that the run began with and keeps; None if it keeps none, or has
            not measured yet.
        mixed: Whether a stage so far was trained with other settings than the run has now, so that
            the cache must not give its weights, or those built on it, to other runs.
    """

    folder: Path
    stages: list[Stage]
    dataset: CaptionedDataset
    data: dict[str, Any]
    seed: int
    seed_weights: Callable[[], None]
    sheet: Callable[[System, str, int], None]
    write_settings: Callable[[int | None], None] = lambda threads: None
    threads: int | None = None
    mixed: bool = False
    keys: dict[str, str] = field(default_factory=dict)

    def run(self) -> Trainable:
        """Train the stages that are not finished; returns the last system, with averaged weights.

        Raises:
            Stopped: After a request to stop, once the state is saved.
            UserError: A checkpoint does not fit, the disk is full, or a loss is not finite.
        """
        fixed_keys = self._fixed_keys()
        for stage in self.stages:
            self.seed_weights()
            system = stage.construct()
            own_key = stage.key(self.data)
            key = fixed_keys.get(stage.name, own_key)
            self.mixed |= key != own_key
            self.keys[stage.name] = key
            last = stage is self.stages[-1]
            cached = cache_folder("stages") / key / "model.safetensors"
            if stage.weights is not None:
                load_weights(system, stage.weights)
            elif last or not self._load_finished(stage, system, cached, fixed_keys):
                system = self._train(stage, last, stage.name in fixed_keys)
            if not last and Distributed.join(next(system.parameters()).device).is_main:
                self._save_finished(stage, system, cached)
            stage.system = system.eval()
        assert self.stages[-1].system is not None
        return self.stages[-1].system

    def _load_finished(
        self, stage: Stage, system: Trainable, cached: Path, fixed_keys: Mapping[str, str]
    ) -> bool:
        """Load a stage that was finished before, here or in another run; False if there is none."""
        if stage.name in fixed_keys:  # a later stage was built from it
            own = finished_weights(self.folder, stage.name)
            if _load_cached(system, own):
                return True
        started = state_path(self.folder, stage, self.stages).exists()
        return not self.mixed and not started and _load_cached(system, cached)

    def _save_finished(self, stage: Stage, system: Trainable, cached: Path) -> None:
        """Save a finished stage in the run folder, and for other runs in the cache."""
        own = finished_weights(self.folder, stage.name)
        if not _holds(own, system):
            self.write_settings(self.threads)
            save_tensors(own, system.state_dict())
        if not self.mixed and not _holds(cached, system):
            write_cache(lambda: save_tensors(cached, system.state_dict()))

    def _fixed_keys(self) -> dict[str, str]:
        """Keys of the stages that a later stage was built from: its weights hold theirs, so they
        stay as they are, whatever budget or file is named now.
        """
        for stage in reversed(self.stages):
            path = state_path(self.folder, stage, self.stages)
            if path.exists():
                keys: dict[str, str] = load_state(path).get("keys", {})
                return {name: key for name, key in keys.items() if name != stage.name}
        return {}

    def _train(self, stage: Stage, last: bool, fixed: bool) -> Trainable:
        """Train one stage, from its checkpoint if the folder holds one; returns it with averaged
        weights.
        """
        trainer = stage.trainer(self.dataset, self.seed, self.threads)
        is_main = trainer.processes.is_main
        state_file = state_path(self.folder, stage, self.stages)
        loaded_step = -1
        if state_file.exists():
            state = load_state(state_file)
            if state.get("stage") != stage.name:
                raise UserError(
                    f"{state_file} is of a stage called {state.get('stage')!r}, not "
                    f"{stage.name!r}; choose another --out."
                )
            trainer.load_state(state)
            loaded_step = trainer.step
            before = state.get("keys", {}).get(stage.name)
            if before != self.keys[stage.name]:
                self.mixed = True
                self.keys[stage.name] = f"{stage.name}-{fingerprint(f'{before}'.encode())}"
        if not fixed:
            self.threads = trainer.choose_threads() or self.threads
        self.write_settings(self.threads)
        log = Log(self.folder) if is_main else None
        if log is not None:
            log.truncate(stage.name, trainer.step)

        def checkpoint() -> None:
            if is_main:
                if trainer.step != loaded_step:  # a finished run has nothing new to save
                    save_state(state_file, {**trainer.state(), "keys": dict(self.keys)})
                if last:
                    with trainer.averaged() as averaged:
                        save_tensors(self.folder / "model.safetensors", averaged.state_dict())
                write_cost(self.folder, trainer)
            trainer.processes.barrier()

        def sample() -> None:
            if is_main:
                with trainer.averaged() as averaged:
                    if isinstance(averaged, System):
                        self.sheet(averaged, stage.name, trainer.step)
            trainer.processes.barrier()

        try:
            if not (fixed and state_file.exists()):
                trainer.run(log, checkpoint, sample)
                sample()
        finally:
            if log is not None:
                log.close()
        return keep_average(trainer)


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


def _load_cached(system: Trainable, path: Path) -> bool:
    """Load the weights of a finished stage from the cache; False if it must be trained."""
    if not os.path.isfile(path):
        return False
    try:
        load_weights(system, path)
    except UserError as error:
        say_once(f"{without_advice(error)}: the stage is trained again.")
        return False
    return True


def _holds(path: Path, system: Trainable) -> bool:
    """Whether a file holds the weights of `system`."""
    if not path.exists():
        return False
    try:
        saved = load_tensors(path)
    except UserError:
        return False
    now = system.state_dict()
    return saved.keys() == now.keys() and all(
        saved[name].equal(tensor.cpu()) for name, tensor in now.items()
    )


__all__ = [
    "RunStages",
    "Stage",
    "Stopped",
    "finished_weights",
    "load_weights",
    "replace_stage",
    "state_path",
]
