"""The diffusion process: its schedule, what the network predicts, and the loss. No network is known
here.

    forward     x_t = a_t x_0 + b_t eps; a "signal", b "noise"           (Ho et al. 2020, eq. 4)
    posterior   q(x_s | x_t, x_0) for any s < t                          (equations 6 and 7)
    loss        E |target - network(x_t, t)|^2                           (equation 14)

Schedules, and the paths that samplers take along them, are in `schedules.py`.
Predictions: `noise` eps; `x0`; `v` = a eps - b x_0 (Salimans and Ho 2022, arXiv:2202.00512);
    `flow` = eps - x_0, the velocity of the straight line; `edm`, what x_0 is beyond a share of x_t,
    at unit deviation (Karras et al. 2022, arXiv:2206.00364, table 1). Each can be had with any
    schedule.
Weights: `simple`, or `min_snr` (Hang et al. 2023, arXiv:2303.09556, section 3.4).
Variances of p(x_s | x_t): `fixed_small`, `fixed_large` (Ho et al. 2020, section 3.2), `learned`,
    and `learned_range` between the two (Nichol and Dhariwal 2021, eq. 15); `bound.py` has their
    loss.

Which of the T steps a sampler visits is a `Path`. Respacing is no more than that: a and b of the
visited steps stay, and all else (the beta of a stride, the posterior) follows from them.

Tables are made in float64 and used in float32. Axes: B pictures, C H W, T steps; t counts from 0
(nearly clean) to T - 1 (nearly noise).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lineage.config import at_least, one_of
from lineage.diffusion.schedules import (
    CLEAN,
    FARTHEST,
    FLOW,
    SCHEDULES,
    SPACINGS,
    Path,
    Point,
    even_times,
    exponential_sigmas,
    karras_sigmas,
    leading_times,
    shifted,
    trailing_times,
    without_snr_at_end,
)
from lineage.errors import UserError

PREDICTIONS = ("noise", "x0", "v", "flow", "edm")
WEIGHTS = ("simple", "min_snr")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


@dataclass(frozen=True)
class ProcessConfig:
    """A diffusion process; the header says what the names mean.

    Attributes:
        steps: T.
        schedule: `linear`, `scaled_linear`, `cosine`, `sigmoid` or `flow`.
        prediction: what the network gives: `noise`, `x0`, `v`, `flow` or `edm`.
        weighting: of the loss over t: `simple` or `min_snr`.
        gamma: the signal-to-noise ratio at which `min_snr` cuts.
        variance: `fixed_small`, `fixed_large`, or `learned` and `learned_range`, for which the
            network has twice the channels.
        shift: of the levels that a sampler visits on the straight line, towards noise; 1 for none.
        deviation: of the pictures' values, for `edm`.
        zero_snr: whether the last step is noise alone. Not with the `noise` prediction, from which
            the picture could not be told there.
    """

    steps: int = 1000
    schedule: str = "linear"
    prediction: str = "noise"
    weighting: str = "simple"
    gamma: float = 5.0
    variance: str = "fixed_small"
    shift: float = 1.0
    deviation: float = 0.5
    zero_snr: bool = False

    def __post_init__(self) -> None:
        one_of("process.schedule", self.schedule, (*SCHEDULES, FLOW))
        one_of("process.prediction", self.prediction, PREDICTIONS)
        one_of("process.weighting", self.weighting, WEIGHTS)
        one_of("process.variance", self.variance, VARIANCES)
        for name in ("gamma", "shift", "deviation"):
            at_least(f"process.{name}", getattr(self, name), 1e-3)
        flow, few = self.schedule == FLOW, self.steps < 2
        with torch.device("cpu"):  # whatever device a network is being built on
            possible = not few and (flow or bool((SCHEDULES[self.schedule](self.steps) < 1).all()))
        if not possible:
            raise UserError(f"steps={self.steps} are too few for a {self.schedule} schedule.")
        if flow and self.learned:
            raise UserError("A learned variance needs a schedule of betas, not schedule=flow.")
        if (flow or self.zero_snr) and self.prediction == "noise":
            raise UserError(
                "prediction=noise says nothing of the picture where there is noise alone, as at "
                "the end of schedule=flow and with zero_snr: choose x0, v, flow or edm."
            )

    @property
    def learned(self) -> bool:
        """Whether the network gives variances too."""
        return self.variance.startswith("learned")


@dataclass(frozen=True)
class Scalings:
    """Karras et al. 2022, table 1: x_0 = skip x / a + out F, F of deviation 1, at one sigma.

    Attributes:
        skip, out, into: the factors of x / a, of the network's output, and of x / a as its input.
    """

    skip: float
    out: float
    into: float

    @classmethod
    def at(cls, sigma: float, deviation: float) -> Scalings:
        """`deviation` is that of the data."""
        whole = math.hypot(sigma, deviation)
        return cls((deviation / whole) ** 2, sigma * deviation / whole, 1 / whole)


def row(table: Tensor, t: Tensor) -> Tensor:
    """(T,) at t (B,) -> (B, 1, 1, 1) float32."""
    return table.to(t.device)[t].float()[:, None, None, None]


class Posterior:
    """q(x_(t-1) | x_t, x_0) of a process, (T,) float64 each (Ho et al. 2020, equation 7)."""

    def __init__(self, process: Process) -> None:
        betas, abar = process.betas, process.abar
        self.abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
        self.of_x0 = betas * self.abar_before.sqrt() / (1 - abar)
        self.of_noised = (1 - self.abar_before) * (1 - betas).sqrt() / (1 - abar)
        self.variance = betas * (1 - self.abar_before) / (1 - abar)
        # at t = 0 it is zero, so there the logarithm is that of t = 1
        self.log_variance = torch.cat([self.variance[1:2], self.variance[1:]]).log()
        self.log_betas = betas.log()
        self.log_large = torch.cat([self.variance[1:2], betas[1:]]).log()

    def mean(self, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W)."""
        return row(self.of_x0, t) * x0 + row(self.of_noised, t) * noised


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
            own = betas is None
            if betas is None:
                betas = SCHEDULES[config.schedule](config.steps)
            self.abar = torch.cumprod(1 - betas, dim=0)
            if config.zero_snr and own:
                self.abar = without_snr_at_end(self.abar)
                betas = 1 - self.abar / torch.cat([self.abar.new_ones(1), self.abar[:-1]])
            self.betas = betas
            self.signal, self.noise = self.abar.sqrt(), (1 - self.abar).sqrt()
        tables = torch.stack([self.signal, self.noise]).float()  # (2, T)
        self._tables = {tables.device: tables}
        self._log_sigmas: list[float] = (self.noise / self.signal).log().tolist()

    def respaced(self, kept: Sequence[int]) -> Process:
        """The process of some of the steps, `kept` in rising order: their abar stay as they are,
        and the betas between them follow.
        """
        abar = self.abar[list(kept)]
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return Process(self.config, betas, [self.times[t] for t in kept])

    @cached_property
    def posterior(self) -> Posterior:
        """Tables of q(x_(t-1) | x_t, x_0)."""
        return Posterior(self)

    # --- levels ---

    def point(self, t: int) -> Point:
        """Step t."""
        return Point(float(self.signal[t]), float(self.noise[t]), float(self.times[t]))

    def at(self, sigma: float) -> Point:
        """The level of a sigma, its time interpolated in log sigma between steps."""
        step = self.time(sigma)
        below = min(int(step), self.steps - 2)
        low, high = self.times[below : below + 2]
        told = low + (step - below) * (high - low)
        if math.isinf(sigma):
            return Point(0.0, 1.0, told)
        signal = 1 / (1 + sigma) if self.straight else 1 / math.hypot(1, sigma)
        return Point(signal, sigma * signal, told)

    def time(self, sigma: float) -> float:
        """The number of the step that has this sigma; between steps, by the logarithms."""
        wanted, table = math.log(max(sigma, 1e-12)), self._log_sigmas
        above = min(max(bisect.bisect_left(table, wanted), 1), len(table) - 1)
        low, high = table[above - 1], table[above]
        if math.isinf(high):  # noise alone
            return float(above if math.isinf(wanted) else above - 1)
        return above - 1 + min(max((wanted - low) / (high - low), 0.0), 1.0)

    def nearest(self, sigma: float) -> int:
        """The step whose sigma is nearest, by the logarithms."""
        if math.isinf(sigma):
            return self.steps - 1
        wanted = math.log(max(sigma, 1e-12))
        return min(range(self.steps), key=lambda t: abs(self._log_sigmas[t] - wanted))

    def sigma(self, time: float) -> float:
        """The sigma of a step, or between two of them, by the logarithms."""
        time = min(max(time, 0.0), self.steps - 1.0)
        below = min(int(time), self.steps - 2)
        low, high = self._log_sigmas[below], self._log_sigmas[below + 1]
        return math.exp(low + (time - below) * (high - low) if time > below else low)

    def path(self, steps: int, spacing: str = "even") -> Path:
        """`steps` levels from noise on, and the clean picture at the end.

        Args:
            spacing: `even` in t, both ends among them; `leading` as the code of latent diffusion,
                which adds 1; `trailing` as Lin et al.; `karras` or `exponential` in sigma.
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
                "leading": lambda: leading_times(self.steps, steps, int(steps < self.steps)),
                "trailing": lambda: trailing_times(self.steps, steps),
            }[spacing]()
            points = [self.point(t) for t in times]
            if self.straight and self.config.shift != 1:
                levels = [shifted(point.noise, self.config.shift) for point in points]
                points = [Point(1 - s, s, max(s * self.steps - 1, 0.0)) for s in levels]
        return Path((*points, CLEAN), self.at)

    # --- forward ---

    def levels(self, at: Tensor | Point) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """a and b: of steps t (B,), each (B, 1, 1, 1); or of one level, two numbers."""
        if isinstance(at, Point):
            return at.signal, at.noise
        if at.device not in self._tables:
            self._tables[at.device] = self._tables[torch.device("cpu")].to(at.device)
        signal, noise = self._tables[at.device][:, at, None, None, None]  # (B, 1, 1, 1) each
        return signal, noise

    def noised(self, x0: Tensor, noise: Tensor, at: Tensor | Point) -> Tensor:
        """x_t; x0 and noise (B, C, H, W)."""
        a, b = self.levels(at)
        return a * x0 + b * noise

    # --- what the network's output means ---

    def target(self, x0: Tensor, noise: Tensor, at: Tensor | Point) -> Tensor:
        """What the network should give for x_t."""
        if self.config.prediction == "noise":
            return noise
        if self.config.prediction == "x0":
            return x0
        if self.config.prediction == "flow":
            return noise - x0
        a, b = self.levels(at)
        if self.config.prediction == "edm":
            skip, out = self._share_and_rest(a, b)
            return (x0 - skip * (a * x0 + b * noise)) / out
        return a * noise - b * x0

    def _share_and_rest(
        self, a: Tensor | float, b: Tensor | float
    ) -> tuple[Tensor | float, Tensor | float]:
        """What x_t and the network's output count in x_0 under `edm`: `Scalings`, without the
        division by a, which may be 0.
        """
        deviation = self.config.deviation
        square = b * b + (a * deviation) ** 2
        return a * deviation**2 / square, b * deviation / square**0.5

    def to_x0(self, output: Tensor, noised: Tensor, at: Tensor | Point) -> Tensor:
        """The network's output for x_t, read as an estimate of x_0."""
        if self.config.prediction == "x0":
            return output
        a, b = self.levels(at)
        if self.config.prediction == "edm":
            skip, out = self._share_and_rest(a, b)
            return skip * noised + out * output
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

    def weight(self, at: Tensor | Point) -> Tensor:
        """(B,), or (1,) of one level, what the squared error of each row counts."""
        a, b = (torch.as_tensor(level).flatten().double() for level in self.levels(at))
        if self.config.weighting == "simple":
            return torch.ones_like(a, dtype=torch.float32)
        snr = (a / b) ** 2
        cut = snr.clamp(max=self.config.gamma)  # the weight of |x_0 - estimate|^2
        per_output = {
            "x0": torch.ones_like(snr),
            "noise": 1 / snr.clamp(min=1e-12),  # |x_0 error|^2 = |eps error|^2 / snr
            "v": (b / (a * a + b * b)) ** 2,
            "flow": (b / (a + b)) ** 2,
            "edm": self._share_and_rest(a, b)[1] ** 2,
        }
        return (cut * per_output[self.config.prediction]).float()

    def mse(self, output: Tensor, x0: Tensor, noise: Tensor, at: Tensor | Point) -> Tensor:
        """(B,) the mean square of equation 14 over each picture, weighted."""
        error = (output.float() - self.target(x0, noise, at)).square().flatten(1).mean(1)
        return error * self.weight(at).to(error.device)
