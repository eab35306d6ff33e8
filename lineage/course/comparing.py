"""Comparing a student's tensor with the right one, so that the difference is named: a sign, a
factor, a shift by one, a square root, a shape that does not broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lineage.course.checking import Wrong

RTOL, ATOL = 1e-3, 1e-5


def close(value: Tensor, want: Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    return value.shape == want.shape and torch.allclose(
        value.double(), want.double(), rtol=RTOL, atol=ATOL
    )


def expect(
    value: Any,
    want: Tensor | float | int | bool,
    what: str = "returns a tensor that",
    mistakes: Mapping[str, Any] | None = None,
) -> None:
    """Raise `Wrong` unless `value` is `want` up to rounding.

    Args:
        value: What the answer returned.
        want: The right tensor or number.
        what: Start of the sentence; its rest begins with a verb, such as `has`.
        mistakes: Sentence (without its subject) -> the value that an answer with this mistake has;
            they are compared first.
    """
    want = torch.as_tensor(want)
    value = _tensor(value, want)
    if value.shape != want.shape:
        raise Wrong(
            f"{what} has shape {tuple(value.shape)}, not {tuple(want.shape)}{_axes(value, want)}."
        )
    if value.is_floating_point() != want.is_floating_point():
        kinds = {True: "floating-point numbers", False: "integers or truth values"}
        raise Wrong(
            f"{what} holds {kinds[value.is_floating_point()]} ({value.dtype}), not "
            f"{kinds[want.is_floating_point()]}."
        )
    value = value.detach()
    if value.is_floating_point() and not value.isfinite().all():
        raise Wrong(f"{what} holds NaN or infinity: look for a division by zero or a log of zero.")
    if close(value, want):
        return
    for sentence, wrong in (mistakes or {}).items():
        if close(value, torch.as_tensor(wrong)):
            raise Wrong(f"{sentence}.")
    raise Wrong(f"{what} {_difference(value, want.detach())}.")


def _tensor(value: Any, want: Tensor) -> Tensor:
    if value is None:
        raise Wrong("returns nothing: end it with `return`.")
    if isinstance(value, Tensor):
        return value
    if want.dim() == 0 and isinstance(value, (int, float)):
        return torch.as_tensor(float(value) if want.is_floating_point() else value)
    raise Wrong(f"returns {type(value).__name__} where a tensor {tuple(want.shape)} is expected.")


def _axes(value: Tensor, want: Tensor) -> str:
    """What may have gone wrong with a shape."""
    if value.dim() == want.dim() and sorted(value.shape) == sorted(want.shape):
        return ": two axes are exchanged"
    if value.dim() > want.dim():
        return ": axes too many; look at what is broadcast against what"
    if value.numel() == want.numel():
        return ": the numbers are there, but in another shape"
    missing = [size for size in want.shape if size not in value.shape]
    return f": the axis of size {missing[0]} is missing" if missing else ""


def _difference(value: Tensor, want: Tensor) -> str:
    """How two tensors of one shape differ, as the rest of a sentence."""
    if want.dtype == torch.bool:
        if close(value, ~want):
            return "is inverted: True stands where False should"
        return _first(value, want)
    value, want = value.double(), want.double()
    if close(value, -want):
        return "has the wrong sign"
    factor = float((value * want).sum() / (want * want).sum().clamp(min=1e-30))
    if abs(factor) > 1e-6 and close(value, factor * want):
        return f"is {factor:.4g} times what it should be: check the factor"
    if close(value, 1 - want):
        return "is 1 minus what it should be"
    offset = float((value - want).mean())
    if close(value - offset, want):
        return f"is {abs(offset):.4g} too {'large' if offset > 0 else 'small'} everywhere"
    if want.min() >= 0:
        if close(value, want.sqrt()):
            return "is the square root of what it should be"
        if close(value, want**2):
            return "is the square of what it should be"
    if want.dim() == 2 and close(value, want.T):
        return "is transposed: rows and columns are exchanged"
    for axis, size in enumerate(want.shape):
        if size > 2:
            head, tail = want.narrow(axis, 0, size - 1), want.narrow(axis, 1, size - 1)
            for shift, part, other in (
                ("late", (1, size - 1), head),
                ("early", (0, size - 1), tail),
            ):
                if close(value.narrow(axis, *part), other):
                    return f"is one position too {shift} along axis {axis}"
    return _first(value, want)


def _first(value: Tensor, want: Tensor) -> str:
    """The first place where two tensors differ."""
    wrong = (value.double() - want.double()).abs() > ATOL + RTOL * want.double().abs()
    share = wrong.double().mean().item()
    if not want.dim():
        return f"is {value.item():.4g}, and should be {want.item():.4g}"
    place = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"differs in {share:.0%} of its numbers; the first is at {list(place)}: "
        f"{value[place].item():.4g} where {want[place].item():.4g} is right"
    )


def expect_gradient(value: Tensor, source: Tensor, what: str, exists: bool = True) -> None:
    """Raise `Wrong` unless `value` has a gradient with respect to `source`, or has none.

    Args:
        what: Names of both, such as `the loss to the weights`.
        exists: If false, there must be none.
    """
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), source, allow_unused=True, retain_graph=True)
    reaches = gradient is not None and bool((gradient != 0).any())
    if exists and not reaches:
        raise Wrong(f"passes no gradient from {what}: something is detached, or under no_grad.")
    if not exists and reaches:
        raise Wrong(f"passes a gradient from {what}, where there should be none: detach it.")


def untouched(answer: Callable[..., Any], *arguments: Any) -> Any:
    """The answer to these arguments. Raises `Wrong` if it changes one of them in place."""
    before = [one.clone() if isinstance(one, Tensor) else one for one in arguments]
    value = answer(*arguments)
    for number, (one, old) in enumerate(zip(arguments, before, strict=True), start=1):
        if isinstance(one, Tensor) and not torch.equal(one, old):
            raise Wrong(f"changes its argument {number} in place: make a new tensor.")
    return value
