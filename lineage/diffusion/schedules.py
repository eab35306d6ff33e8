"""Noise schedules, and the levels that a sampler visits. No network, no picture: numbers alone.

A level is x = a x_0 + b eps; a "signal", b "noise", b / a "sigma".

Schedules. For all but the last a^2 = abar and b^2 = 1 - abar, abar the product of 1 - beta:
    linear         beta from 1e-4 to 0.02 over 1,000 steps               (Ho et al. 2020, section 4)
    scaled_linear  its root is linear, 0.00085 to 0.012                  (Rombach et al. 2022, code)
    cosine         abar = cos^2                                          (Nichol and Dhariwal 2021,
                                                                         arXiv:2102.09672, eq. 17)
    sigmoid        abar = a sigmoid, stretched to end at 0               (Jabri et al. 2022,
                                                                         arXiv:2212.11972, alg. 1)
    flow           a = 1 - s, b = s: a straight line                     (Liu et al. 2022,
                                                                         arXiv:2209.03003)
`without_snr_at_end` takes the last trace of the picture from the last step (Lin et al. 2023,
arXiv:2305.08891, algorithm 1).

Axes: T steps; t counts from 0 (nearly clean) to T - 1 (nearly noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lineage.errors import UserError

FLOW = "flow"
FARTHEST = 80.0  # sigma, as good as noise alone (Karras et al. 2022): grids begin there at most

# --- schedules --------------------------------------------------------------------------------


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """(T,) beta; chains of other lengths than 1,000 get proportionally other steps."""
    scale = 1000 / steps
    return torch.linspace(scale * start, scale * end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """(T,) beta whose root is linear."""
    scale = 1000 / steps
    ends = math.sqrt(scale * start), math.sqrt(scale * end)
    return torch.linspace(*ends, steps, dtype=torch.float64) ** 2


def betas_of(abar: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """(T,) beta of a falling function of t / T, clipped at 0.999."""
    values = abar(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return (1 - values[1:] / values[:-1]).clamp(max=0.999)


def cosine_betas(steps: int) -> Tensor:
    """(T,) beta such that abar(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2)."""
    return betas_of(lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, steps)


def sigmoid_betas(steps: int, start: float = -3.0, end: float = 3.0) -> Tensor:
    """(T,) beta such that abar falls like a sigmoid between `start` and `end`, from 1 to 0."""
    first, last = (torch.tensor(x, dtype=torch.float64).sigmoid() for x in (start, end))

    def abar(t: Tensor) -> Tensor:
        return (last - (start + t * (end - start)).sigmoid()) / (last - first)

    return betas_of(abar, steps)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}


def without_snr_at_end(abar: Tensor) -> Tensor:
    """(T,) abar, its root shifted and stretched so that the last is 0 and the first as it was."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


# --- which steps a sampler visits ---------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A noise level: x = signal x_0 + noise eps; `time` is what the network is told."""

    signal: float
    noise: float
    time: float

    @property
    def sigma(self) -> float:
        """Noise against signal, by which levels of all processes are compared."""
        return self.noise / self.signal if self.signal > 0 else math.inf


CLEAN = Point(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Path:
    """Levels in the order in which a sampler visits them.

    Attributes:
        points: from the noisiest on; the last is where it ends, without asking the network there.
        at: the level of a sigma between them.
    """

    points: tuple[Point, ...]
    at: Callable[[float], Point]

    def __len__(self) -> int:
        """Steps."""
        return len(self.points) - 1

    def steps(self) -> list[tuple[Point, Point]]:
        """(from, to) of each step."""
        return list(zip(self.points, self.points[1:], strict=False))

    def shortened(self, steps: int) -> Path:
        """The last `steps` steps."""
        return Path(self.points[-steps - 1 :], self.at)


def karras_sigmas(steps: int, least: float, most: float, rho: float = 7.0) -> list[float]:
    """Sigmas from `most` to `least` whose 1 / rho-th powers are evenly spaced (Karras et al. 2022,
    arXiv:2206.00364, equation 5); rho = 1 spaces them evenly themselves.
    """
    shares = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = most ** (1 / rho), least ** (1 / rho)
    return ((ends[0] + shares * (ends[1] - ends[0])) ** rho).tolist()


def exponential_sigmas(steps: int, least: float, most: float, rho: float = 1.0) -> list[float]:
    """Sigmas from `most` to `least` whose logarithms are evenly spaced, or, for another rho, by the
    rho-th power of even shares.
    """
    shares = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    low, high = math.log(least), math.log(most)
    return (low + shares * (high - low)).exp().tolist()


def vp_sigmas(steps: int, rate: float = 19.9, least: float = 0.1, end: float = 1e-3) -> list[float]:
    """Sigmas of evenly spaced times of the variance-preserving process in continuous time (Song et
    al. 2021, arXiv:2011.13456, equation 32), whose beta rises from `least` by `rate`.
    """
    t = torch.linspace(1, end, steps, dtype=torch.float64)
    return ((rate * t**2 / 2 + least * t).expm1().sqrt()).tolist()


def even_times(total: int, steps: int) -> list[int]:
    """From T - 1 to 0, both among them."""
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().int().tolist()


def leading_times(total: int, steps: int, offset: int = 0) -> list[int]:
    """Every T // steps-th step from `offset` on."""
    return [k * (total // steps) + offset for k in reversed(range(steps))]


def trailing_times(total: int, steps: int) -> list[int]:
    """Every T / steps-th step, counted from T - 1 down (Lin et al. 2023, table 2)."""
    return [round(total - k * total / steps) - 1 for k in range(steps)]


def shifted(s: float, shift: float) -> float:
    """A level of the straight line, moved towards noise, where large pictures lose their last trace
    (Esser et al. 2024, arXiv:2403.03206, equation 23). 1 moves nothing.
    """
    return shift * s / (1 - s + shift * s)  # 1 at s = 1, exactly


SPACINGS = ("even", "leading", "trailing", "karras", "exponential")


def whole(part: str, how: str) -> int:
    """A part of `how`, a way to keep steps, as a number."""
    try:
        return int(part)
    except ValueError:
        raise UserError(f"Steps to keep are told as 10,15,20 or ddim25, not {how!r}.") from None


def respaced_times(total: int, how: str) -> list[int]:
    """Steps to keep, sorted (Nichol and Dhariwal 2021, code).

    Args:
        how: `10,15,20` keeps so many of each of three equal parts of the chain, both ends of a part
            among them; `ddim25` keeps 25, an equal stride apart, the first step among them.
    """
    if how.startswith("ddim"):
        wanted = whole(how.removeprefix("ddim"), how)
        fitting = (range(0, total, k) for k in range(1, total))
        found = next((list(times) for times in fitting if len(times) == wanted), None)
        if found is None:
            raise UserError(f"No stride of {total} steps keeps {wanted} of them.")
        return found
    sections = [whole(part, how) for part in how.split(",")]
    size, more = divmod(total, len(sections))
    kept, start = [], 0
    for part, count in enumerate(sections):
        length = size + (part < more)
        if not 1 <= count <= length:
            raise UserError(f"{count} steps cannot be kept of a part of {length}.")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        places = accumulate([0.0] + [stride] * (count - 1))  # summed up, as their rounding is
        kept += [start + round(place) for place in places]
        start += length
    return kept
