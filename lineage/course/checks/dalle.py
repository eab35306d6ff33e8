"""Checks of `06_dalle`.

Axes: B rows, K codes, N positions, d width of a head, H W grid of codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong, exercise
from lineage.course.comparing import close, expect, expect_gradient, untouched


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one head; the mask is True where a query may attend to a key."""
    scores = (query @ key.T * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(1).nan_to_num() @ value


@exercise(points=2)
def causal_attention(answer: Any) -> None:
    """softmax(Q K^T / sqrt(d)) V under the causal mask."""
    num, width = 5, 4
    query, key, value = (torch.randn(num, width) for _ in range(3))
    causal = torch.ones(num, num, dtype=torch.bool).tril()
    every, scale = torch.ones_like(causal), width**-0.5
    right = _attend(query, key, value, causal, scale)
    result = untouched(answer, query, key, value)
    scores = query @ key.T * scale
    expect(
        result,
        right,
        mistakes={
            "has no mask: a position attends to those after it": _attend(
                query, key, value, every, scale
            ),
            "has an inverted mask: it attends to the future alone": _attend(
                query, key, value, ~causal, scale
            ),
            "attends to itself and to the future: the mask should be lower triangular": _attend(
                query, key, value, causal.T, scale
            ),
            "hides each position from itself: the diagonal should stay": _attend(
                query, key, value, causal.tril(-1), scale
            ),
            "does not divide by the square root of the width": _attend(
                query, key, value, causal, 1.0
            ),
            "divides by the width, not by its square root": _attend(
                query, key, value, causal, 1 / width
            ),
            "divides by the square root of the number of positions, not of the width": _attend(
                query, key, value, causal, num**-0.5
            ),
            "sets hidden scores to 0 before the softmax, which is no small weight: set them to "
            "minus infinity": (scores * causal).softmax(1) @ value,
            "hides the future after the softmax, so that the weights do not sum to 1": (
                scores.softmax(1) * causal
            )
            @ value,
            "takes the softmax over the queries (axis 0): each query's weights should sum to 1": (
                scores.masked_fill(~causal, -torch.inf).softmax(0) @ value
            ),
        },
    )
    if isinstance(result, Tensor):
        value.requires_grad_()
        expect_gradient(answer(query, key, value), value, "the result to the values")


@exercise(points=2)
def cached_step(answer: Any) -> None:
    """One position at a time with a cache equals attention over all of them."""
    num, width = 5, 4
    query, key, value = (torch.randn(num, width) for _ in range(3))
    causal = torch.ones(num, num, dtype=torch.bool).tril()
    right = _attend(query, key, value, causal, width**-0.5)
    unscaled = _attend(query, key, value, causal, 1.0)
    before = _attend(query, key, value, causal.tril(-1), width**-0.5)
    keys, values = key[:0], value[:0]
    for i in range(num):
        result = untouched(answer, query[i], key[i], value[i], keys, values)
        if not isinstance(result, tuple) or len(result) != 3:
            raise Wrong("should return three things: the attended value, keys and values.")
        attended, keys, values = result
        expect(
            keys,
            key[: i + 1],
            f"at position {i} returns keys of which the tensor",
            {
                "returns the keys without the new one": key[:i],
                "puts the new key before the others: it comes last": torch.cat(
                    [key[i : i + 1], key[:i]]
                ),
                "stores the value among the keys": torch.cat([key[:i], value[i : i + 1]]),
                "stores the query among the keys": torch.cat([key[:i], query[i : i + 1]]),
            },
        )
        expect(
            values,
            value[: i + 1],
            f"at position {i} returns values of which the tensor",
            {
                "returns the values without the new one": value[:i],
                "stores the key among the values": torch.cat([value[:i], key[i : i + 1]]),
            },
        )
        expect(
            attended,
            right[i],
            f"at position {i} returns an attended value that",
            {
                "leaves out the new position itself: attend after the cache has its key": before[i],
                "does not divide by the square root of the width": unscaled[i],
                "returns the new value alone: weigh the values of all positions": value[i],
                "takes the mean of all values: weigh them by a softmax of the products": value[
                    : i + 1
                ].mean(0),
            }
            if i
            else None,
        )


@exercise(points=2)
def top_k_probs(answer: Any) -> None:
    """Top-k, then a softmax at a temperature."""
    logits, temperature, top_k = torch.randn(3, 6) * 2, 0.5, 2
    largest = logits.topk(top_k).indices
    mask = torch.zeros(3, 6, dtype=torch.bool).scatter(1, largest, True)

    def probs(mask: Tensor, factor: float) -> Tensor:
        return (logits * factor).masked_fill(~mask, -torch.inf).softmax(1)

    full = (logits / temperature).softmax(1)
    right = probs(mask, 1 / temperature)
    of_all = logits.flatten().topk(top_k).values[-1]
    mistakes = {
        "multiplies by the temperature: it should divide": probs(mask, temperature),
        "does not use the temperature": probs(mask, 1.0),
        "keeps all codes: the others should get 0": full,
        "does not share the probability of the forbidden codes: each row should sum to 1": full
        * mask,
        "keeps the unlikeliest codes: topk of the logits has the largest": probs(
            torch.zeros_like(mask).scatter(1, (-logits).topk(top_k).indices, True), 1 / temperature
        ),
        "keeps the top k of the whole batch, not of each row": probs(
            logits >= of_all, 1 / temperature
        ).nan_to_num(),
        "keeps one code too few: the k-th largest itself should stay": probs(
            torch.zeros_like(mask).scatter(1, logits.argmax(1, keepdim=True), True), 1 / temperature
        ),
        "keeps one code too many": probs(
            torch.zeros_like(mask).scatter(1, logits.topk(top_k + 1).indices, True), 1 / temperature
        ),
        "sets forbidden logits to 0, which is no probability of 0: set them to minus infinity": (
            logits * mask / temperature
        ).softmax(1),
        "takes the softmax over the rows (axis 0): it goes over the codes": (
            (logits / temperature).masked_fill(~mask, -torch.inf).softmax(0).nan_to_num()
        ),
    }
    result = untouched(answer, logits, temperature, top_k)
    if isinstance(result, Tensor) and result.shape == (3, top_k):
        raise Wrong("returns the kept codes alone: the others should be there, with 0.")
    for sentence, wrong in mistakes.items():  # also those in which a row holds NaN
        if isinstance(result, Tensor) and close(result.nan_to_num(), wrong):
            raise Wrong(f"{sentence}.")
    expect(result, right)
    expect(answer(logits, 1.0, 6), logits.softmax(1), "with top_k = K, the plain softmax, a row")


@exercise(points=2)
def sequence_loss(answer: Any) -> None:
    """text_weight L_text + (1 - text_weight) L_image, each a mean over its own tokens."""
    text, codes, weight = torch.rand(2, 4) + 2, torch.rand(2, 9), 1 / 8
    has_word = torch.tensor([[True, True, False, False], [True, True, True, False]])
    words = text[has_word]
    mean, image = words.mean(), codes.mean()
    of_rows = torch.stack([t[m].mean() for t, m in zip(text, has_word, strict=True)]).mean()
    zeroed = (text * has_word).mean()

    def loss(text_loss: Tensor, image_loss: Tensor = image) -> Tensor:
        return weight * text_loss + (1 - weight) * image_loss

    expect(
        untouched(answer, text, has_word, codes, weight),
        loss(mean),
        "is a number that",
        mistakes={
            "exchanges the weights: text has 1/8 and the picture 7/8": (1 - weight) * mean
            + weight * image,
            "counts padding too: take the words where has_word is True": loss(text.mean()),
            "divides by all positions of text: divide by the number of words": loss(zeroed),
            "inverts has_word: it is True where there is a word": loss(text[~has_word].mean()),
            "averages each caption first, so that words of short captions weigh more": loss(
                of_rows
            ),
            "sums over the words: it should be a mean": loss(words.sum()),
            "sums over the codes: it should be a mean": loss(mean, codes.sum()),
            "has sums where means should be": loss(words.sum(), codes.sum()),
            "has no weights": mean + image,
            "weighs the text alone: the codes have 1 - text_weight": weight * mean + image,
            "takes one mean over words and codes together": torch.cat(
                [words, codes.flatten()]
            ).mean(),
        },
    )
    codes.requires_grad_()
    expect_gradient(answer(text, has_word, codes, weight), codes, "the loss to the codes' nats")


@exercise()
def gumbel_mixture(answer: Any) -> None:
    """softmax((logits - ln(-ln u)) / tau) over the codes."""
    logits, tau = torch.randn(2, 5, 3, 3), 0.5
    u = torch.rand(2, 5, 3, 3).clamp(1e-4, 1 - 1e-4)
    gumbel = -(-u.log()).log()
    result = untouched(answer, logits, u, tau)
    expect(
        result,
        ((logits + gumbel) / tau).softmax(1),
        mistakes={
            "subtracts the noise: g = -ln(-ln u) is added": ((logits - gumbel) / tau).softmax(1),
            "divides the logits by tau, and not the noise": (logits / tau + gumbel).softmax(1),
            "divides the noise by tau, and not the logits": (logits + gumbel / tau).softmax(1),
            "multiplies by tau: it should divide": ((logits + gumbel) * tau).softmax(1),
            "does not use tau": (logits + gumbel).softmax(1),
            "adds u itself: g = -ln(-ln u)": ((logits + u) / tau).softmax(1),
            "adds -ln u, which is exponential noise: take its logarithm once more": (
                (logits - u.log()) / tau
            ).softmax(1),
            "has no noise": (logits / tau).softmax(1),
            "takes the softmax over the rows (axis 0): it goes over the codes, axis 1": (
                (logits + gumbel) / tau
            ).softmax(0),
            "takes the softmax over the last axis: it goes over the codes, axis 1": (
                (logits + gumbel) / tau
            ).softmax(-1),
            "returns one code: the mixture is soft, so that it has a gradient": torch.zeros_like(
                logits
            ).scatter(1, (logits + gumbel).argmax(1, keepdim=True), 1.0),
        },
    )
    logits.requires_grad_()
    weights = torch.randn_like(u)
    expect_gradient(answer(logits, u, tau) * weights, logits, "the mixture to the logits")
