"""DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095), in
x / alpha = x_0 + sigma eps.

In the time lambda = -log sigma, a step of h = log(sigma / sigma_next) is exact but for the integral
of x_0 (or eps), which is approximated by a polynomial through the last estimates m_0, m_1, m_2:

    D1, D2     first and second difference of the estimates, in units of h   `differences`
    x_0        x' = sigma'/sigma x + phi_1 m_0 + phi_2 D1 - phi_3 D2          (DPM-Solver++)
               phi_1 = 1 - exp(-h),  phi_2 = 1 - phi_1 / h,  phi_3 = phi_2 / h - 1/2
    eps        x' = x - sigma' (phi_1 m_0 + phi_2 D1 + phi_3 D2)              (DPM-Solver)
               phi_1 = exp(h) - 1,   phi_2 = phi_1 / h - 1,  phi_3 = phi_2 / h - 1/2

A solver of order 2 may replace phi_2 by phi_1 / 2 (`midpoint` instead of `heun`, in diffusers'
words). The stochastic equation (`eta` > 0) has h (1 + eta) in place of h, x times another
exp(-eta h), and noise of variance sigma'^2 (1 - exp(-2 eta h)).

    dpmpp_2m, dpm_solver                      multistep, order 1 to 3   (algorithm 2 of the second)
    dpmpp_2m_sde, dpmpp_3m_sde                multistep, stochastic
    dpmpp_2s_ancestral, dpmpp_sde             single step, by its middle     (algorithm 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from lineage.diffusion.samplers.base import Callback, DenoiseSigma, sigma_sampler
from lineage.diffusion.samplers.k_diffusion import ancestral_step, to_d
from lineage.nn.noise import NoiseStreams

# --- multistep ------------------------------------------------------------------------------------


def phis(h: float, from_noise: bool) -> tuple[float, float, float]:
    """phi_1, phi_2 and phi_3 of the header."""
    phi_1 = math.expm1(h) if from_noise else -math.expm1(-h)
    phi_2 = phi_1 / h - 1 if from_noise else 1 - phi_1 / h
    return phi_1, phi_2, phi_2 / h - 0.5


def differences(m: Sequence[Tensor], h: Sequence[float]) -> tuple[Tensor | float, Tensor | float]:
    """D1 and D2 of one to three estimates; those that need more estimates are 0.

    Args:
        m: Estimates, newest first.
        h: Step to take, then the steps between the estimates, newest first.
    """
    if len(m) == 1:
        return 0.0, 0.0
    r = [width / h[0] for width in h[1:]]
    D1_0 = (m[0] - m[1]) / r[0]
    if len(m) == 2:
        return D1_0, 0.0
    D1_1 = (m[1] - m[2]) / r[1]
    return D1_0 + (D1_0 - D1_1) * r[0] / (r[0] + r[1]), (D1_0 - D1_1) / (r[0] + r[1])


def multistep(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    order: int,
    solver_type: str,
    eta: float = 0.0,
    from_noise: bool = False,
    lower_order_final: bool = False,
) -> Tensor:
    """The equations of the header.

    Args:
        solver_type: `midpoint` or `heun`, for steps of order 2.
        lower_order_final: If true, and there are fewer than 15 steps, the last ones are of lower
            order, since a higher one is not stable there.
    """
    m: list[Tensor] = []
    hs: list[float] = []
    steps = len(sigmas) - 1
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        m = [to_d(x, sigma, x0) if from_noise else x0, *m][:order]
        if sigma_next == 0:
            x = x0
            continue
        h = math.log(sigma / sigma_next)
        hs = [h, *hs][:order]
        step_order = min(len(m), steps - step) if lower_order_final and steps < 15 else len(m)
        phi_1, phi_2, phi_3 = phis(h * (1 + eta), from_noise)
        D1, D2 = differences(m[:step_order], hs[:step_order])
        if solver_type == "midpoint" and step_order == 2:
            phi_2 = 0.5 * phi_1
        if from_noise:
            x = x - sigma_next * phi_1 * m[0] - sigma_next * phi_2 * D1 - sigma_next * phi_3 * D2
        else:
            shrink = sigma_next / sigma * math.exp(-eta * h)
            x = shrink * x + phi_1 * m[0] + phi_2 * D1 - phi_3 * D2
        if eta > 0:
            sigma_up = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
            x = x + sigma_up * noise.randn(*x.shape[1:])
    return x


@sigma_sampler
def dpmpp_2m(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    order: int = 2,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++; one evaluation a step."""
    return multistep(
        denoise, x, sigmas, noise, callback, order, solver_type, lower_order_final=True
    )


@sigma_sampler
def dpm_solver(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    order: int = 2,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver; one evaluation a step."""
    return multistep(
        denoise,
        x,
        sigmas,
        noise,
        callback,
        order,
        solver_type,
        from_noise=True,
        lower_order_final=True,
    )


@sigma_sampler
def dpmpp_2m_sde(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    solver_type: str = "midpoint",
    eta: float = 1.0,
) -> Tensor:
    """Order 2; eta = 0 is `dpmpp_2m`."""
    return multistep(denoise, x, sigmas, noise, callback, 2, solver_type, eta)


@sigma_sampler
def dpmpp_3m_sde(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """Order 3."""
    return multistep(denoise, x, sigmas, noise, callback, 3, "heun", eta)


# --- single step ----------------------------------------------------------------------------------


def first_order_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact step if x_0 is constant."""
    return (sigma_next / sigma) * x + (1 - sigma_next / sigma) * x0


@sigma_sampler
def dpmpp_2s_ancestral(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
) -> Tensor:
    """Down to sigma_down with the x_0 of the middle, then noise."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next)
        if sigma_down > 0:
            sigma_mid = math.sqrt(sigma * sigma_down)
            x0 = denoise(first_order_step(x, x0, sigma, sigma_mid), sigma_mid)
        x = first_order_step(x, x0, sigma, sigma_down)
        if sigma_next > 0:
            x = x + sigma_up * noise.randn(*x.shape[1:])
    return x


@sigma_sampler
def dpmpp_sde(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    brownian: bool = True,
) -> Tensor:
    """The stochastic equation, with the x_0 of the middle.

    Args:
        brownian: If true, the noise of a step contains that of its first half, as on one Brownian
            path; otherwise the two are independent, and the solver is of order 1.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        if sigma_next == 0:
            x = x0
            continue
        sigma_mid = math.sqrt(sigma * sigma_next)
        z_mid, z_rest = (noise.randn(*x.shape[1:]) for _ in range(2))
        sigma_down, sigma_up = ancestral_step(sigma, sigma_mid)
        x_mid = first_order_step(x, x0, sigma, sigma_down) + sigma_up * z_mid
        x0 = denoise(x_mid, sigma_mid)
        shared = (sigma - sigma_mid) / (sigma - sigma_next) if brownian else 0.0
        z = math.sqrt(shared) * z_mid + math.sqrt(1 - shared) * z_rest
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next)
        x = first_order_step(x, x0, sigma, sigma_down) + sigma_up * z
    return x
