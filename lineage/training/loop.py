"""The training loop, once, for all systems. It knows no model.

A system states its step as a coroutine that yields turns (group, loss terms, metrics) in the order
in which they are optimised (see lineage/system.py). For each turn the loop takes the gradient of
the terms' sum with respect to that group's parameters alone, clips it, takes the optimiser's step,
and updates the average of the weights; then it resumes the coroutine, which sees the updated
parameters.

Exact resume: batch, noise and dropout of step n are functions of (seed, n); a checkpoint holds
weights, averages, optimiser states, the step and the seconds spent. On the CPU, a run that was
killed and resumed therefore ends with the same bits as an unstopped one, if its budget is in steps
or pictures: it keeps the number of threads that it began with, on which the last bits depend. With
a budget in minutes, the number changes whenever another one is faster (see lineage/threads.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property, reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lineage.config import OptimConfig, TrainConfig
from lineage.data.contract import Batch, CaptionedDataset
from lineage.errors import CheckFailed, UserError
from lineage.nn.noise import BatchNoise, stream_seed
from lineage.system import Trainable
from lineage.threads import LARGE, ThreadTuner
from lineage.training.caption_cache import CaptionCache
from lineage.training.group import Group
from lineage.training.loader import Loader
from lineage.training.log import Log
from lineage.training.machine import (
    Distributed,
    autocast,
    channels_last,
    frozen_heap,
    pick_device,
    seed_layers,
)
from lineage.training.progress import (
    RateWatch,
    described,
    losses_text,
    not_finite,
    progress_bar,
    tell,
)
from lineage.training.rehearsal import choose_threads, flops_per_step
from lineage.training.stopping import Stopped, noting_signals

CHECK_EVERY = 1000
"""Number of steps after which losses are checked, however rarely they are logged."""

METRIC_STEPS = 5
"""Number of steps per log line on which metrics are collected, its first step among them."""


class Trainer:
    """Trains one system on one data set until its budget is spent.

    Args:
        system: System to train; it is moved to the device.
        dataset: Data set to train on.
        optim: Optimiser of each group.
        train: Budget, batch size, precision and so on.
        seed: Seed of data order, captions and noise.
        stage: Name for the log and the progress bar.
        optim_setting: Name of the setting that holds `optim`; empty if none does.
        threads: Number of threads that the run began with, and keeps; None to measure. With a
            budget of processor time, one thread is used, unless the user demands more.
    """

    def __init__(
        self,
        system: Trainable,
        dataset: CaptionedDataset,
        optim: OptimConfig,
        train: TrainConfig,
        seed: int = 0,
        stage: str = "model",
        optim_setting: str = "optim",
        threads: int | None = None,
    ) -> None:
        self.optim, self.train, self.seed, self.stage = optim, train, seed, stage
        self.optim_setting = optim_setting
        self.device = pick_device(train.device)
        self.processes = Distributed.join(self.device)
        self.autocast = autocast(self.device, train.precision)  # never entered inside itself
        self.batch_size = train.batch_size * self.processes.world_size  # all processes together
        self.system = self._prepare(system)
        on_gpu = self.device.type == "cuda"
        self.loader = Loader(
            dataset,
            self.batch_size,
            seed,
            self.processes.rank,
            self.processes.world_size,
            prefetch=(2 if on_gpu else 0) if train.prefetch is None else train.prefetch,
            pin=on_gpu,
        )
        self.captions = CaptionCache(self.system.text, train.text_cache)
        modules = self.system.groups()
        for name in optim.lr_multipliers:
            if name not in modules:
                raise UserError(
                    f"{optim_setting}.lr_multipliers.{name}: the groups of this stage are "
                    f"{', '.join(modules)}."
                )
        self.groups = {name: Group(name, parts, optim) for name, parts in modules.items()}
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []  # values of steps, on the device
        self._values: dict[str, list[float]] = {}  # values since the last line of the log
        self._saved_step = 0
        self._stop_requested = False
        if self.device.type != "cpu" or self.processes.world_size > 1:
            threads = torch.get_num_threads()
        elif train.cpu_minutes is not None:
            threads = 1
        size = sum(parameter.numel() for parameter in system.parameters())
        self.threads = ThreadTuner(fixed=threads, large=size >= LARGE)
        self._rates = RateWatch(train, self.threads)

    def _prepare(self, system: Trainable) -> Trainable:
        system = system.to(self.device)
        self.layout = torch.contiguous_format
        if channels_last(self.device, self.train):
            self.layout = torch.channels_last
            system = system.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
            if self.processes.world_size > 1:
                system = nn.SyncBatchNorm.convert_sync_batchnorm(system)
        system.train()
        if self.train.compile:
            for modules in system.groups().values():
                for module in modules:
                    if module is not system.text:  # strings to numbers is not for the compiler
                        module.compile()
        return system

    # --- one step ---------------------------------------------------------------------------------

    def advance(self, batch: Batch, collect_metrics: bool = True) -> dict[str, Tensor]:
        """Take one training step.

        Returns:
            Loss terms as `<group>/<term>`, gradient norms as `gradient/<group>`, and, if
            `collect_metrics`, the turns' metrics as `metric/<name>`.
        """
        return self._advance(batch, collect_metrics)

    def _advance(self, batch: Batch, collect_metrics: bool) -> dict[str, Tensor]:
        rank = self.processes.rank
        seed_layers(self.device, stream_seed("step", self.seed, self.stage, self.step, rank))
        stream = stream_seed("batch", self.seed, self.stage, self.step)
        noise = BatchNoise(stream, self.batch_size, self.loader.rows, self.device)
        batch = batch.to(self.device)
        batch.image = batch.image.contiguous(memory_format=self.layout)
        lr_factor = self._lr_factor()
        values: dict[str, Tensor] = {}
        if not self.system.training:  # to set the mode of all layers takes a while
            self.system.train()
        with self.autocast:
            turns = self.system.losses(batch, self.captions.encode(batch.caption), noise)
        while True:
            with self.autocast:
                turn = next(turns, None)
                if turn is None:
                    break
                if collect_metrics:
                    with torch.no_grad():
                        values |= {f"metric/{name}": v for name, v in turn.metrics().items()}
            loss = reduce(torch.add, [term.float() for term in turn.terms.values()])
            norm = self.groups[turn.group].update(loss, lr_factor, self.step, self.processes)
            values |= {f"{turn.group}/{term}": value.detach() for term, value in turn.terms.items()}
            values[f"gradient/{turn.group}"] = norm
        self.step += 1
        return values

    def _lr_factor(self) -> float:
        """Factor on every learning rate: warm-up by steps, decay by the share of the budget that is
        spent.
        """
        warm = min(1.0, (self.step + 1) / self.optim.warmup) if self.optim.warmup else 1.0
        spent = min(1.0, self.spent())
        if self.optim.decay == "cosine":
            return warm * (0.5 + 0.5 * math.cos(math.pi * spent))
        return warm * (1.0 - spent) if self.optim.decay == "linear" else warm

    def spent(self) -> float:
        """Share of the budget that is spent; see `TrainConfig.spent`."""
        return self.train.spent(
            step=self.step,
            pictures=self.step * self.batch_size,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            flops=self.step * self.flops_per_step if self.train.max_flops else 0.0,
        )

    def choose_threads(self) -> int | None:
        """Find the fastest number of threads, and keep it; see `rehearsal.choose_threads`."""
        return choose_threads(self)

    @cached_property
    def flops_per_step(self) -> float:
        """Floating-point operations of a step, the mean of the first; see `rehearsal`."""
        self.__dict__["flops_per_step"] = 0.0  # for the rehearsal, which asks for its budget
        return flops_per_step(self)

    # --- the run ----------------------------------------------------------------------------------

    def run(
        self,
        log: Log | None = None,
        checkpoint: Callable[[], None] = lambda: None,
        sample: Callable[[], None] = lambda: None,
        snapshots: Mapping[float, Callable[[], None]] = MappingProxyType({}),
    ) -> None:
        """Train until the budget is spent.

        Args:
            log: Log of the main process.
            checkpoint: Function that saves the state; called every `checkpoint_every` steps, when
                stopped, and at the end.
            sample: Function that draws a sheet, every `sample_every` steps, outside of the budget.
            snapshots: Functions that are called, outside of the budget, at that share of it.

        Raises:
            CheckFailed: A loss is not finite; the sentence names step and term. The last checkpoint
                is from before.
            Stopped: After Ctrl-C, SIGTERM or SIGHUP, once the state is saved.
        """
        train = self.train
        due = lambda every: every > 0 and self.step % every == 0  # noqa: E731
        waiting = sorted(share for share in snapshots if share > self.spent())
        self.choose_threads()
        if train.count_flops:
            _ = self.flops_per_step  # before the clock starts
        bar = progress_bar(self.stage, train, visible=self.processes.is_main)
        with noting_signals(self._request_stop), frozen_heap(), bar:
            logged_seconds, logged_step = self.seconds, self.step
            if self.step and due(train.sample_every) and self.spent() < 1:
                sample()  # the sheet that a kill after the checkpoint may have prevented
            for values in self.steps():
                self._unchecked.append((self.step, values))
                if due(train.log_every):
                    self._report(log, bar, logged_seconds, logged_step)
                    logged_seconds, logged_step = self.seconds, self.step
                if due(train.checkpoint_every) or len(self._unchecked) >= CHECK_EVERY:
                    self._check_values()
                if due(train.checkpoint_every) or due(train.sample_every):
                    with self.outside_budget():
                        if due(train.checkpoint_every):
                            checkpoint()
                            self._saved_step = self.step
                        if due(train.sample_every):
                            sample()
                if waiting and self.spent() >= waiting[0]:
                    with self.outside_budget():
                        snapshots[waiting.pop(0)]()
            if self._unchecked or self._values:
                self._report(log, bar, logged_seconds, logged_step)
            checkpoint()
            self.captions.save()
        if self._stop_requested:
            raise Stopped

    def steps(self) -> Iterator[dict[str, Tensor]]:
        """Train until the budget is spent, and yield the values of each step; see `advance`.

        What is done between two steps counts as time of training, but for what is done
        `outside_budget`.
        """
        first_step, log_every = self.step, self.train.log_every or math.inf
        metrics_every = max(1, self.train.log_every // METRIC_STEPS)
        self._clock = time.perf_counter(), time.process_time()
        with closing(self.loader.batches(self.step)) as batches:  # type: ignore[type-var]
            while self._agreed_spent() < 1 and not self._stop_requested:
                since_line = min(self.step - first_step, self.step % log_every)
                with self.threads.unit():
                    values = self.advance(next(batches), since_line % metrics_every == 0)
                self._count_time()
                yield values

    @contextmanager
    def outside_budget(self) -> Iterator[None]:
        """Between two steps of `steps`: work that is no part of the budget."""
        self._count_time()
        yield
        self._clock = time.perf_counter(), time.process_time()

    def _count_time(self) -> None:
        """Add the time since the last call to that of training."""
        (clock, cpu), self._clock = self._clock, (time.perf_counter(), time.process_time())
        self.seconds += self._clock[0] - clock
        self.cpu_seconds += self._clock[1] - cpu

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _agreed_spent(self) -> float:
        """`spent`, the same in all processes, which also agree whether to stop."""
        if self.processes.world_size == 1:
            return self.spent()
        spent, stop, self.seconds, self.cpu_seconds = self.processes.all_reduce_max(
            [self.spent(), float(self._stop_requested), self.seconds, self.cpu_seconds]
        )
        self._stop_requested = stop > 0
        return max(spent, self.spent())

    def _check_values(self) -> None:
        """Read the values since the last check, means over processes; stop at one not finite."""
        for step, terms in self._unchecked:
            values = torch.stack([v.float() for v in terms.values()]) if terms else torch.zeros(0)
            self.processes.all_reduce_mean([values])
            for name, value in zip(terms, values.tolist(), strict=True):
                if not math.isfinite(value):
                    what = self._not_finite(name, value)
                    raise CheckFailed(f"Step {step} of {self.stage}: {what}")
                self._values.setdefault(name, []).append(value)
        self._unchecked.clear()

    def _not_finite(self, name: str, value: float) -> str:
        with self.autocast:
            reduced = torch.is_autocast_enabled(self.device.type)
        return not_finite(name, value, self._saved_step, self.optim, self.optim_setting, reduced)

    def _report(self, log: Log | None, bar: tqdm, logged_seconds: float, logged_step: int) -> None:
        """Write a line of the log and the text of the bar."""
        self._check_values()
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        elapsed = max(1e-9, self.seconds - logged_seconds)
        speed = (self.step - logged_step) * self.batch_size / elapsed
        metrics = {n[7:]: value for n, value in means.items() if n.startswith("metric/")}
        diagnosis = self.system.diagnose(metrics)
        if log is not None and self.processes.is_main:
            log.write(
                {
                    "stage": self.stage,
                    "step": self.step,
                    "pictures": self.step * self.batch_size,
                    "seconds": round(self.seconds, 3),
                    "cpu_seconds": round(self.cpu_seconds, 3),
                    "pictures_per_second": round(speed, 2),
                    "threads": self.threads.count,
                    "threads_reason": self.threads.reason,
                    "lr": self.optim.lr * self._lr_factor(),
                    **means,
                    **({"diagnosis": diagnosis} if diagnosis else {}),
                }
            )
        losses = {n: value for n, value in means.items() if n.split("/")[0] in self.groups}
        head = f"step {self.step}, {speed:,.0f} pictures/s, {described(self.threads)}  "
        bar.set_postfix_str(head + losses_text(losses | metrics, diagnosis), refresh=False)
        if self.processes.is_main and 2 * (self.step - logged_step) > self.train.log_every:
            tell(self._rates.sentence(self.step, speed))
        bar.n = min(bar.total, round(self.spent() * bar.total, 1))
        bar.refresh()

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that is needed to continue exactly here."""
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
        """Continue from `state`. Raises `UserError` if it belongs to other networks."""
        try:
            self.system.load_state_dict(state["weights"])
            for name, group in self.groups.items():
                saved = state["groups"][name]
                group.load_optimizer_states(saved)
                if group.average is not None:
                    group.load_average(saved["average"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.cpu_seconds = float(state["cpu_seconds"])
            self._saved_step = self.step
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
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
        weights = [parameter.detach().clone() for parameter, _ in pairs]
        with torch.no_grad():
            for parameter, average in pairs:
                parameter.copy_(average)
        try:
            yield self.system
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(pairs, weights, strict=True):
                    parameter.copy_(value)
