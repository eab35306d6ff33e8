"""Metrics of generated pictures, from features that some network has taken.

No network is known here.

    quality        `frechet_distance` (FID), `kernel_distance` (KID), `inception_score`
    fidelity and   `precision_recall` (improved precision and recall), `density_coverage`
    diversity
    text fit       `clip_score`, `r_precision`
    copying        `nearest_distance`, `nearer`; and `spread` among samples of one caption

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
    once = [torch.ones(1, len(rows), dtype=torch.float64) for rows in (real, fake)]
    return float(kernel_distances(real, fake, *once))


def kernel_distances(
    real: Tensor, fake: Tensor, real_counts: Tensor, fake_counts: Tensor
) -> Tensor:
    """KID of T resampled pairs of sets, of which each kernel is computed once.

    Args:
        real_counts: (T, N) how often each real picture is in each set; rows have one sum.
        fake_counts: (T, M) likewise.

    Returns:
        (T,) float64.
    """
    x, y = _rows(real, at_least=2), _rows(fake, at_least=2)
    w, v = real_counts.double(), fake_counts.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_self(square: Tensor, counts: Tensor) -> Tensor:
        count = counts.sum(1)
        every = ((counts @ square) * counts).sum(1) - counts @ square.diagonal()
        return every / (count * (count - 1))

    across = ((w @ kernel(x, y)) * v).sum(1) / (w.sum(1) * v.sum(1))
    return without_self(kernel(x, x), w) + without_self(kernel(y, y), v) - 2 * across


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
    precise, recalled = inside_balls(real, fake, neighbours)
    return float(precise.mean()), float(recalled.mean())


def inside_balls(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """What precision and recall are the means of: (M,) and (N,) float64, 1 or 0 a picture."""
    x, y = _rows(real, neighbours + 1), _rows(fake, neighbours + 1)
    apart = _distances(x, y)  # (N, M)
    precise = (apart < _radii(x, neighbours)[:, None]).any(0)
    recalled = (apart < _radii(y, neighbours)[None, :]).any(1)
    return precise.double(), recalled.double()


def density_coverage(real: Tensor, fake: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4), in the same balls.

    Density: in how many balls of real pictures a generated one lies, divided by `neighbours`.
    Coverage: the share of real pictures with a generated one in their ball.
    """
    dense, covered = ball_counts(real, fake, neighbours)
    return float(dense.mean()), float(covered.mean())


def ball_counts(real: Tensor, fake: Tensor, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """What density and coverage are the means of: (M,) and (N,) float64."""
    x, y = _rows(real, neighbours + 1), _rows(fake, at_least=1)
    inside = _distances(x, y) < _radii(x, neighbours)[:, None]  # (N, M)
    return inside.double().sum(0) / neighbours, inside.any(1).double()


def spread(groups: Tensor) -> Tensor:
    """How far apart the samples of one caption lie: (G, K, D) -> (G,) mean distance of pairs."""
    count = groups.shape[1]
    apart = torch.cdist(groups.double(), groups.double())
    return apart.sum((1, 2)) / (count * (count - 1))


def nearest_distance(rows: Tensor, others: Tensor) -> Tensor:
    """(M, D), (N, D) -> (M,) the distance of each row to the nearest of the others."""
    parts = [_distances(part, others.double()).amin(1) for part in rows.double().split(256)]
    return torch.cat(parts)


def nearer(fake: Tensor, real: Tensor) -> Tensor:
    """(M,) and (N,) distances -> (M,) float64, the share of the real ones that each lies below,
    ties counting half.

    The mean is the Mann-Whitney statistic. Of distances to the nearest training picture it is the
    test for copying of Meehan et al. (2020, section 3): 0.5 where generated pictures lie as near as
    real ones that training never saw, towards 1 where they are copies.
    """
    apart = fake.double()[:, None] - real.double()[None, :]
    return ((apart < 0).double() + (apart == 0).double() / 2).mean(1)


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
    return float(clip_scores(image, text).mean())


def clip_scores(image: Tensor, text: Tensor) -> Tensor:
    """What the CLIP score is the mean of: (M,) float64."""
    return (100 * _cosine(image, text)).clamp(min=0)


def r_precision(image: Tensor, candidates: Tensor) -> float:
    """R-precision (Xu et al. 2018, section 4): how often the true caption is the nearest.

    Args:
        image: (M, D) embeddings of pictures.
        candidates: (M, K, D) embeddings of captions; number 0 is the true one.
    """
    return float(found_first(image, candidates).mean())


def found_first(image: Tensor, candidates: Tensor) -> Tensor:
    """What R-precision is the mean of: (M,) float64, 1 where the true caption is the nearest, and
    1 / k where k captions are equally near and the true one is among them.
    """
    near = _cosine(image[:, None], candidates)  # (M, K)
    nearest = near == near.amax(1, keepdim=True)
    return nearest[:, 0].double() / nearest.sum(1)


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
