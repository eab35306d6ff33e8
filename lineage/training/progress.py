"""Progress of a stage on the terminal: the bar, and what the user should know on the way."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from tqdm import tqdm

from lineage.characters import plain
from lineage.config import OptimConfig, TrainConfig
from lineage.threads import ThreadTuner, worded

LABEL = "LINEAGE_LABEL"
"""Environment variable with text before a stage's name, where several runs share a terminal."""
FALL = 0.5
"""Share of the best rate so far below which the user is warned."""


def progress_bar(stage: str, train: TrainConfig, visible: bool) -> tqdm:
    """A progress bar in the unit of the budget.

    Args:
        stage: Name of the stage.
        train: Budget.
        visible: If true, the bar is shown where standard error is a terminal.
    """
    if train.minutes is not None:
        total, unit = 60 * train.minutes, "s"
    elif train.cpu_minutes is not None:
        total, unit = 60 * train.cpu_minutes, "s of the processor"
    elif train.max_steps is not None:
        total, unit = float(train.max_steps), " steps"
    elif train.max_flops is not None:
        total, unit = train.max_flops / 1e9, " GFLOPs"
    else:
        total, unit = float(train.max_pictures or 1), " pictures"
    layout = (
        "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f}{unit} "
        "{elapsed}<{remaining} {postfix}"
    )
    disable = None if visible else True
    return tqdm(
        desc=os.environ.get(LABEL, "") + stage,
        total=total,
        unit=unit,
        bar_format=layout,
        disable=disable,
    )


def described(threads: ThreadTuner) -> str:
    """The number of threads, and why: `2 threads (1.4 times as fast as one)`."""
    if threads.measuring:
        return "comparing numbers of threads"
    count = worded(threads.count)
    return f"{count} ({threads.reason})" if threads.reason else count


class RateWatch:
    """Warns, once, that training has become much slower than it was.

    Args:
        train: Budget, on which the advice depends.
        threads: Number of threads of the steps.
    """

    def __init__(self, train: TrainConfig, threads: ThreadTuner) -> None:
        self.train, self.threads = train, threads
        self.best = 0.0
        self.warned = False

    def sentence(self, step: int, rate: float) -> str:
        """The warning about `rate` pictures a second at `step`; empty if all is well."""
        self.best = max(self.best, rate)
        if self.warned or rate >= FALL * self.best or self.threads.measuring:
            return ""
        self.warned = True
        fell = (
            f"Step {step}: {rate:,.0f} pictures a second, where it was {self.best:,.0f} before; "
            "other processes may use the processor."
        )
        if self.train.minutes is not None:
            return (
                f"{fell} A budget in minutes then gives fewer steps: --steps or --cpu-minutes give "
                "the same work."
            )
        if self.threads.count > 1 and self.threads.fixed is not None:
            return (
                f"{fell} This run keeps its {self.threads.count} threads, so that its bits do not "
                "depend on that: to go on faster, press Ctrl-C and add --resume --threads 1 (the "
                "last bits then differ)."
            )
        return fell


def tell(sentence: str) -> None:
    """Print a sentence on standard error, above the bar."""
    if sentence:
        tqdm.write(f"lineage: {plain(sentence)}", file=sys.stderr)


def losses_text(values: Mapping[str, float], diagnosis: str) -> str:
    """Losses and metrics for the bar."""
    text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    return text + (f"  ({diagnosis})" if diagnosis else "")


def not_finite(
    name: str, value: float, saved_step: int, optim: OptimConfig, setting: str, reduced: bool
) -> str:
    """What the user should know of a value that is no number, and do.

    Args:
        name: Name of the value in the log.
        value: The value.
        saved_step: Step of the last checkpoint; 0 for none.
        optim: Optimiser of the stage.
        setting: Name of the setting that holds `optim`; empty if none does.
        reduced: If true, some operations are in half precision.
    """
    saved = "there is no checkpoint yet"
    if saved_step:
        saved = f"the last good checkpoint is from step {saved_step}"
    kind, _, rest = name.partition("/")
    what = {"gradient": f"the gradient of {rest}", "metric": f"the metric {rest}"}.get(
        kind, f"the loss {name}"
    )
    settings = [f"{setting}.lr={min(optim.lr / 3, 1e-3):.1g}"] if setting else []
    if reduced:
        settings.append("train.precision=fp32")
    changes = " or ".join(f"--set {change}" for change in settings)
    advice = f"Go on with --resume {changes}" if changes else "Train again with another --seed"
    return f"{what} became {value}, so training stopped; {saved}. {advice}."
