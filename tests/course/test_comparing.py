"""What the comparison of two tensors says of their difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lineage.course.checking import Wrong
from lineage.course.comparing import expect, expect_gradient, untouched

X = torch.tensor([[0.1, 0.4, 0.9, 1.6], [0.2, 0.3, 0.5, 0.7]])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returns nothing"),
        ([1, 2], "returns list where a tensor"),
        (X.T, "two axes are exchanged"),
        (X[None], "axes too many"),
        (X[0], "the axis of size 2 is missing"),
        (X.flatten(), "in another shape"),
        (X.long(), "not floating-point numbers"),
        (X / 0 - X / 0, "NaN or infinity"),
        (-X, "has the wrong sign"),
        (3 * X, "is 3 times what it should be"),
        (1 - X, "is 1 minus"),
        (X - 0.25, "is 0.25 too small everywhere"),
        (X.sqrt(), "is the square root"),
        (X**2, "is the square of"),
        (X.roll(1, 1), "one position too late along axis 1"),
        (X.roll(-1, 1), "one position too early along axis 1"),
        (X + torch.eye(2, 4), "differs in 25% of its numbers; the first is at [0, 0]: 1.1 where"),
    ],
)
def test_the_difference_is_named(value: Any, words: str) -> None:
    with pytest.raises(Wrong) as caught:
        expect(value, X)
    assert words in str(caught.value)


def test_a_square_matrix_may_be_transposed_and_a_mask_inverted() -> None:
    square = X[:, :2]
    with pytest.raises(Wrong, match="is transposed"):
        expect(square.T, square)
    with pytest.raises(Wrong, match="is inverted"):
        expect(X < 0.5, X >= 0.5)


@pytest.mark.parametrize("value", [X, X.double(), X.clone().requires_grad_(), X + 1e-7])
def test_what_is_right_in_another_form_is_right(value: torch.Tensor) -> None:
    expect(value, X)


@pytest.mark.parametrize(("value", "want"), [(5, 5.0), (5.0, 5.0), (5, 5), (True, True)])
def test_plain_numbers_are_numbers(value: Any, want: Any) -> None:
    expect(value, want)


def test_a_known_mistake_is_named_before_a_general_one() -> None:
    with pytest.raises(Wrong, match="forgets the minus"):
        expect(-X, X, mistakes={"forgets the minus": -X})


def test_gradients_are_asked_for_and_forbidden() -> None:
    x = X.clone().requires_grad_()
    expect_gradient(2 * x, x, "y to x")
    expect_gradient((2 * x).detach(), x, "y to x", exists=False)
    with pytest.raises(Wrong, match="passes no gradient from y to x"):
        expect_gradient((2 * x).detach(), x, "y to x")
    with pytest.raises(Wrong, match="detach it"):
        expect_gradient(2 * x, x, "y to x", exists=False)


def test_a_change_in_place_is_seen() -> None:
    assert torch.equal(untouched(torch.neg, X), -X)
    with pytest.raises(Wrong, match="changes its argument 1 in place"):
        untouched(lambda x: x.neg_(), X.clone())
