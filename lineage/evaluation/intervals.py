"""How sure a number is: 95 % bootstrap intervals (Efron 1979).

The pictures that were scored are drawn again with replacement, many times, and the number is
computed anew; where it falls in the middle 95 % is the interval. It speaks of the choice of
pictures alone, not of training the system again with another seed.

    of_mean       a mean over pictures: percentiles of the resampled means
    of_tasks      a mean of the means of several tasks, each resampled within itself
    of_frechet_distance, of_kernel_distance    FID and KID: the value, give or take 1.96 standard
                  deviations of the resampled ones. Their percentiles would not do: a resampled set
                  holds pictures twice, which by itself moves it away from the other. Where both
                  sets are of one kind, and the distance next to zero, this is up to twice too wide

Where all pictures got the same verdict, resampling says nothing; the interval is then Wilson's
(1927).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lineage.evaluation.metrics import frechet_distance, kernel_distance, kernel_distances

RESAMPLES = 1000  # of a mean
DISTANCE_RESAMPLES = 100  # of a distance, which costs more
DIGITS = 4
"""Significant digits that are told. The rounding of a pixel may hang on the last bit of a product,
which a batch of another size computes in another order; it must not show in a score."""


def rounded(value: float) -> float:
    """A number to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def score(value: float, low: float, high: float, count: int) -> dict[str, Any]:
    """A number as it stands in the JSON."""
    return {"value": rounded(value), "interval": [rounded(low), rounded(high)], "n": count}


def of_mean(values: Tensor | Sequence[float | bool], seed: int = 0) -> dict[str, Any]:
    """The mean of (N,) numbers, one a picture, with its interval."""
    return of_tasks([values], seed)


def of_tasks(tasks: Sequence[Tensor | Sequence[float | bool]], seed: int = 0) -> dict[str, Any]:
    """The mean over tasks of their means, with its interval."""
    columns = [torch.as_tensor(t, dtype=torch.float64) for t in tasks]
    means = torch.stack(
        [c[_draws(len(c), seed + i, RESAMPLES)].mean(1) for i, c in enumerate(columns)]
    ).mean(0)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = float(torch.stack([c.mean() for c in columns]).mean())
    count = sum(map(len, columns))
    if low == high and value in (0.0, 1.0):
        beyond = 1.96**2 / (count + 1.96**2)
        low, high = (0.0, beyond) if value == 0 else (1 - beyond, 1.0)
    return score(value, low, high, count)


def of_frechet_distance(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """FID between features (N, D) and (M, D), with its interval and standard error."""
    rows = zip(_draws(len(real), seed), _draws(len(fake), seed + 1), strict=True)
    again = [frechet_distance(real[i], fake[j]) for i, j in rows]
    return _around(
        frechet_distance(real, fake), torch.tensor(again, dtype=torch.float64), len(fake)
    )


def of_kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """KID between features (N, D) and (M, D), with its interval and standard error."""
    counts = [
        torch.stack([torch.bincount(draw, minlength=len(rows)) for draw in _draws(len(rows), s)])
        for rows, s in ((real, seed), (fake, seed + 1))
    ]
    again = kernel_distances(real, fake, *counts)
    return _around(kernel_distance(real, fake), again, len(fake))


def _draws(count: int, seed: int, times: int = DISTANCE_RESAMPLES) -> Tensor:
    """(T, N) numbers of the pictures in each resampled set."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (times, count), generator=generator)


def _around(value: float, again: Tensor, count: int) -> dict[str, Any]:
    error = float(again.double().std())
    result = score(value, value - 1.96 * error, value + 1.96 * error, count)
    return {**result, "standard_error": rounded(error)}
