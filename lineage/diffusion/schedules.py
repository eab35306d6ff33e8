"""Noise schedules, and the noise levels that a sampler visits.

A noise level is x = alpha x_0 + sigma eps. Its karras_sigma, sigma / alpha, is the sigma of Karras
et al., by which the levels of all processes can be compared.

Schedules. All but the last have alpha^2 = alphas_cumprod and sigma^2 = 1 - alphas_cumprod, where
alphas_cumprod is the product of 1 - beta:
    linear         beta rises from 1e-4 to 0.02 over 1,000 steps         (Ho et al. 2020, section 4)
    scaled_linear  sqrt(beta) is linear, beta from 0.00085 to 0.012      (Rombach et al. 2022, code)
    cosine         alphas_cumprod = cos^2                                (Nichol and Dhariwal 2021,
                                                                         arXiv:2102.09672, eq. 17)
    sigmoid        alphas_cumprod = a sigmoid, stretched to end at 0     (Jabri et al. 2022,
                                                                         arXiv:2212.11972, alg. 1)
    flow           alpha = 1 - s, sigma = s: a straight line             (Liu et al. 2022,
                                                                         arXiv:2209.03003)
`rescale_zero_terminal_snr` makes the last step pure noise (Lin et al. 2023, arXiv:2305.08891,
algorithm 1).

Axes: T timesteps; t counts from 0 (almost no noise) to T - 1 (almost pure noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

FLOW = "flow"
SIGMA_MAX = 80.0  # karras_sigma that counts as pure noise (Karras et al. 2022)

Spacing = Literal["even", "leading", "trailing", "karras", "exponential"]
SPACINGS: tuple[str, ...] = get_args(Spacing)

# --- schedules --------------------------------------------------------------------------------


def linear_betas(num_timesteps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """(T,) linear betas; the ends are those of T = 1,000 and scale with 1,000 / T."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * start, scale * end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """(T,) betas with a linear square root; the ends scale with 1,000 / T."""
    scale = 1000 / num_timesteps
    ends = math.sqrt(scale * start), math.sqrt(scale * end)
    return torch.linspace(*ends, num_timesteps, dtype=torch.float64) ** 2


def betas_for_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_timesteps: int) -> Tensor:
    """(T,) betas whose alphas_cumprod is the function `alpha_bar` of t / T, clipped at 0.999."""
    values = alpha_bar(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    return (1 - values[1:] / values[:-1]).clamp(max=0.999)


def cosine_betas(num_timesteps: int) -> Tensor:
    """(T,) betas with alphas_cumprod(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2)."""
    return betas_for_alpha_bar(
        lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, num_timesteps
    )


def sigmoid_betas(num_timesteps: int, start: float = -3.0, end: float = 3.0) -> Tensor:
    """(T,) betas whose alphas_cumprod falls from 1 to 0 like a sigmoid from `start` to `end`."""
    first, last = (torch.tensor(x, dtype=torch.float64).sigmoid() for x in (start, end))

    def alpha_bar(t: Tensor) -> Tensor:
        return (last - (start + t * (end - start)).sigmoid()) / (last - first)

    return betas_for_alpha_bar(alpha_bar, num_timesteps)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """(T,) betas whose cumulative product of 1 - beta is `alphas_cumprod` (T,)."""
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """(T,) betas for which the last alpha is 0 and the first is unchanged: sqrt(alphas_cumprod) is
    shifted and scaled.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return betas_from_alphas_cumprod(root**2)


# --- noise levels and sampling schedules --------------------------------------------------------


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level x = alpha x_0 + sigma eps; `timestep` is the network's input."""

    alpha: float
    sigma: float
    timestep: float

    @property
    def karras_sigma(self) -> float:
        """sigma / alpha: the noise level of x / alpha = x_0 + karras_sigma eps."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


NO_NOISE = NoiseLevel(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class SamplingSchedule:
    """Noise levels in the order in which a sampler visits them.

    Attributes:
        levels: The levels, noisiest first; the network is not evaluated at the last.
        at: Function from a karras_sigma between two levels to its noise level.
    """

    levels: tuple[NoiseLevel, ...]
    at: Callable[[float], NoiseLevel]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.levels) - 1

    def steps(self) -> list[tuple[NoiseLevel, NoiseLevel]]:
        """The level and the next level of each step."""
        return list(zip(self.levels, self.levels[1:], strict=False))

    def shortened(self, sampling_steps: int) -> SamplingSchedule:
        """The last `sampling_steps` steps."""
        return SamplingSchedule(self.levels[-sampling_steps - 1 :], self.at)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """n sigmas from `sigma_max` to `sigma_min` whose 1 / rho-th powers are evenly spaced (Karras et
    al. 2022, arXiv:2206.00364, equation 5).
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((ends[0] + ramp * (ends[1] - ends[0])) ** rho).tolist()


def exponential_sigmas(n: int, sigma_min: float, sigma_max: float) -> list[float]:
    """n sigmas from `sigma_max` to `sigma_min` whose logarithms are evenly spaced."""
    ramp = torch.linspace(1, 0, n, dtype=torch.float64)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return (low + ramp * (high - low)).exp().tolist()


def even_timesteps(num_timesteps: int, n: int) -> list[int]:
    """n timesteps from T - 1 to 0, both included."""
    return torch.linspace(num_timesteps - 1, 0, n, dtype=torch.float64).round().int().tolist()


def leading_timesteps(num_timesteps: int, n: int, offset: int = 0) -> list[int]:
    """n timesteps, T // n apart; the last is `offset`."""
    return [k * (num_timesteps // n) + offset for k in reversed(range(n))]


def trailing_timesteps(num_timesteps: int, n: int) -> list[int]:
    """n timesteps, T / n apart; the first is T - 1 (Lin et al. 2023, table 2)."""
    return [round(num_timesteps - k * num_timesteps / n) - 1 for k in range(n)]


def shift_sigma(sigma: float, shift: float) -> float:
    """A sigma of the straight line, moved towards noise if `shift` is above 1: large pictures need
    more noise (Esser et al. 2024, arXiv:2403.03206, equation 23).
    """
    return shift * sigma / (1 - sigma + shift * sigma)  # exactly 1 at sigma = 1
