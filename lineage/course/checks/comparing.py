"""Checks of `20_comparing`.

Axes: N, M pictures, D features, T resampled sets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, untouched
from lineage.evaluation.metrics import precision_recall

Things = list[tuple[str, str]]

RED, BLUE = ("red", "circle"), ("blue", "square")
SCENES: tuple[tuple[Things, Things, bool, str], ...] = (
    ([RED, BLUE], [RED, BLUE], True, "the same two objects"),
    ([BLUE, RED], [RED, BLUE], True, "the same two objects in another order"),
    ([RED, RED], [RED, RED], True, "two equal objects"),
    ([], [RED], False, "an empty picture"),
    ([RED], [RED, BLUE], False, "a picture that lacks an object"),
    ([RED, BLUE], [RED], False, "a picture with an object too many"),
    ([RED, RED], [RED], False, "two circles where one is wanted: count them"),
    ([RED, BLUE, BLUE], [RED, RED, BLUE], False, "the right kinds in wrong numbers: count each"),
    (
        [("blue", "circle"), ("red", "square")],
        [RED, BLUE],
        False,
        "objects that have exchanged their colours: compare pairs",
    ),
    ([("red", "square")], [RED], False, "a wrong shape"),
    ([("blue", "circle")], [RED], False, "a wrong colour"),
)


@exercise()
def strict_scene(answer: Any) -> None:
    """Whether two lists hold the same objects equally often."""
    for found, wanted, right, words in SCENES:
        arguments = list(found), list(wanted)
        value = answer(*arguments)
        if arguments != (found, wanted):
            raise Wrong("changes one of its lists: make a new one, as `sorted` does.")
        if value is None:
            raise Wrong("returns nothing: end it with `return`.")
        if not isinstance(value, bool):
            raise Wrong(f"returns {type(value).__name__}, not True or False.")
        if value != right:
            raise Wrong(f"{'accepts' if value else 'rejects'} {words}.")


@exercise(points=2)
def frechet_diagonal(answer: Any) -> None:
    """FID of features with diagonal covariances."""
    mean_a, mean_b = torch.randn(5), torch.randn(5)
    var_a, var_b = torch.rand(5) + 0.2, torch.rand(5) + 1.5
    value = untouched(answer, mean_a, var_a, mean_b, var_b)
    means, std = (mean_a - mean_b).square(), (var_a.sqrt() - var_b.sqrt()).square()
    root = (var_a * var_b).sqrt()
    expect(
        value,
        means.sum() + std.sum(),
        "returns a number that",
        mistakes={
            "compares the variances themselves: take the square root of each first": means.sum()
            + (var_a - var_b).square().sum(),
            "compares the means only: the deviations are missing": means.sum(),
            "compares the deviations only: the means are missing": std.sum(),
            "takes the mean over the features, not the sum": means.mean() + std.mean(),
            "lacks the factor 2 before the root of the product": (
                means + var_a + var_b - root
            ).sum(),
            "lacks the root of the product of the variances": (
                means + var_a + var_b - 2 * var_a * var_b
            ).sum(),
            "adds 2 times the root of the product, which is subtracted": (
                means + var_a + var_b + 2 * root
            ).sum(),
            "takes the distance of the means, not its square": means.sum().sqrt() + std.sum(),
            "takes absolute differences, not squares": means.sqrt().sum() + std.sqrt().sum(),
            "takes the square root of the sum: FID is a squared distance": (
                means.sum() + std.sum()
            ).sqrt(),
        },
    )
    expect(
        answer(mean_a, var_a, mean_a.clone(), var_a.clone()),
        torch.zeros(()),
        "is wrong for two equal clouds, whose distance is 0: it",
    )


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _within(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / (n * (n - 1))


@exercise(points=2)
def unbiased_kid(answer: Any) -> None:
    """The unbiased squared MMD with the cubic kernel: Binkowski et al. 2018."""
    x, y = torch.randn(6, 3), torch.randn(4, 3) + 0.5

    def mmd(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
        return _within(xx) + _within(yy) - 2 * xy.mean()

    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    plain = [(a @ b.T + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    linear = [a @ b.T / 3 + 1 for a, b in ((x, x), (y, y), (x, y))]
    squared = [(a @ b.T / 3 + 1) ** 2 for a, b in ((x, x), (y, y), (x, y))]
    zero = [(a @ b.T / 3) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [square.sum() - square.diagonal().sum() for square in (xx, yy)]
    expect(
        untouched(answer, x, y),
        mmd(xx, yy, xy),
        "returns a number that",
        mistakes={
            "pairs pictures with themselves: leave the diagonal out, and divide by n (n - 1)": (
                xx.mean() + yy.mean() - 2 * xy.mean()
            ),
            "leaves the diagonal out, but divides by n^2, not by n (n - 1)": off[0] / 36
            + off[1] / 16
            - 2 * xy.mean(),
            "divides by n (n - 1), but keeps the diagonal": xx.sum() / 30
            + yy.sum() / 12
            - 2 * xy.mean(),
            "leaves a diagonal out between the two sets, where no picture meets itself": (
                _within(xx) + _within(yy) - 2 * (xy.sum() - xy.diagonal().sum()) / 20
            ),
            "lacks the factor 2 of the last term": _within(xx) + _within(yy) - xy.mean(),
            "adds the last term, which is subtracted": _within(xx) + _within(yy) + 2 * xy.mean(),
            "does not divide by D in the kernel": mmd(*plain),
            "lacks the cube in the kernel": mmd(*linear),
            "has a square in the kernel, not a cube": mmd(*squared),
            "lacks the 1 in the kernel": mmd(*zero),
            "has sums where means over the pairs belong": off[0] + off[1] - 2 * xy.sum(),
            "takes the square root: KID is a squared distance": mmd(xx, yy, xy).abs().sqrt(),
        },
    )


@exercise()
def fool_precision(answer: Any) -> None:
    """Features with perfect precision and a recall below 0.1."""
    real = torch.randn(60, 4)
    for count in (40, 25):
        value = untouched(answer, real, count)
        if not isinstance(value, Tensor):
            raise Wrong(f"returns {type(value).__name__} where a tensor ({count}, 4) is expected.")
        if tuple(value.shape) != (count, 4):
            raise Wrong(f"returns shape {tuple(value.shape)}, not ({count}, 4), for {count} rows.")
        if not value.isfinite().all():
            raise Wrong("returns NaN or infinity.")
        precision, recall = (float(one.mean()) for one in precision_recall(real, value.detach()))
        if precision < 1:
            raise Wrong(
                f"has precision {precision:.2f}, not 1: each row must lie within reach of a real "
                "one, and a copy of a real row always does."
            )
        if recall >= 0.1:
            raise Wrong(
                f"has precision 1, but recall {recall:.2f}: too many real rows lie within reach of "
                "its rows, which should be all in one place."
            )


@exercise(points=2)
def bootstrap_interval(answer: Any) -> None:
    """The 95 % percentile interval of a mean, from given resampled sets."""
    values = torch.rand(7)
    indices = torch.randint(7, (400, 7))
    means = values[indices].mean(1)

    def ends(low: float, high: float, of: Tensor = means) -> Tensor:
        return torch.quantile(of, torch.tensor([low, high]))

    value = untouched(answer, values, indices)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = torch.stack([torch.as_tensor(end, dtype=values.dtype) for end in value])
    half = 1.96 * means.std()
    expect(
        value,
        ends(0.025, 0.975),
        mistakes={
            "has the upper end first": ends(0.975, 0.025),
            "leaves 5 % out on each side, which makes an interval of 90 %": ends(0.05, 0.95),
            "leaves 5 % out on one side only": ends(0.0, 0.95),
            "takes quantiles of the values: those of the resampled means are asked for": ends(
                0.025, 0.975, values
            ),
            "takes quantiles of all resampled values: take the mean of each set first": ends(
                0.025, 0.975, values[indices].flatten()
            ),
            "takes the mean over the sets, not over the values of each: another axis": ends(
                0.025, 0.975, values[indices].mean(0)
            ),
            "returns the smallest and the largest mean": torch.stack([means.min(), means.max()]),
            "takes 1.96 deviations to each side: percentiles of the means are asked for": (
                torch.stack([means.mean() - half, means.mean() + half])
            ),
            "takes 1.96 deviations around the mean of the values: percentiles are asked for": (
                torch.stack([values.mean() - half, values.mean() + half])
            ),
        },
    )
