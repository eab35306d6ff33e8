"""The variational lower bound, and variances that are learned with it (Nichol and Dhariwal 2021,
arXiv:2102.09672, sections 2.1 and 3.1).

    L_(t-1) = KL(q(x_(t-1) | x_t, x_0) | p(x_(t-1) | x_t))    for t > 0     (equation 6)
    L_0 = -log p(x_0 | x_1), of a picture of bytes            for t = 0     (equation 5)
    log variance = v log beta + (1 - v) log beta~             `learned_range` (equation 15)
    L_hybrid = L_simple + lambda L_vlb, lambda = 0.001        `vlb_loss`    (equation 16)

In L_hybrid the mean is detached, so that L_vlb trains the variances alone.

Axes: B pictures, C H W; t (B,). The network's output is (B, 2 C, H, W): the prediction, then
2 v - 1 (`learned_range`) or the log variance (`learned`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.diffusion.process import Process, gather

VLB_WEIGHT = 0.001  # lambda


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) | N(mean2, variance2)) in nats, elementwise."""
    ratio = (log_variance1 - log_variance2).exp()
    distance = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + (ratio + distance))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Cumulative distribution function of N(0, 1), approximated by tanh."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log p(x) in nats, elementwise, of bytes scaled to [-1, 1] (Ho et al. 2020, equation 13): the
    normal distribution, integrated over the width of a byte; the ends get its tails.
    """
    centred, inv_std = x - mean, (-log_std).exp()
    cdf_min = approx_standard_normal_cdf(inv_std * (centred - 1 / 255))
    cdf_plus = approx_standard_normal_cdf(inv_std * (centred + 1 / 255))
    probs = torch.where(
        x < -0.999, cdf_plus, torch.where(x > 0.999, 1 - cdf_min, cdf_plus - cdf_min)
    )
    return probs.clamp(min=1e-12).log()


@dataclass
class MeanVariance:
    """p(x_(t-1) | x_t): mean and log variance, and the estimate of x_0, (B, C, H, W) each."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


def p_mean_variance(
    process: Process, output: Tensor, x: Tensor, t: Tensor, clip: bool = False
) -> MeanVariance:
    """p(x_(t-1) | x_t) from the network's output at x_t.

    Args:
        clip: If true, x_0 is clipped to [-1, 1].
    """
    posterior, variance = process.posterior, process.config.variance
    prediction, learned = output.chunk(2, 1) if process.config.learns_variance else (output, output)
    x0 = process.to_x0(prediction, x, t)
    x0 = x0.clamp(-1, 1) if clip else x0
    if variance == "learned_range":
        v = (learned + 1) / 2
        min_log, max_log = gather(posterior.log_variance, t), gather(posterior.log_betas, t)
        log_variance = v * max_log + (1 - v) * min_log
    elif variance == "learned":
        log_variance = learned
    else:
        table = posterior.log_large if variance == "fixed_large" else posterior.log_variance
        log_variance = gather(table, t)
    return MeanVariance(posterior.mean(x0, x, t), log_variance.expand_as(x0), x0)


def vlb_terms(process: Process, p: MeanVariance, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """L_(t-1) of each row, or L_0 at t = 0, in bits per dimension, (B,)."""
    mean = process.posterior.mean(x0, x, t)
    kl = normal_kl(mean, gather(process.posterior.log_variance, t), p.mean, p.log_variance)
    nll = -discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    return bits_per_dim(torch.where((t == 0)[:, None, None, None], nll, kl))


def bits_per_dim(nats: Tensor) -> Tensor:
    """Mean of each row in bits, (B, ...) -> (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def vlb_loss(process: Process, output: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """lambda L_vlb, estimated as lambda T L_(t-1) at uniform t, (B,)."""
    prediction, learned = output.float().chunk(2, dim=1)
    output = torch.cat([prediction.detach(), learned], dim=1)
    p = p_mean_variance(process, output, x, t)
    return VLB_WEIGHT * process.num_timesteps * vlb_terms(process, p, x0, x, t)
