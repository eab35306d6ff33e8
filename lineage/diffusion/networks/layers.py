"""Small layers that several denoising networks share."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t (B,) at falling frequencies, (B, width).

    cos(t 10000^(-k / half)) for k = 0 .. half - 1, then the sines (Vaswani et al. 2017, section
    3.5, with the cosines first, as in the authors' code).
    """
    half = width // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_module(module: M) -> M:
    """`module` with its parameters set to zero, so that its residual block starts as the
    identity.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
