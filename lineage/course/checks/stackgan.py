"""Checks of `03_stackgan`.

Axes: B captions, C width of the condition, Z of the noise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched


@exercise()
def augment_condition(answer: Any) -> None:
    """c = mu + sigma eps: section 3.2 of Zhang et al. 2017."""
    mu, logvar, eps = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    sigma = (logvar / 2).exp()
    expect(
        untouched(answer, mu, logvar, eps),
        mu + sigma * eps,
        mistakes={
            "multiplies eps by sigma^2: exp(logvar) is the variance, halve logvar first": mu
            + logvar.exp() * eps,
            "multiplies eps by logvar itself: take the exponential of its half": mu + logvar * eps,
            "multiplies eps by logvar / 2: its exponential is missing": mu + logvar / 2 * eps,
            "multiplies eps by exp(2 logvar), where exp(logvar / 2) is sigma": mu
            + (2 * logvar).exp() * eps,
            "subtracts the noise: it should be added": mu - sigma * eps,
            "returns mu alone: the noise is missing": mu,
            "lacks the factor sigma on eps": mu + eps,
            "multiplies mu, too, by sigma": sigma * (mu + eps),
        },
    )
    mu.requires_grad_(), logvar.requires_grad_()
    value = answer(mu, logvar, eps)
    expect_gradient(value, mu, "c to mu")
    expect_gradient(value, logvar, "c to logvar")


@exercise(points=2)
def condition_kl(answer: Any) -> None:
    """KL(N(mu, sigma^2) || N(0, I)) of each caption: equation 2 of Zhang et al. 2017."""
    mu, logvar = torch.randn(3, 4), torch.randn(3, 4)
    variance = logvar.exp()

    def total(terms: Tensor) -> Tensor:
        return -0.5 * terms.sum(1)

    right = total(1 + logvar - mu**2 - variance)
    value = untouched(answer, mu, logvar)
    if isinstance(value, Tensor) and value.dim() == 0:
        raise Wrong("returns one number for the whole batch: sum over C alone, the last axis.")
    if isinstance(value, Tensor) and value.shape == mu.shape:
        raise Wrong("returns a number for each entry of mu, (B, C): the sum over C is missing.")
    if isinstance(value, Tensor) and value.shape == mu.shape[1:]:
        raise Wrong("returns a number for each of the C entries: sum over C, not over captions.")
    expect(
        value,
        right,
        mistakes={
            "has the wrong sign: a divergence is never negative": -right,
            "lacks the factor 1/2": 2 * right,
            "takes the mean over C (as the authors' code does), where the paper and this exercise "
            "have the sum": right / 4,
            "adds exp(logvar / 2), which is sigma, where equation 2 has sigma^2": total(
                1 + logvar - mu**2 - (logvar / 2).exp()
            ),
            "subtracts logvar itself where equation 2 has sigma^2 = exp(logvar)": total(
                1 + logvar - mu**2 - logvar
            ),
            "takes mu where equation 2 has its square": total(1 + logvar - mu - variance),
            "lacks the term mu^2": total(1 + logvar - variance),
            "lacks the 1, so that it does not vanish for the standard Gaussian": total(
                logvar - mu**2 - variance
            ),
            "lacks the term log sigma^2, which keeps sigma from falling to 0": total(
                1 - mu**2 - variance
            ),
            "adds mu^2 inside the bracket: equation 2 subtracts it": total(
                1 + logvar + mu**2 - variance
            ),
        },
    )
    mu.requires_grad_(), logvar.requires_grad_()
    value = answer(mu, logvar)
    expect_gradient(value, mu, "the divergence to mu")
    expect_gradient(value, logvar, "the divergence to logvar")


@exercise(points=2)
def stage1_disc_loss(answer: Any) -> None:
    """Loss of stage I's discriminator, by three kinds of pairs."""
    real, wrong, fake = torch.randn(4), torch.randn(3), torch.randn(4)
    mismatched = torch.tensor([1.0, 0.0, 1.0])

    def loss(r: Tensor, w: Tensor, f: Tensor, weights: tuple[float, ...] = (1, 0.5, 0.5)) -> Tensor:
        return weights[0] * r.mean() + weights[1] * w + weights[2] * f.mean()

    def mean(values: Tensor) -> Tensor:
        return (values * mismatched).sum() / mismatched.sum()

    r, w, f = F.softplus(-real), F.softplus(wrong), F.softplus(fake)
    expect(
        untouched(answer, real, wrong, fake, mismatched),
        loss(r, mean(w), f),
        "returns a loss that",
        mistakes={
            "gives wrong and fake pairs the weight 1: each weighs 1/2": loss(
                r, mean(w), f, (1,) * 3
            ),
            "takes a third of the sum: real pairs weigh 1, the others 1/2 each": loss(
                r, mean(w), f, (1 / 3,) * 3
            ),
            "halves the real pairs, too: they weigh 1": loss(r, mean(w), f, (0.5,) * 3),
            "counts the pairs whose captions are the same: mismatched is 0 there": loss(
                r, w.mean(), f
            ),
            "divides the wrong pairs by their number, B - 1, where only those that are mismatched "
            "count": loss(r, (w * mismatched).mean(), f),
            "counts the pairs whose captions are the same, and leaves out the others: the mask is "
            "inverted": loss(r, (w * (1 - mismatched)).sum() / (1 - mismatched).sum(), f),
            "sums the wrong pairs: take their mean": loss(r, (w * mismatched).sum(), f),
            "wants high logits for wrong pairs: only real pairs should be high": loss(
                r, mean(F.softplus(-wrong)), f
            ),
            "wants high logits for fake pairs: that is the generator's loss": loss(
                r, mean(w), F.softplus(-fake)
            ),
            "exchanges the signs: real pairs should be high, the others low": loss(
                F.softplus(real), mean(F.softplus(-wrong)), F.softplus(-fake)
            ),
            "lacks the wrong pairs: nothing then makes it compare caption and picture": loss(
                r, 0 * mean(w), f
            ),
            "has the wrong sign": -loss(r, mean(w), f),
        },
    )
    none = answer(real, wrong, fake, torch.zeros(3))
    expect(
        none,
        loss(r, torch.tensor(0.0), f),
        "returns a loss for a batch in which no caption is mismatched that",
    )
    huge = answer(real, torch.tensor([200.0, 0.0, -200.0]), fake, mismatched)
    expect(
        huge,
        loss(r, torch.tensor(100.0), f),
        "returns, for a logit of 200, a loss that",
        {
            "stops growing at large logits, since the sigmoid rounds to 1: use softplus, or "
            "binary_cross_entropy_with_logits": loss(r, torch.tensor(50.0), f)
        },
    )
    fake.requires_grad_()
    expect_gradient(answer(real, wrong, fake, mismatched), fake, "the loss to fake_logits")


@exercise()
def stage2_sides(answer: Any) -> None:
    """Sides of the features in stage II."""
    for small, size in ((16, 32), (8, 16), (32, 64), (64, 256)):
        sides = [small, small // 2, small // 4]
        while sides[-1] < size:
            sides.append(2 * sides[-1])
        value = answer(small, size)
        if not isinstance(value, (list, tuple)):
            raise Wrong(f"returns {type(value).__name__}, not a list of sides.")
        value, call = list(value), f"for ({small}, {size})"
        if value == sides:
            continue
        if value[:1] != sides[:1]:
            raise Wrong(f"{call} begins with {value[:1]}, not with the small picture, {small}.")
        if value == sides[:-1]:
            raise Wrong(f"{call} ends one block too early: the last side is {size}.")
        if value == [*sides, 2 * size]:
            raise Wrong(f"{call} ends one block too late: the last side is {size}.")
        if min(value) > sides[2]:
            raise Wrong(
                f"{call} does not go down to {sides[2]}: the encoder halves the side twice."
            )
        if min(value) < sides[2]:
            raise Wrong(
                f"{call} goes down to {min(value)}: the encoder halves the side only twice."
            )
        if sorted(set(value)) != value[2:] and value.count(sides[2]) > 1:
            raise Wrong(f"{call} lists {sides[2]} twice: the next block already doubles it.")
        raise Wrong(f"returns {value} {call}, where {sides} is right.")


@exercise(points=2)
def blend_noise(answer: Any) -> None:
    """A path between two noises on which the variance stays 1."""
    start, end = torch.randn(2, 6), torch.randn(2, 6)
    for share, right in ((0.0, start), (1.0, end)):
        other = end if share == 0 else start
        expect(
            untouched(answer, start, end, share),
            right,
            f"returns, for share {share:g}, a tensor that",
            {f"returns the other noise for share {share:g}: the weights are exchanged": other},
        )
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    last = 0.0
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        value = answer(one, other, share)
        expect(answer(start, end, share).shape[0], 2, "returns a batch that")
        if value.shape != one.shape:
            raise Wrong(f"has shape {tuple(value.shape)}, not that of the noise, (B, Z).")
        a, b = value[0].tolist()
        variance = a**2 + b**2
        if abs(a - (1 - share)) < 1e-3 and abs(b - share) < 1e-3:
            raise Wrong(
                f"has variance {variance:.2f} for share {share}: weights that sum to 1 make it "
                "smaller; it is their squares that should sum to 1."
            )
        if abs(variance - 1) > 1e-3:
            raise Wrong(
                f"has variance {variance:.2f} for share {share}: the squares of the two weights "
                "should sum to 1."
            )
        if a < 0 or b < last:
            raise Wrong("does not move steadily from `start` to `end` as the share grows.")
        last = b
