"""Samplers on the noise of a reference file, with their trajectories, for verifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineage.diffusion.samplers.base import Denoise, Estimate, Sampler
from lineage.diffusion.schedules import NoiseLevel, SamplingSchedule
from lineage.nn.noise import NoiseStreams


class FileNoise(NoiseStreams):
    """Noise of a file, (n, B, C, H, W), in the order in which the official code drew it."""

    def __init__(self, noise: Tensor | None = None) -> None:
        super().__init__([])
        self._remaining = [] if noise is None else list(noise)

    def randn(self, *shape: int) -> Tensor:
        return self._remaining.pop(0)


class Recorder:
    """A denoiser that records x and the estimate of x_0 of every evaluation."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.x: list[Tensor] = []
        self.x0: list[Tensor] = []

    def __call__(self, x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = self.denoise(x, level)
        self.x.append(x)
        self.x0.append(estimate.x0)
        return estimate


def trajectory(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    schedule: SamplingSchedule,
    noise: Tensor | None = None,
    **own: Any,
) -> Tensor:
    """x at every step, as the callback receives it, and at the end."""
    xs: list[Tensor] = []
    last = sampler(denoise, x, schedule, FileNoise(noise), lambda step, x, x0: xs.append(x), **own)
    return torch.stack([*xs, last])
