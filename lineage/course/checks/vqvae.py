"""Checks of `05_vqvae`.

Axes: N vectors, D width, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import close, expect, untouched


@exercise()
def nearest_code(answer: Any) -> None:
    """Equation 1 of van den Oord et al. 2017."""
    codebook = torch.randn(5, 3) * torch.tensor([0.3, 1.0, 3.0, 1.0, 2.0])[:, None]
    z_e = torch.randn(12, 3)
    squared = (z_e[:, None] - codebook).square().sum(2)  # (N, K)
    expect(
        untouched(answer, z_e, codebook),
        squared.argmin(1),
        mistakes={
            "takes the farthest code: it should be the nearest (argmin)": squared.argmax(1),
            "takes the code with the largest product, which prefers long codes: subtract half its "
            "squared length, or compare distances": (z_e @ codebook.T).argmax(1),
            "compares directions alone: lengths count too": (
                F.normalize(z_e, dim=1) @ F.normalize(codebook, dim=1).T
            ).argmax(1),
            "lacks the squared length of the codes: |z|^2 - 2 z e + |e|^2 has three terms": (
                z_e.square().sum(1, keepdim=True) - 2 * z_e @ codebook.T
            ).argmin(1),
            "lacks the factor 2 in |z|^2 - 2 z e + |e|^2": (
                codebook.square().sum(1) - z_e @ codebook.T
            ).argmin(1),
            "adds up differences without a square: negative ones cancel positive ones": (
                z_e[:, None] - codebook
            )
            .sum(2)
            .argmin(1),
        },
    )


@exercise()
def straight_through(answer: Any) -> None:
    """The value of z_q, the gradient for z_e."""
    z_e, z_q = torch.randn(4, 3), torch.randn(4, 3)
    expect(
        untouched(answer, z_e, z_q),
        z_q,
        mistakes={
            "has the value of z_e: its value should be that of z_q": z_e,
            "adds z_q to z_e: add the difference z_q - z_e": z_e + z_q,
            "goes away from z_q: the difference is z_q - z_e, not z_e - z_q": 2 * z_e - z_q,
        },
    )
    gradient_e, gradient_q = _gradients(lambda e, q: answer(e, q), z_e, z_q)
    if not bool(gradient_e.any()):
        raise Wrong(
            "passes no gradient to z_e: only the difference z_q - z_e should be detached, not the "
            "z_e before it."
        )
    if bool(gradient_q.any()):
        raise Wrong("passes a gradient to z_q, where there should be none: detach the difference.")
    ones = torch.ones_like(gradient_e)
    if not close(gradient_e, ones):
        raise Wrong("passes a gradient to z_e that is not the one of its result: copy it as it is.")


@exercise(points=2)
def codebook_loss(answer: Any) -> None:
    """Second and third term of equation 3."""
    z_e, z_q, beta = torch.randn(4, 3), torch.randn(4, 3), 0.25
    mse = F.mse_loss(z_e, z_q)
    expect(
        untouched(answer, z_e, z_q, beta),
        (1 + beta) * mse,
        "is a number that",
        mistakes={
            "sums over all numbers: it should be a mean": (1 + beta) * mse * z_e.numel(),
            "sums over the width: it should be a mean over all numbers": (1 + beta) * mse * 3,
            "sums over the vectors: it should be a mean over all numbers": (1 + beta) * mse * 4,
            "has the two terms without beta": 2 * mse,
            "multiplies both terms by beta: the codebook's has weight 1": 2 * beta * mse,
            "lacks the commitment loss": mse,
            "lacks the codebook loss": beta * mse,
            "takes the distance without its square": (1 + beta) * (z_e - z_q).abs().mean(),
        },
    )
    gradient_e, gradient_q = _gradients(lambda e, q: answer(e, q, beta), z_e, z_q)
    of_one = 2 * (z_e - z_q) / z_e.numel()  # the gradient of one term with weight 1
    if not bool(gradient_e.any()):
        raise Wrong("passes no gradient to z_e: the commitment loss should, with z_q detached.")
    if not bool(gradient_q.any()):
        raise Wrong("passes no gradient to z_q: the codebook loss should, with z_e detached.")
    if close(gradient_e, of_one) and close(gradient_q, -beta * of_one):
        raise Wrong(
            "has beta on the wrong term: it weighs the commitment, which moves z_e (VQGAN's public "
            "code has the same mistake)."
        )
    both = (1 + beta) * of_one
    if close(gradient_e, both) or close(gradient_q, -both):
        raise Wrong("lets both terms move both tensors: detach z_e in one and z_q in the other.")
    if not (close(gradient_e, beta * of_one) and close(gradient_q, -of_one)):
        raise Wrong("has the right value and a wrong gradient: look at what is detached in which.")


@exercise(points=2)
def ema_codes(answer: Any) -> None:
    """Appendix A.1 without smoothing."""
    decay, ids = 0.8, torch.tensor([0, 2, 2, 0, 2, 3])  # code 1 has no vector
    z_e, size, total = torch.randn(6, 2), torch.rand(4) + 1, torch.randn(4, 2)
    one_hot = F.one_hot(ids, 4).float()
    sizes, sums = one_hot.sum(0), one_hot.T @ z_e

    def codes(keep: float, sizes: Tensor, sums: Tensor, rate: float) -> Tensor:
        return (keep * total + rate * sums) / (keep * size + rate * sizes)[:, None]

    right = codes(decay, sizes, sums, 1 - decay)
    means = sums / sizes.clamp(min=1)[:, None]
    new_total = decay * total + (1 - decay) * sums
    expect(
        untouched(answer, z_e, ids, size, total, decay),
        right,
        mistakes={
            "exchanges decay and 1 - decay: the old value should keep most of its weight": codes(
                1 - decay, sizes, sums, decay
            ),
            "lacks the factor 1 - decay of the new numbers": codes(decay, sizes, sums, 1.0),
            "lacks the factor decay of the old numbers": codes(1.0, sizes, sums, 1 - decay),
            "returns the sums m: divide them by the numbers N": new_total,
            "divides by the old N: update it first": new_total / size[:, None],
            "divides by the number of vectors in this batch alone": new_total
            / sizes.clamp(min=1)[:, None],
            "averages means in place of sums: a code with more vectors should weigh more": codes(
                decay, sizes, means, 1 - decay
            ),
            "averages the codes m / N, not m and N each": decay * total / size[:, None]
            + (1 - decay) * means,
        },
    )


@exercise()
def code_perplexity(answer: Any) -> None:
    """Perplexity of the frequencies of codes."""
    ids = torch.tensor([0, 0, 0, 0, 2, 2, 5, 3])  # codes 1 and 4 are not used
    shares = ids.bincount(minlength=6) / len(ids)
    entropy = torch.special.entr(shares).sum()
    value = untouched(answer, ids, 6)
    if isinstance(value, (Tensor, float)) and bool(torch.as_tensor(value).isnan().any()):
        raise Wrong("returns NaN: codes without use give 0 ln 0, which should count as 0.")
    expect(
        value,
        entropy.exp(),
        "is a number that",
        mistakes={
            "returns the entropy: the perplexity is its exponential": entropy,
            "has the wrong sign in the exponent: entropy is -sum p ln p": (-entropy).exp(),
            "takes logarithms to base 2 and the exponential to base e": (entropy / _LN2).exp(),
            "counts the codes in use, however rare": (shares > 0).sum().float(),
            "takes the mean over the codes, not the sum": (entropy / 6).exp(),
            "takes the counts for probabilities: divide by their sum": torch.special.entr(
                shares * len(ids)
            )
            .sum()
            .exp(),
        },
    )
    expect(answer(torch.arange(6), 6), 6.0, "of six codes used equally often, 6 by definition,")


_LN2 = torch.tensor(2.0).log()


def _gradients(function: Any, z_e: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of a result with respect to z_e and z_q; zeros where there is none."""
    z_e, z_q = z_e.clone().requires_grad_(), z_q.clone().requires_grad_()
    result = function(z_e, z_q).sum()
    if not result.requires_grad:
        return torch.zeros_like(z_e), torch.zeros_like(z_q)
    gradients = torch.autograd.grad(result, (z_e, z_q), allow_unused=True)
    first, second = (torch.zeros(4, 3) if one is None else one for one in gradients)
    return first, second
