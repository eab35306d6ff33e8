"""Solvers in x / a = x_0 + sigma eps, where all processes are alike (Karras et al. 2022,
arXiv:2206.00364), under the names of the field (k-diffusion's).

Of dx/dsigma = (x - x_0) / sigma:
    euler, heun        orders 1 and 2; with churn, algorithm 2 of that paper
    dpm_2, lms         order 2 by the middle of a step, order 4 by the steps before
and of the stochastic equation with the same marginals:
    euler_ancestral, dpm_2_ancestral    a step too far, and noise back

`in_sigmas` makes a sampler of each, on any path. What samplers are is said in `samplers.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from lineage.diffusion.schedules import FARTHEST, Path, Point
from lineage.nn.noise import NoiseStreams


@dataclass
class Estimate:
    """What is known of the clean picture.

    Attributes:
        x0: (B, C, H, W).
        noise: eps where it is not to be derived from x0, as where x0 was clipped.
        share: of log beta, against log beta~, in the log variance of a step, where it is learnt.
        log_variance: where it is learnt for itself.
    """

    x0: Tensor
    noise: Tensor | None = None
    share: Tensor | None = None
    log_variance: Tensor | None = None


Denoise = Callable[[Tensor, Point], Estimate]
Callback = Callable[[int, Tensor, Tensor], None]
"""Called at each step with its number, x and the estimate of x_0."""
Sampler = Callable[..., Tensor]


def ignore(step: int, x: Tensor, x0: Tensor) -> None:
    """The callback of who does not want to see."""


Clean = Callable[[Tensor, float], Tensor]
"""x and sigma to the estimate of x_0."""


def in_sigmas(solver: Callable[..., Tensor]) -> Sampler:
    """A solver (clean, x, sigmas, draws, callback, ...) as a sampler on any path."""

    @functools.wraps(solver)
    def sampler(
        denoise: Denoise,
        x: Tensor,
        path: Path,
        draws: NoiseStreams,
        callback: Callback = ignore,
        **knobs: Any,
    ) -> Tensor:
        points = path.points
        if points[0].signal == 0:  # a sigma without end; one that is far beyond the next is as good
            most = max(FARTHEST, 2 * points[1].sigma)
            points = (Point(1 / most, points[0].noise, points[0].time), *points[1:])
        levels = {point.sigma: point for point in points}

        def clean(scaled: Tensor, sigma: float) -> Tensor:
            level = levels[sigma] if sigma in levels else path.at(sigma)
            return denoise(scaled * level.signal, level).x0

        def seen(step: int, scaled: Tensor, x0: Tensor) -> None:
            callback(step, scaled * points[step].signal, x0)

        sigmas = [point.sigma for point in points]
        scaled = solver(clean, x / points[0].signal, sigmas, draws, seen, **knobs)
        return scaled * points[-1].signal

    return sampler


def slope(x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    """dx / dsigma, which is the noise in x."""
    return (x - x0) / sigma


def ancestral(sigma: float, following: float, eta: float = 1.0) -> tuple[float, float]:
    """(how far down to step, how much noise to add there) to arrive at `following`."""
    up = min(following, eta * math.sqrt(following**2 * (sigma**2 - following**2)) / sigma)
    return math.sqrt(following**2 - up**2), up


@dataclass(frozen=True)
class Churn:
    """Noise that is added before a step (Karras et al. 2022, algorithm 2).

    Attributes:
        amount: over the whole path; 0 adds none.
        least, most: sigmas between which it is added.
        deviation: of the noise.
    """

    amount: float = 0.0
    least: float = 0.0
    most: float = math.inf
    deviation: float = 1.0

    def stir(
        self, x: Tensor, sigma: float, steps: int, draws: NoiseStreams
    ) -> tuple[Tensor, float]:
        """x and its sigma with noise added."""
        if self.amount == 0:
            return x, sigma
        noise = draws.randn(*x.shape[1:])
        within = self.least <= sigma <= self.most
        more = min(self.amount / steps, math.sqrt(2) - 1) if within else 0.0
        if more == 0:
            return x, sigma
        higher = sigma * (1 + more)
        return x + self.deviation * math.sqrt(higher**2 - sigma**2) * noise, higher


NO_CHURN = Churn()


@in_sigmas
def euler(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
    callback: Callback,
    churn: Churn = NO_CHURN,
) -> Tensor:
    """A step along the slope: x_0 + sigma' eps."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x, now = churn.stir(x, now, len(sigmas) - 1, draws)
        x0 = clean(x, now)
        callback(step, x, x0)
        x = x0 + then * slope(x, now, x0)
    return x


@in_sigmas
def heun(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
    callback: Callback,
    churn: Churn = NO_CHURN,
) -> Tensor:
    """The mean of the slopes at both ends of a step: two evaluations, but for the last step."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x, now = churn.stir(x, now, len(sigmas) - 1, draws)
        x0 = clean(x, now)
        callback(step, x, x0)
        first = slope(x, now, x0)
        ahead = x0 + then * first
        if then > 0:
            second = slope(ahead, then, clean(ahead, then))
            ahead = ahead + 0.5 * (then - now) * (second - first)
        x = ahead
    return x


@in_sigmas
def dpm_2(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: NoiseStreams, callback: Callback
) -> Tensor:
    """The slope in the middle of a step, by log sigma: two evaluations, but for the last step."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        x = through_middle(clean, x, x0, now, then)
    return x


def through_middle(clean: Clean, x: Tensor, x0: Tensor, now: float, then: float) -> Tensor:
    """From `now` to `then` along the slope that there is halfway."""
    first = slope(x, now, x0)
    if then == 0:
        return x0
    middle = math.sqrt(now * then)
    halfway = x + (middle - now) * first
    return x + (then - now) * slope(halfway, middle, clean(halfway, middle))


@in_sigmas
def lms(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
    callback: Callback,
    order: int = 4,
) -> Tensor:
    """Linear multistep: the slope as a polynomial through the last `order` ones (Adams and
    Bashforth), integrated over the step.
    """
    slopes: list[Tensor] = []
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        slopes = [slope(x, now, x0), *slopes][:order]
        nodes = [sigmas[step - k] for k in range(len(slopes))]
        for number, each in enumerate(slopes):
            others = [node for k, node in enumerate(nodes) if k != number]
            scale = math.prod(nodes[number] - node for node in others)
            integral = np.polyint(np.atleast_1d(np.poly(others)))
            x = x + float((np.polyval(integral, then) - np.polyval(integral, now)) / scale) * each
    return x


@in_sigmas
def euler_ancestral(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """Down along the slope, and noise back up."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        down, up = ancestral(now, then, eta)
        x = x0 + down * slope(x, now, x0)
        if then > 0:
            x = x + up * draws.randn(*x.shape[1:])
    return x


@in_sigmas
def dpm_2_ancestral(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: NoiseStreams, callback: Callback
) -> Tensor:
    """`dpm_2` down, and noise back up."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        down, up = ancestral(now, then)
        x = through_middle(clean, x, x0, now, down)
        if then > 0:
            x = x + up * draws.randn(*x.shape[1:])
    return x
