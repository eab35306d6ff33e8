"""Checks of `02_first_gans`.

Axes: B rows of a batch, D width of a sentence, S side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched


@exercise()
def object_mask(answer: Any) -> None:
    """Where the largest difference from the background is above the threshold."""
    ground, threshold = torch.tensor([0.9, 0.8, 0.7]), 0.3
    picture = ground[:, None, None] + 0.4 * torch.randn(3, 6, 6)
    signed = picture - ground[:, None, None]
    distance = signed.abs()
    value = untouched(answer, picture, ground, threshold)
    if isinstance(value, Tensor) and value.shape == (3, 6, 6):
        raise Wrong("returns a mask for each channel: take the largest difference over axis 0.")
    expect(
        value,
        distance.amax(0) > threshold,
        mistakes={
            "inverts the mask: True stands for the object": distance.amax(0) <= threshold,
            "forgets the absolute value: a darker object differs too": signed.amax(0) > threshold,
            "takes the mean over the channels, not the largest": distance.mean(0) > threshold,
            "takes the sum over the channels, not the largest": distance.sum(0) > threshold,
            "takes the smallest difference: one channel is enough": distance.amin(0) > threshold,
            "takes the length of the difference, not its largest channel": distance.square()
            .sum(0)
            .sqrt()
            > threshold,
            "compares the picture itself: subtract the background first": picture.abs().amax(0)
            > threshold,
        },
    )


@exercise(points=2)
def matching_aware_loss(answer: Any) -> None:
    """L_D of algorithm 1 of Reed et al. 2016, from logits."""
    s_r, s_w, s_f = torch.randn(3, 6)
    real, wrong, fake = F.softplus(-s_r).mean(), F.softplus(s_w).mean(), F.softplus(s_f).mean()
    value = untouched(answer, s_r, s_w, s_f)
    if isinstance(value, Tensor) and value.shape == s_r.shape:
        raise Wrong("returns a number for each row: take the mean over the batch.")
    expect(
        value,
        real + wrong / 2 + fake / 2,
        mistakes={
            "lacks the factor 1/2 of the wrong and the fake pairs": real + wrong + fake,
            "lacks the factor 1/2 of the wrong pairs": real + wrong + fake / 2,
            "lacks the factor 1/2 of the fake pairs": real + wrong / 2 + fake,
            "halves the real pairs too: their weight is 1": (real + wrong + fake) / 2,
            "leaves the wrong pairs out: this is a plain GAN": real + fake,
            "leaves the wrong pairs out: this is a plain GAN, with half the weight": real
            + fake / 2,
            "accepts wrong pairs: their D should become small, -log(1 - D)": real
            + F.softplus(-s_w).mean() / 2
            + fake / 2,
            "accepts fakes, which is the generator's aim: their loss is -log(1 - D)": real
            + wrong / 2
            + F.softplus(-s_f).mean() / 2,
            "exchanges log D and log(1 - D): D should be high for real pairs": F.softplus(
                s_r
            ).mean()
            + F.softplus(-s_w).mean() / 2
            + F.softplus(-s_f).mean() / 2,
            "has the wrong sign: a loss is to be minimised": -(real + wrong / 2 + fake / 2),
            "sums over the batch: take means": 6 * (real + wrong / 2 + fake / 2),
            "applies the sigmoid twice: softplus expects logits": F.softplus(-s_r.sigmoid()).mean()
            + F.softplus(s_w.sigmoid()).mean() / 2
            + F.softplus(s_f.sigmoid()).mean() / 2,
        },
    )
    large = torch.full((2,), 200.0, requires_grad=True)
    value = answer(-large, large, large)
    if not value.isfinite():
        raise Wrong(
            "is infinite for logits of 200: log(sigmoid(s)) overflows, softplus and the losses "
            "`with_logits` do not."
        )
    expect(value, 400.0, "saturates for large logits: for 200 it")
    expect_gradient(value, large, "the loss to the logits")


@exercise(points=2)
def wrong_pair_loss(answer: Any) -> None:
    """Mean of -log(1 - D) over rows whose caption is not that of the row before."""
    captions = ["a ring", "a star", "".join(["a ", "star"]), "a ring", "a kite", "a ring"]
    s_w = torch.randn(6)
    loss = F.softplus(s_w)
    differs = torch.tensor([0.0, 1, 0, 1, 1, 1])
    after = torch.tensor([1.0, 0, 1, 1, 1, 0])
    first = torch.tensor([1.0, 1, 0, 1, 1, 1])
    unique = torch.tensor([0.0, 0, 0, 0, 1, 0])
    accepted = F.softplus(-s_w)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    value = untouched(answer, s_w, list(captions))
    expect(
        value,
        mean(loss, differs),
        mistakes={
            "counts all rows: where both captions are equal, the pair is right": loss.mean(),
            "divides by B: divide by the number of rows that count": (loss * differs).sum() / 6,
            "returns a sum: divide by the number of rows that count": (loss * differs).sum(),
            "inverts the mask: rows count where the captions differ": mean(loss, 1 - differs),
            "compares with `is`, though equal captions may be two objects: use `!=`": mean(
                loss, torch.tensor([0.0, 1, 1, 1, 1, 1])
            ),
            "compares with the row after: row i has the caption of row i - 1": mean(loss, after),
            "counts row 0 always: its row before is the last": mean(loss, first),
            "leaves out every caption that occurs twice: only the row before matters": mean(
                loss, unique
            ),
            "accepts wrong pairs: their loss is -log(1 - D)": mean(accepted, differs),
        },
    )
    same = answer(torch.randn(3), ["a star"] * 3)
    if isinstance(same, Tensor) and same.isnan().any():
        raise Wrong("is NaN if all captions are equal: 0 / 0; keep the divisor at 1 or more.")
    expect(torch.as_tensor(same).float(), 0.0, "is not 0 if all captions are equal: it")
    s_w.requires_grad_()
    expect_gradient(answer(s_w, list(captions)), s_w, "the loss to the logits")


@exercise()
def mix_sentences(answer: Any) -> None:
    """Equation 5 of Reed et al. 2016, each row with the row before."""
    h = torch.randn(4, 3)
    for beta in (0.5, 0.3):
        right = beta * h + (1 - beta) * h.roll(1, 0)
        expect(
            untouched(answer, h, beta),
            right,
            mistakes={
                "mixes with the row after: the sentence before comes by roll(1, 0)": beta * h
                + (1 - beta) * h.roll(-1, 0),
                "rolls the axis of the features: rows are axis 0": beta * h
                + (1 - beta) * h.roll(1, 1),
                "rolls all numbers as one row: name axis 0": beta * h + (1 - beta) * h.roll(1),
                "exchanges beta and 1 - beta": (1 - beta) * h + beta * h.roll(1, 0),
                "takes one half whatever beta is": 0.5 * h + 0.5 * h.roll(1, 0),
                "adds both with weight beta: the weights sum to 1": beta * (h + h.roll(1, 0)),
                "adds all of both: the weights sum to 1": h + h.roll(1, 0),
                "mixes each sentence with the mean of all": beta * h + (1 - beta) * h.mean(0),
                "returns the sentences unchanged": h,
            },
        )
    expect(answer(h, 1.0), h, "is wrong at beta = 1, where nothing is mixed: it")


@exercise(points=2)
def best_discriminator(answer: Any) -> None:
    """The minimum over D of L_D for one pair with given densities."""
    p_r, p_w, p_f = torch.rand(3, 5) + 0.1
    rest = (p_w + p_f) / 2
    expect(
        untouched(answer, p_r, p_w, p_f),
        p_r / (p_r + rest),
        mistakes={
            "lacks the factor 1/2 of the wrong and the fake pairs": p_r / (p_r + p_w + p_f),
            "leaves the wrong pairs out": p_r / (p_r + p_f),
            "leaves the wrong pairs out, though their weight is 1/2": p_r / (p_r + p_f / 2),
            "leaves the fakes out": p_r / (p_r + p_w / 2),
            "is the probability that the pair is not right: 1 - D": rest / (p_r + rest),
            "is the odds p_r / (...), not a probability: add p_r below the line": p_r / rest,
            "is the best logit: the sigmoid of it is D": (p_r / rest).log(),
            "halves p_r in one place only: its weight is 1": (p_r / 2) / (p_r + rest),
        },
    )
    one, none = torch.ones(1), torch.zeros(1)
    expect(answer(one, none, one), torch.tensor([2 / 3]), "is not 2/3 for perfect fakes: it")
