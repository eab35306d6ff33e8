"""DPM-Solver and its family (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095), in sigmas.

    dpmpp_2m                        DPM-Solver++ (algorithm 2 of the second paper), order 1 to 3
    dpm_solver                      the same with the noise in place of x_0
    dpmpp_2s_ancestral              by the middle of a step (algorithm 1), with noise back
    dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde    for the stochastic equation, noise within the solver

All hold that l = -log sigma is the time in which a step is solved exactly but for x_0, which is
taken as a polynomial through a few estimates: a step of h = l' - l multiplies x by exp(-h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lineage.diffusion.samplers.k_diffusion import Callback, Clean, ancestral, in_sigmas, slope
from lineage.nn.noise import NoiseStreams


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
    draws: NoiseStreams,
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
    draws: NoiseStreams,
    callback: Callback,
    order: int = 2,
    kind: str = "midpoint",
) -> Tensor:
    """DPM-Solver (Lu et al. 2022, arXiv:2206.00927) in the same form."""
    return multistep(clean, x, sigmas, callback, order, kind, of_noise=True)


@in_sigmas
def dpmpp_2s_ancestral(
    clean: Clean, x: Tensor, sigmas: Sequence[float], draws: NoiseStreams, callback: Callback
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
            x = x + up * draws.randn(*x.shape[1:])
    return x


def toward(x: Tensor, x0: Tensor, now: float, then: float) -> Tensor:
    """The exact way from `now` to `then` if x_0 stayed what it is."""
    return (then / now) * x + (1 - then / now) * x0


@in_sigmas
def dpmpp_sde(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
    callback: Callback,
    related: bool = True,
) -> Tensor:
    """DPM-Solver++ for the stochastic equation, by the middle of a step.

    Args:
        related: whether the noise of the way to the middle is part of the step's, as on one path;
            without it the solver is of order 1.
    """
    for step, (now, then) in enumerate(pairwise(sigmas)):
        x0 = clean(x, now)
        callback(step, x, x0)
        if then == 0:
            x = x0
            continue
        middle = math.sqrt(now * then)
        first, rest = (draws.randn(*x.shape[1:]) for _ in range(2))
        down, up = ancestral(now, middle)
        x0 = clean(toward(x, x0, now, down) + up * first, middle)
        share = (now - middle) / (now - then) if related else 0.0  # of the step's noise
        noise = math.sqrt(share) * first + math.sqrt(1 - share) * rest
        down, up = ancestral(now, then)
        x = toward(x, x0, now, down) + up * noise
    return x


def sde_steps(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
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
            x = x + deviation * draws.randn(*x.shape[1:])
    return x


@in_sigmas
def dpmpp_2m_sde(
    clean: Clean,
    x: Tensor,
    sigmas: Sequence[float],
    draws: NoiseStreams,
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
    draws: NoiseStreams,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """Order 3."""
    return sde_steps(clean, x, sigmas, draws, callback, 3, "", eta)
