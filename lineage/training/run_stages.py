"""Training of a recipe's stages in a run folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineage.cache import cache_folder, without_advice, write_cache
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError, say_once
from lineage.files import write_bytes
from lineage.system import System, Trainable
from lineage.training.cost import write_cost
from lineage.training.log import Log
from lineage.training.loop import Trainer
from lineage.training.machine import Distributed, pick_device
from lineage.training.stage import (
    Stage,
    finished_weights,
    keep_average,
    load_weights,
    state_path,
)
from lineage.training.store import (
    fingerprint,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
    write_json,
)

SNAPSHOTS = "snapshots"
"""Folder of a run that holds its snapshots."""


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
        sheet: Function that draws a sample sheet of a system, given stage and step; the last
            stage's may be no `System`.
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
    sheet: Callable[[Trainable, str, int], None]
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
            elif not stage.trains:
                self._save_assembly(stage, system)
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

    def _save_assembly(self, stage: Stage, system: Trainable) -> None:
        """Save the system of a last stage that trains nothing, and draw a sheet."""
        system.to(pick_device(stage.train.device)).eval()
        if Distributed.join(system.device).is_main:
            self.write_settings(self.threads)
            if not (self.folder / "cost.json").exists():  # all other stages are from other runs
                write_json(self.folder / "cost.json", {})
            if not _holds(self.folder / "model.safetensors", system):
                save_tensors(self.folder / "model.safetensors", system.state_dict())
                self.sheet(system, stage.name, 0)

    def _save_snapshot(self, trainer: Trainer, share: float) -> None:
        """Save the averaged weights as a run folder; the configuration, which makes it one, comes
        last.
        """
        folder = self.folder / SNAPSHOTS / f"{share:g}"
        with trainer.averaged() as averaged:
            save_tensors(folder / "model.safetensors", averaged.state_dict())
        write_cost(self.folder, trainer)
        for name in ("cost.json", "tokenizer.json", "config.json"):
            write_bytes(folder / name, (self.folder / name).read_bytes())

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
                    if last or isinstance(averaged, System):
                        self.sheet(averaged, stage.name, trainer.step)
            trainer.processes.barrier()

        others = [one for one in self.stages if one is not stage and one.weights is None]
        before = sum(one.share for one in others)
        shares = {  # of the stage's own budget, at which snapshots are due
            (share - before) / stage.share: share
            for share in stage.train.snapshots
            if last and is_main and share > before
        }
        snapshots = {
            own: functools.partial(self._save_snapshot, trainer, share)
            for own, share in shares.items()
        }
        try:
            if not (fixed and state_file.exists()):
                trainer.run(log, checkpoint, sample, snapshots)
                sample()
        finally:
            if log is not None:
                log.close()
        return keep_average(trainer)


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
