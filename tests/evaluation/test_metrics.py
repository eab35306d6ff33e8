"""Metrics against naive versions, closed forms and other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lineage.errors import UserError
from lineage.evaluation import metrics


def features(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


def means(values: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    first, second = values
    return float(first.mean()), float(second.mean())


def test_frechet_distance_of_gaussians_in_one_dimension() -> None:
    """(mu - mu')^2 + (s - s')^2, with the unbiased deviations."""
    x, y = features(50, 1), 3 * features(40, 1, seed=1) + 2
    expected = (x.double().mean() - y.double().mean()) ** 2
    expected += (x.double().std() - y.double().std()) ** 2
    assert metrics.frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_by_the_root_of_the_product() -> None:
    """scipy's root of S S', as in pytorch-fid."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is an extra")
    x, y = features(80), features(70, seed=1, shift=0.5)
    (m, s), (n, t) = metrics.mean_and_covariance(x), metrics.mean_and_covariance(y)
    root = linalg.sqrtm((s @ t).numpy()).real
    expected = float((m - n).square().sum() + s.trace() + t.trace()) - 2 * root.trace()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_and_kernel_distance_by_torchmetrics() -> None:
    """Both agree on the same features to 1e-6."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is an extra")
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is an extra")
    x, y = features(80).double(), features(80, seed=1, shift=0.5).double()
    (m, s), (n, t) = metrics.mean_and_covariance(x), metrics.mean_and_covariance(y)
    assert metrics.frechet_distance(x, y) == pytest.approx(
        float(fid._compute_fid(m, s, n, t)), rel=1e-6
    )
    assert metrics.kernel_distance(x, y) == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-6)


def test_kernel_distance_by_loops() -> None:
    x, y = features(7, 3).double(), features(5, 3, seed=1).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    other = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert metrics.kernel_distance(x, y) == pytest.approx(within + other - 2 * across, rel=1e-10)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_coverage_by_loops(k: int) -> None:
    x, y = features(30, 2), features(25, 2, seed=1, shift=0.8)

    def radius(rows: torch.Tensor, i: int) -> float:
        return sorted(float((rows[i] - b).double().norm()) for j, b in enumerate(rows) if j != i)[
            k - 1
        ]

    def inside(rows: torch.Tensor, i: int, point: torch.Tensor) -> bool:
        return float((rows[i] - point).double().norm()) < radius(rows, i) - 1e-9

    precision = sum(any(inside(x, i, b) for i in range(30)) for b in y) / 25
    recall = sum(any(inside(y, j, a) for j in range(25)) for a in x) / 30
    density = sum(inside(x, i, b) for i in range(30) for b in y) / (25 * k)
    coverage = sum(any(inside(x, i, b) for b in y) for i in range(30)) / 30
    assert means(metrics.precision_recall(x, y, k)) == pytest.approx((precision, recall))
    assert means(metrics.density_coverage(x, y, k)) == pytest.approx((density, coverage))
    assert 0 < precision < 1  # else the case would test nothing


def test_collapse_keeps_precision_and_loses_recall() -> None:
    real = features(100, 2)
    collapsed = real[:1] + 1e-3 * features(50, 2, seed=1)
    precision, recall = means(metrics.precision_recall(real, collapsed))
    assert precision == 1.0
    assert recall < 0.05


def test_inception_score_bounds() -> None:
    """Certain and varied classes score their number, uniform ones 1."""
    certain = torch.eye(5).repeat(8, 1)
    assert metrics.inception_score(certain, 4).tolist() == pytest.approx([5.0] * 4)
    assert metrics.inception_score(torch.full((40, 5), 0.2), 4).tolist() == pytest.approx([1.0] * 4)


def test_text_fit_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    text = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert metrics.clip_score(image, text).tolist() == pytest.approx([100 * math.sqrt(0.5), 0.0])
    candidates = torch.stack([text, torch.tensor([[0.0, 1.0], [0.0, 1.0]])], dim=1)
    assert metrics.r_precision(image, candidates).tolist() == [1.0, 0.0]


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(UserError, match="4 rows"):
        metrics.precision_recall(features(3), features(10))


@pytest.mark.parametrize("k", [1, 3])
def test_equal_features_have_all_precision_and_recall(k: int) -> None:
    """Equations 1 and 2 count a distance of exactly the radius."""
    for rows in (torch.ones(6, 2), torch.arange(6.0)[:, None]):
        precision, recall = metrics.precision_recall(rows, rows, k)
        assert precision.eq(1).all() and recall.eq(1).all()
    line = torch.arange(6.0)[:, None]
    precision, recall = metrics.precision_recall(line, line + 100, k)
    assert precision.eq(0).all() and recall.eq(0).all()
    edge = line + line.new_tensor(float(k))  # the last k lie outside, the first of them at its edge
    assert metrics.precision_recall(line, edge, k)[0].tolist() == [1.0] * 6


GOOD = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
ON_FEATURES: dict[str, Callable[[Tensor], object]] = {
    "frechet_distance": lambda x: metrics.frechet_distance(GOOD, x),
    "kernel_distance": lambda x: metrics.kernel_distance(x, GOOD),
    "precision_recall": lambda x: metrics.precision_recall(GOOD, x),
    "density_coverage": lambda x: metrics.density_coverage(x, GOOD),
    "mean_and_covariance": metrics.mean_and_covariance,
    "inception_score": lambda x: metrics.inception_score(x, 2),
    "nearest_distance": lambda x: metrics.nearest_distance(x, GOOD),
    "spread": lambda x: metrics.spread(x[None]),
    "data_copying": lambda x: metrics.data_copying(x[:, 0], GOOD[:, 0]),
    "clip_score": lambda x: metrics.clip_score(x, GOOD),
    "r_precision": lambda x: metrics.r_precision(x, GOOD[:, None].expand(-1, 3, -1)),
}


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_an_error(name: str, value: float) -> None:
    ON_FEATURES[name](GOOD)
    features = GOOD.clone()
    features[3, 0] = value
    with pytest.raises(UserError, match="A metric needs finite numbers, but 1 of") as caught:
        ON_FEATURES[name](features)
    assert "\n" not in str(caught.value)
