"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with one product for all matrices
of a shape.

    M = lerp(M, G, 1 - mu);   W = (1 - lr wd) W - lr 0.2 sqrt(max(R, S)) NS(lerp(G, M, mu))

NS brings all singular values close to 1 (Newton-Schulz). The plain line is `torch.optim.Muon`; it
takes one matrix after another, and products of small matrices last as long as their calls and
leave a second thread without work.

Axes: K matrices of one shape, R rows, S columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineage.training.machine import bfloat16_is_fast


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, computed faster."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; without closure."""
        for part in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(part, params, grads, momenta)
            if params:
                torch._foreach_lerp_(momenta, grads, 1 - part["momentum"])
                updates = torch._foreach_lerp(grads, momenta, part["momentum"])
                self._apply(params, list(updates), part)

    def _apply(self, params: list[Tensor], updates: list[Tensor], part: dict[str, Any]) -> None:
        """Subtract the updates, made orthogonal, from the weights."""
        shapes: dict[torch.Size, list[int]] = {}
        for number, param in enumerate(params):
            shapes.setdefault(param.shape, []).append(number)
        torch._foreach_mul_(params, 1 - part["lr"] * part["weight_decay"])
        for shape, numbers in shapes.items():
            stacked = torch.stack([updates[number] for number in numbers])
            orthogonal = newton_schulz(
                stacked, part["ns_coefficients"], part["ns_steps"], part["eps"]
            )
            lr = part["lr"] * 0.2 * math.sqrt(max(shape))
            weights = [params[number] for number in numbers]
            torch._foreach_add_(weights, orthogonal.float().unbind(), alpha=-lr)


def newton_schulz(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices (K, R, S) with all their singular values close to 1, in bfloat16 where the device
    has the instructions for it, otherwise in float32, which is then several times as fast.

    `steps` times X = a X + b (X X^T) X + c (X X^T)^2 X, from X of norm 1.
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if bfloat16_is_fast(matrices.device) else matrices.float()
    if x.shape[1] > x.shape[2]:  # the smaller of X X^T and X^T X
        return newton_schulz(matrices.mT, coefficients, steps, eps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
