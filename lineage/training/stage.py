"""Stages: a recipe is a list of them, and a finished one is found again by its content.

A stage trains one system. It may need what earlier stages made (`stage1 -> stage2`, `damsm -> gan`,
`codec -> prior`). When a stage that others need is finished, its weights are kept under a key that
is a hash of its configuration and of
everything it was built from: data, text, seed, program version, and the keys of the stages it
needed. A later run with the same key takes them from there, whatever folder it trains in.

The last stage's system is what a run is for: it holds all that generation needs, and is saved in
the run folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lineage.config import OptimConfig, RunConfig, TrainConfig, to_dict
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.system import System, Trainable
from lineage.training.log import Log
from lineage.training.loop import Stopped, Trainer
from lineage.training.machine import Processes, peak_memory
from lineage.training.store import (
    cache_folder,
    load_state,
    load_tensors,
    read_json,
    save_state,
    save_tensors,
    write_json,
)

Made = dict[str, Trainable]
"""The systems of the stages done so far, by stage name."""


@dataclass(frozen=True)
class Stage:
    """One training step and what it needs.

    Attributes:
        name: unique in its recipe.
        build: makes the stage's system, untrained, from the systems made before it.
        optim, train: how it is trained; the budget in `train` is the whole run's, of which it gets
            `share`.
        settings: everything else that its result depends on, as JSON values.
        needs: names of the stages whose systems it is built from.
        share: of the run's budget; the shares of a recipe sum to 1. 0 for a stage whose `train` has
            a budget of its own.
    """

    name: str
    build: Callable[[Made], Trainable]
    optim: OptimConfig
    train: TrainConfig
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    share: float = 1.0

    def budgeted(self) -> TrainConfig:
        """`train` with this stage's share of the budget."""
        train = self.train
        if not self.share:
            return train
        return replace(
            train,
            minutes=None if train.minutes is None else train.minutes * self.share,
            steps=None if train.steps is None else max(1, round(train.steps * self.share)),
            pictures=None if train.pictures is None else max(1, round(train.pictures * self.share)),
        )


def content(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that its stages' results depend on, beside optimiser, budget, data and
    seed.
    """
    settings = to_dict(config)
    return {name: settings[name] for name in ("key", "text", "encoder", "model")}


_NOT_CONTENT = ("checkpoint_every", "sample_every", "log_every", "prefetch", "compile", "device")


def content_key(stage: Stage, origin: dict[str, Any], keys: dict[str, str]) -> str:
    """The name under which a stage's result is kept: a hash of all that it depends on.

    Args:
        origin: what the whole run depends on: data, size, seed, tokeniser, program version.
        keys: content keys of the stages before it.
    """
    train = {k: v for k, v in vars(stage.budgeted()).items() if k not in _NOT_CONTENT}
    content = {
        "stage": stage.name,
        "settings": stage.settings,
        "optim": vars(stage.optim),
        "train": train,
        "origin": origin,
        "needs": {name: keys[name] for name in stage.needs},
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"{stage.name}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


@dataclass
class RunStages:
    """Trains the stages of one run in its folder.

    Attributes:
        folder: the run folder.
        stages: in order; the last one's system is the run's result.
        dataset: what to train on.
        origin: see `content_key`.
        seed: of data order and noise.
        seeded: puts torch's random state where every build starts from.
        sheet: draws a sample sheet of a system, given its stage and step.
    """

    folder: Path
    stages: list[Stage]
    dataset: CaptionedDataset
    origin: dict[str, Any]
    seed: int
    seeded: Callable[[], None]
    sheet: Callable[[System, str, int], None]
    keys: dict[str, str] = field(default_factory=dict)

    def run(self) -> Trainable:
        """Train what is not yet trained and return the last system, with averaged weights.

        Raises:
            Stopped: when asked to stop, after saving.
            UserError: for a checkpoint that does not fit, a full disk, a loss that is not finite.
        """
        made: Made = {}
        settled = self._settled()
        for stage in self.stages:
            self.seeded()
            system = stage.build(made)
            key = settled.get(stage.name) or content_key(stage, self.origin, self.keys)
            self.keys[stage.name] = key
            kept = cache_folder("stages") / key / "model.safetensors"
            last = stage is self.stages[-1]
            if not last and kept.exists():
                load_weights(system, kept)
            else:
                system = self._train(stage, system, last, stage.name in settled)
                if not last and Processes.join(next(system.parameters()).device).first:
                    save_tensors(kept, system.state_dict())
            made[stage.name] = system.eval()
        return made[self.stages[-1].name]

    def _state_path(self, stage: Stage) -> Path:
        last = stage is self.stages[-1]
        return (self.folder if last else self.folder / "stages" / stage.name) / "state.pt"

    def _settled(self) -> dict[str, str]:
        """Keys of the stages that a later one was begun on: that one's weights hold theirs, so they
        stay as they are whatever budget or file is given now.
        """
        for stage in reversed(self.stages):
            path = self._state_path(stage)
            if path.exists():
                keys: dict[str, str] = load_state(path).get("keys", {})
                return {name: key for name, key in keys.items() if name != stage.name}
        return {}

    def _train(self, stage: Stage, system: Trainable, last: bool, settled: bool) -> Trainable:
        """Train one stage, from its checkpoint if the folder holds one.

        Returns it with averaged weights.
        """
        trainer = Trainer(
            system, self.dataset, stage.optim, stage.budgeted(), seed=self.seed, stage=stage.name
        )
        first = trainer.processes.first
        state_path = self._state_path(stage)
        if state_path.exists():
            state = load_state(state_path)
            if state.get("stage") != stage.name:
                raise UserError(
                    f"{state_path} is of a stage called {state.get('stage')!r}, not "
                    f"{stage.name!r}; choose another --out."
                )
            trainer.load_state(state)
        log = Log(self.folder) if first else None
        if log is not None:
            log.forget_after(stage.name, trainer.step)

        def checkpoint() -> None:
            if first:
                save_state(state_path, {**trainer.state(), "keys": dict(self.keys)})
                if last:
                    with trainer.averaged() as averaged:
                        save_tensors(self.folder / "model.safetensors", averaged.state_dict())
            trainer.processes.wait()

        def sample() -> None:
            if first:
                with trainer.averaged() as averaged:
                    if isinstance(averaged, System):
                        self.sheet(averaged, stage.name, trainer.step)
            trainer.processes.wait()

        try:
            if not (settled and state_path.exists()):
                trainer.run(log, checkpoint, sample)
                sample()
        finally:
            if log is not None:
                log.close()
        self._note_cost(trainer)
        with trainer.averaged() as averaged:
            final = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
        trainer.system.load_state_dict(final)
        return trainer.system

    def _note_cost(self, trainer: Trainer) -> None:
        """Add what the stage cost to `cost.json`."""
        if not trainer.processes.first:
            return
        path = self.folder / "cost.json"
        cost = read_json(path) if path.exists() else {}
        if cost.get(trainer.stage, {}).get("steps") == trainer.step:
            return  # it was finished before; this process only looked
        pictures = trainer.step * trainer.batch
        cost[trainer.stage] = {
            "steps": trainer.step,
            "pictures": pictures,
            "seconds": round(trainer.seconds, 3),
            "cpu_seconds": round(trainer.cpu_seconds, 3),
            "pictures_per_second": round(pictures / max(1e-9, trainer.seconds), 2),
            "peak_memory_bytes": peak_memory(trainer.device),
            "device": trainer.device.type,
        }
        write_json(path, cost)


def load_weights(system: Trainable, path: Path) -> None:
    """Load saved weights strictly. Raises `UserError` if they are of another network."""
    tensors = load_tensors(path)
    try:
        system.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"{path} does not hold the weights of {type(system).__name__} "
            f"({(lines[1] if len(lines) > 1 else lines[0]).strip()[:120]})."
        ) from error


__all__ = [
    "RunStages",
    "Stage",
    "Stopped",
    "content",
    "content_key",
    "load_weights",
]
