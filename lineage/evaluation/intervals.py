"""95 % bootstrap intervals of scores (Efron 1979).

The scored pictures are drawn again with replacement, many times, and the score is computed for each
resampled set. The interval speaks of the choice of pictures alone, not of training the system again
with another seed; that of `seeds_score` speaks of both.

    mean_score       a mean over pictures: percentiles of the resampled means
    task_mean_score  a mean of the means of several tasks, each resampled within itself
    seeds_score      the mean of it over runs with several seeds, scored on the same prompts: runs
                     and prompts are resampled, each on their own (Owen 2007, arXiv:0711.2402)
    fid_score        FID and KID: the value, give or take 1.96 standard deviations of the resampled
    kid_score        ones. Percentiles would be wrong: a resampled set holds some pictures twice,
                     which by itself moves it away from the other set. If both sets are of one kind,
                     so that the distance is next to zero, this interval is up to twice too wide

If all pictures have the same verdict, resampling says nothing; the interval is then Wilson's
(1927).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lineage.evaluation.metrics import frechet_distance, kernel_distance, kernel_distances

RESAMPLES = 1000  # of a mean
DISTANCE_RESAMPLES = 100  # of a distance, which costs more
Z = 1.96  # standard deviations to each side of a 95 % interval
DIGITS = 4
"""Significant digits of a score. The rounding of a pixel may depend on the last bit of a product,
which a batch of another size computes in another order; it must not show in a score."""

Values = Tensor | Sequence[float | bool]


def rounded(value: float) -> float:
    """A number to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def as_score(value: float, low: float, high: float, count: int) -> dict[str, Any]:
    """A number with its interval, as JSON."""
    return {"value": rounded(value), "interval": [rounded(low), rounded(high)], "n": count}


def mean_score(values: Values, seed: int = 0) -> dict[str, Any]:
    """The mean of (N,) numbers, one for each picture."""
    return task_mean_score([values], seed)


def task_mean_score(tasks: Sequence[Values], seed: int = 0) -> dict[str, Any]:
    """The mean over tasks of their means."""
    columns = [torch.as_tensor(task, dtype=torch.float64) for task in tasks]
    resampled = [
        column[resample_indices(len(column), seed + i, RESAMPLES)].mean(1)
        for i, column in enumerate(columns)
    ]
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(resampled).mean(0), quantiles).tolist()
    value = float(torch.stack([column.mean() for column in columns]).mean())
    count = sum(map(len, columns))
    if low == high and value in (0.0, 1.0):
        low, high = _wilson(value, count)
    return as_score(value, low, high, count)


def _wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's interval of `count` verdicts that are all alike."""
    width = Z**2 / (count + Z**2)
    return (0.0, width) if value == 0 else (1 - width, 1.0)


def seeds_score(
    runs: Sequence[Sequence[Values]], seed: int = 0, *, lowest: float = 0.0
) -> dict[str, Any]:
    """`task_mean_score` of runs that differ in their seed alone, and of their like.

    Each resampled set draws runs, and draws prompts once for all its runs, since all drew the same
    prompts. Of R runs, resampled means vary too little, by the factor sqrt((R - 1) / R); their
    distance from the mean is stretched by its inverse. Three runs still say little of a fourth: in
    simulations the interval holds the truth in 99 of 100 studies if runs differ by the chance of
    their pictures alone, in 92 if seeds add a standard deviation of 0.05, in 84 if they add 0.1.

    Args:
        runs: For each run, the values of the prompts of each task: verdicts, or their differences
            to another run's, for a paired comparison. One run speaks of prompts alone.
        lowest: Lowest possible value: 0 for verdicts, -1 for differences. The highest is 1.

    Returns:
        The score; `n` counts prompts, `runs` the runs.
    """
    tasks = [
        torch.stack([torch.as_tensor(values, dtype=torch.float64) for values in task])
        for task in zip(*runs, strict=True)
    ]  # of each task (R, N)
    chosen = resample_indices(len(runs), seed, RESAMPLES)  # (T, R)
    shares = torch.nn.functional.one_hot(chosen, len(runs)).double().mean(1)  # (T, R) of each run
    even = torch.full_like(shares, 1 / len(runs))
    shares = even + (shares - even) * math.sqrt(len(runs) / max(1, len(runs) - 1))
    means = []
    for number, task in enumerate(tasks, start=1):
        prompts = resample_indices(task.shape[1], seed + number, RESAMPLES)  # (T, N)
        counts = torch.zeros(RESAMPLES, task.shape[1], dtype=torch.float64)
        counts.scatter_add_(1, prompts, torch.ones_like(prompts, dtype=torch.float64))
        of_runs = counts @ task.T / task.shape[1]  # (T, R)
        means.append((shares * of_runs).sum(1))
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(means).mean(0), quantiles).tolist()
    value = float(torch.stack([task.mean() for task in tasks]).mean())
    low, high = max(low, lowest), min(high, 1.0)  # stretched means may lie beyond
    count = sum(task.shape[1] for task in tasks)
    if low == high and value in (0.0, 1.0) and lowest == 0:
        low, high = _wilson(value, count)
    return {**as_score(value, low, high, count), "runs": len(runs)}


def fid_score(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """FID between features (N, D) and (M, D), with its standard error."""
    pairs = zip(
        resample_indices(len(real), seed), resample_indices(len(fake), seed + 1), strict=True
    )
    resampled = [frechet_distance(real[i], fake[j]) for i, j in pairs]
    return _normal_interval(
        frechet_distance(real, fake), torch.tensor(resampled, dtype=torch.float64), len(fake)
    )


def kid_score(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """KID between features (N, D) and (M, D), with its standard error."""
    counts = [
        torch.stack(
            [torch.bincount(i, minlength=len(rows)) for i in resample_indices(len(rows), s)]
        )
        for rows, s in ((real, seed), (fake, seed + 1))
    ]
    resampled = kernel_distances(real, fake, *counts)
    return _normal_interval(kernel_distance(real, fake), resampled, len(fake))


def resample_indices(count: int, seed: int, times: int = DISTANCE_RESAMPLES) -> Tensor:
    """(T, N) numbers of the pictures in each resampled set."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (times, count), generator=generator)


def _normal_interval(value: float, resampled: Tensor, count: int) -> dict[str, Any]:
    error = float(resampled.std())
    result = as_score(value, value - Z * error, value + Z * error, count)
    return {**result, "standard_error": rounded(error)}
