"""DPM-Solver and DPM-Solver++ (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095), in
x / alpha = x_0 + sigma eps.

In the time lambda = log(alpha / sigma) of the papers, here -log sigma, a step from sigma to sigma'
of h = log(sigma / sigma') is exact but for an integral of x_0 (or eps). Multistep solvers
extrapolate it from the last estimates m_0, m_1, m_2, newest first (phi_k here is h phi_k of the
first paper):

    D1, D2     first derivative, and half the second, at m_0, times h and h^2   `derivatives`
    x_0        x' = sigma'/sigma x + phi_1 m_0 + phi_2 D1 - phi_3 D2            (DPM-Solver++)
               phi_1 = 1 - exp(-h),  phi_2 = 1 - phi_1 / h,  phi_3 = phi_2 / h - 1/2
    eps        x' = x - sigma' (phi_1 m_0 + phi_2 D1 + phi_3 D2)                (DPM-Solver)
               phi_1 = exp(h) - 1,   phi_2 = phi_1 / h - 1,  phi_3 = phi_2 / h - 1/2

The integral of the polynomial through three estimates has 2 phi_3 D2. The authors' code, diffusers
and k-diffusion all have phi_3 D2, and this file follows them, so order 3 is nominal. At order 2,
`midpoint`, the default, has phi_1 / 2 in place of phi_2 (algorithm 2 of the second paper); `heun`
has phi_2 (diffusers' words). The stochastic equation (`eta` > 0) has h (1 + eta) in place of h, x
times another exp(-eta h), and noise of variance sigma'^2 (1 - exp(-2 eta h)).

    dpmpp_2m, dpm_solver              multistep, order 1 to 3, of x_0 (algorithm 2 of the second
                                      paper) and of eps (the authors' code)
    dpmpp_2m_sde, dpmpp_3m_sde        multistep, stochastic        (k-diffusion, Crowson 2022)
    dpmpp_2s_ancestral, dpmpp_sde     single step with the midpoint in lambda, r = 1/2 (algorithm 1
                                      of the second paper), with noise           (k-diffusion)

`sigma_sampler` (base.py) adapts a solver in x / alpha and sigma to a model in x and its schedule.
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


def derivatives(m: Sequence[Tensor], h: Sequence[float]) -> tuple[Tensor | float, Tensor | float]:
    """D1 and D2 of one to three estimates; those that need more estimates are 0.

    Args:
        m: Estimates, newest first.
        h: Step to take, then the steps between the estimates, newest first.
    """
    if len(m) == 1:
        return 0.0, 0.0
    r = [h_i / h[0] for h_i in h[1:]]
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
    """Multistep solver by the equations of the header.

    Args:
        order: Number of estimates that a step takes, 1 to 3.
        solver_type: `midpoint` or `heun`, for steps of order 2.
        eta: Factor on the noise; 0 is deterministic.
        from_noise: If true, the estimates are eps (DPM-Solver), otherwise x_0 (DPM-Solver++).
        lower_order_final: If true, and there are fewer than 15 steps, the last ones are of lower
            order, since a higher one is not stable there (the authors' code, and diffusers).
    """
    m: list[Tensor] = []
    step_sizes: list[float] = []
    steps = len(sigmas) - 1
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        callback(step, x, x0)
        m = [to_d(x, sigma, x0) if from_noise else x0, *m][:order]  # d is eps
        if sigma_next == 0:
            x = x0
            continue
        h = math.log(sigma / sigma_next)
        step_sizes = [h, *step_sizes][:order]
        step_order = min(len(m), steps - step) if lower_order_final and steps < 15 else len(m)
        phi_1, phi_2, phi_3 = phis(h * (1 + eta), from_noise)
        D1, D2 = derivatives(m[:step_order], step_sizes[:step_order])
        if solver_type == "midpoint" and step_order == 2:
            phi_2 = 0.5 * phi_1
        if from_noise:
            x = x - sigma_next * phi_1 * m[0] - sigma_next * phi_2 * D1 - sigma_next * phi_3 * D2
        else:
            x_coef = sigma_next / sigma * math.exp(-eta * h)
            x = x_coef * x + phi_1 * m[0] + phi_2 * D1 - phi_3 * D2
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
    """DPM-Solver++ of order 1 to 3 (2M by default); one evaluation a step."""
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
    """DPM-Solver of order 1 to 3; one evaluation a step."""
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
    """Stochastic DPM-Solver++ of order 2; eta = 0 is `dpmpp_2m`."""
    return multistep(denoise, x, sigmas, noise, callback, 2, solver_type, eta=eta)


@sigma_sampler
def dpmpp_3m_sde(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
    eta: float = 1.0,
) -> Tensor:
    """Stochastic DPM-Solver++ of order 3."""
    return multistep(denoise, x, sigmas, noise, callback, 3, "heun", eta=eta)


# --- single step ----------------------------------------------------------------------------------


def first_order_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """DDIM's step, which is DPM-Solver of order 1: exact if x_0 is constant."""
    return (sigma_next / sigma) * x + (1 - sigma_next / sigma) * x0


@sigma_sampler
def dpmpp_2s_ancestral(
    denoise: DenoiseSigma,
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseStreams,
    callback: Callback,
) -> Tensor:
    """Ancestral step: to sigma_down with x_0 at the midpoint, then noise of deviation sigma_up."""
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
    """The stochastic equation, with x_0 at the midpoint.

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
        # on a Brownian path in sigma, the first part has this share of the variance
        shared = (sigma - sigma_mid) / (sigma - sigma_next) if brownian else 0.0
        z = math.sqrt(shared) * z_mid + math.sqrt(1 - shared) * z_rest
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next)
        x = first_order_step(x, x0, sigma, sigma_down) + sigma_up * z
    return x
