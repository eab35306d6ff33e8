"""Solvers of Karras et al. 2022 (arXiv:2206.00364) in x_0 + sigma eps, under k-diffusion's names.

Of the ordinary equation dx / dsigma = d = (x - x_0) / sigma:
    euler               order 1; with churn, and `heun` too, algorithm 2 of that paper
    heun                order 2: the mean of d at both ends of a step
    dpm_2               order 2: d in the middle of a step
    lms                 order 4: a polynomial through the last four d
Of the stochastic equation with the same marginals:
    euler_ancestral, dpm_2_ancestral    a step down to sigma_down, then noise up to sigma_next

`euler` is `ddim` without noise, and `euler_ancestral` is `ddpm`, divided by alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from lineage.diffusion.samplers.base import Callback, DenoiseSigma, sigma_sampler
from lineage.nn.noise import NoiseStreams


def to_d(x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    """dx / dsigma, which is the estimate of eps."""
    return (x - x0) / sigma


def ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """sigma_down to step to, and sigma_up of the noise that leads from there to `sigma_next`."""
    variance_up = sigma_next**2 * (sigma**2 - sigma_next**2)
    sigma_up = min(sigma_next, eta * math.sqrt(variance_up) / sigma)
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def add_churn(
    x: Tensor,
    sigma: float,
    noise: NoiseStreams,
    gamma: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Tensor, float]:
    """x and sigma, raised to sigma (1 + gamma) if s_tmin <= sigma <= s_tmax (algorithm 2)."""
    if gamma == 0:
        return x, sigma
    eps = noise.randn(*x.shape[1:])
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    return x + s_noise * math.sqrt(sigma_hat**2 - sigma**2) * eps, sigma_hat


def churn_gamma(s_churn: float, sigmas: Sequence[float]) -> float:
    """Relative increase of sigma in each step, for `s_churn` over the whole schedule."""
    return min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)


@sigma_sampler
def euler(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """x_0 + sigma_next d."""
    gamma = churn_gamma(s_churn, sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma = add_churn(x, sigma, noise, gamma, s_tmin, s_tmax, s_noise)
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        x = x0 + sigma_next * to_d(x, sigma, x0)
    return x


@sigma_sampler
def heun(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """The mean of d at both ends: two evaluations a step, one in the last."""
    gamma = churn_gamma(s_churn, sigmas)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma = add_churn(x, sigma, noise, gamma, s_tmin, s_tmax, s_noise)
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        d = to_d(x, sigma, x0)
        x = x0 + sigma_next * d
        if sigma_next > 0:
            d_next = to_d(x, sigma_next, denoise(x, sigma_next))
            x = x + 0.5 * (sigma_next - sigma) * (d_next - d)
    return x


def midpoint_step(
    denoise: DenoiseSigma, x: Tensor, x0: Tensor, sigma: float, sigma_next: float
) -> Tensor:
    """From sigma to sigma_next along the d of their geometric mean."""
    if sigma_next == 0:
        return x0
    sigma_mid = math.sqrt(sigma * sigma_next)
    x_mid = x + (sigma_mid - sigma) * to_d(x, sigma, x0)
    return x + (sigma_next - sigma) * to_d(x_mid, sigma_mid, denoise(x_mid, sigma_mid))


@sigma_sampler
def dpm_2(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
) -> Tensor:
    """d in the middle of a step: two evaluations a step, one in the last."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        x = midpoint_step(denoise, x, x0, sigma, sigma_next)
    return x


@sigma_sampler
def lms(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    order: int = 4,
) -> Tensor:
    """Linear multistep (Adams and Bashforth): the integral over the step of the polynomial through
    the last `order` values of d.
    """
    ds: list[Tensor] = []
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        ds = [to_d(x, sigma, x0), *ds][:order]
        nodes = [sigmas[step - k] for k in range(len(ds))]
        for k, d in enumerate(ds):
            others = nodes[:k] + nodes[k + 1 :]
            scale = math.prod(nodes[k] - node for node in others)  # of Lagrange's polynomial
            integral = np.polyint(np.atleast_1d(np.poly(others)))
            area = (np.polyval(integral, sigma_next) - np.polyval(integral, sigma)) / scale
            x = x + float(area) * d
    return x


@sigma_sampler
def euler_ancestral(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """`euler` down to sigma_down, then noise."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = x0 + sigma_down * to_d(x, sigma, x0)
        if sigma_next > 0:
            x = x + sigma_up * noise.randn(*x.shape[1:])
    return x


@sigma_sampler
def dpm_2_ancestral(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
) -> Tensor:
    """`dpm_2` down to sigma_down, then noise."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next)
        x = midpoint_step(denoise, x, x0, sigma, sigma_down)
        if sigma_next > 0:
            x = x + sigma_up * noise.randn(*x.shape[1:])
    return x
