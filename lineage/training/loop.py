"""The training loop, once, for all systems. It knows no model.

A system states its step as a coroutine that yields (group, loss terms) in the order in which they
are optimised (see `lineage/contract.py`). For each turn the loop takes the gradient of the terms'
sum for that group's parameters alone, clips it, takes the optimiser's step, and moves the average
of the weights; then it resumes the coroutine, which now sees the updated parameters. One turn or
many, the loop is the same.

Exact resume: batch, noise and dropout of step n are functions of (seed, n); a checkpoint holds
weights, averages, optimiser states, the step and the seconds spent. On the CPU, a run that was
killed and resumed therefore gives bit for bit the weights of one that was not, if its budget is in
steps or pictures (minutes are not the same twice).
"""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import CheckFailed, UserError
from lineage.nn.noise import BatchNoise, stream_seed
from lineage.system import Trainable
from lineage.training.caption_cache import Reader
from lineage.training.group import Group
from lineage.training.loader import Loader
from lineage.training.log import Log
from lineage.training.machine import (
    Processes,
    autocast,
    channels_last,
    pick_device,
    seed_layers,
)

LOOK_AT_LEAST_EVERY = 1000
"""Steps after which losses are looked at, however rarely they are logged."""

WATCHED = 5
"""Of about so many steps between two lines of the log the facts are taken, the first always."""


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


@contextmanager
def _frozen() -> Iterator[None]:
    """Spares the garbage collector all that exists already; it would look at it again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Trainer:
    """Trains one system on one data set until its budget is spent.

    Args:
        system: what to train; moved to the device.
        dataset: what to train on.
        optim: how each group is minimised.
        train: budget, batch, precision and so on.
        seed: of data order, captions and noise.
        stage: name for the log and the progress bar.
    """

    def __init__(
        self,
        system: Trainable,
        dataset: CaptionedDataset,
        optim: OptimConfig,
        train: TrainConfig,
        seed: int = 0,
        stage: str = "model",
    ) -> None:
        self.optim, self.train, self.seed, self.stage = optim, train, seed, stage
        self.device = pick_device(train.device)
        self.processes = Processes.join(self.device)
        self.context = autocast(self.device, train.precision)  # never entered inside itself
        self.batch = train.batch * self.processes.world  # pictures a step, all processes together
        self.system = self._prepare(system)
        on_gpu = self.device.type == "cuda"
        self.loader = Loader(
            dataset,
            self.batch,
            seed,
            self.processes.rank,
            self.processes.world,
            prefetch=(2 if on_gpu else 0) if train.prefetch is None else train.prefetch,
            pin=on_gpu,
        )
        self.reader = Reader(self.system.text, dataset)
        named = self.system.groups()
        for name in optim.rates:
            if name not in named:
                raise UserError(
                    f"optim.rates.{name}: the groups of this stage are {', '.join(named)}."
                )
        self.groups = {name: Group(name, modules, optim) for name, modules in named.items()}
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []  # terms of steps not yet looked at
        self._seen: dict[str, list[float]] = {}  # values since the last line of the log
        self._saved = 0  # step of the last checkpoint
        self._asked_to_stop = False

    def _prepare(self, system: Trainable) -> Trainable:
        system = system.to(self.device)
        self.layout = torch.contiguous_format
        if channels_last(self.device, self.train):
            self.layout = torch.channels_last
            system = system.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
            if self.processes.world > 1:
                system = nn.SyncBatchNorm.convert_sync_batchnorm(system)
        system.train()
        if self.train.compile:
            for modules in system.groups().values():
                for module in modules:
                    if module is not system.text:  # strings to numbers is not for the compiler
                        module.compile()
        return system

    # --- one step --------------------------------------------------------------

    def advance(self, batch: Batch) -> dict[str, Tensor]:
        """One training step.

        Returns every loss term as `<group>/<term>`, gradient norms as `gradient/<group>`, and the
        system's facts as `health/<fact>`, unless its `watched` was set to False for this step.
        """
        rank = self.processes.rank
        seed_layers(self.device, stream_seed("step", self.seed, self.stage, self.step, rank))
        stream = stream_seed("batch", self.seed, self.stage, self.step)
        draws = BatchNoise(stream, self.batch, self.loader.rows, self.device)
        batch = batch.to(self.device)
        batch.image = batch.image.contiguous(memory_format=self.layout)
        rate = self._rate()
        seen: dict[str, Tensor] = {}
        if not self.system.training:  # to go through all of its layers takes a while
            self.system.train()
        with self.context:
            text = self.reader.read(batch.caption, self.step * self.batch)
            turns = self.system.losses(batch, text, draws)
        while True:
            with self.context:
                turn = next(turns, None)
            if turn is None:
                break
            name, terms = turn
            loss = reduce(torch.add, [term.float() for term in terms.values()])
            norm = self.groups[name].update(loss, rate, self.step, self.processes)
            seen |= {f"{name}/{term}": value.detach() for term, value in terms.items()}
            seen[f"gradient/{name}"] = norm
        if self.system.watched:
            seen |= {f"health/{name}": value for name, value in self.system.facts.items()}
        self.system.watched = True
        self.step += 1
        return seen

    def _rate(self) -> float:
        """Factor on every learning rate.

        Warm-up by steps, decay by the share of the budget that is spent.
        """
        warm = min(1.0, (self.step + 1) / self.optim.warmup) if self.optim.warmup else 1.0
        spent = min(1.0, self.spent())
        if self.optim.decay == "cosine":
            return warm * (0.5 + 0.5 * math.cos(math.pi * spent))
        return warm * (1.0 - spent) if self.optim.decay == "linear" else warm

    def spent(self) -> float:
        """Share of the budget that is spent: 1 or more when the run is done, 0 without a budget."""
        train = self.train
        shares = [0.0]
        if train.minutes is not None:
            shares.append(self.seconds / (60 * train.minutes))
        if train.steps is not None:
            shares.append(self.step / train.steps)
        if train.pictures is not None:
            shares.append(self.step * self.batch / train.pictures)
        return max(shares)

    # --- the run ---------------------------------------------------------------

    def run(
        self,
        log: Log | None = None,
        checkpoint: Callable[[], None] = lambda: None,
        sample: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until the budget is spent.

        Args:
            log: where lines go, from the first process.
            checkpoint: saves the state; called every `checkpoint_every` steps, when stopped, and at
                the end.
            sample: draws a sheet, every `sample_every` steps; its time is not part of the budget.

        Raises:
            CheckFailed: when a loss is not finite; names step and term. The last checkpoint is from
                before.
            Stopped: when asked to by Ctrl-C or SIGTERM, after saving.
        """
        train = self.train
        batches = self.loader.batches(self.step)
        due = lambda every: every > 0 and self.step % every == 0  # noqa: E731
        watch_every = max(1, train.log_every // WATCHED)
        with self._signals(), _frozen(), self._bar() as bar:
            clock, cpu, logged = time.perf_counter(), time.process_time(), self.step
            start = self.seconds
            while self._agreed_spent() < 1 and not self._asked_to_stop:
                self.system.watched = (self.step - logged) % watch_every == 0
                self._waiting.append((self.step + 1, self.advance(next(batches))))
                now, now_cpu = time.perf_counter(), time.process_time()
                self.seconds += now - clock
                self.cpu_seconds += now_cpu - cpu
                clock, cpu = now, now_cpu
                if due(train.log_every):
                    self._report(log, bar, start, logged)
                    start, logged = self.seconds, self.step
                if due(train.checkpoint_every) or len(self._waiting) >= LOOK_AT_LEAST_EVERY:
                    self._look_at_waiting()
                if due(train.checkpoint_every):
                    checkpoint()
                    self._saved = self.step
                if due(train.sample_every):
                    sample()
                if due(train.checkpoint_every) or due(train.sample_every):
                    clock, cpu = time.perf_counter(), time.process_time()
            batches.close()  # type: ignore[attr-defined]
            if self._waiting or self._seen:
                self._report(log, bar, start, logged)
            checkpoint()
        if self._asked_to_stop:
            raise Stopped

    def _agreed_spent(self) -> float:
        """`spent`, the same in all processes, which also agree whether to stop."""
        if self.processes.world == 1:
            return self.spent()
        spent, stop, self.seconds = self.processes.highest(
            [self.spent(), float(self._asked_to_stop), self.seconds]
        )
        self._asked_to_stop = stop > 0
        return max(spent, self.spent())

    def _look_at_waiting(self) -> None:
        """Read the terms since the last look, means over processes; stop at one not finite."""
        for number, terms in self._waiting:
            values = torch.stack([v.float() for v in terms.values()]) if terms else torch.zeros(0)
            self.processes.average([values])
            for name, value in zip(terms, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise CheckFailed(self._not_finite(number, name, value))
                self._seen.setdefault(name, []).append(value)
        self._waiting.clear()

    def _not_finite(self, step: int, name: str, value: float) -> str:
        saved = (
            f"the last good checkpoint is from step {self._saved}"
            if self._saved
            else "there is no checkpoint yet"
        )
        what = f"the gradient of {name[9:]}" if name.startswith("gradient/") else f"the loss {name}"
        return (
            f"Step {step} of {self.stage}: {what} became {value}, so training stopped; {saved}. "
            f"Lower the rate (--set optim.lr={self.optim.lr / 3:.1g}) "
            "or use --set train.precision=fp32."
        )

    def _report(self, log: Log | None, bar: tqdm, start: float, logged: int) -> None:
        """One line in the log, one look for the bar."""
        self._look_at_waiting()
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        speed = (self.step - logged) * self.batch / max(1e-9, self.seconds - start)
        health = {n[7:]: value for n, value in means.items() if n.startswith("health/")}
        remark = self.system.remark(health)
        if log is not None and self.processes.first:
            log.write(
                {
                    "stage": self.stage,
                    "step": self.step,
                    "pictures": self.step * self.batch,
                    "seconds": round(self.seconds, 3),
                    "cpu_seconds": round(self.cpu_seconds, 3),
                    "pictures_per_second": round(speed, 2),
                    "lr": self.optim.lr * self._rate(),
                    **means,
                    **({"remark": remark} if remark else {}),
                }
            )
        shown = {n: value for n, value in means.items() if n.split("/")[0] in self.groups}
        text = "  ".join(f"{name} {value:.4g}" for name, value in (shown | health).items())
        head = f"step {self.step}, {speed:,.0f} pictures/s  "
        bar.set_postfix_str(head + text + (f"  ({remark})" if remark else ""), refresh=False)
        bar.n = min(bar.total, round(self.spent() * bar.total, 1))
        bar.refresh()

    def _bar(self) -> tqdm:
        """One bar a stage, in the unit of its budget."""
        train = self.train
        if train.minutes is not None:
            total, unit = 60 * train.minutes, "s"
        elif train.steps is not None:
            total, unit = float(train.steps), " steps"
        else:
            total, unit = float(train.pictures or 1), " pictures"
        layout = (
            "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f}{unit} "
            "{elapsed}<{remaining} {postfix}"
        )
        hidden = None if self.processes.first else True
        return tqdm(desc=self.stage, total=total, unit=unit, bar_format=layout, disable=hidden)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the loop to stop after this step.

        A second Ctrl-C does not wait.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- state -----------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly here."""
        return {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "weights": self.system.state_dict(),
            "groups": {
                name: {**group.optimizer_states(), "average": group.average}
                for name, group in self.groups.items()
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `UserError` if it belongs to other networks."""
        try:
            self.system.load_state_dict(state["weights"])
            for name, group in self.groups.items():
                saved = state["groups"][name]
                group.load_optimizer_states(saved)
                if group.average is not None:
                    for average, value in zip(group.average, saved["average"], strict=True):
                        average.copy_(value)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.cpu_seconds = float(state["cpu_seconds"])
            self._saved = self.step
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            first = (str(error).splitlines() or ["incomplete"])[0]
            raise UserError(
                f"The checkpoint of stage {self.stage} does not fit this configuration "
                f"({first[:120]}); resume with the settings it was made with, "
                "or choose another --out."
            ) from error

    @contextmanager
    def averaged(self) -> Iterator[Trainable]:
        """The system with the moving average in place of its weights, for sampling and for the
        saved model.
        """
        groups = [group for group in self.groups.values() if group.average is not None]
        pairs = [(t, a) for g in groups for t, a in zip(g.tracked, g.average or [], strict=True)]
        kept = [parameter.detach().clone() for parameter, _ in pairs]
        with torch.no_grad():
            for parameter, average in pairs:
                parameter.copy_(average)
        try:
            yield self.system
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(pairs, kept, strict=True):
                    parameter.copy_(value)
