"""The diffusion process: its noise schedule, what the network predicts, and the loss. No network is
known here.

    forward     x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                   (Ho et al. 2020,
                equation 4)
    loss        E_t,x0,eps |target - network(x_t, t)|^2                          (equation 14, for
                target = eps)
    posterior   q(x_s | x_t, x_0) for s < t                                      (equations 6 and 7,
                any stride)

Schedules: `linear` (Ho et al. 2020, section 4: beta from 1e-4 to 0.02 over 1,000 steps) and
    `cosine` (Nichol and
Dhariwal 2021, equation 17). Predictions: `noise` (the paper's), `x0`, and `v` = sqrt(abar) eps -
sqrt(1 - abar) x_0 (Salimans and Ho 2022, appendix D).

Tables are made in float64 and used in float32. Axes: B pictures, T steps; t counts from 0 to T - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.errors import UserError, nearest


def linear_betas(steps: int) -> Tensor:
    """(T,) beta from 1e-4 to 0.02; shorter chains get proportionally larger steps."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def cosine_betas(steps: int) -> Tensor:
    """(T,) beta such that abar(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2), clipped at 0.999."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
PREDICTIONS = ("noise", "x0", "v")


@dataclass(frozen=True)
class ProcessConfig:
    """A diffusion process.

    Attributes:
        steps: T.
        schedule: `linear` or `cosine`.
        prediction: what the network gives: `noise`, `x0` or `v`.
    """

    steps: int = 1000
    schedule: str = "linear"
    prediction: str = "noise"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"There is no schedule {self.schedule!r}: {nearest(self.schedule, SCHEDULES)}"
            )
        if self.prediction not in PREDICTIONS:
            hint = nearest(self.prediction, PREDICTIONS)
            raise UserError(f"There is no prediction {self.prediction!r}: {hint}")
        if self.steps < 2 or not bool((SCHEDULES[self.schedule](self.steps) < 1).all()):
            raise UserError(f"steps={self.steps} are too few for a {self.schedule} schedule.")


class Process:
    """Owns the schedule, the meaning of the network's output, and the loss."""

    def __init__(self, config: ProcessConfig) -> None:
        self.config = config
        self.steps = config.steps
        self.betas = SCHEDULES[config.schedule](config.steps)  # (T,) float64
        self.abar = torch.cumprod(1 - self.betas, dim=0)  # (T,) float64
        self._roots = torch.stack([self.abar.sqrt(), (1 - self.abar).sqrt()]).float()  # (2, T)

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) -> sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1)."""
        if self._roots.device != t.device:
            self._roots = self._roots.to(t.device)
        signal, sigma = self._roots[:, t, None, None, None]  # (B, 1, 1, 1) each
        return signal, sigma

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of equation 4; x0 and noise (B, 3, H, W), t (B,)."""
        signal, sigma = self.signal_and_noise(t)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should give for x_t."""
        if self.config.prediction == "noise":
            return noise
        if self.config.prediction == "x0":
            return x0
        signal, sigma = self.signal_and_noise(t)
        return signal * noise - sigma * x0

    def to_x0(self, output: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The network's output for x_t, read as an estimate of x_0."""
        if self.config.prediction == "x0":
            return output
        signal, sigma = self.signal_and_noise(t)
        if self.config.prediction == "noise":
            return (noised - sigma * output) / signal
        return signal * noised - sigma * output

    def to_noise(self, x0: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """The eps that makes x_t of x_0."""
        signal, sigma = self.signal_and_noise(t)
        return (noised - signal * x0) / sigma

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The mean square of equation 14: scalar, a mean over batch and pixels."""
        return torch.nn.functional.mse_loss(output.float(), self.target(x0, noise, t))
