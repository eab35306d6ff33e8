"""Samplers: pure functions (denoise, x, path, draws, callback) -> x. They know no network.

In the process's own coordinates x = a x_0 + b eps:
    ddpm               ancestral sampling (Ho et al. 2020, algorithm 2), any stride and variance
    ddim               the implicit sampler (Song et al. 2021, arXiv:2010.02502, equation 12)
    flow_euler         Euler's method on the straight line (Liu et al. 2022, arXiv:2209.03003)

In x / a = x_0 + sigma eps, where all processes are alike (Karras et al. 2022, arXiv:2206.00364),
the solvers of dx/dsigma = (x - x_0) / sigma, under the names of the field:
    euler, heun        orders 1 and 2; with churn, algorithm 2 of that paper
    dpm_2, lms         order 2 by the middle of a step, order 4 by the steps before
    dpmpp_2m           DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2) of order 1 to 3,
    dpm_solver         and DPM-Solver, which does with the noise what that does with x_0
and of the stochastic equation with the same marginals:
    euler_ancestral, dpm_2_ancestral, dpmpp_2s_ancestral    a step too far, and noise back
    dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde                   noise within the solver

Two that are one: `euler` is `ddim` without noise, `euler_ancestral` is `ddpm` (divide by a).

`denoise(x, level)` gives an `Estimate` of x_0, guidance and clipping included. x is (B, C, H, W).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineage.diffusion.schedules import FARTHEST, Path, Point
from lineage.errors import UserError
from lineage.nn.draws import Draws


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


# --- in the process's own coordinates -----------------------------------------------------------


def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    draws: Draws,
    callback: Callback = ignore,
    variance: str = "fixed_small",
) -> Tensor:
    """Each step draws from p(x_s | x_t) = q(x_s | x_t, x_0), equations 6 and 7, at the estimate of
    x_0; where that comes with variances of its own, with these.

    Args:
        variance: `fixed_small` is beta~, `fixed_large` is beta.
    """
    for step, (now, then) in enumerate(path.steps()):
        found = denoise(x, now)
        callback(step, x, found.x0)
        ratio = now.signal / then.signal if then.signal else 0.0
        beta = now.noise**2 - (ratio * then.noise) ** 2  # of the whole stride
        share = (then.noise / now.noise) ** 2
        x = ratio * share * x + then.signal * beta / now.noise**2 * found.x0
        if then.noise == 0:
            continue
        noise = draws.normal(*x.shape[1:])
        small = beta * share
        if found.share is not None:
            log = found.share * math.log(beta) + (1 - found.share) * math.log(small)
            x = x + (0.5 * log).exp() * noise
        elif found.log_variance is not None:
            x = x + (0.5 * found.log_variance).exp() * noise
        else:
            x = x + math.sqrt(beta if variance == "fixed_large" else small) * noise
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    draws: Draws,
    callback: Callback = ignore,
    eta: float = 0.0,
) -> Tensor:
    """x_s = a_s x_0 + sqrt(b_s^2 - v) eps + sqrt(v) z, with v = eta^2 times the variance of the
    posterior: 0 adds no noise, 1 is `ddpm`. Walked the other way, it finds the noise of a picture.
    """
    for step, (now, then) in enumerate(path.steps()):
        found = denoise(x, now)
        callback(step, x, found.x0)
        eps = (x - now.signal * found.x0) / now.noise if found.noise is None else found.noise
        variance = eta**2 * posterior_variance(now, then)
        x = then.signal * found.x0 + math.sqrt(max(0.0, then.noise**2 - variance)) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * draws.normal(*x.shape[1:])
    return x


def posterior_variance(now: Point, then: Point) -> float:
    """Of q(x_s | x_t, x_0)."""
    if then.noise == 0 or then.signal <= now.signal:
        return 0.0
    return then.noise**2 * (1 - (now.signal * then.noise / (then.signal * now.noise)) ** 2)


def flow_euler(
    denoise: Denoise, x: Tensor, path: Path, draws: Draws, callback: Callback = ignore
) -> Tensor:
    """x + (s' - s) velocity, along x = (1 - s) x_0 + s eps.

    Raises:
        UserError: on a path that is not of this form.
    """
    if any(abs(p.signal + p.noise - 1) > 1e-6 for p in path.points):
        raise UserError("sampler=flow_euler needs process.schedule=flow: choose another.")
    for step, (now, then) in enumerate(path.steps()):
        x0 = denoise(x, now).x0
        callback(step, x, x0)
        velocity = (x - x0) / now.noise  # eps - x_0
        x = x + (then.noise - now.noise) * velocity
    return x


# --- in x / a = x_0 + sigma eps -------------------------------------------------------------------

Clean = Callable[[Tensor, float], Tensor]
"""x and sigma to the estimate of x_0."""


def in_sigmas(solver: Callable[..., Tensor]) -> Sampler:
    """A solver (clean, x, sigmas, draws, callback, ...) as a sampler on any path."""

    @functools.wraps(solver)
    def sampler(
        denoise: Denoise,
        x: Tensor,
        path: Path,
        draws: Draws,
        callback: Callback = ignore,
        **knobs: Any,
    ) -> Tensor:
        points = path.points
        if points[0].signal == 0:  # a sigma without end; this one is as good
            points = (Point(1 / FARTHEST, points[0].noise, points[0].time), *points[1:])
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

    def stir(self, x: Tensor, sigma: float, steps: int, draws: Draws) -> tuple[Tensor, float]:
        """x and its sigma with noise added."""
        if self.amount == 0:
            return x, sigma
        noise = draws.normal(*x.shape[1:])
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
    draws: Draws,
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
    draws: Draws,
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
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: Draws, callback: Callback
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
    draws: Draws,
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


# DPM-Solver works in l = -log sigma, along which a step of h = l' - l multiplies x by exp(-h).


def multistep_change(values: list[Tensor], widths: list[float]) -> tuple[Tensor, Tensor]:
    """First and second difference, by the width of the coming step, of the last two or three
    values. Newest first; `widths` holds the coming step and those before it.
    """
    ratios = [width / widths[0] for width in widths[1:]]
    newest = (values[0] - values[1]) / ratios[0]
    if len(values) == 2:
        return newest, torch.zeros_like(newest)
    older = (values[1] - values[2]) / ratios[1]
    both = ratios[0] + ratios[1]
    return newest + (newest - older) * ratios[0] / both, (newest - older) / both


def multistep(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    callback: Callback,
    order: int,
    kind: str,
    of_noise: bool,
) -> Tensor:
    """DPM-Solver++ of x_0, or DPM-Solver of the noise, by the estimates of the steps before."""
    values: list[Tensor] = []
    widths: list[float] = []
    steps = len(sigmas) - 1
    few = steps < 15  # then the last steps are of lower order
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        values = [slope(x, now, x0) if of_noise else x0, *values][:order]
        if then == 0:
            x = x0
            continue
        h = math.log(now / then)
        widths = [h, *widths][:order]
        left = steps - step  # this step among them
        now_order = min(len(values), left) if few else len(values)
        # exponentially weighted moments of a step: of 1, of its share done, of half its square
        g = math.expm1(h) if of_noise else -math.expm1(-h)
        rise = g / h - 1 if of_noise else 1 - g / h
        bend = rise / h - 0.5 if of_noise else 0.5 - rise / h
        x = (x - then * g * values[0]) if of_noise else ((then / now) * x + g * values[0])
        if now_order == 1:
            continue
        slower, bent = multistep_change(values[:now_order], widths[:now_order])
        sign = -then if of_noise else 1.0
        first = 0.5 * g if kind == "midpoint" and now_order == 2 else rise
        x = x + sign * first * slower
        if now_order == 3:
            x = x + sign * bend * bent
    return x


@in_sigmas
def dpmpp_2m(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
    callback: Callback,
    order: int = 2,
    kind: str = "midpoint",
) -> Tensor:
    """DPM-Solver++; one evaluation a step. `kind` of order 2 is `midpoint` or `heun`."""
    return multistep(clean, x, sigmas, callback, order, kind, of_noise=False)


@in_sigmas
def dpm_solver(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
    callback: Callback,
    order: int = 2,
    kind: str = "midpoint",
) -> Tensor:
    """DPM-Solver (Lu et al. 2022, arXiv:2206.00927) in the same form."""
    return multistep(clean, x, sigmas, callback, order, kind, of_noise=True)


# --- with noise -----------------------------------------------------------------------------------


@in_sigmas
def euler_ancestral(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
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
            x = x + up * draws.normal(*x.shape[1:])
    return x


@in_sigmas
def dpm_2_ancestral(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: Draws, callback: Callback
) -> Tensor:
    """`dpm_2` down, and noise back up."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        down, up = ancestral(now, then)
        x = through_middle(clean, x, x0, now, down)
        if then > 0:
            x = x + up * draws.normal(*x.shape[1:])
    return x


@in_sigmas
def dpmpp_2s_ancestral(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: Draws, callback: Callback
) -> Tensor:
    """DPM-Solver++ by the middle of a step (algorithm 1) down, and noise back up."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        down, up = ancestral(now, then)
        if down > 0:
            middle = math.sqrt(now * down)
            x0 = clean(toward(x, x0, now, middle), middle)
        x = toward(x, x0, now, down)
        if then > 0:
            x = x + up * draws.normal(*x.shape[1:])
    return x


def toward(x: Tensor, x0: Tensor, now: float, then: float) -> Tensor:
    """The exact way from `now` to `then` if x_0 stayed what it is."""
    return (then / now) * x + (1 - then / now) * x0


@in_sigmas
def dpmpp_sde(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: Draws, callback: Callback
) -> Tensor:
    """DPM-Solver++ for the stochastic equation, by the middle of a step, with noise twice."""
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        if then == 0:
            x = x0
            continue
        middle = math.sqrt(now * then)
        down, up = ancestral(now, middle)
        halfway = toward(x, x0, now, down) + up * draws.normal(*x.shape[1:])
        x0 = clean(halfway, middle)
        down, up = ancestral(now, then)
        x = toward(x, x0, now, down) + up * draws.normal(*x.shape[1:])
    return x


def sde_steps(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
    callback: Callback,
    order: int,
    kind: str,
    eta: float,
) -> Tensor:
    """DPM-Solver++ for the stochastic equation, by the estimates of the steps before."""
    values: list[Tensor] = []
    widths: list[float] = []
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        values = [x0, *values][:order]
        if then == 0:
            x = x0
            continue
        h = math.log(now / then)
        widths = [h, *widths][:order]
        whole = h * (1 + eta)  # the noise that is added lets the picture be forgotten faster
        g = -math.expm1(-whole)
        x = math.exp(-whole) * x + g * x0
        if len(values) > 1:
            slower, bent = multistep_change(values, widths)
            rise = 1 - g / whole
            x = x + (0.5 * g if kind == "midpoint" and order == 2 else rise) * slower
            if len(values) == 3:
                x = x + (0.5 - rise / whole) * bent
        if eta > 0:
            deviation = then * math.sqrt(-math.expm1(-2 * h * eta))
            x = x + deviation * draws.normal(*x.shape[1:])
    return x


@in_sigmas
def dpmpp_2m_sde(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
    callback: Callback,
    kind: str = "midpoint",
    eta: float = 1.0,
) -> Tensor:
    """Order 2; `kind` is `midpoint` or `heun`. eta = 0 is `dpmpp_2m`."""
    return sde_steps(clean, x, sigmas, draws, callback, 2, kind, eta)


@in_sigmas
def dpmpp_3m_sde(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: Draws,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """Order 3."""
    return sde_steps(clean, x, sigmas, draws, callback, 3, "", eta)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "flow_euler": flow_euler,
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpm_solver": dpm_solver,
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}
