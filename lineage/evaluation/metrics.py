"""Metrics of generated pictures, computed from features that some network has extracted.

    quality        `frechet_distance` (FID), `kernel_distance` (KID), `inception_score`
    fidelity and   `precision_recall` (improved precision and recall), `density_coverage`
    diversity
    text fit       `clip_score`, `r_precision`
    copying        `nearest_distance`, `data_copying`; and `spread` among samples of one caption

A metric that is a mean over pictures returns its value for each picture, so that an interval can be
taken of them. Everything is computed in float64. A number means something only with its protocol:
which network took the features, of how many real and how many generated pictures.

Axes: N real, M generated pictures, D features, K candidates, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.errors import UserError


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,), unbiased covariance (D, D)."""
    rows = _checked(features, min_rows=2)
    return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al. 2017, equation 6) between features (N, D) and (M, D).

    |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of S_r^(1/2) S_f S_r^(1/2). This matrix is symmetric, so singular
    covariances do no harm.
    """
    (mu_r, sigma_r), (mu_f, sigma_f) = map(mean_and_covariance, (real, fake))
    root = _matrix_sqrt(sigma_r)
    eigenvalues = torch.linalg.eigvalsh(root @ sigma_f @ root)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    return float(
        (mu_r - mu_f).square().sum() + sigma_r.trace() + sigma_f.trace() - 2 * trace_of_root
    )


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID (Binkowski et al. 2018, section 4): the unbiased squared MMD, kernel (x.y / D + 1)^3."""
    once = [torch.ones(1, len(rows), dtype=torch.float64) for rows in (real, fake)]
    return float(kernel_distances(real, fake, *once))


def kernel_distances(
    real: Tensor, fake: Tensor, real_counts: Tensor, fake_counts: Tensor
) -> Tensor:
    """KID of T resampled pairs of sets; each kernel is computed only once.

    Args:
        real_counts: (T, N) number of times that a set holds each real picture; rows have one sum.
        fake_counts: (T, M) the same for generated pictures.

    Returns:
        (T,) float64.
    """
    x, y = _checked(real, min_rows=2), _checked(fake, min_rows=2)
    w, v = real_counts.double(), fake_counts.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(square: Tensor, counts: Tensor) -> Tensor:
        """The mean over all pairs of a set, without a row's pair with itself."""
        count = counts.sum(1)
        total = ((counts @ square) * counts).sum(1) - counts @ square.diagonal()
        return total / (count * (count - 1))

    across = ((w @ kernel(x, y)) * v).sum(1) / (w.sum(1) * v.sum(1))
    return mean_of_pairs(kernel(x, x), w) + mean_of_pairs(kernel(y, y), v) - 2 * across


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision (M,) and recall (N,), 1 or 0 for each picture (Kynkaanniemi et al. 2019,
    equations 1 and 2).

    Precision: whether a generated picture's distance to some real one is at most that one's radius,
    the distance to its `k`-th real neighbour. Recall: the same, exchanged.
    """
    x, y = _checked(real, k + 1), _checked(fake, k + 1)
    distance = _distances(x, y)  # (N, M)
    precision = (distance <= _radii(x, k)[:, None]).any(0)
    recall = (distance <= _radii(y, k)[None, :]).any(1)
    return precision.double(), recall.double()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density (M,) and coverage (N,) (Naeem et al. 2020, equations 3 and 4), in the same balls, but
    without their boundary, as in the authors' code.

    Density: number of real pictures' balls that a generated one lies in, divided by `k`.
    Coverage: whether a generated picture lies in the ball of a real one, 1 or 0.
    """
    x, y = _checked(real, k + 1), _checked(fake, min_rows=1)
    inside = _distances(x, y) < _radii(x, k)[:, None]  # (N, M)
    return inside.double().sum(0) / k, inside.any(1).double()


def spread(groups: Tensor) -> Tensor:
    """Mean distance between two samples of one caption: (G, K, D) -> (G,)."""
    count, groups = groups.shape[1], _finite(groups)
    distance = torch.cdist(groups, groups)
    return distance.sum((1, 2)) / (count * (count - 1))


def nearest_distance(rows: Tensor, others: Tensor) -> Tensor:
    """Distance of each row to the nearest of `others`: (M, D), (N, D) -> (M,)."""
    rows, others = _finite(rows), _finite(others)
    parts = [_distances(part, others).amin(1) for part in rows.split(256)]
    return torch.cat(parts)


def data_copying(fake: Tensor, real: Tensor) -> Tensor:
    """Share of real distances that each generated distance lies below: (M,) and (N,) -> (M,).

    Ties count half; the mean is the Mann-Whitney statistic. Of distances to the nearest training
    picture it is the test for copying of Meehan et al. (2020, section 3): 0.5 where generated
    pictures lie as near as unseen real ones, towards 1 where they are copies.
    """
    difference = _finite(fake)[:, None] - _finite(real)[None, :]
    return ((difference < 0).double() + (difference == 0).double() / 2).mean(1)


def inception_score(probabilities: Tensor, splits: int = 10) -> Tensor:
    """Inception score exp(mean KL(p(y | x) || p(y))) of consecutive parts (Salimans et al. 2016).

    Args:
        probabilities: (M, C) of classes; each row sums to 1.
        splits: Number of parts; papers state the mean of their scores and its deviation.

    Returns:
        (splits,) float64.
    """
    rows = _checked(probabilities, min_rows=splits)

    def score(part: Tensor) -> Tensor:
        marginal = part.mean(0, keepdim=True)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        return divergence.sum(1).mean().exp()

    return torch.stack([score(part) for part in torch.tensor_split(rows, splits)])


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """CLIPScore max(100 cosine, 0) of each pair, as torchmetrics scales it (Hessel et al. 2021).

    Features (M, D) of pictures and of their captions -> (M,) float64.
    """
    return (100 * cosine(image, text)).clamp(min=0)


def r_precision(image: Tensor, candidates: Tensor) -> Tensor:
    """R-precision (Xu et al. 2018, section 4): 1 where the true caption is the nearest.

    Where k captions are equally near and the true one is among them, it is 1 / k.

    Args:
        image: (M, D) embeddings of pictures.
        candidates: (M, K, D) embeddings of captions; number 0 is the true one.

    Returns:
        (M,) float64.
    """
    similarity = cosine(image[:, None], candidates)  # (M, K)
    nearest = similarity == similarity.amax(1, keepdim=True)
    return nearest[:, 0].double() / nearest.sum(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along the last axis, in float64."""
    return F.cosine_similarity(_finite(a), _finite(b), dim=-1)


def _radii(rows: Tensor, k: int) -> Tensor:
    """Distance of each row to its `k`-th nearest other row: (N, D) -> (N,)."""
    distance = _distances(rows, rows)
    distance.fill_diagonal_(torch.inf)
    return distance.kthvalue(k, dim=1).values


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) Euclidean distances, without the shortcut that loses digits."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _matrix_sqrt(square: Tensor) -> Tensor:
    """The symmetric root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(square)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _checked(features: Tensor, min_rows: int) -> Tensor:
    """`features` in float64; `UserError` if they have fewer than `min_rows` rows."""
    if features.dim() != 2 or len(features) < min_rows:
        raise UserError(
            f"A metric needs {min_rows} rows of features or more, not a tensor of shape "
            f"{tuple(features.shape)}."
        )
    return _finite(features)


def _finite(features: Tensor) -> Tensor:
    """`features` in float64; `UserError` if a number is not finite."""
    wrong = ~features.isfinite()
    if wrong.any():
        raise UserError(
            f"A metric needs finite numbers, but {int(wrong.sum())} of {wrong.numel()} are NaN or "
            f"infinite, the first of them in row {int(wrong.nonzero()[0, 0])}."
        )
    return features.double()
