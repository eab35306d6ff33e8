"""Vector quantisation: each vector is replaced by the nearest of K code vectors (van den Oord,
Vinyals and Kavukcuoglu 2017, arXiv:1711.00937).

The problem: a transformer models tokens, and a picture has none. What is new: the vectors of an
encoder are replaced by the nearest entries of a codebook, whose indices are the tokens. The choice
has no gradient, so the decoder's gradient is copied to the encoder.

    equations 1, 2    k = argmin_j |z_e - e_j|^2,  z_q = e_k          `VectorQuantiser.nearest`
    straight-through  z_e + sg[z_q - z_e]                             `VectorQuantiser.forward`
    equation 3        |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2          `quantiser_terms`
                      (moves the codebook; the commitment of the encoder)
    appendix A.1      N_i <- gamma N_i + (1 - gamma) n_i,             `VectorQuantiser.ema_update`
                      m_i <- gamma m_i + (1 - gamma) sum_j z_ij,  e_i = m_i / N_i
                      (moves the codebook in place of the first term)

A code that is nearest to no vector is never moved again; with most codes in this state the codebook
has collapsed. Three remedies: initialise the codebook from the data (k-means), move codes out of
use to vectors of the batch (`restart_threshold`), compare vectors by their direction (`cosine`).

Departures: Laplace smoothing of N_i, as in all public codes. `misplaced_beta` reproduces VQGAN's
public code, which has beta on the codebook's term by mistake.

Axes: N vectors in any arrangement, D width, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Dim, Fraction, NonNegativeFloat, PositiveInt
from lineage.config import configuration

EPSILON = 1e-5
"""Constant of the Laplace smoothing of cluster sizes."""
KMEANS_STEPS = 10
UNUSED = 0.03
"""Share of 1 / K below which a code counts as out of use."""
COLLAPSED = 0.5
"""Share of codes in use below which a codebook has collapsed."""


@configuration
class QuantiserConfig:
    """A codebook.

    Attributes:
        num_codes: K, number of codes.
        code_dim: D, width of a code.
        beta: Weight of the commitment loss.
        update: How the codebook is moved: by moving averages (`ema`) or by its `loss`.
        ema_decay: Decay gamma of the moving averages.
        init: How the codebook starts: from the `kmeans` clusters of the first batch, or `normal`.
        restart_threshold: Share of 1 / K: a code that is used less often is moved to a vector of
            the batch that is far from its code; 0 moves none.
        cosine: If true, vectors and codes are divided by their length before they are compared.
        misplaced_beta: If true, beta is the weight of the codebook loss (see the header).
    """

    num_codes: PositiveInt = 256
    code_dim: Dim = 16
    beta: NonNegativeFloat = 0.25
    update: Literal["ema", "loss"] = "ema"
    ema_decay: Fraction = 0.99
    init: Literal["kmeans", "normal"] = "kmeans"
    restart_threshold: NonNegativeFloat = UNUSED
    cosine: bool = False
    misplaced_beta: bool = False


@dataclass
class Quantised:
    """Vectors and their codes.

    Attributes:
        z_q: (..., D) code vectors; the gradient with respect to them reaches the vectors as it is.
        ids: (...) int64, indices of the codes.
        terms: Loss terms: `commitment`, and `codebook` if it is moved by its loss.
    """

    z_q: Tensor
    ids: Tensor
    terms: dict[str, Tensor]


def quantiser_terms(
    z_e: Tensor, z_q: Tensor, beta: float, misplaced_beta: bool = False
) -> dict[str, Tensor]:
    """Second and third term of equation 3, means over vectors and entries.

    Args:
        z_e: Vectors of the encoder (..., D).
        z_q: Their codes (..., D).
        beta: Weight of the commitment loss.
        misplaced_beta: If true, weight of the codebook loss instead.
    """
    codebook, commitment = F.mse_loss(z_q, z_e.detach()), F.mse_loss(z_e, z_q.detach())
    if misplaced_beta:
        return {"codebook": beta * codebook, "commitment": commitment}
    return {"codebook": codebook, "commitment": beta * commitment}


class VectorQuantiser(nn.Module):
    """A codebook and the choice of the nearest code.

    Attributes:
        embedding: (K, D) the codes as they are trained.
        cluster_size: (K,) moving average of the number of vectors per code and step, N_i.
        cluster_sum: (K, D) moving average of their sum, m_i.
        initialised: Whether the codebook has its initial values.
    """

    embedding: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    initialised: Tensor

    def __init__(self, config: QuantiserConfig) -> None:
        super().__init__()
        self.config = config
        embedding = torch.randn(config.num_codes, config.code_dim) / config.code_dim**0.5
        embedding = F.normalize(embedding, dim=1) if config.cosine else embedding
        if config.update == "loss":
            self.embedding = nn.Parameter(embedding)
        else:
            self.register_buffer("embedding", embedding)
        self.register_buffer("cluster_size", torch.zeros(config.num_codes))
        self.register_buffer("cluster_sum", torch.zeros_like(embedding))
        self.register_buffer("initialised", torch.tensor(config.init == "normal"))

    def extra_repr(self) -> str:
        return f"num_codes={self.config.num_codes}, code_dim={self.config.code_dim}"

    @property
    def codebook(self) -> Tensor:
        """(K, D) the codes as they are compared and returned.

        Under `cosine` they are divided by their length, which an optimiser or an average of weights
        changes.
        """
        return F.normalize(self.embedding, dim=1) if self.config.cosine else self.embedding

    def nearest(self, z_e: Tensor) -> Tensor:
        """(..., D) -> (...) int64, index of the nearest code, in full precision."""
        with torch.autocast(z_e.device.type, enabled=False):
            flat, codebook = z_e.float().reshape(-1, z_e.shape[-1]), self.codebook
            flat = F.normalize(flat, dim=1) if self.config.cosine else flat
            distances = flat.square().sum(1, keepdim=True) - 2 * flat @ codebook.T
            return (distances + codebook.square().sum(1)).argmin(1).view(z_e.shape[:-1])

    def lookup(self, ids: Tensor) -> Tensor:
        """Indices (...) -> codes (..., D)."""
        return F.embedding(ids, self.codebook)

    def forward(self, z_e: Tensor) -> Quantised:
        """Vectors (..., D) -> codes, with a straight-through gradient.

        In training the statistics are updated too; the codes returned are those from before.
        """
        config = self.config
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.float()
            if config.cosine:
                z_e = F.normalize(z_e, dim=-1)
            if self.training and not bool(self.initialised):
                self.kmeans_init(z_e.detach())
            ids = self.nearest(z_e.detach())
            z_q = self.lookup(ids)
            terms = quantiser_terms(z_e, z_q, config.beta, config.misplaced_beta)
            if config.update == "ema":
                del terms["codebook"]
            if self.training:
                self.ema_update(z_e.detach(), ids)
            return Quantised(z_e + (z_q - z_e).detach(), ids, terms)

    # --- updates of the codebook ------------------------------------------------------------------

    @torch.no_grad()
    def kmeans_init(self, z_e: Tensor) -> None:
        """Replace the codes by the k-means clusters of a batch (..., D).

        k-means++ (Arthur and Vassilvitskii 2007) chooses the first centres far from each other:
        most vectors of most pictures are background, which needs one code only. If there are fewer
        vectors than codes, the remaining codes keep their values.
        """
        flat = z_e.reshape(-1, z_e.shape[-1])
        count = min(len(flat), self.config.num_codes)
        centres = flat[torch.randint(len(flat), (1,), device=flat.device)]
        distances = (flat - centres).square().sum(1)
        while len(centres) < count:
            centres = torch.cat([centres, flat[_sample_by_distance(distances, 1)]])
            distances = torch.minimum(distances, (flat - centres[-1]).square().sum(1))
        for _ in range(KMEANS_STEPS):
            nearest = torch.cdist(flat, centres).argmin(1)
            sizes = torch.bincount(nearest, minlength=count)
            sums = torch.zeros_like(centres).index_add_(0, nearest, flat)
            means = sums / sizes.clamp(min=1)[:, None]
            centres = torch.where(sizes[:, None] > 0, means, centres)
        centres = _broadcast(centres)
        self.embedding[:count] = F.normalize(centres, dim=1) if self.config.cosine else centres
        self.initialised.fill_(True)

    @torch.no_grad()
    def ema_update(self, z_e: Tensor, ids: Tensor) -> None:
        """Appendix A.1: update cluster sizes and sums, and, under `ema`, the codes; then restart
        codes out of use.
        """
        config, embedding = self.config, self.embedding
        flat, nearest = z_e.reshape(-1, z_e.shape[-1]), ids.flatten()
        sizes = torch.bincount(nearest, minlength=config.num_codes).to(flat.dtype)
        sums = torch.zeros_like(embedding).index_add_(0, nearest, flat)
        if _is_distributed():
            for statistic in (sizes, sums):
                torch.distributed.all_reduce(statistic)
        is_first = not bool(self.cluster_size.any())
        if is_first:  # as if all codes had been used equally often so far
            self.cluster_size.fill_(sizes.sum() / config.num_codes)
            self.cluster_sum.copy_(embedding * self.cluster_size[:, None])
        self.cluster_size.lerp_(sizes, 1 - config.ema_decay)
        self.cluster_sum.lerp_(sums, 1 - config.ema_decay)
        if config.update == "ema":
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + EPSILON) / (total + config.num_codes * EPSILON) * total
            means = self.cluster_sum / smoothed[:, None]
            embedding.copy_(F.normalize(means, dim=1) if config.cosine else means)
        if config.restart_threshold > 0 and not is_first:
            self._restart_unused(flat, nearest)

    def _restart_unused(self, flat: Tensor, nearest: Tensor) -> None:
        """Move codes out of use to vectors (N, D) that are far from their nearest codes (N,)."""
        shares = self.cluster_size / self.cluster_size.sum().clamp(min=1e-12)
        unused = shares < self.config.restart_threshold / self.config.num_codes
        if not bool(unused.any()):
            return
        distances = (flat - self.codebook[nearest]).square().sum(1)
        vectors = _broadcast(flat[_sample_by_distance(distances, int(unused.sum()))])
        mean_size = self.cluster_size.sum() / self.config.num_codes
        self.embedding[unused] = vectors.to(self.embedding.dtype)
        self.cluster_size[unused], self.cluster_sum[unused] = mean_size, vectors * mean_size


def _sample_by_distance(distances: Tensor, count: int) -> Tensor:
    """(count,) indices, drawn with probabilities proportional to squared distances (N,)."""
    return torch.multinomial(distances + 1e-12, count, replacement=True)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor: processes that train together share one codebook."""
    if _is_distributed():
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor


# --- usage of a codebook --------------------------------------------------------------------------


@torch.no_grad()
def codebook_usage(cluster_size: Tensor) -> dict[str, Tensor]:
    """Metrics of a codebook, from how often each code is used (K,).

    Returns:
        `codebook_usage`: share of codes in use, that is with at least `UNUSED` / K of all vectors;
        `unused_codes`: number of the others; `perplexity`: number of equally frequent codes that
        have the same entropy.
    """
    shares = cluster_size / cluster_size.sum().clamp(min=1e-12)
    in_use = shares > UNUSED / len(cluster_size)
    return {
        "codebook_usage": in_use.float().mean(),
        "unused_codes": (~in_use).float().sum(),
        "perplexity": torch.special.entr(shares).sum().exp(),
    }


def diagnose_usage(means: Mapping[str, float]) -> str:
    """A few words on a collapsed codebook, from the mean of `codebook_usage`; empty if all is
    well.
    """
    usage = means.get("codebook_usage", 1.0)
    if usage < COLLAPSED:
        return f"codebook collapse: only {usage:.0%} of the codes are in use"
    return ""
