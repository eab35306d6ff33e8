"""Scores of one system over several runs that differ in their seed alone.

    composition        intervals over runs and prompts, each resampled on their own (`seeds_score`)
    every other score  the mean of the runs, give or take Student's interval: t s / sqrt(R)
    costs              means

The result has the form of one run's scores, so that tables and figures show either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lineage.evaluation.intervals import Values, as_score, rounded, seeds_score

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantile 0.975 of Student's t with 1 to 9 degrees of freedom."""


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of a system from those of its runs on the same prompts and pictures.

    Args:
        runs: Entries of `runs` of an evaluation; one is returned as it is.
    """
    if len(runs) == 1:
        return dict(runs[0])
    merged = dict(_merged(runs))
    for split, section in merged.get("composition", {}).items():
        verdicts = [run["composition"][split]["verdicts"] for run in runs]
        section["tasks"] = {
            task: seeds_score([tasks_of({task: own[task]}) for own in verdicts])
            for task in verdicts[0]
        }
        section["overall"] = seeds_score([tasks_of(own) for own in verdicts])
    return merged


def tasks_of(verdicts: Mapping[str, str]) -> list[Values]:
    """The verdicts of each task, written as `0110`, as numbers."""
    return [[float(digit) for digit in own] for own in verdicts.values()]


def difference(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], split: str = "test"
) -> dict[str, Any]:
    """How much more of the six tasks one system gets right than another, with an interval.

    Runs are paired by their order, which is that of their seeds, and prompts by themselves; where
    one has more runs, the rest is left out.

    Args:
        one, other: Entries of `runs` of an evaluation, for each seed.
        split: `test` or `heldout`.
    """
    pairs = [
        [
            torch.as_tensor(a) - torch.as_tensor(b)
            for a, b in zip(
                tasks_of(mine["composition"][split]["verdicts"]),
                tasks_of(theirs["composition"][split]["verdicts"]),
                strict=True,
            )
        ]
        for mine, theirs in zip(one, other, strict=False)
    ]
    return seeds_score(pairs, lowest=-1.0)


def runs_score(values: Sequence[float], count: int) -> dict[str, Any]:
    """The mean of a score over R runs with Student's 95 % interval.

    Args:
        values: The score of each run.
        count: Number of pictures behind each.
    """
    number = len(values)
    mean = math.fsum(values) / number
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1))
    half = quantile(number - 1) * deviation / math.sqrt(number)
    return {**as_score(mean, mean - half, mean + half, count), "runs": number}


def quantile(freedom: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table by its expansion about the normal one."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _merged(values: Sequence[Any]) -> Any:
    """Scores with intervals, means of numbers, and the first of what is neither."""
    first = values[0]
    if isinstance(first, Mapping):
        if isinstance(first.get("value"), (int, float)) and "interval" in first:
            return runs_score([one["value"] for one in values], first["n"])
        shared = [name for name in first if all(name in one for one in values)]
        return {name: _merged([one[name] for one in values]) for name in shared}
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        return first
    mean = math.fsum(values) / len(values)
    return round(mean) if isinstance(first, int) else rounded(mean)
