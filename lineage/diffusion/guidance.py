"""Classifier-free guidance, and what was added to it.

    combine     out = uncond + scale (cond - uncond); `uncond` is the prediction without a caption
                or for a negative prompt (Ho and Salimans 2022, arXiv:2207.12598, equation 6)
    rescale     scales `out` back towards the standard deviation of `cond`
                (Lin et al. 2023, arXiv:2305.08891, equations 15 and 16)
    interval    guidance only between two karras_sigmas
                (Kynkäänniemi et al. 2024, arXiv:2404.07724, equation 5)
    threshold   clips x_0 to [-1, 1], or divides it by a quantile
                (Saharia et al. 2022, arXiv:2205.11487, section 2.3)

Guidance acts on the network's output, whatever it predicts; thresholds act on x_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lineage.errors import UserError

Threshold = Literal["none", "clip", "dynamic"]
THRESHOLDS: tuple[str, ...] = get_args(Threshold)


@dataclass(frozen=True)
class Guidance:
    """How predictions with and without the caption are combined.

    Attributes:
        scale: Guidance scale; 1 is no guidance.
        rescale: Share of the standard deviation of `cond` that is restored, from 0 to 1.
        sigma_min, sigma_max: Interval of karras_sigmas in which guidance acts.
    """

    scale: float = 1.0
    rescale: float = 0.0
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale} must be from 0 to 1.")
        if not 0 <= self.sigma_min <= self.sigma_max:
            raise UserError(
                f"interval={self.sigma_min},{self.sigma_max} must be two sigmas, the smaller first."
            )

    def acts(self, karras_sigma: float) -> bool:
        """If true, `uncond` is needed at this noise level."""
        return self.scale != 1 and self.sigma_min <= karras_sigma <= self.sigma_max

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided prediction of two predictions, (B, C, H, W) each."""
        guided = uncond + self.scale * (cond - uncond)
        if self.rescale == 0:
            return guided
        factor = std(cond) / std(guided).clamp(min=1e-8)
        return guided * (1 + self.rescale * (factor - 1))


def std(x: Tensor) -> Tensor:
    """Standard deviation of each row, (B, 1, 1, 1)."""
    return x.flatten(1).std(1)[:, None, None, None]


def apply_threshold(x0: Tensor, threshold: str, quantile: float = 0.995) -> Tensor:
    """x_0 within [-1, 1].

    Args:
        threshold: `none`, `clip`, or `dynamic`: values are clipped to [-s, s] and divided by s, the
            quantile of a picture's absolute values or 1 if that is larger.
        quantile: Quantile of `dynamic`.
    """
    if threshold == "none":
        return x0
    if threshold == "clip":
        return x0.clamp(-1, 1)
    s = torch.quantile(x0.float().abs().flatten(1), quantile, dim=1).clamp(min=1)
    s = s[:, None, None, None].to(x0.dtype)
    return x0.clamp(-s, s) / s
