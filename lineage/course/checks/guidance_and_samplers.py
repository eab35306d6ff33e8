"""Checks of `09_guidance_and_samplers`.

Axes: B pictures, S side, L words, D width of a word or of a text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import close, expect, expect_gradient, untouched
from lineage.diffusion.schedules import NoiseLevel

# --- 1: dropped captions --------------------------------------------------------------------------


@exercise()
def drop_captions(answer: Any) -> None:
    """Words of a batch in which some captions are replaced by `null`."""
    words, null = torch.randn(4, 3, 2), torch.randn(3, 2)
    u, prob = torch.tensor([0.05, 0.5, 0.2, 0.9]), 0.2
    drop = (u < prob)[:, None, None]
    value = untouched(answer, words, null, u, prob)
    expect(
        value,
        torch.where(drop, null, words),
        mistakes={
            "drops the captions that should stay: the mask is inverted": torch.where(
                drop, words, null
            ),
            "drops a caption whose u equals prob: only those below it are dropped": torch.where(
                (u <= prob)[:, None, None], null, words
            ),
            "fills dropped captions with zeros, not with null": torch.where(
                drop, torch.zeros(()), words
            ),
            "drops no caption": words,
            "drops every caption": null.expand_as(words),
            "adds null to the words: it should replace them": torch.where(
                drop, words + null, words
            ),
        },
    )
    null.requires_grad_()
    expect_gradient(answer(words, null, u, prob), null, "the words to null")


# --- 2: guidance ----------------------------------------------------------------------------------


class _Network:
    """A small function (x, t, text) -> prediction, which counts its calls."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.sizes = weight, list[int]()

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        for name, tensor in (("t", t), ("text", text)):
            if len(tensor) != len(x):
                raise Wrong(
                    f"calls the network with {len(x)} rows of x_t and {len(tensor)} of {name}: "
                    "each prediction needs its own row of all three."
                )
        self.sizes.append(len(x))
        return x * torch.cos(text @ self.weight)[:, :, None, None] + 0.1 * t[:, None, None, None]


@exercise(points=2)
def guided_prediction(answer: Any) -> None:
    """uncond + scale (cond - uncond), with one call of the network."""
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 8.0])
    text, null, negative = (torch.randn(2, 5) for _ in range(3))
    weight, scale = torch.randn(5, 3), 3.0
    network = _Network(weight)
    value = untouched(answer, network, x_t, t, text, null, scale)
    calls = len(network.sizes)
    cond, uncond, away = (network(x_t, t, one) for one in (text, null, negative))
    expect(
        value,
        uncond + scale * (cond - uncond),
        mistakes={
            "starts from cond, where it should start from uncond: that is the paper's w, and s is "
            "w + 1": cond + scale * (cond - uncond),
            "exchanges the two halves of the batch: the caption's prediction is the one to go "
            "towards": cond + scale * (uncond - cond),
            "returns the prediction with the caption alone: at scale 1 that is right, at 3 it is "
            "not": cond,
            "multiplies the difference, and does not add it to uncond": scale * (cond - uncond),
            "takes the mean of the two predictions with weights scale and 1": (
                (scale * cond + uncond) / (scale + 1)
            ),
            "adds uncond: its weight should be 1 - scale": scale * cond + uncond,
        },
    )
    if calls != 1:
        raise Wrong(
            f"calls the network {calls} times: put both texts into one batch, which is faster."
        )
    expect(answer(network, x_t, t, text, null, 1.0), cond, "at scale 1 is not the prediction: it")
    value = answer(network, x_t, t, text, null, scale, negative)
    if close(value, uncond + scale * (cond - uncond)):
        raise Wrong("ignores the negative text.")
    expect(
        value,
        away + scale * (cond - away),
        "with a negative text",
        mistakes={
            "goes towards the negative text": cond + scale * (away - cond),
            "uses both null and the negative text: negative takes the place of null": uncond
            + scale * (cond - away),
        },
    )


# --- 3: DDIM --------------------------------------------------------------------------------------


@exercise(points=2)
def ddim_step(answer: Any) -> None:
    """Equation 12 of Song et al. 2020 with sigma = 0."""
    level, after = NoiseLevel(0.6, 0.8, 500.0), NoiseLevel(0.9, math.sqrt(0.19), 200.0)
    x, x0 = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) * 2 - 1
    eps = (x - level.alpha * x0) / level.sigma
    value = untouched(answer, x, x0, level, after)
    expect(
        value,
        after.alpha * x0 + after.sigma * eps,
        mistakes={
            "adds no noise back: x is clean, one step too far": after.alpha * x0,
            "returns the estimate x0": x0,
            "takes (x - x0) / sigma for the noise: x0 needs its factor alpha": after.alpha * x0
            + after.sigma * (x - x0) / level.sigma,
            "does not divide by sigma, so that its eps has another deviation than 1": after.alpha
            * x0
            + after.sigma * (x - level.alpha * x0),
            "adds the noise of this level, not of the next": after.alpha * x0 + level.sigma * eps,
            "uses this level's alpha for the new x": level.alpha * x0 + after.sigma * eps,
            "leaves out the next level's alpha before x0": x0 + after.sigma * eps,
            "exchanges alpha and sigma of the next level": after.sigma * x0 + after.alpha * eps,
            "subtracts the noise: it should be added": after.alpha * x0 - after.sigma * eps,
        },
    )
    again = answer(x, x0, level, after)
    if not close(again, value):
        raise Wrong("returns another x for the same arguments: DDIM adds no new noise.")
    same = "changes x in a step to the same level: it"
    expect(answer(x, x0, level, level), x, same)
    expect(answer(x, x0, level, NoiseLevel(1.0, 0.0, 0.0)), x0, "is not x0 at the end: it")


# --- 4: DPM-Solver++(2M) --------------------------------------------------------------------------


@exercise(points=2)
def dpmpp_2m_step(answer: Any) -> None:
    """One step of algorithm 2 of Lu et al. 2022 (DPM-Solver++)."""
    x, x0, before = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    sigma_before, sigma, sigma_next = 5.0, 3.0, 1.0

    def step(h: float, r: float, ratio: float, sign: float = 1.0) -> Tensor:
        d = (1 + sign / (2 * r)) * x0 - sign / (2 * r) * before
        return ratio * x + (1 - math.exp(-h)) * d

    h, h_before = math.log(sigma / sigma_next), math.log(sigma_before / sigma)
    r, ratio = h_before / h, sigma_next / sigma
    value = untouched(answer, x, x0, before, sigma_before, sigma, sigma_next)
    expect(
        value,
        step(h, r, ratio),
        mistakes={
            "inverts r: it is the step before, divided by this step": step(h, 1 / r, ratio),
            "interpolates between the estimates, where it should extrapolate: the signs of 1 / (2 "
            "r) are exchanged": step(h, r, ratio, -1.0),
            "ignores the estimate of the step before: that is a step of order 1": ratio * x
            + (1 - math.exp(-h)) * x0,
            "has the wrong sign in h: sigma falls, and h is positive": step(-h, r, ratio),
            "inverts the factor of x: it should be sigma' / sigma, below 1": step(h, r, 1 / ratio),
            "takes differences of sigmas for h: they are differences of log sigma": step(
                h, (sigma_before - sigma) / (sigma - sigma_next), ratio
            ),
            "lacks the 2 in 1 / (2 r)": step(h, r / 2, ratio),
            "lacks the term with x": step(h, r, 0.0),
        },
    )
    d = answer(x, x0, x0, sigma_before, sigma, sigma_next)
    expect(d, ratio * x + (1 - ratio) * x0, "with two equal estimates is not Euler's step: it")


# --- 5: order of convergence ----------------------------------------------------------------------


@exercise()
def convergence_order(answer: Any) -> None:
    """p of errors C n^-p."""
    for p, steps in ((1.0, [5, 10, 20, 40]), (2.0, [4, 12, 24]), (1.5, [3, 48])):
        errors = [0.7 * n**-p for n in steps]
        value = answer(list(steps), list(errors))
        expect(
            float(value) if isinstance(value, int) else value,
            p,
            f"for errors of order {p:g}",
            mistakes={
                "has the wrong sign: errors fall as n grows, and p is positive": -p,
                "divides the two logarithms the wrong way round": 1 / p,
                "returns the ratio of the errors: take logarithms of both ratios": errors[0]
                / errors[-1],
                "does not divide by the logarithm of the ratio of steps": math.log(
                    errors[0] / errors[-1]
                ),
            },
        )
