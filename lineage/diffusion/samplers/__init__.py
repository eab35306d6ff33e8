"""Samplers: pure functions (denoise, x, path, draws, callback) -> x. They know no network.

In the process's own coordinates x = a x_0 + b eps:
    ddpm               ancestral sampling (Ho et al. 2020, algorithm 2), any stride and variance
    ddim               the implicit sampler (Song et al. 2021, arXiv:2010.02502, equation 12)
    flow_euler         Euler's method on the straight line (Liu et al. 2022, arXiv:2209.03003)
In x / a = x_0 + sigma eps: `solvers.py` and `dpm_solver.py`.

Two that are one: `euler` is `ddim` without noise, `euler_ancestral` is `ddpm` (divide by a).

`denoise(x, level)` gives an `Estimate` of x_0, guidance and clipping included. x is (B, C, H, W).
"""

from __future__ import annotations

import math

from torch import Tensor

from lineage.diffusion.samplers.dpm_solver import (
    dpm_solver,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from lineage.diffusion.samplers.k_diffusion import (
    Callback,
    Denoise,
    Sampler,
    dpm_2,
    dpm_2_ancestral,
    euler,
    euler_ancestral,
    heun,
    ignore,
    lms,
)
from lineage.diffusion.schedules import Path, Point
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams


def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    draws: NoiseStreams,
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
        noise = draws.randn(*x.shape[1:])
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
    draws: NoiseStreams,
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
            x = x + math.sqrt(variance) * draws.randn(*x.shape[1:])
    return x


def posterior_variance(now: Point, then: Point) -> float:
    """Of q(x_s | x_t, x_0)."""
    if then.noise == 0 or then.signal <= now.signal:
        return 0.0
    return then.noise**2 * (1 - (now.signal * then.noise / (then.signal * now.noise)) ** 2)


def flow_euler(
    denoise: Denoise, x: Tensor, path: Path, draws: NoiseStreams, callback: Callback = ignore
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
