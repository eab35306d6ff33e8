"""Samplers: pure functions of (denoise, x, process, steps, draws). They know no network.

    ddpm_sample   ancestral sampling (Ho et al. 2020, algorithm 2), on all T steps or on some of
                  them
    ddim_sample   the implicit sampler (Song et al. 2021, equation 12); eta = 0 adds no noise

`denoise(x_t, t)` gives the estimate of x_0, guidance and clipping included; x is (B, 3, H, W), t
(B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lineage.diffusion.process import Process
from lineage.errors import UserError
from lineage.nn.draws import Draws

Denoise = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoise, Tensor, Process, int, Draws], Tensor]


def timesteps(total: int, steps: int) -> list[int]:
    """`steps` of the numbers 0 .. T - 1, evenly spaced, from T - 1 down to 0."""
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} is not possible: the process has 1 to {total}.")
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().int().tolist()


def ddim_sample(
    denoise: Denoise, x: Tensor, process: Process, steps: int, draws: Draws, eta: float = 0.0
) -> Tensor:
    """From noise x at t = T - 1 to a picture: x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2)
    eps + sigma z.

    `eta` = 1 makes sigma^2 the variance of the posterior q(x_s | x_t, x_0), which is ancestral
    sampling.
    """
    visited = timesteps(process.steps, steps)
    for now, following in zip(visited, [*visited[1:], None], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        x0 = denoise(x, t)
        if following is None:
            return x0
        noise = process.to_noise(x0, x, t)
        abar, abar_s = process.abar[now], process.abar[following]
        variance = (eta**2 * (1 - abar_s) / (1 - abar) * (1 - abar / abar_s)).item()
        x = abar_s.sqrt().item() * x0 + max(0.0, 1 - abar_s.item() - variance) ** 0.5 * noise
        if variance > 0:
            x = x + variance**0.5 * draws.normal(*x.shape[1:])
    return x


def ddpm_sample(denoise: Denoise, x: Tensor, process: Process, steps: int, draws: Draws) -> Tensor:
    """Algorithm 2.

    Each step draws from the posterior q(x_s | x_t, x_0) of equation 7, s the next step visited.
    """
    return ddim_sample(denoise, x, process, steps, draws, eta=1.0)


SAMPLERS: dict[str, Sampler] = {"ddim": ddim_sample, "ddpm": ddpm_sample}
