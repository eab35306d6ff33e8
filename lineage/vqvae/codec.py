"""The contract of a codec: pictures to grids of codes and back.

    Codec    `encode`, `decode`, `num_codes`, `factor`: `vqvae.py`, `dalle.py` and `vqgan.py`

A codec is trained on pictures alone. It also gives the density of a picture under its codes
(`nll`), so that codec and prior together can be measured in bits per dimension.

Axes: B pictures, K codes, H W grid of codes, S side, N = H W.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lineage.system import Trainable
from lineage.vqvae.quantise import diagnose_usage

MSE_DECAY = 0.99
"""Decay of the moving average of the squared error."""
HALF_STEP = 1 / 255
"""Half the distance of two neighbouring byte values, in pixels from -1 to 1."""


class Codec(Trainable):
    """Pictures to codes and back.

    Attributes:
        num_codes: K, number of different codes.
        factor: Number of pixels on a side of one grid cell.
    """

    num_codes: int
    factor: int
    running_mse: Tensor
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.text = None
        self.register_buffer("running_mse", torch.ones(()))  # of pixels in [-1, 1]
        self.register_buffer("num_batches_tracked", torch.zeros(()))

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] -> int64 codes (B, S / factor, S / factor)."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Codes (B, H, W) -> pictures (B, 3, factor H, factor W) in [-1, 1]."""

    def nll(self, image: Tensor, ids: Tensor) -> Tensor:
        """-ln p(image | ids) of pictures whose pixels are bytes, (B,) in nats.

        p is a Gaussian around the decoded pixel, with the squared error of training as variance,
        integrated over the width of a byte. The tails belong to black and white.
        """
        mean, std = self.decode(ids), self.running_mse.clamp(min=1e-6).sqrt()
        low = torch.where(image <= -1 + HALF_STEP, -torch.inf, image - HALF_STEP)
        high = torch.where(image >= 1 - HALF_STEP, torch.inf, image + HALF_STEP)
        return -log_interval_probability(normal_cdf, (low - mean) / std, (high - mean) / std)

    @torch.no_grad()
    def track_mse(self, image: Tensor, decoded: Tensor) -> Tensor:
        """Squared error of this step, which also enters the moving average."""
        mse = (decoded.float().clamp(-1, 1) - image).square().mean()
        self.num_batches_tracked += 1
        # a plain mean over the first 100 steps, so that the initial value has no weight
        rate = (1 / self.num_batches_tracked).clamp(min=1 - MSE_DECAY)
        self.running_mse.lerp_(mse, rate)
        return mse

    def diagnose(self, means: Mapping[str, float]) -> str:
        """Name a collapse of the codebook."""
        return diagnose_usage(means)


def normal_cdf(x: Tensor) -> Tensor:
    """Cumulative distribution of the standard normal; accurate far out on the left."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def log_interval_probability(cdf: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """ln(cdf(high) - cdf(low)) of a symmetric distribution, summed over all but the first axis:
    (B, ...) -> (B,).
    """
    # intervals on the right are mirrored to the left, where a small probability is not the
    # difference of two numbers close to 1
    on_right = low + high > 0
    low, high = torch.where(on_right, -high, low), torch.where(on_right, -low, high)
    return (cdf(high) - cdf(low)).clamp(min=1e-30).log().flatten(1).sum(1)
