"""Metrics of generated pictures, from features that some network has taken.

No network is known here.

    quality        `frechet_distance` (FID), `kernel_distance` (KID), `inception_score`
    fidelity and   `precision_recall` (improved precision and recall), `density_coverage`
    diversity
    text fit       `clip_score`, `r_precision`

Everything is computed in float64, whatever comes in. A number means something only with its
protocol: which network took the features, of how many real and how many generated pictures.

Axes: N real, M generated pictures, D features, K candidates, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineage.errors import UserError


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,), unbiased covariance (D, D)."""
    rows = _rows(features, at_least=2)
    return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al. 2017, equation 6) between features (N, D) and (M, D).

    |mu - mu'|^2 + Tr(S + S' - 2 (S S')^(1/2)). The trace of the root is the sum of the roots of the
    eigenvalues of S^(1/2) S' S^(1/2), which is symmetric, so singular covariances do no harm.
    """
    (mean, covariance), (mean_f, covariance_f) = map(mean_and_covariance, (real, fake))
    root = _root(covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_f @ root)
    shared = eigenvalues.clamp(min=0).sqrt().sum()
    apart = (mean - mean_f).square().sum()
    return float(apart + covariance.trace() + covariance_f.trace() - 2 * shared)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID (Binkowski et al. 2018, section 4): the unbiased squared MMD, kernel (x.y / D + 1)^3."""
    x, y = _rows(real, at_least=2), _rows(fake, at_least=2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_self(square: Tensor) -> Tensor:
        count = len(square)
        return (square.sum() - square.trace()) / (count * (count - 1))

    within = without_self(kernel(x, x)) + without_self(kernel(y, y))
    return float(within - 2 * kernel(x, y).mean())


def kernel_distance_with_error(
    real: Tensor, fake: Tensor, subsets: int = 50, size: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Mean of `kernel_distance` over random subsets, and the standard error of that mean.

    Args:
        subsets: how many.
        size: rows of each, of both sides; at most what there is.
    """
    size = min(size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)

    def some(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    values = torch.tensor([kernel_distance(some(real), some(fake)) for _ in range(subsets)])
    return float(values.mean()), float(values.std() / subsets**0.5)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision: the share of generated pictures inside the ball of some real one; its radius is the
    distance to that picture's `neighbours`-th other real neighbour. Recall: the same, exchanged.
    """
    x, y = _rows(real, neighbours + 1), _rows(fake, neighbours + 1)
    apart = _distances(x, y)  # (N, M)
    precision = (apart < _radii(x, neighbours)[:, None]).any(0)
    recall = (apart < _radii(y, neighbours)[None, :]).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4), in the same balls.

    Density: in how many balls of real pictures a generated one lies, divided by `neighbours`.
    Coverage: the share of real pictures with a generated one in their ball.
    """
    x, y = _rows(real, neighbours + 1), _rows(fake, at_least=1)
    inside = _distances(x, y) < _radii(x, neighbours)[:, None]  # (N, M)
    density = inside.double().sum(0).mean() / neighbours
    return float(density), float(inside.any(1).double().mean())


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016): mean and population deviation over consecutive parts.

    Args:
        probabilities: (M, C) of classes, rows that sum to 1.
        splits: number of parts; each scores exp(mean KL(p(y | x) || p(y))).
    """
    rows = _rows(probabilities, at_least=splits)
    scores = torch.stack([_split_score(part) for part in torch.tensor_split(rows, splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def clip_score(image: Tensor, text: Tensor) -> float:
    """CLIPScore (Hessel et al. 2021) as torchmetrics scales it, clipped at each pair.

    Features (M, D) of pictures and of their captions -> mean of max(100 cosine, 0).
    """
    return float((100 * _cosine(image, text)).clamp(min=0).mean())


def r_precision(image: Tensor, candidates: Tensor) -> float:
    """R-precision (Xu et al. 2018, section 4): how often the true caption is the nearest.

    Args:
        image: (M, D) embeddings of pictures.
        candidates: (M, K, D) embeddings of captions; number 0 is the true one.
    """
    return float((_cosine(image[:, None], candidates).argmax(1) == 0).double().mean())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along the last axis, in float64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def _split_score(rows: Tensor) -> Tensor:
    marginal = rows.mean(0, keepdim=True)
    divergence = torch.xlogy(rows, rows) - torch.xlogy(rows, marginal)
    return divergence.sum(1).mean().exp()


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """(N, D) -> (N,) distance of each row to its `neighbours`-th nearest other row."""
    apart = _distances(rows, rows)
    apart.fill_diagonal_(torch.inf)
    return apart.kthvalue(neighbours, dim=1).values


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) Euclidean distances, without the shortcut that loses digits."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _root(square: Tensor) -> Tensor:
    """The symmetric root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(square)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _rows(features: Tensor, at_least: int) -> Tensor:
    if features.dim() != 2 or len(features) < at_least:
        raise UserError(
            f"A metric needs {at_least} rows of features or more, not a tensor of shape "
            f"{tuple(features.shape)}."
        )
    return features.double()
