"""Checks of `04_attngan`.

Axes: B pictures, L words, N regions, G and D width of vectors, H W positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import expect, expect_gradient, untouched


def _attend(scores: Tensor, projected: Tensor, axis: int = 1) -> Tensor:
    """Contexts (B, G, H, W) of scores (B, L, H, W)."""
    return torch.einsum("blhw,blg->bghw", scores.softmax(axis), projected)


@exercise(points=2)
def word_contexts(answer: Any) -> None:
    """Attention of positions to words: equation 2 of Xu et al. 2018."""
    hidden, projected = torch.randn(2, 5, 3, 4), torch.randn(2, 6, 5)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    scores = torch.einsum("blg,bghw->blhw", projected, hidden)
    place = mask[:, :, None, None]
    masked = scores.masked_fill(~place, -torch.inf)
    weights = scores.softmax(1) * place
    late = torch.einsum("blhw,blg->bghw", weights, projected)
    over_positions = scores.flatten(2).softmax(2).view_as(scores) * place
    rows = torch.arange(2 * 12) % 2  # the defect of the public code
    official = mask[rows].view(2, 3, 4, 6).permute(0, 3, 1, 2)
    expect(
        untouched(answer, hidden, projected, mask),
        _attend(masked, projected),
        "returns contexts that",
        mistakes={
            "ignores the mask: padding takes part": _attend(scores, projected),
            "sets the weights of padding to 0 after the softmax, so that the rest no longer sums "
            "to 1: mask the scores with -inf before it": late,
            "sets the scores of padding to 0, not to -inf: exp(0) is 1": _attend(
                scores.masked_fill(~place, 0.0), projected
            ),
            "takes the softmax over positions, where each position weighs the words": torch.einsum(
                "blhw,blg->bghw", over_positions, projected
            ),
            "divides the scores by the square root of G: equation 2 does not": _attend(
                masked / 5**0.5, projected
            ),
            "masks row r of the flattened scores by caption r % B, not by its own": _attend(
                scores.masked_fill(~official, -torch.inf), projected
            ),
            "weighs the words by their scores: the softmax is missing": torch.einsum(
                "blhw,blg->bghw", scores * place, projected
            ),
            "adds the hidden state to the contexts": _attend(masked, projected) + hidden,
        },
    )
    inverted = torch.ones(2, 6, dtype=torch.bool)
    inverted[1, 3:] = False
    flipped = _attend(scores.masked_fill(inverted[:, :, None, None], -torch.inf), projected)[1]
    expect(
        answer(hidden, projected, inverted)[1],
        _attend(scores.masked_fill(~inverted[:, :, None, None], -torch.inf), projected)[1],
        "returns, for a caption of three words, contexts that",
        {"attends to the padding and not to the words: the mask is inverted": flipped},
    )
    hidden.requires_grad_(), projected.requires_grad_()
    value = answer(hidden, projected, mask)
    expect_gradient(value, hidden, "the contexts to hidden")
    expect_gradient(value, projected, "the contexts to the words")


@exercise(points=2)
def region_weights(answer: Any) -> None:
    """Attention of words to regions: equations 7 to 9."""
    words, regions, gamma1 = torch.randn(3, 4), torch.randn(5, 4), 4.0
    scores = words @ regions.T  # (L, N)
    value = untouched(answer, words, regions, gamma1)
    if isinstance(value, Tensor) and value.shape == scores.shape:
        sums = value.sum(1)
        if torch.allclose(value.sum(0), torch.ones(5), atol=1e-4):
            raise Wrong(
                "returns columns that sum to 1: the last softmax is over the regions, axis 1."
            )
        if not torch.allclose(sums, torch.ones(3), atol=1e-4):
            raise Wrong(
                f"returns rows that sum to {sums[0].item():.3g}: the weights of a word over the "
                "regions sum to 1."
            )
    cosines = F.cosine_similarity(words[:, None], regions[None], dim=2)
    expect(
        value,
        (gamma1 * scores.softmax(0)).softmax(1),
        "returns weights that",
        mistakes={
            "lacks gamma_1": scores.softmax(0).softmax(1),
            "leaves out the softmax over words, equation 8": (gamma1 * scores).softmax(1),
            "leaves out both gamma_1 and the softmax over words": scores.softmax(1),
            "takes the first softmax over regions, where equation 8 is over words": (
                gamma1 * scores.softmax(1)
            ).softmax(1),
            "multiplies by gamma_1 before the softmax over words, where equation 9 does it after": (
                gamma1 * scores
            )
            .softmax(0)
            .softmax(1),
            "divides by gamma_1: it multiplies": (scores.softmax(0) / gamma1).softmax(1),
            "takes cosines where equation 7 has products": (gamma1 * cosines.softmax(0)).softmax(1),
        },
    )
    words.requires_grad_()
    weights = answer(words, regions, gamma1)
    expect_gradient(weights[:, 0], words, "the weights to the words")


@exercise(points=2)
def caption_score(answer: Any) -> None:
    """R(Q, D) of one picture and one caption: equation 10, without its outer power."""
    words, contexts, gamma2 = torch.randn(4, 6), torch.randn(4, 6), 5.0
    cosines = F.cosine_similarity(words, contexts, dim=1)
    dots = (words * contexts).sum(1)

    def soft(values: Tensor, gamma: float = gamma2) -> Tensor:
        return (gamma * values).exp().sum().log()

    right = soft(cosines)
    expect(
        untouched(answer, words, contexts, gamma2),
        right,
        "returns a score that",
        mistakes={
            "lacks gamma_2": soft(cosines, 1.0),
            "multiplies by gamma_2 outside of the exponential": (gamma2 * cosines.exp())
            .sum()
            .log(),
            "takes products where equation 10 has cosines: divide by both lengths": soft(dots),
            "divides by one of the two lengths only": soft(dots / words.norm(dim=1)),
            "lacks the logarithm": right.exp(),
            "takes the mean over words, where equation 10 has the sum": right
            - torch.tensor(float(len(words))).log(),
            "takes the logarithm of each word before the sum, which leaves the sum of cosines": (
                gamma2 * cosines
            ).sum(),
            "takes the largest cosine: equation 10 is a soft maximum": cosines.max(),
            "takes gamma_2 times the largest cosine: equation 10 is a soft maximum": gamma2
            * cosines.max(),
            "takes the mean of the cosines": cosines.mean(),
            "has the outer power 1 / gamma_2 of the paper, which the exercise leaves out": right
            / gamma2,
            "takes cosines along the words (axis 0), not along each vector": soft(
                F.cosine_similarity(words, contexts, dim=0)
            ),
        },
    )
    contexts.requires_grad_()
    expect_gradient(answer(words, contexts, gamma2), contexts, "the score to the contexts")


@exercise()
def pair_loss(answer: Any) -> None:
    """L_1 + L_2: equations 11 to 13."""
    similarity = 3 * torch.randn(4, 4)
    rows = F.cross_entropy(similarity, torch.arange(4))
    columns = F.cross_entropy(similarity.T, torch.arange(4))
    expect(
        untouched(answer, similarity),
        rows + columns,
        "returns a loss that",
        mistakes={
            "lacks L_2: each caption has to find its picture, too": rows,
            "lacks L_1: each picture has to find its caption, too": columns,
            "counts L_1 twice: transpose the similarity for L_2": 2 * rows,
            "takes the mean of L_1 and L_2, not their sum": (rows + columns) / 2,
            "sums over pairs: take the mean": 4 * (rows + columns),
            "has the wrong sign: the loss is a negative logarithm": -(rows + columns),
            "prefers dissimilar pairs: the sign of the similarity is wrong": F.cross_entropy(
                -similarity, torch.arange(4)
            )
            + F.cross_entropy(-similarity.T, torch.arange(4)),
            "lacks the logarithm": -(
                similarity.softmax(1).diagonal().mean() + similarity.softmax(0).diagonal().mean()
            ),
            "takes the similarities of the diagonal alone: the rivals are missing": -2
            * similarity.diagonal().mean(),
        },
    )
    similarity.requires_grad_()
    expect_gradient(answer(similarity), similarity, "the loss to the similarity")


@exercise()
def own_mask_share(answer: Any) -> None:
    """Share of rows with the mask of their own caption, in the public code."""
    for batch, positions in ((2, 4), (4, 64), (3, 4), (5, 3), (1, 9)):
        size = batch * positions
        right = sum(row // positions == row % batch for row in range(size)) / size
        value = answer(batch, positions)
        expect(
            float(value) if isinstance(value, (int, float)) else value,
            right,
            f"returns a share for batch {batch} and {positions} positions that",
            mistakes={
                "returns a number of rows: divide it by batch times positions": right * size,
                "returns the share of the rows with a wrong mask": 1 - right,
                "divides by the number of positions: there are batch times as many rows": right
                * batch,
                "returns 1 / batch, which is right only where positions is a multiple of batch": 1
                / batch,
            },
        )
