"""The diffusion process: its schedule, what the network predicts, and the loss. No network is known
here.

    forward     x_t = a_t x_0 + b_t eps; a "signal", b "noise"           (Ho et al. 2020, eq. 4)
    posterior   q(x_s | x_t, x_0) for any s < t                          (equations 6 and 7)
    loss        E |target - network(x_t, t)|^2                           (equation 14)

Schedules. For all but the last a^2 = abar and b^2 = 1 - abar, abar the product of 1 - beta:
    linear         beta from 1e-4 to 0.02 over 1,000 steps               (Ho et al. 2020, section 4)
    scaled_linear  its root is linear, 0.00085 to 0.012                  (Rombach et al. 2022, code)
    cosine         abar = cos^2                                          (Nichol and Dhariwal 2021,
                                                                         arXiv:2102.09672, eq. 17)
    sigmoid        abar = a sigmoid, stretched to end at 0               (Jabri et al. 2022,
                                                                         arXiv:2212.11972, alg. 1)
    flow           a = 1 - s, b = s: a straight line                     (Liu et al. 2022,
                                                                         arXiv:2209.03003)
Predictions: `noise` eps; `x0`; `v` = a eps - b x_0 (Salimans and Ho 2022, arXiv:2202.00512); `flow`
    = eps - x_0, the velocity of the straight line. Each can be had with any schedule.
Weights: `simple`, or `min_snr` (Hang et al. 2023, arXiv:2303.09556, section 3.4).
Variances of p(x_s | x_t): `fixed_small`, `fixed_large` (Ho et al. 2020, section 3.2), `learned`,
    and `learned_range` between the two (Nichol and Dhariwal 2021, eq. 15); `bound.py` has their
    loss.
`zero_snr` takes the last trace of the picture from the last step (Lin et al. 2023,
    arXiv:2305.08891, algorithm 1).

Which of the T steps a sampler visits is a `Path`. Respacing is no more than that: a and b of the
visited steps stay, and all else (the beta of a stride, the posterior) follows from them.

Tables are made in float64 and used in float32. Axes: B pictures, C H W, T steps; t counts from 0
(nearly clean) to T - 1 (nearly noise).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.config import at_least, one_of
from lineage.errors import UserError

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
FLOW = "flow"
PREDICTIONS = ("noise", "x0", "v", "flow")
WEIGHTS = ("simple", "min_snr")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def without_snr_at_end(abar: Tensor) -> Tensor:
    """(T,) abar, its root shifted and stretched so that the last is 0 and the first as it was."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclass(frozen=True)
class ProcessConfig:
    """A diffusion process; the header says what the names mean.

    Attributes:
        steps: T.
        schedule: `linear`, `scaled_linear`, `cosine`, `sigmoid` or `flow`.
        prediction: what the network gives: `noise`, `x0`, `v` or `flow`.
        weighting: of the loss over t: `simple` or `min_snr`.
        gamma: the signal-to-noise ratio at which `min_snr` cuts.
        variance: `fixed_small`, `fixed_large`, or `learned` and `learned_range`, for which the
            network has twice the channels.
        zero_snr: whether the last step is noise alone. Not with the `noise` prediction, from which
            the picture could not be told there.
    """

    steps: int = 1000
    schedule: str = "linear"
    prediction: str = "noise"
    weighting: str = "simple"
    gamma: float = 5.0
    variance: str = "fixed_small"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        one_of("process.schedule", self.schedule, (*SCHEDULES, FLOW))
        one_of("process.prediction", self.prediction, PREDICTIONS)
        one_of("process.weighting", self.weighting, WEIGHTS)
        one_of("process.variance", self.variance, VARIANCES)
        at_least("process.gamma", self.gamma, 0)
        flow, few = self.schedule == FLOW, self.steps < 2
        if few or not (flow or bool((SCHEDULES[self.schedule](self.steps) < 1).all())):
            raise UserError(f"steps={self.steps} are too few for a {self.schedule} schedule.")
        if flow and self.learned:
            raise UserError("A learned variance needs a schedule of betas, not schedule=flow.")
        if (flow or self.zero_snr) and self.prediction == "noise":
            raise UserError(
                "prediction=noise says nothing of the picture where there is noise alone, as at "
                "the end of schedule=flow and with zero_snr: choose x0, v or flow."
            )

    @property
    def learned(self) -> bool:
        """Whether the network gives variances too."""
        return self.variance.startswith("learned")


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
    return ((ends[0] + shares * (ends[1] - ends[0])) ** rho).tolist()  # type: ignore[no-any-return]


def exponential_sigmas(steps: int, least: float, most: float, rho: float = 1.0) -> list[float]:
    """Sigmas from `most` to `least` whose logarithms are evenly spaced, or, for another rho, by the
    rho-th power of even shares.
    """
    shares = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    low, high = math.log(least), math.log(most)
    return (low + shares * (high - low)).exp().tolist()  # type: ignore[no-any-return]


def even_times(total: int, steps: int) -> list[int]:
    """From T - 1 to 0, both among them."""
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().int().tolist()  # type: ignore[no-any-return]


def leading_times(total: int, steps: int, offset: int = 0) -> list[int]:
    """Every T // steps-th step from `offset` on. Where `steps` does not divide T there is another
    one, as in the code of latent diffusion.
    """
    return [t + offset for t in range(0, total, total // steps) if t + offset < total][::-1]


def trailing_times(total: int, steps: int) -> list[int]:
    """Every T / steps-th step, counted from T - 1 down (Lin et al. 2023, table 2)."""
    return [round(total - k * total / steps) - 1 for k in range(steps)]


SPACINGS = ("even", "leading", "trailing", "karras", "exponential")


def respaced_times(total: int, sections: Sequence[int]) -> list[int]:
    """Steps to keep: as many of each of several equal parts of the chain as `sections` says, both
    ends of a part among them (Nichol and Dhariwal 2021, code). Sorted.
    """
    size, more = divmod(total, len(sections))
    kept, start = [], 0
    for part, count in enumerate(sections):
        length = size + (part < more)
        if not 1 <= count <= length:
            raise UserError(f"{count} steps cannot be kept of a part of {length}.")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(stride * k) for k in range(count)]
        start += length
    return kept


# --- the process --------------------------------------------------------------------------------


class Process:
    """Owns the schedule, the meaning of the network's output, and the loss.

    Attributes:
        signal, noise: (T,) float64, a and b.
        betas, abar: (T,) float64; not for `flow`, which has none.

    Args:
        config: schedule, prediction, loss.
        betas: (T,) float64 in place of the schedule's.
        times: what the network is told of each step; its number, unless steps were taken out.
    """

    def __init__(
        self,
        config: ProcessConfig,
        betas: Tensor | None = None,
        times: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.steps = config.steps if betas is None else len(betas)
        self.times = list(range(self.steps)) if times is None else list(times)
        self.straight = config.schedule == FLOW and betas is None
        with torch.device("cpu"):  # whatever device a network is being built on
            self._fill(betas)

    def _fill(self, betas: Tensor | None) -> None:
        """Make the tables."""
        config = self.config
        if self.straight:
            self.noise = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
            self.signal = 1 - self.noise
        else:
            if betas is None:
                betas = SCHEDULES[config.schedule](config.steps)
            self.abar = torch.cumprod(1 - betas, dim=0)
            if config.zero_snr:
                self.abar = without_snr_at_end(self.abar)
                betas = 1 - self.abar / torch.cat([self.abar.new_ones(1), self.abar[:-1]])
            self.betas = betas
            self.signal, self.noise = self.abar.sqrt(), (1 - self.abar).sqrt()
        self._tables = torch.stack([self.signal, self.noise]).float()  # (2, T)
        self._log_sigmas: list[float] = (self.noise / self.signal).log().tolist()

    def respaced(self, kept: Sequence[int]) -> Process:
        """The process of some of the steps, `kept` in rising order: their abar stay as they are,
        and the betas between them follow.
        """
        abar = self.abar[list(kept)]
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return Process(self.config, betas, [self.times[t] for t in kept])

    # --- levels ---

    def point(self, t: int) -> Point:
        """Step t."""
        return Point(float(self.signal[t]), float(self.noise[t]), float(self.times[t]))

    def at(self, sigma: float) -> Point:
        """The level of a sigma, its time interpolated in log sigma between steps."""
        signal = 1 / (1 + sigma) if self.straight else 1 / math.sqrt(1 + sigma**2)
        return Point(signal, sigma * signal, self.time(sigma))

    def time(self, sigma: float) -> float:
        """The number of the step that has this sigma; between steps, by the logarithms."""
        wanted, table = math.log(max(sigma, 1e-12)), self._log_sigmas
        above = min(max(bisect.bisect_left(table, wanted), 1), len(table) - 1)
        low, high = table[above - 1], table[above]
        if math.isinf(high):  # noise alone
            return float(above if math.isinf(wanted) else above - 1)
        return above - 1 + min(max((wanted - low) / (high - low), 0.0), 1.0)

    def sigma(self, time: float) -> float:
        """The sigma of a step, or between two of them, by the logarithms."""
        below = min(int(time), self.steps - 2)
        low, high = self._log_sigmas[below], self._log_sigmas[below + 1]
        return math.exp(low + (time - below) * (high - low))

    def path(self, steps: int, spacing: str = "even", offset: int = 0) -> Path:
        """`steps` levels from noise on, and the clean picture at the end.

        Args:
            spacing: `even` in t, both ends among them; `leading`, `trailing` as the code of latent
                diffusion and Lin et al. have them; `karras` or `exponential` in sigma.
            offset: added to the steps of `leading`.
        """
        one_of("spacing", spacing, SPACINGS)
        if not 1 <= steps <= self.steps:
            raise UserError(f"steps={steps} is not possible: the process has 1 to {self.steps}.")
        if spacing in ("karras", "exponential"):
            ends = [self.point(t).sigma for t in (0, self.steps - 1)]
            grid = karras_sigmas if spacing == "karras" else exponential_sigmas
            points = [self.at(s) for s in grid(steps, ends[0], min(ends[1], FARTHEST))]
        else:
            times = {
                "even": lambda: even_times(self.steps, steps),
                "leading": lambda: leading_times(self.steps, steps, offset),
                "trailing": lambda: trailing_times(self.steps, steps),
            }[spacing]()
            points = [self.point(t) for t in times]
        return Path((*points, CLEAN), self.at)

    # --- forward ---

    def levels(self, at: Tensor | Point) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """a and b: of steps t (B,), each (B, 1, 1, 1); or of one level, two numbers."""
        if isinstance(at, Point):
            return at.signal, at.noise
        if self._tables.device != at.device:
            self._tables = self._tables.to(at.device)
        signal, noise = self._tables[:, at, None, None, None]  # (B, 1, 1, 1) each
        return signal, noise

    def noised(self, x0: Tensor, noise: Tensor, at: Tensor | Point) -> Tensor:
        """x_t; x0 and noise (B, C, H, W)."""
        a, b = self.levels(at)
        return a * x0 + b * noise

    # --- what the network's output means ---

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for x_t."""
        if self.config.prediction == "noise":
            return noise
        if self.config.prediction == "x0":
            return x0
        if self.config.prediction == "flow":
            return noise - x0
        a, b = self.levels(t)
        return a * noise - b * x0

    def to_x0(self, output: Tensor, noised: Tensor, at: Tensor | Point) -> Tensor:
        """The network's output for x_t, read as an estimate of x_0."""
        a, b = self.levels(at)
        if self.config.prediction == "x0":
            return output
        if self.config.prediction == "noise":
            return (noised - b * output) / a
        if self.config.prediction == "flow":
            return (noised - b * output) / (a + b)
        return (a * noised - b * output) / (a * a + b * b)

    def to_noise(self, x0: Tensor, noised: Tensor, at: Tensor | Point) -> Tensor:
        """The eps that makes x_t of x_0."""
        a, b = self.levels(at)
        return (noised - a * x0) / b

    # --- loss ---

    def weight(self, t: Tensor) -> Tensor:
        """(B,) what the squared error of each row counts."""
        if self.config.weighting == "simple":
            return torch.ones_like(t, dtype=torch.float32)
        a, b = (level.flatten().double() for level in self.levels(t))  # type: ignore[union-attr]
        snr = (a / b) ** 2
        cut = snr.clamp(max=self.config.gamma)  # the weight of |x_0 - estimate|^2
        per_output = {
            "x0": torch.ones_like(snr),
            "noise": 1 / snr.clamp(min=1e-12),  # |x_0 error|^2 = |eps error|^2 / snr
            "v": 1 / (snr + 1),
            "flow": (b / (a + b)) ** 2,
        }
        return (cut * per_output[self.config.prediction]).float()

    def mse(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) the mean square of equation 14 over each picture, weighted."""
        error = (output.float() - self.target(x0, noise, t)).square().flatten(1).mean(1)
        return error if self.config.weighting == "simple" else error * self.weight(t)


FARTHEST = 1e3  # sigma from which grids in sigma begin where the schedule's own is larger
