"""The budget of a comparison: what is the same for all systems, and the commands that say so.

On a CPU, a budget in minutes is one of the processor's time: minutes of the clock would give fewer
steps to the systems whose turn comes while the machine is busy. Each system is trained with one
thread, since several threads wait for each other more in some systems than in others and the wait
counts as processor time; and as many runs as there are cores are trained at a time, which uses two
cores better than two threads do.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lineage.config import TrainConfig
from lineage.cores import usable_cpus
from lineage.evaluation.run import EvalConfig
from lineage.threads import worded
from lineage.training.memory import total_memory

BUDGET = {
    *("train.minutes", "train.cpu_minutes"),
    *("train.max_steps", "train.max_pictures", "train.max_flops"),
}
MEMORY = 2 * 10**9
"""Bytes of memory for each run that is trained at a time; one at preset tiny needs up to half of
them.
"""


def runs_at_once(threads: int | None) -> int:
    """Number of runs that are trained at a time: as many as cores and memory allow, on a CPU.

    Args:
        threads: Number of threads of each; None on a GPU.
    """
    if threads is None:
        return 1
    return max(1, min(usable_cpus() // threads, total_memory("cpu") // MEMORY))


def fair_budget(
    train: TrainConfig, settings: Mapping[str, Any], threads: int | None
) -> dict[str, Any]:
    """Options of `configure` that replace minutes of the clock by those of the processor.

    Args:
        train: Budget as the user gave it.
        settings: Fields that the user set, whose budget is left as it is.
        threads: Number of threads of each run; None on a GPU.
    """
    if threads is None or train.minutes is None or BUDGET & settings.keys():
        return {}
    return {"minutes": None, "cpu_minutes": threads * train.minutes}


def fairness(minutes: float, threads: int, at_once: int) -> str:
    """What the budget is counted in, for the user."""
    return (
        f"Each system is trained for {minutes:g} minutes of the processor's time with "
        f"{worded(threads)}, {at_once} at a time, so that what else "
        "the machine does hardly changes a score."
    )


def flags_of(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Options and settings as arguments of the command line."""
    set_options = {name: value for name, value in options.items() if value is not None}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in set_options.items()]
    pairs += [("--set", f"{name}={value}") for name, value in settings.items()]
    return [part for pair in pairs for part in pair]


def scoring_flags(scoring: EvalConfig) -> list[str]:
    """How runs are scored, as arguments of the command line, where it is not the default."""
    names = ("pictures", "features", "scorer")
    changed = [n for n in names if getattr(scoring, n) != getattr(EvalConfig(), n)]
    return [part for n in changed for part in (f"--{n}", str(getattr(scoring, n)))]


def as_lines(commands: Sequence[Sequence[str]]) -> list[str]:
    """Commands as a shell reads them."""
    return [shlex.join(command) for command in commands]
