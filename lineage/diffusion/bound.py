"""The variational bound, and the variances that are learnt by it (Nichol and Dhariwal 2021,
arXiv:2102.09672, sections 2.1 and 3.1).

    L_t = KL(q(x_(t-1) | x_t, x_0) | p(x_(t-1) | x_t))   for t > 0          (equation 6)
    L_0 = -log p(x_0 | x_1), of a picture of bytes       for t = 0          (equation 5)
    log variance = v log beta + (1 - v) log beta~, v from the network       (equation 15), or, where
                   the variance is plainly `learned`, what the network says
    L_hybrid = L_simple + 0.001 L_vlb                                       (equation 16)

In L_hybrid the mean is held fixed, so that the bound moves the variances alone.

Axes: B pictures, C H W; t (B,). The network's output is (B, 2 C, H, W): the prediction, then
2 v - 1 or the log variance.
Terms are in bits per dimension, (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.diffusion.process import Process, row
from lineage.nn.noise import NoiseStreams

HYBRID = 0.001  # weight of the bound, a sum over all t, beside L_simple


def normal_kl(mean: Tensor, log_variance: Tensor, other: Tensor, other_log: Tensor) -> Tensor:
    """KL of two normal distributions in nats, elementwise."""
    spread = (log_variance - other_log).exp() + (mean - other).square() * (-other_log).exp()
    return 0.5 * (other_log - log_variance - 1 + spread)


def approximate_cdf(x: Tensor) -> Tensor:
    """Of the standard normal distribution, by tanh."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def log_likelihood_of_bytes(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log p of pixels that are bytes, scaled to [-1, 1], in nats, elementwise.

    A normal distribution, gathered over the width of a byte; what is beyond the darkest and the
    brightest belongs to these.
    """
    centred, narrow = x - mean, (-log_deviation).exp()
    below = approximate_cdf(narrow * (centred - 1 / 255))
    above = approximate_cdf(narrow * (centred + 1 / 255))
    share = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return share.clamp(min=1e-12).log()


@dataclass
class Backward:
    """p(x_(t-1) | x_t): mean and log variance, and the x_0 that they come from, (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


def backward(
    process: Process, output: Tensor, noised: Tensor, t: Tensor, clip: bool = False
) -> Backward:
    """What the network's output says of the step before; `clip` keeps x_0 within [-1, 1]."""
    posterior = process.posterior
    kind = process.config.variance
    predicted, learned = output.chunk(2, dim=1) if process.config.learned else (output, output)
    x0 = process.to_x0(predicted, noised, t)
    x0 = x0.clamp(-1, 1) if clip else x0
    if kind == "learned_range":
        share, low, high = (learned + 1) / 2, posterior.log_variance, posterior.log_betas
        log_variance = share * row(high, t) + (1 - share) * row(low, t)
    elif kind == "learned":
        log_variance = learned
    else:
        table = posterior.log_large if kind == "fixed_large" else posterior.log_variance
        log_variance = row(table, t)
    return Backward(posterior.mean(x0, noised, t), log_variance.expand_as(x0), x0)


def bound_terms(process: Process, found: Backward, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """L_t of each row."""
    posterior = process.posterior
    true = posterior.mean(x0, noised, t)
    kl = normal_kl(true, row(posterior.log_variance, t), found.mean, found.log_variance)
    last = -log_likelihood_of_bytes(x0, found.mean, 0.5 * found.log_variance)
    return bits(torch.where((t == 0)[:, None, None, None], last, kl))


def bits(nats: Tensor) -> Tensor:
    """(B, ...) -> (B,) a mean in bits."""
    return nats.flatten(1).mean(1) / math.log(2)


def hybrid_term(process: Process, output: Tensor, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """What L_hybrid adds to L_simple, (B,): for a t drawn evenly, T L_t is the whole bound."""
    predicted, learned = output.float().chunk(2, dim=1)
    fixed = torch.cat([predicted.detach(), learned], dim=1)
    found = backward(process, fixed, noised, t)
    return HYBRID * process.steps * bound_terms(process, found, x0, noised, t)


def prior_bits(process: Process, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) | N(0, 1)), which no network can change."""
    a, b = process.point(process.steps - 1).signal, process.point(process.steps - 1).noise
    zero = torch.zeros_like(x0)
    return bits(normal_kl(a * x0, zero + 2 * math.log(b), zero, zero))


@dataclass
class Bound:
    """The bound of pictures, in bits per dimension.

    Attributes:
        total: (B,).
        terms: (B, T) L_t, from t = T - 1 down.
        prior: (B,) L_T.
        x0_errors, noise_errors: (B, T) mean squares.
    """

    total: Tensor
    terms: Tensor
    prior: Tensor
    x0_errors: Tensor
    noise_errors: Tensor


@torch.no_grad()
def bits_per_dim(
    process: Process,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    draws: NoiseStreams,
    clip: bool = True,
) -> Bound:
    """The whole bound of pictures (B, C, H, W) of bytes in [-1, 1]: T evaluations of the network.

    Args:
        network: x_t and its time (B,) to output.
    """
    terms, x0_errors, noise_errors = [], [], []
    for t in reversed(range(process.steps)):
        at = torch.full((len(x0),), t, device=x0.device)
        noise = draws.randn(*x0.shape[1:])
        noised = process.noised(x0, noise, at)
        time = torch.full((len(x0),), process.times[t], device=x0.device)
        found = backward(process, network(noised, time), noised, at, clip)
        terms.append(bound_terms(process, found, x0, noised, at))
        x0_errors.append((found.x0 - x0).square().flatten(1).mean(1))
        said = process.to_noise(found.x0, noised, at)
        noise_errors.append((said - noise).square().flatten(1).mean(1))
    stacked = torch.stack(terms, 1)
    prior = prior_bits(process, x0)
    errors = torch.stack(x0_errors, 1), torch.stack(noise_errors, 1)
    return Bound(stacked.sum(1) + prior, stacked, prior, *errors)
