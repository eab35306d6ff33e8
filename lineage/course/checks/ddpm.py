"""Checks of `08_ddpm`.

Axes: B pictures, N pictures of a data set, T timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched
from lineage.diffusion.schedules import cosine_betas


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_0, t, eps, betas and alphas_cumprod of a batch of two pictures and T = 10."""
    x0, eps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    betas = cosine_betas(10).float()
    return x0, torch.tensor([3, 7]), eps, betas, torch.cumprod(1 - betas, 0)


def _rows(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


@exercise(points=2)
def q_sample(answer: Any) -> None:
    """x_t of equation 4 of Ho et al. 2020."""
    x0, t, eps, _, abar = _inputs()
    a = _rows(abar, t)
    value = untouched(answer, x0, t, eps, abar)
    expect(
        value,
        a.sqrt() * x0 + (1 - a).sqrt() * eps,
        mistakes={
            "multiplies x_0 by alphas_cumprod itself: its square root is missing": a * x0
            + (1 - a).sqrt() * eps,
            "multiplies eps by 1 - alphas_cumprod itself: its square root is missing": a.sqrt() * x0
            + (1 - a) * eps,
            "has no square roots: alphas_cumprod is a variance, and x_t needs deviations": a * x0
            + (1 - a) * eps,
            "exchanges the two factors: x_0 should fade as t grows": (1 - a).sqrt() * x0
            + a.sqrt() * eps,
            "subtracts the noise: it should be added": a.sqrt() * x0 - (1 - a).sqrt() * eps,
            "reads alphas_cumprod one step too early (t - 1)": _rows(abar, t - 1).sqrt() * x0
            + (1 - _rows(abar, t - 1)).sqrt() * eps,
            "reads alphas_cumprod one step too late (t + 1)": _rows(abar, t + 1).sqrt() * x0
            + (1 - _rows(abar, t + 1)).sqrt() * eps,
            "gives all pictures the noise level of the first": abar[t[0]].sqrt() * x0
            + (1 - abar[t[0]]).sqrt() * eps,
        },
    )
    x0.requires_grad_()
    expect_gradient(answer(x0, t, eps, abar), x0, "x_t to x_0")


@exercise()
def x0_from_noise(answer: Any) -> None:
    """x_0 that x_t and eps imply: equation 4 solved for x_0."""
    x0, t, eps, _, abar = _inputs()
    a = _rows(abar, t)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    expect(
        untouched(answer, x_t, t, eps, abar),
        x0,
        mistakes={
            "divides by alphas_cumprod itself: its square root is missing": (
                x_t - (1 - a).sqrt() * eps
            )
            / a,
            "does not divide by the square root of alphas_cumprod": x_t - (1 - a).sqrt() * eps,
            "adds the noise: it should be subtracted": (x_t + (1 - a).sqrt() * eps) / a.sqrt(),
            "subtracts eps without its factor": (x_t - eps) / a.sqrt(),
            "divides before it subtracts": x_t / a.sqrt() - (1 - a).sqrt() * eps,
        },
    )


@exercise(points=2)
def posterior_mean(answer: Any) -> None:
    """Mean of q(x_(t-1) | x_t, x_0): equation 7 of Ho et al. 2020."""
    x0, t, eps, betas, abar = _inputs()
    x_t = _rows(abar, t).sqrt() * x0 + (1 - _rows(abar, t)).sqrt() * eps
    a, before, beta = _rows(abar, t), _rows(abar, t - 1), _rows(betas, t)

    def mean(before: Tensor, weight_x0: Tensor, weight_xt: Tensor) -> Tensor:
        return (weight_x0 * x0 + weight_xt * (1 - before) * x_t) / (1 - a)

    right = mean(before, before.sqrt() * beta, (1 - beta).sqrt())
    expect(
        untouched(answer, x0, x_t, t, betas),
        right,
        mistakes={
            "takes alphas_cumprod at t where equation 7 has t - 1": mean(
                a, a.sqrt() * beta, (1 - beta).sqrt()
            ),
            "lacks the square root of alphas_cumprod at t - 1": mean(
                before, before * beta, (1 - beta).sqrt()
            ),
            "lacks the square root of alpha_t": mean(before, before.sqrt() * beta, 1 - beta),
            "does not divide by 1 - alphas_cumprod": right * (1 - a),
            "exchanges x_0 and x_t": (
                before.sqrt() * beta * x_t + (1 - beta).sqrt() * (1 - before) * x0
            )
            / (1 - a),
        },
    )
    first = torch.zeros(2, dtype=torch.long)
    expect(
        answer(x0, x_t, first, betas),
        x0,
        "is wrong at t = 0, where alphas_cumprod of the step before is 1 and the mean is x_0: it",
    )


@exercise(points=2)
def ideal_weights(answer: Any) -> None:
    """Posterior probabilities (B, N) of a finite data set, given x_t."""
    pictures = torch.rand(5, 3, 2, 2) * 2 - 1
    alpha, sigma = 0.8, 0.6
    x_t = alpha * pictures[[1, 4]] + sigma * torch.randn(2, 3, 2, 2)
    squared = (x_t[:, None] - alpha * pictures[None]).flatten(2).square().sum(2)  # (B, N)
    unscaled = (x_t[:, None] - pictures[None]).flatten(2).square().sum(2)
    value = untouched(answer, x_t, alpha, sigma, pictures)
    if isinstance(value, Tensor) and value.shape == squared.shape:
        sums = value.sum(1)
        if not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            raise Wrong(
                f"returns rows that sum to {sums[0].item():.3g}: probabilities over the N pictures "
                "sum to 1 (softmax over the last axis)."
            )
    expect(
        value,
        (-squared / (2 * sigma**2)).softmax(1),
        mistakes={
            "prefers the pictures that are farthest from x_t: the exponent is negative": (
                squared / (2 * sigma**2)
            ).softmax(1),
            "lacks the factor 2 in 2 sigma^2": (-squared / sigma**2).softmax(1),
            "divides by 2 sigma, not by 2 sigma^2": (-squared / (2 * sigma)).softmax(1),
            "compares x_t with the pictures themselves: multiply them by alpha first": (
                -unscaled / (2 * sigma**2)
            ).softmax(1),
            "takes the distance, not its square": (-squared.sqrt() / (2 * sigma**2)).softmax(1),
            "takes the mean over the pixels, not the sum": (
                -squared / pictures[0].numel() / (2 * sigma**2)
            ).softmax(1),
        },
    )


@exercise()
def half_noise_step(answer: Any) -> None:
    """The first t at which the noise deviates more than the picture."""
    for num_timesteps in (10, 100, 1000):
        abar = torch.cumprod(1 - cosine_betas(num_timesteps), 0)
        right = int((abar < 0.5).nonzero()[0])
        value = answer(abar)
        if not isinstance(value, int):
            raise Wrong(f"returns {type(value).__name__}, not a whole number: int(...) makes one.")
        if value == right - 1:
            raise Wrong(
                f"returns {value} for T = {num_timesteps}, one step too early: there the picture "
                "still deviates more."
            )
        if value == right + 1:
            raise Wrong(f"returns {value} for T = {num_timesteps}, one step too late.")
        if value != right:
            raise Wrong(
                f"returns {value} for T = {num_timesteps}, where {right} is right: compare "
                "sqrt(1 - alphas_cumprod) with sqrt(alphas_cumprod)."
            )
