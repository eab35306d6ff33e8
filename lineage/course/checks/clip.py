"""Checks of `07_clip`.

Axes: B pairs, P width of the joint space, T templates, K classes, N points of a curve, Q pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched


def _rows(logits: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy along rows; the right answer is the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits)), reduction=reduction)


def _both(logits: Tensor) -> Tensor:
    return (_rows(logits) + _rows(logits.T)) / 2


@exercise(points=2)
def clip_loss(answer: Any) -> None:
    """The symmetric cross-entropy of Radford et al. 2021, figure 3."""
    image, text, scale = torch.randn(5, 4) * 2, torch.randn(5, 4), 3.0
    unit_image, unit_text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    cosines = unit_image @ unit_text.T
    logits = scale * cosines
    log_p = logits.log_softmax(1)
    expect(
        untouched(answer, image, text, scale),
        _both(logits),
        "is a number that",
        mistakes={
            "reads rows only: captions should find their pictures too, along columns": _rows(
                logits
            ),
            "reads columns only: pictures should find their captions too, along rows": _rows(
                logits.T
            ),
            "adds the two directions: it should be their mean": 2 * _both(logits),
            "has products of the vectors as they are: make them unit vectors first": _both(
                scale * image @ text.T
            ),
            "makes the pictures' vectors unit vectors, but not the captions'": _both(
                scale * unit_image @ text.T
            ),
            "makes the captions' vectors unit vectors, but not the pictures'": _both(
                scale * image @ unit_text.T
            ),
            "normalises over the batch (axis 0): each vector should have length 1": _both(
                scale * F.normalize(image, dim=0) @ F.normalize(text, dim=0).T
            ),
            "divides by the scale: it multiplies the cosines": _both(cosines / scale),
            "does not use the scale": _both(cosines),
            "takes the exponential of the scale: it is given as it is": _both(
                math.exp(scale) * cosines
            ),
            "sums over the pairs: it should be a mean": (
                _rows(logits, "sum") + _rows(logits.T, "sum")
            )
            / 2,
            "has the wrong sign: the logarithm of a probability is below 0": -_both(logits),
            "takes the mean over all pairs: only the diagonal is right": -log_p.mean(),
            "lacks the negatives: it is 1 minus the cosine of each pair": 1
            - cosines.diagonal().mean(),
        },
    )
    image.requires_grad_()
    expect_gradient(answer(image, text, scale), image, "the loss to the pictures' vectors")


@exercise()
def smallest_loss(answer: Any) -> None:
    """-ln(e^s / (e^s + (B - 1) e^-s))."""
    for num_pairs, scale in ((128, 1.5), (16, 0.8), (64, 3.0)):
        up, down = math.exp(scale), math.exp(-scale)
        n = num_pairs - 1
        expect(
            answer(num_pairs, scale),
            math.log1p(n * down / up),
            f"returns for {num_pairs} pairs and a scale of {scale:g} a number that",
            mistakes={
                "counts the own pair among the others: they are one fewer than all": math.log1p(
                    num_pairs * down / up
                ),
                "gives the others a cosine of 0: it is -1": math.log1p(n / up),
                "gives the others a cosine of 1: it is -1": math.log(num_pairs),
                "does not use the scale": math.log1p(n * math.exp(-2.0)),
                "leaves the own pair out of the sum: the softmax has it too": math.log(
                    n * down / up
                ),
                "takes one other pair alone: there are as many as the batch has": math.log1p(
                    down / up
                ),
                "is the probability: take minus its logarithm": up / (up + n * down),
                "has the wrong sign: the logarithm of a probability is below 0": -math.log1p(
                    n * down / up
                ),
                "adds both directions: the loss is their mean": 2 * math.log1p(n * down / up),
                "divides by the scale: it multiplies the cosines": math.log1p(
                    n * math.exp(-2 / scale)
                ),
            },
        )


@exercise()
def mask_same(answer: Any) -> None:
    """Minus infinity for equal captions off the diagonal."""
    captions = ["a red circle", "two squares", "a red circle", "a cross", "two squares"]
    logits = torch.randn(5, 5) * 3
    same = torch.tensor([[a == b for b in captions] for a in captions])
    others = same & ~torch.eye(5, dtype=torch.bool)
    value = untouched(answer, logits, list(captions))
    if not isinstance(value, Tensor) or value.shape != logits.shape:
        expect(value, logits)
    if value.isnan().any():
        raise Wrong(
            "returns NaN: 0 times infinity is NaN, so set the entries, as masked_fill does."
        )
    if value.diagonal().isinf().any():
        raise Wrong("hides the diagonal: each picture's own caption is the right answer.")
    hidden = value == -torch.inf
    if (value == torch.inf).any():
        raise Wrong("sets entries to plus infinity, so that a softmax gives them all the weight.")
    if not hidden.any():
        if torch.equal(value, logits):
            raise Wrong("hides nothing: captions 0 and 2 are equal, and so are 1 and 4.")
        if torch.equal(value, logits.masked_fill(others, 0.0)):
            raise Wrong("sets entries to 0, which is no small logit: set them to minus infinity.")
        raise Wrong("hides nothing: set entries to minus infinity.")
    if torch.equal(hidden, ~same):
        raise Wrong("hides pairs whose captions differ: these are the negatives.")
    if torch.equal(hidden, others.triu()) or torch.equal(hidden, others.tril()):
        raise Wrong("hides one half of the table: if captions 0 and 2 are equal, so are 2 and 0.")
    if not torch.equal(hidden, others):
        row, column = (int(i) for i in (hidden != others).nonzero()[0])
        verb = "hides" if hidden[row, column] else "does not hide"
        raise Wrong(f"{verb} picture {row} with caption {column}, in a batch of {captions}.")
    expect(value[~others], logits[~others], "changes entries that stay: the rest")


@exercise(points=2)
def ensemble(answer: Any) -> None:
    """Normalise, mean over templates, normalise."""
    features = torch.randn(3, 4, 6) * torch.tensor([0.2, 1.0, 5.0])[:, None, None]
    unit = F.normalize(features, dim=-1)
    right = F.normalize(unit.mean(0), dim=-1)
    value = untouched(answer, features)
    if isinstance(value, Tensor) and value.shape == (3, 6):
        raise Wrong(
            "returns a vector for each template: average over axis 0, and keep the classes."
        )
    expect(
        value,
        right,
        mistakes={
            "lets long vectors weigh more: make unit vectors before the mean": F.normalize(
                features.mean(0), dim=-1
            ),
            "returns means that are shorter than 1: normalise them again": unit.mean(0),
            "returns sums of unit vectors: normalise them": unit.sum(0),
            "normalises nothing": features.mean(0),
            "normalises over the templates (axis 0), not over the vector": F.normalize(
                F.normalize(features, dim=0).mean(0), dim=-1
            ),
            "normalises over the classes, not over the vector": F.normalize(
                F.normalize(features, dim=1).mean(0), dim=-1
            ),
            "normalises the result over the classes (axis 0), not over the vector": F.normalize(
                unit.mean(0), dim=0
            ),
            "takes the first template alone": unit[0],
            "divides by the sum of the entries, not by the length": (
                unit.mean(0) / unit.mean(0).sum(-1, keepdim=True)
            ),
        },
    )


def _curve(points: Tensor, t: Tensor, middle: float = 3.0) -> Tensor:
    s = 1 - t
    weights = torch.stack([s**3, middle * s**2 * t, middle * s * t**2, t**3], dim=1)
    return weights @ points


@exercise(points=2)
def stroke_coverage(answer: Any) -> None:
    """clamp(r - d + 1/2, 0, 1), with the distance to points of a cubic Bezier curve."""
    points = torch.tensor([[1.0, 1.0], [6.0, 0.0], [0.0, 7.0], [7.0, 6.0]])
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    centres, t, radius = torch.stack([x, y], 2).flatten(0, 1), torch.linspace(0, 1, 41), 1.2

    def coverage(curve: Tensor, shift: float = 0.5) -> Tensor:
        return (radius - torch.cdist(centres, curve).amin(1) + shift).clamp(0, 1)

    curve = _curve(points, t)
    every = torch.cdist(centres, curve)
    d = every.amin(1)
    expect(
        untouched(answer, points, radius, centres, t),
        coverage(curve),
        mistakes={
            "lacks the 1/2: a pixel whose centre is on the border is half covered": coverage(
                curve, 0.0
            ),
            "does not clamp: coverage lies between 0 and 1": radius - d + 0.5,
            "does not clamp at 1": (radius - d + 0.5).clamp(min=0),
            "does not clamp at 0": (radius - d + 0.5).clamp(max=1),
            "lacks the factors 3 of the curve": coverage(_curve(points, t, 1.0)),
            "runs along straight lines between the control points": coverage(
                torch.cat([points[i] + t[:, None] * (points[i + 1] - points[i]) for i in range(3)])
            ),
            "takes the distance to the control points, not to the curve": coverage(points),
            "takes the farthest point of the curve: the nearest counts": (
                radius - every.amax(1) + 0.5
            ).clamp(0, 1),
            "takes the mean distance: the nearest point of the curve counts": (
                radius - every.mean(1) + 0.5
            ).clamp(0, 1),
            "takes the squared distance": (radius - d.square() + 0.5).clamp(0, 1),
            "is large outside the stroke: it is r - d, not d - r": (d - radius + 0.5).clamp(0, 1),
            "is only 0 or 1, which has no gradient: take the ramp": (d < radius).float(),
            "takes the radius for the whole width": (radius / 2 - d + 0.5).clamp(0, 1),
        },
    )
    points.requires_grad_()
    value = answer(points, radius, centres, t)
    expect_gradient(value, points, "the coverage to the control points")
