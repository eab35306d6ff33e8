"""Guidance without a classifier, and what was added to it.

    guided      out = without + scale (towards - without); `without` is the network told nothing, or
                told a negative prompt     (Ho and Salimans 2022, arXiv:2207.12598, equation 6)
    rescale     brings the deviation of `out` back to that of `towards`
                (Lin et al. 2023, arXiv:2305.08891, equations 15 and 16)
    interval    guidance only at noise levels between two sigmas
                (Kynkäänniemi et al. 2024, arXiv:2404.07724, equation 5)
    thresholds  x_0 kept within [-1, 1]: clipped, or scaled by a quantile
                (Saharia et al. 2022, arXiv:2205.11487, section 2.3)

All act on what the network gives, whatever that predicts, but for the thresholds, which act on x_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineage.errors import UserError

THRESHOLDS = ("none", "clip", "dynamic")


@dataclass(frozen=True)
class Guidance:
    """How outputs with and without the caption are joined.

    Attributes:
        scale: 1 follows the caption as training did, more follows it more closely.
        rescale: share of the deviation that is brought back, from 0 to 1.
        least, most: sigmas between which there is guidance.
    """

    scale: float = 1.0
    rescale: float = 0.0
    least: float = 0.0
    most: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale} must be from 0 to 1.")
        if not 0 <= self.least <= self.most:
            raise UserError(
                f"interval={self.least},{self.most} must be two sigmas, the smaller one first."
            )

    def acts(self, sigma: float) -> bool:
        """Whether `without` is needed at a noise level."""
        return self.scale != 1 and self.least <= sigma <= self.most

    def join(self, towards: Tensor, without: Tensor) -> Tensor:
        """(B, C, H, W) each."""
        guided = without + self.scale * (towards - without)
        if self.rescale == 0:
            return guided
        wanted, now = (deviation(x) for x in (towards, guided))
        return guided * (1 + self.rescale * (wanted / now.clamp(min=1e-8) - 1))


def deviation(x: Tensor) -> Tensor:
    """Of each row, (B, 1, 1, 1)."""
    return x.flatten(1).std(1)[:, None, None, None]


def bounded(x0: Tensor, threshold: str, quantile: float = 0.995) -> Tensor:
    """x_0 within [-1, 1], as `threshold` says.

    `dynamic`: what `quantile` of the values of a picture do not pass, if it is more than 1, becomes
    1, and the rest of the picture follows.
    """
    if threshold == "none":
        return x0
    if threshold == "clip":
        return x0.clamp(-1, 1)
    largest = torch.quantile(x0.float().abs().flatten(1), quantile, dim=1).clamp(min=1)
    largest = largest[:, None, None, None].to(x0.dtype)
    return x0.clamp(-largest, largest) / largest
