"""Intervals against simulations, formulas and explicit resampling.

A reader calls two systems different if their intervals do not overlap, so an interval that is too
narrow would present chance as a difference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.evaluation import intervals


def rows(count: int, width: int = 3, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


def flips(count: int, share: float, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(count) < share).tolist()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_an_interval_of_a_mean_covers_the_truth(share: float) -> None:
    """A 95 % interval from 60 pictures holds the true share in about 95 of 100 evaluations."""
    scores = [intervals.mean_score(flips(60, share, seed), seed) for seed in range(300)]
    covered = [score["interval"][0] <= share <= score["interval"][1] for score in scores]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_an_interval_of_tasks_covers_the_truth() -> None:
    """Tasks of unequal size and difficulty have equal weight, in the value and in the interval."""
    tasks = ((90, 0.9), (40, 0.5), (30, 0.2))
    truth = sum(share for _, share in tasks) / len(tasks)
    covered = []
    for seed in range(300):
        verdicts = [flips(n, p, 1000 * seed + i) for i, (n, p) in enumerate(tasks)]
        low, high = intervals.task_mean_score(verdicts, seed)["interval"]
        covered.append(low <= truth <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("groups", [1, 4])
def test_intervals_are_as_wide_as_theory_says(groups: int) -> None:
    """1.96 standard errors to each side; four equal tasks halve it if each is resampled alone."""
    columns = [torch.tensor(flips(200, 0.5, 7)) for _ in range(groups)]
    score = intervals.task_mean_score(columns)
    low, high = score["interval"]
    error = float(columns[0].double().std()) / math.sqrt(200 * groups)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert (low + high) / 2 == pytest.approx(score["value"], abs=error / 4)


def test_values_and_counts_by_hand() -> None:
    score = intervals.task_mean_score([[True, False], [1.0, 1.0, 1.0, 0.0]])
    assert (score["value"], score["n"]) == (0.625, 6)
    assert intervals.mean_score([True, False, False])["value"] == 0.3333
    assert intervals.mean_score(torch.tensor([2.5] * 5)) == {
        "value": 2.5,
        "interval": [2.5, 2.5],
        "n": 5,
    }


def test_the_same_seed_gives_the_same_interval() -> None:
    """Two evaluations of one run print the same interval, and another seed another one."""
    x, y = rows(30), rows(25, seed=1, shift=0.4)
    values = x[:, 0]
    calls = [
        lambda seed: intervals.mean_score(values, seed),
        lambda seed: intervals.task_mean_score([values, y[:, 0]], seed),
        lambda seed: intervals.fid_score(x, y, seed),
        lambda seed: intervals.kid_score(x, y, seed),
    ]
    for call in calls:
        torch.manual_seed(1)
        first = call(3)
        torch.manual_seed(2)
        assert call(3) == first
        other = call(4)
        assert other["value"] == first["value"]
        assert other["interval"] != first["interval"]
        low, high = first["interval"]
        assert low < first["value"] < high


def resampled(name: str, x: Tensor, y: Tensor, patch: pytest.MonkeyPatch) -> tuple[Any, Tensor]:
    """The score of a distance, and the distances of the resampled sets behind it."""
    recorded: list[Tensor] = []
    original = intervals._normal_interval

    def spy(value: float, again: Tensor, count: int) -> dict[str, Any]:
        recorded.append(again)
        return original(value, again, count)

    patch.setattr(intervals, "_normal_interval", spy)
    return getattr(intervals, name)(x, y, 5), recorded[0].double()


def resampled_sets(x: Tensor, y: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """The resampled sets themselves, row by row."""
    pairs = zip(
        intervals.resample_indices(len(x), 5), intervals.resample_indices(len(y), 6), strict=True
    )
    return [(x[i].double().numpy(), y[j].double().numpy()) for i, j in pairs]


def check_score(score: dict[str, Any], value: float, again: Tensor, count: int) -> None:
    error = float(again.std())
    assert score["value"] == pytest.approx(value, rel=1e-3)
    assert score["standard_error"] == pytest.approx(error, rel=1e-3)
    assert score["interval"] == pytest.approx([value - 1.96 * error, value + 1.96 * error], 1e-3)
    assert score["n"] == count


def naive_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Loops over rows; a row is not compared with itself, but with an equal other row."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(points: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j]
        return sum(kernel(points[i], points[j]) for i, j in pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distances_of_resampled_sets_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code weighs the kernel of all pictures; this test resamples the pictures."""
    x, y = rows(9, 4), rows(7, 4, seed=1, shift=1.0)
    score, again = resampled("kid_score", x, y, monkeypatch)
    naive = [naive_kernel_distance(a, b) for a, b in resampled_sets(x, y)]
    expected = torch.tensor(naive, dtype=torch.float64)
    assert len(expected) == intervals.DISTANCE_RESAMPLES
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)
    whole = naive_kernel_distance(x.double().numpy(), y.double().numpy())
    check_score(score, whole, expected, 7)


def naive_frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The trace of the root from the eigenvalues of the product, as in the paper's formula."""
    s, t = np.cov(x.T), np.cov(y.T)
    shared = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * shared)


def test_frechet_distances_of_resampled_sets_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(20), rows(16, seed=1, shift=1.0)
    score, again = resampled("fid_score", x, y, monkeypatch)
    naive = [naive_frechet_distance(a, b) for a, b in resampled_sets(x, y)]
    expected = torch.tensor(naive, dtype=torch.float64)
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-6)
    whole = naive_frechet_distance(x.double().numpy(), y.double().numpy())
    check_score(score, whole, expected, 16)


def test_sets_are_resampled_with_replacement_and_independently() -> None:
    """With equal indices, both sides would change together."""
    indices = intervals.resample_indices(50, 0)
    assert indices.shape == (intervals.DISTANCE_RESAMPLES, 50)
    assert indices.unique().tolist() == list(range(50))
    different = torch.tensor([len(row.unique()) for row in indices]).double().mean() / 50
    assert float(different) == pytest.approx(1 - math.exp(-1), abs=0.03)
    x = rows(40)
    assert intervals.fid_score(x, x)["standard_error"] > 0
    assert intervals.kid_score(x, x)["standard_error"] > 0


@pytest.mark.parametrize("name", ["kid_score", "fid_score"])
def test_the_standard_error_is_what_fresh_pictures_show(name: str) -> None:
    """The distances of fresh sets vary as much as the bootstrap predicts."""
    call, values, errors = getattr(intervals, name), [], []
    for seed in range(40):
        score = call(rows(80, seed=2 * seed), rows(80, seed=2 * seed + 1, shift=1.0), seed)
        values.append(score["value"])
        errors.append(score["standard_error"])
    assert 0.7 < np.mean(errors) / np.std(values, ddof=1) < 1.4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (0.123449, 0.1234),
        (-0.123451, -0.1235),
        (123456.0, 123500.0),
        (0.000012344999, 0.00001234),
        (0.99996, 1.0),
        (1 / 3, 0.3333),
    ],
)
def test_scores_have_four_significant_digits(value: float, expected: float) -> None:
    assert intervals.rounded(value) == expected
    assert intervals.as_score(value, value, value, 3) == {
        "value": expected,
        "interval": [expected, expected],
        "n": 3,
    }


def test_the_last_bits_do_not_show() -> None:
    """Features of a batch of another size may differ in the last bit; the document must not."""
    x, y = rows(40), rows(40, seed=1, shift=0.5)
    again = y * (1 + 1e-7)
    assert not torch.equal(y, again)
    for name in ("kid_score", "fid_score"):
        call = getattr(intervals, name)
        assert call(x, y) == call(x, again)


def study(seed: int, runs: int, deviation: float) -> list[list[np.ndarray]]:
    """Verdicts [run][task][prompt] of a study whose true score is 0.5; runs and prompts differ."""
    rng = np.random.default_rng(seed)
    of_run = rng.normal(0, deviation, (runs, 1))
    tasks = []
    for _ in range(4):
        share = np.clip(0.5 + of_run + rng.normal(0, 0.2, 40), 0, 1)
        tasks.append((rng.random((runs, 40)) < share).astype(float))
    return [[task[run] for task in tasks] for run in range(runs)]


def test_an_interval_over_seeds_covers_the_truth() -> None:
    """One over pictures alone leaves out that the next run has another score."""
    covered: dict[str, list[bool]] = {"seeds": [], "pictures": []}
    for seed in range(150):
        runs = study(seed, 4, 0.08)
        together = [np.concatenate(task) for task in zip(*runs, strict=True)]
        for name, score in (
            ("seeds", intervals.seeds_score(runs, seed)),
            ("pictures", intervals.task_mean_score(together, seed)),
        ):
            low, high = score["interval"]
            covered[name].append(low <= 0.5 <= high)
    assert 0.86 <= np.mean(covered["seeds"]) <= 0.99
    assert np.mean(covered["pictures"]) < 0.65


def test_a_score_over_seeds_by_hand() -> None:
    """Tasks have equal weight, whatever their number of prompts, and so have runs."""
    score = intervals.seeds_score([[[1, 1, 1, 0], [0, 1]], [[1, 1, 0, 0], [0, 0]]])
    assert score["value"] == 0.4375 and score["n"] == 6 and score["runs"] == 2


def test_equal_runs_say_no_more_than_one() -> None:
    """All runs drew the same prompts: the prompts of a resampled set are those of all its runs."""
    run = study(0, 1, 0.0)
    one, three = intervals.seeds_score(run), intervals.seeds_score(run * 3)
    assert one["interval"] == three["interval"] and one["value"] == three["value"]
    low, high = intervals.task_mean_score(run[0])["interval"]
    assert one["interval"] == pytest.approx([low, high], abs=0.015)


def test_runs_that_differ_widen_the_interval() -> None:
    """Of two constant runs, half of the resampled sets hold one alone; its distance from the mean
    is stretched by sqrt(2).
    """
    low, high = intervals.seeds_score([[[0.4] * 9], [[0.6] * 9]])["interval"]
    assert (low, high) == pytest.approx((0.5 - 0.1 * math.sqrt(2), 0.5 + 0.1 * math.sqrt(2)), 1e-3)


def test_limits_of_a_score_over_seeds() -> None:
    """Stretched means stay possible; equal verdicts have Wilson's interval, differences none."""
    assert intervals.seeds_score([[[0.0] * 9], [[1.0] * 9]])["interval"] == [0.0, 1.0]
    assert intervals.seeds_score([[[-1.0] * 9], [[1.0] * 9]], lowest=-1)["interval"] == [-1.0, 1.0]
    assert intervals.seeds_score([[[0.0] * 9]] * 3)["interval"] == [0.0, pytest.approx(0.299, 1e-2)]
    assert intervals.seeds_score([[[0.0] * 9]] * 3, lowest=-1)["interval"] == [0.0, 0.0]
