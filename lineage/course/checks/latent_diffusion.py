"""Checks of `10_latent_diffusion`.

Axes: B pictures, C H W latents, N cells, L words, D and Dw widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched


def _moments() -> tuple[Tensor, Tensor]:
    """Means and log variances (3, 2, 4, 4)."""
    return torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4) * 0.5 - 0.3


@exercise()
def sample_posterior(answer: Any) -> None:
    """mean + std eps."""
    mean, log_variance = _moments()
    eps = torch.randn_like(mean)
    expect(
        untouched(answer, mean, log_variance, eps),
        mean + (0.5 * log_variance).exp() * eps,
        mistakes={
            "multiplies eps by the variance: it needs the deviation, the variance's square root": (
                mean + log_variance.exp() * eps
            ),
            "multiplies eps by the log variance itself": mean + log_variance * eps,
            "multiplies eps by half the log variance: exp is missing": (
                mean + 0.5 * log_variance * eps
            ),
            "inverts the deviation: the exponent should be positive": (
                mean + (-0.5 * log_variance).exp() * eps
            ),
            "returns the mean: the noise is missing": mean,
            "does not scale eps by the deviation": mean + eps,
            "subtracts the noise: it should be added": mean - (0.5 * log_variance).exp() * eps,
        },
    )
    for name, source in (("mean", mean), ("log variance", log_variance)):
        source.requires_grad_()
        expect_gradient(answer(mean, log_variance, eps), source, f"z to the {name}")


@exercise(points=2)
def kl_to_standard_normal(answer: Any) -> None:
    """KL of N(mean, variance) to N(0, 1), a sum over each row."""
    mean, log_variance = _moments()
    variance = log_variance.exp()
    kl = 0.5 * (mean**2 + variance - 1 - log_variance)
    reversed_kl = 0.5 * ((mean**2 + 1) / variance - 1 + log_variance)

    def rows(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)

    value = untouched(answer, mean, log_variance)
    if isinstance(value, Tensor) and value.dim() == 0:
        for name, whole in (("sum", kl.sum()), ("mean", kl.mean())):
            if torch.allclose(value.double(), whole.double(), rtol=1e-3):
                raise Wrong(f"takes the {name} over the batch too: it should return (B,) numbers.")
    expect(
        value,
        rows(kl),
        mistakes={
            "takes the mean over a picture's numbers, where it should take their sum": rows(kl)
            / mean[0].numel(),
            "lacks the factor 1/2": rows(2 * kl),
            "has the wrong sign: a KL divergence is never negative": rows(-kl),
            "adds the log variance: it should be subtracted": rows(
                0.5 * (mean**2 + variance - 1 + log_variance)
            ),
            "lacks the -1": rows(kl + 0.5),
            "takes the mean without its square": rows(0.5 * (mean + variance - 1 - log_variance)),
            "takes the deviation where the variance belongs": rows(
                0.5 * (mean**2 + variance.sqrt() - 1 - log_variance)
            ),
            "takes the log variance where the variance belongs: exp is missing": rows(
                0.5 * (mean**2 - 1) + 0 * variance
            ),
            "is the divergence the other way round, of N(0, 1) to the posterior": rows(reversed_kl),
        },
    )
    zero = torch.zeros(2, 2, 4, 4)
    expect(answer(zero, zero), torch.zeros(2), "for the standard normal itself")
    mean.requires_grad_()
    expect_gradient(answer(mean, log_variance), mean, "the divergence to the mean")


@exercise()
def scale_of_latents(answer: Any) -> None:
    """1 / std over all numbers."""
    z = torch.randn(4, 2, 8, 8) * torch.tensor([3.0, 0.5])[:, None, None] + 0.7
    std = z.std(correction=0)
    value = untouched(answer, z)
    if isinstance(value, Tensor) and value.numel() == 2:
        raise Wrong("returns a factor for each channel: there is one for all numbers.")
    expect(
        value,
        1 / std,
        mistakes={
            "returns the deviation: the factor is its inverse": std,
            "divides by the variance: its square root is the deviation": 1 / std**2,
            "does not subtract the mean before it squares": 1 / z.square().mean().sqrt(),
            "averages the deviations of the pictures": 1 / z.flatten(1).std(1).mean(),
            "averages the deviations of the channels": 1
            / z.transpose(0, 1).flatten(1).std(1).mean(),
            "divides by the largest value, not by the deviation": 1 / z.abs().max(),
        },
    )


@exercise(points=2)
def cross_attention(answer: Any) -> None:
    """softmax(Q K^T / sqrt(D)) V with queries of the cells, keys and values of the words."""
    cells, words = torch.randn(2, 5, 8), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    to_q, to_k, to_v = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 8)
    for layer in (to_q, to_k, to_v):
        layer.requires_grad_(False)
        layer.weight.mul_(3)
    q, k, v = to_q(cells), to_k(words), to_v(words)
    scores = q @ k.transpose(1, 2) / 8**0.5

    def mix(scores: Tensor, mask: Tensor, axis: int = 2) -> Tensor:
        return scores.masked_fill(~mask[:, None], -torch.inf).softmax(axis).nan_to_num() @ v

    def both() -> Tensor:
        return untouched(answer, cells, words, mask, to_q, to_k, to_v)

    weights = scores.softmax(2)
    late = (weights * mask[:, None]) @ v
    zeroed = scores.masked_fill(~mask[:, None], 0.0).softmax(2) @ v
    everything = torch.ones_like(mask)
    inverted = scores.masked_fill(mask[:, None], -torch.inf).softmax(2) @ v
    value = both()
    if (
        isinstance(value, Tensor)
        and value[1].isnan().logical_not().all()
        and value[0].isnan().all()
    ):
        raise Wrong("inverts the mask: it hides the words and attends to the padding.")
    expect(
        value,
        mix(scores, mask),
        mistakes={
            "attends to the padding: the mask is not used": mix(scores, everything),
            "inverts the mask: it hides the words and attends to the padding": inverted,
            "does not divide the scores by sqrt(D)": mix(scores * 8**0.5, mask),
            "divides the scores by D, not by its square root": mix(scores / 8**0.5, mask),
            "divides the scores by the square root of the words' width, not of the queries'": mix(
                scores * (8 / 6) ** 0.5, mask
            ),
            "takes the softmax over the cells: the weights of one cell's words should sum to 1": (
                mix(scores, mask, axis=1)
            ),
            "zeroes the weights after the softmax: they no longer sum to 1": late,
            "sets masked scores to 0: exp(0) is 1, so set them to minus infinity": zeroed,
            "mixes the keys, where it should mix the values": scores.masked_fill(
                ~mask[:, None], -torch.inf
            ).softmax(2)
            @ k,
        },
    )


@exercise()
def attention_saving(answer: Any) -> None:
    """factor^4."""
    for size, factor in ((32, 4), (512, 8), (64, 2)):
        value = answer(size, factor)
        expect(
            float(value) if isinstance(value, int) else value,
            float(factor**4),
            f"for cells of {factor} pixels",
            mistakes={
                "counts the cells: comparisons are between all pairs of them": float(factor**2),
                "counts a row of cells, not all of them": float(factor),
                "divides the wrong way round: there are fewer comparisons in the latents": float(
                    factor**-4
                ),
                "returns the comparisons in the latents: divide those in pixels by them": float(
                    (size // factor) ** 4
                ),
            },
        )
