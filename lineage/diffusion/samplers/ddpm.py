"""Samplers in the coordinates of the process, x_t = alpha_t x_0 + sigma_t eps.

ddpm: ancestral sampling (Ho et al. 2020, algorithm 2), for any stride from level t to level s.
    beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2         beta of the stride
    beta~ = beta sigma_s^2 / sigma_t^2                         variance of q(x_s | x_t, x_0)
    x_s = (alpha_s beta x_0 + alpha_t / alpha_s sigma_s^2 x_t) / sigma_t^2 + sqrt(variance) z

ddim: the implicit sampler (Song et al. 2021, arXiv:2010.02502, equation 12).
    x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z,   v = eta^2 beta~
"""

from __future__ import annotations

import math

from torch import Tensor

from lineage.diffusion.samplers.base import Callback, Denoise, no_callback
from lineage.diffusion.schedules import NoiseLevel, SamplingSchedule
from lineage.nn.noise import NoiseStreams


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: SamplingSchedule,
    noise: NoiseStreams,
    callback: Callback = no_callback,
    variance: str = "fixed_small",
) -> Tensor:
    """Draw x_s from q(x_s | x_t, x_0) at the estimate of x_0 (equations 6 and 7).

    Args:
        variance: Variance of a step: `fixed_small` is beta~, `fixed_large` is beta; a learned
            variance of the estimate takes precedence.
    """
    for step, (level, next_level) in enumerate(schedule.steps()):
        estimate = denoise(x, level)
        callback(step, x, estimate.x0)
        ratio = level.alpha / next_level.alpha if next_level.alpha else 0.0
        beta = level.sigma**2 - (ratio * next_level.sigma) ** 2
        shrink = (next_level.sigma / level.sigma) ** 2
        x = ratio * shrink * x + next_level.alpha * beta / level.sigma**2 * estimate.x0
        if next_level.sigma == 0:
            continue
        z = noise.randn(*x.shape[1:])
        if estimate.variance_fraction is not None:
            fraction = estimate.variance_fraction
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(beta * shrink)
            x = x + (0.5 * log_variance).exp() * z
        elif estimate.log_variance is not None:
            x = x + (0.5 * estimate.log_variance).exp() * z
        else:
            x = x + math.sqrt(beta if variance == "fixed_large" else beta * shrink) * z
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: SamplingSchedule,
    noise: NoiseStreams,
    callback: Callback = no_callback,
    eta: float = 0.0,
) -> Tensor:
    """Equation 12. On a schedule that rises to noise it finds the noise of a picture.

    Args:
        eta: Share of new noise: 0 adds none, 1 is `ddpm`.
    """
    for step, (level, next_level) in enumerate(schedule.steps()):
        estimate = denoise(x, level)
        callback(step, x, estimate.x0)
        eps = estimate.eps
        if eps is None:
            eps = (x - level.alpha * estimate.x0) / level.sigma
        variance = eta**2 * posterior_variance(level, next_level)
        direction = math.sqrt(max(0.0, next_level.sigma**2 - variance)) * eps
        x = next_level.alpha * estimate.x0 + direction
        if variance > 0:
            x = x + math.sqrt(variance) * noise.randn(*x.shape[1:])
    return x


def posterior_variance(level: NoiseLevel, next_level: NoiseLevel) -> float:
    """beta~ of a step; 0 for a step to the picture or towards noise."""
    if next_level.sigma == 0 or next_level.alpha <= level.alpha:
        return 0.0
    ratio = level.alpha * next_level.sigma / (next_level.alpha * level.sigma)
    return next_level.sigma**2 * (1 - ratio**2)
