"""The diffusion process: its schedule, the meaning of the network's output, and the loss weight.

    forward     x_t = alpha_t x_0 + sigma_t eps         `add_noise`    (Ho et al. 2020, equation 4)
    posterior   q(x_(t-1) | x_t, x_0)                   `Posterior`                 (equation 6, 7)
    loss        E w_t |target - network(x_t, t)|^2      `target`, `loss_weight`       (equation 14)

alpha_t = sqrt(alphabar_t) and sigma_t = sqrt(1 - alphabar_t) of Ho's alphabar_t (alphas_cumprod);
karras_sigma = sigma / alpha is the sigma of Karras et al. Schedules, and the noise levels that
samplers visit, are in `schedules.py`. Any prediction can be combined with any schedule, except
`noise` with one that ends at pure noise:
    noise   eps                                                            (Ho et al. 2020)
    x0      x_0
    v       alpha eps - sigma x_0               (Salimans and Ho 2022, arXiv:2202.00512)
    flow    eps - x_0, the velocity of the straight line of schedule `flow`, with time from data to
            noise                                            (Liu et al. 2022, arXiv:2209.03003)
    edm     F with x_0 = c_skip x + c_out F; only these two of Karras et al. 2022 (arXiv:2206.00364,
            table 1), rescaled from x / alpha to x
Loss weights: `simple`, w_t = 1; `min_snr`, min(SNR, gamma) on the squared error of x_0, with SNR =
    alpha^2 / sigma^2 (Hang et al. 2023, arXiv:2303.09556, section 3.4).
Variances of p(x_(t-1) | x_t): `fixed_small` beta~_t, `fixed_large` beta_t (Ho et al. 2020, section
    3.2), `learned`, and `learned_range` between the two (Nichol and Dhariwal 2021, eq. 15); their
    loss is in `bound.py`.

Tables are computed in float64 and used in float32. Axes: B pictures, C H W, T timesteps; t counts
from 0 (almost no noise) to T - 1 (almost pure noise).
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, TypeVar, get_args

import torch
from pydantic import Field
from torch import Tensor

from lineage.bounds import Int, PositiveFloat
from lineage.config import configuration, typed
from lineage.diffusion.schedules import (
    FLOW,
    NO_NOISE,
    SCHEDULES,
    SIGMA_MAX,
    NoiseLevel,
    SamplingSchedule,
    Spacing,
    even_timesteps,
    exponential_sigmas,
    karras_sigmas,
    leading_timesteps,
    rescale_zero_terminal_snr,
    shift_sigma,
    trailing_timesteps,
)
from lineage.errors import UserError

Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[str, ...] = get_args(Variance)
Coefficient = TypeVar("Coefficient", Tensor, float)


@configuration
class ProcessConfig:
    """A diffusion process, under the names of the header.

    Attributes:
        num_timesteps: Number of timesteps T.
        schedule: Noise schedule: `linear`, `scaled_linear`, `cosine`, `sigmoid` or `flow`.
        prediction: Target of the network: `noise`, `x0`, `v`, `flow` or `edm`.
        weighting: Weight of the loss over t: `simple` or `min_snr`.
        snr_gamma: Signal-to-noise ratio at which `min_snr` clips.
        variance: Variance of p(x_(t-1) | x_t); the network has twice the channels for `learned` and
            `learned_range`.
        shift: Timestep shift s of Esser et al. 2024 (arXiv:2403.03206) for `flow`: a sampler visits
            s sigma / (1 + (s - 1) sigma).
        sigma_data: Standard deviation of the pictures' values, for `edm`.
        zero_snr: If true, the last timestep is pure noise (zero terminal SNR, Lin et al. 2023,
            arXiv:2305.08891). Not for `noise`: eps does not determine x_0 there.
    """

    num_timesteps: Annotated[Int, Field(ge=2, le=100_000)] = 1000
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"] = "linear"
    prediction: Literal["noise", "x0", "v", "flow", "edm"] = "noise"
    weighting: Literal["simple", "min_snr"] = "simple"
    snr_gamma: PositiveFloat = 5.0
    variance: Variance = "fixed_small"
    shift: PositiveFloat = 1.0
    sigma_data: PositiveFloat = 0.5
    zero_snr: bool = False

    def __post_init__(self) -> None:
        is_flow = self.schedule == FLOW
        with torch.device("cpu"):  # real values, even where PyTorch's default device is `meta`
            if not is_flow and (SCHEDULES[self.schedule](self.num_timesteps) >= 1).any():
                raise UserError(
                    f"num_timesteps={self.num_timesteps} is too small for schedule={self.schedule}."
                )
        if is_flow and self.learns_variance:
            raise UserError("A learned variance needs a schedule of betas, not schedule=flow.")
        if (is_flow or self.zero_snr) and self.prediction == "noise":
            raise UserError(
                "prediction=noise does not determine the picture at pure noise, as at the end of "
                "schedule=flow and with zero_snr: choose x0, v, flow or edm."
            )

    @property
    def learns_variance(self) -> bool:
        """If true, the network predicts variances too."""
        return self.variance.startswith("learned")


# --- what the network predicts ------------------------------------------------------------------


class Prediction(ABC):
    """The meaning of the network's output at x = alpha x_0 + sigma eps.

    alpha and sigma are numbers, or (B, 1, 1, 1).

    Args:
        sigma_data: Standard deviation of the data, for `edm`.
    """

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Output of a perfect network."""

    @abstractmethod
    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Estimate of x_0 that the output implies."""

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(d x_0 / d output)^2: a squared error of the output times this is that of x_0."""
        return self.to_x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma) ** 2


class NoisePrediction(Prediction):
    """The noise eps."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return eps

    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x - sigma * output) / alpha


class X0Prediction(Prediction):
    """The picture x_0."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return x0

    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return output


class VPrediction(Prediction):
    """The velocity v = alpha eps - sigma x_0."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return alpha * eps - sigma * x0

    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (alpha * x - sigma * output) / (alpha * alpha + sigma * sigma)


class FlowPrediction(Prediction):
    """The velocity eps - x_0 of the straight line."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return eps - x0

    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        return (x - sigma * output) / (alpha + sigma)


class EDMPrediction(Prediction):
    """F with x_0 = c_skip x + c_out F, of standard deviation 1 at every level."""

    def c_skip_and_out(
        self, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[Coefficient, Coefficient]:
        """c_skip and c_out of table 1 for x instead of x / alpha, since alpha may be 0."""
        variance = sigma * sigma + (alpha * self.sigma_data) ** 2  # of x
        return alpha * self.sigma_data**2 / variance, sigma * self.sigma_data / variance**0.5

    def target(self, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        c_skip, c_out = self.c_skip_and_out(alpha, sigma)
        return (x0 - c_skip * (alpha * x0 + sigma * eps)) / c_out

    def to_x0(self, output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        c_skip, c_out = self.c_skip_and_out(alpha, sigma)
        return c_skip * x + c_out * output


PREDICTIONS: dict[str, type[Prediction]] = {
    "noise": NoisePrediction,
    "x0": X0Prediction,
    "v": VPrediction,
    "flow": FlowPrediction,
    "edm": EDMPrediction,
}


# --- the process --------------------------------------------------------------------------------


def gather(table: Tensor, t: Tensor) -> Tensor:
    """Rows t (B,) of a table (T,) -> (B, 1, 1, 1) float32."""
    return table.to(t.device)[t].float()[:, None, None, None]


class Posterior:
    """q(x_(t-1) | x_t, x_0) of a process, as tables (T,) in float64 (Ho et al. 2020, equation 7):

    mean = x0_coef x_0 + xt_coef x_t, and variance = beta~_t.
    """

    def __init__(self, process: Process) -> None:
        betas, alphas_cumprod = process.betas, process.alphas_cumprod
        self.alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        self.x0_coef = betas * self.alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.xt_coef = (1 - self.alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)
        self.variance = betas * (1 - self.alphas_cumprod_prev) / (1 - alphas_cumprod)
        # the variance is 0 at t = 0: the logarithm there is that of t = 1
        self.log_variance = torch.cat([self.variance[1:2], self.variance[1:]]).log()
        self.log_betas = betas.log()
        self.log_large = torch.cat([self.variance[1:2], betas[1:]]).log()

    def mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean of x_(t-1) given x_0 and x_t, (B, C, H, W)."""
        return gather(self.x0_coef, t) * x0 + gather(self.xt_coef, t) * x


class Process:
    """The schedule, the meaning of the network's output, and the weight of the loss.

    Methods take a noise level as timesteps (B,), as in training, or as one `NoiseLevel`, as in
    sampling.

    Attributes:
        alpha, sigma: (T,) float64.
        betas, alphas_cumprod: (T,) float64; `flow` has none.
        prediction: Meaning of the network's output.

    Args:
        config: Schedule, prediction and loss.
        betas: Betas (T,) float64 in place of the schedule's.
        timesteps: Timestep that the network gets at each of the T steps, as in respacing; by
            default 0 to T - 1.
    """

    def __init__(
        self,
        config: ProcessConfig,
        betas: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps if betas is None else len(betas)
        self.timesteps = list(range(self.num_timesteps)) if timesteps is None else list(timesteps)
        self.prediction = PREDICTIONS[config.prediction](config.sigma_data)
        self.is_flow = config.schedule == FLOW and betas is None
        with torch.device("cpu"):  # real values, even where PyTorch's default device is `meta`
            self._make_tables(betas)
        self._tables: dict[torch.device, Tensor] = {}  # alpha and sigma (2, T) in float32
        self._log_sigmas: list[float] = (self.sigma / self.alpha).log().tolist()

    def _make_tables(self, betas: Tensor | None) -> None:
        config, num_timesteps = self.config, self.num_timesteps
        if self.is_flow:
            self.sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
            self.alpha = 1 - self.sigma
            return
        if betas is None:
            betas = SCHEDULES[config.schedule](num_timesteps)
            betas = rescale_zero_terminal_snr(betas) if config.zero_snr else betas
        self.betas, self.alphas_cumprod = betas, torch.cumprod(1 - betas, dim=0)
        self.alpha, self.sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def posterior(self) -> Posterior:
        """Tables of q(x_(t-1) | x_t, x_0)."""
        return Posterior(self)

    # --- noise levels ---

    def level(self, t: int) -> NoiseLevel:
        """Noise level of step t."""
        return NoiseLevel(float(self.alpha[t]), float(self.sigma[t]), float(self.timesteps[t]))

    def level_at(self, karras_sigma: float) -> NoiseLevel:
        """Noise level of a karras_sigma; between two steps, its timestep is interpolated in
        log(karras_sigma).
        """
        log_sigma, table = math.log(max(karras_sigma, 1e-12)), self._log_sigmas
        high = min(max(bisect.bisect_left(table, log_sigma), 1), len(table) - 1)
        low = high - 1
        if math.isinf(table[high]):  # pure noise: nothing lies between it and the step before
            weight = float(math.isinf(log_sigma))
        else:
            weight = (log_sigma - table[low]) / (table[high] - table[low])
            weight = min(max(weight, 0.0), 1.0)
        timestep = self.timesteps[low] + weight * (self.timesteps[high] - self.timesteps[low])
        if math.isinf(karras_sigma):
            return NoiseLevel(0.0, 1.0, timestep)
        alpha = 1 / (1 + karras_sigma) if self.is_flow else 1 / math.hypot(1, karras_sigma)
        return NoiseLevel(alpha, karras_sigma * alpha, timestep)

    def sampling_schedule(self, sampling_steps: int, spacing: str = "even") -> SamplingSchedule:
        """Noise levels of `sampling_steps` steps, from noise to the picture.

        Args:
            sampling_steps: Number of steps, from 1 to T.
            spacing: How the levels are spaced: `even` in t, both ends included (diffusers'
                `linspace`); `leading`, as in the code of latent diffusion, which adds 1;
                `trailing`, as Lin et al. 2023; `karras` or
                `exponential` in karras_sigma.
        """
        typed(Spacing, spacing, "spacing")
        n, num_timesteps = sampling_steps, self.num_timesteps
        if not 1 <= n <= num_timesteps:
            raise UserError(f"sampling_steps={n} must be from 1 to {num_timesteps}.")
        if spacing in ("karras", "exponential"):
            sigma_min, sigma_max = (self.level(t).karras_sigma for t in (0, num_timesteps - 1))
            make_sigmas = karras_sigmas if spacing == "karras" else exponential_sigmas
            levels = map(self.level_at, make_sigmas(n, sigma_min, min(sigma_max, SIGMA_MAX)))
        else:
            timesteps = {
                "even": even_timesteps(num_timesteps, n),
                "leading": leading_timesteps(num_timesteps, n, offset=int(n < num_timesteps)),
                "trailing": trailing_timesteps(num_timesteps, n),
            }[spacing]
            levels = map(self._shift, map(self.level, timesteps))
        return SamplingSchedule((*levels, NO_NOISE), self.level_at)

    def _shift(self, level: NoiseLevel) -> NoiseLevel:
        """The level moved by `shift`, on the straight line."""
        if not self.is_flow or self.config.shift == 1:
            return level
        sigma = shift_sigma(level.sigma, self.config.shift)
        return NoiseLevel(1 - sigma, sigma, max(sigma * self.num_timesteps - 1, 0.0))

    # --- forward process and predictions ---

    def alpha_sigma(self, t: Tensor | NoiseLevel) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """alpha and sigma: of timesteps t (B,), each (B, 1, 1, 1) float32; of a level, numbers."""
        if isinstance(t, NoiseLevel):
            return t.alpha, t.sigma
        if t.device not in self._tables:
            self._tables[t.device] = torch.stack([self.alpha, self.sigma]).float().to(t.device)
        alpha, sigma = self._tables[t.device][:, t, None, None, None]
        return alpha, sigma

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | NoiseLevel) -> Tensor:
        """x_t of x_0 and eps (B, C, H, W)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor | NoiseLevel) -> Tensor:
        """Target of the network at x_t."""
        return self.prediction.target(x0, eps, *self.alpha_sigma(t))

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor | NoiseLevel) -> Tensor:
        """Estimate of x_0 from the network's output at x_t."""
        return self.prediction.to_x0(output, x, *self.alpha_sigma(t))

    def to_noise(self, x0: Tensor, x: Tensor, t: Tensor | NoiseLevel) -> Tensor:
        """The eps that leads from x_0 to x_t."""
        alpha, sigma = self.alpha_sigma(t)
        return (x - alpha * x0) / sigma

    def loss_weight(self, t: Tensor | NoiseLevel) -> Tensor:
        """Weight of the squared error of each row, (B,) float32; (1,) for a level."""
        alpha, sigma = (torch.as_tensor(x).flatten().double() for x in self.alpha_sigma(t))
        if self.config.weighting == "simple":
            return torch.ones_like(alpha, dtype=torch.float32)
        snr = (alpha / sigma) ** 2
        x0_weight = snr.clamp(max=self.config.snr_gamma)
        return (x0_weight * self.prediction.weight(alpha, sigma)).float()
