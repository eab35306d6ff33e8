"""The signature of all samplers, and the adapter for solvers in the coordinates of k-diffusion.

    sampler(denoise, x, schedule, noise, callback, **own) -> x_0, in x = alpha x_0 + sigma eps
    solver(denoise, x, sigmas, noise, callback, **own) -> x_0, in x / alpha = x_0 + sigma eps

`sigma_sampler` makes a sampler of a solver. x is (B, C, H, W).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lineage.diffusion.schedules import SIGMA_MAX, NoiseLevel, SamplingSchedule
from lineage.nn.noise import NoiseStreams


@dataclass
class Estimate:
    """A network's estimate at one noise level.

    Attributes:
        x0: Estimate of x_0, (B, C, H, W), with guidance and threshold applied.
        eps: Estimate of eps where it does not follow from x0, for example since x0 was clipped.
        log_variance: Learned log variance of p(x_(t-1) | x_t).
        variance_fraction: Learned share of log beta, against log beta~, in that log variance.
    """

    x0: Tensor
    eps: Tensor | None = None
    log_variance: Tensor | None = None
    variance_fraction: Tensor | None = None


Denoise = Callable[[Tensor, NoiseLevel], Estimate]
"""x and its noise level -> estimate of x_0."""
DenoiseSigma = Callable[[Tensor, float], Tensor]
"""x_0 + sigma eps and sigma -> estimate of x_0."""
Callback = Callable[[int, Tensor, Tensor], None]
"""Function of the step, x and the estimate of x_0, called at every step."""
Sampler = Callable[..., Tensor]


def no_callback(step: int, x: Tensor, x0: Tensor) -> None:
    """The callback that does nothing."""


def sigma_sampler(solver: Callable[..., Tensor]) -> Sampler:
    """Make a sampler of a solver (denoise, x, sigmas, noise, callback, **own)."""

    @functools.wraps(solver)
    def sampler(
        denoise: Denoise,
        x: Tensor,
        schedule: SamplingSchedule,
        noise: NoiseStreams,
        callback: Callback = no_callback,
        **own: Any,
    ) -> Tensor:
        levels = schedule.levels
        if levels[0].alpha == 0:  # an infinite sigma; one far above the next sigma will do
            sigma_max = max(SIGMA_MAX, 2 * levels[1].karras_sigma)
            levels = (NoiseLevel(1 / sigma_max, levels[0].sigma, levels[0].timestep), *levels[1:])
        by_sigma = {level.karras_sigma: level for level in levels}

        def denoise_sigma(scaled: Tensor, sigma: float) -> Tensor:
            level = by_sigma[sigma] if sigma in by_sigma else schedule.at(sigma)
            return denoise(scaled * level.alpha, level).x0

        def scaled_callback(step: int, scaled: Tensor, x0: Tensor) -> None:
            callback(step, scaled * levels[step].alpha, x0)

        sigmas = [level.karras_sigma for level in levels]
        scaled = solver(denoise_sigma, x / levels[0].alpha, sigmas, noise, scaled_callback, **own)
        return scaled * levels[-1].alpha

    return sampler
