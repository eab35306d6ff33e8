"""Attention: the arithmetic against loops, masks, derivatives of derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineage.errors import UserError
from lineage.nn.attention import Attention, attend
from lineage.nn.fast import MANY_QUERIES


def by_loops(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 1, one query at a time; zeros for a query that may attend to no key."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        keys = [m for m in range(key.shape[2]) if mask is None or bool(mask[b, h, n, m])]
        scores = [float(query[b, h, n] @ key[b, h, m]) / query.shape[-1] ** 0.5 for m in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        for m, weight in zip(keys, weights, strict=True):
            out[b, h, n] += weight / sum(weights) * value[b, h, m]
    return out


def qkv(queries: int = 4, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, three heads, width 5."""
    return torch.randn(2, 3, queries, 5), torch.randn(2, 3, keys, 5), torch.randn(2, 3, keys, 5)


def test_attend_is_the_loop() -> None:
    query, key, value = qkv()
    torch.testing.assert_close(
        attend(query, key, value), by_loops(query, key, value), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 6), (4, 6), (2, 1, 1, 6), (1, 3, 4, 1), (2, 1, 4, 6)], ids=str
)
def test_masks_broadcast_and_true_means_attend(shape: tuple[int, ...]) -> None:
    query, key, value = qkv()
    mask = torch.rand(shape) < 0.5
    full = mask.expand(2, 3, 4, 6)
    assert full.any() and not full.all()
    torch.testing.assert_close(
        attend(query, key, value, mask),
        by_loops(query, key, value, full),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_masked_key_does_not_matter() -> None:
    """Neither the key, however large, nor its value."""
    query, key, value = qkv()
    mask = torch.tensor([True, False, True, True, False, True])
    before = attend(query, key, value, mask)
    key[:, :, ~mask], value[:, :, ~mask] = 1e6, -1e6
    assert torch.equal(attend(query, key, value, mask), before)
    assert not torch.allclose(attend(query, key, value), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_may_attend_to_no_key_gets_zeros(dtype: torch.dtype) -> None:
    """And neither it nor its neighbours spoil a gradient."""
    query, key, value = (x.to(dtype).requires_grad_() for x in qkv())
    mask = torch.ones(2, 3, 4, 6, dtype=torch.bool)
    mask[1, 2, 3] = False
    out = attend(query, key, value, mask)
    assert not out[1, 2, 3].any() and out.dtype == dtype
    assert (out[1, 2, :3] != 0).any(-1).all() and (out[0] != 0).any(-1).all()
    out.float().square().sum().backward()
    for x in (query, key, value):
        assert x.grad is not None and x.grad.isfinite().all()
    assert query.grad is not None and not query.grad[1, 2, 3].any()


@pytest.mark.parametrize("masked", [False, True])
def test_it_can_be_differentiated_twice(masked: bool) -> None:
    """d/dk of |d sum(out^2) / dq|^2 by differences of first derivatives: gradient penalties."""
    query, key, value = (x.double().requires_grad_() for x in qkv(2, 3))
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None

    def penalty(key: Tensor) -> Tensor:
        out = attend(query, key, value, mask).square().sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        return gradient.square().sum()

    (second,) = torch.autograd.grad(penalty(key), key)
    step, direction = 1e-2, torch.randn_like(key)
    difference = (penalty(key + step * direction) - penalty(key - step * direction)) / (2 * step)
    assert second.abs().max() > 1e-3
    assert (second * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_long_sequences_are_differentiated_twice_under_the_kernel_that_can() -> None:
    query = torch.randn(1, 1, MANY_QUERIES, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = attend(query, query, query).square().sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        gradient.square().sum().backward()
    assert query.grad is not None and query.grad.abs().max() > 0


# --- the module -------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_heads_are_slices_of_the_width(cross: bool) -> None:
    """Each head takes its own slice of query, key and value; their results stand side by side."""
    layer = Attention(6, 2, context_dim=5 if cross else None)
    x, context = torch.randn(2, 3, 6), torch.randn(2, 4, 5) if cross else None
    mask = torch.rand(2, 1, 3, 4 if cross else 3) < 0.6
    keys = x if context is None else context
    projected = layer.to_q(x), layer.to_k(keys), layer.to_v(keys)
    heads = []
    for h in (0, 1):
        q, k, v = (part[:, None, :, 3 * h : 3 * h + 3].detach() for part in projected)
        heads.append(by_loops(q, k, v, mask)[:, 0])
    expected = layer.to_out(torch.cat(heads, dim=2))
    torch.testing.assert_close(layer(x, context, mask), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_heads", [0, -1, 4, 7])
def test_a_width_that_cannot_be_shared_is_refused(num_heads: int) -> None:
    with pytest.raises(UserError, match=f"width of 6 cannot be shared by {num_heads} heads"):
        Attention(6, num_heads)
