"""Attention: the arithmetic against loops, masks, derivatives of derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineage.errors import UserError
from lineage.nn.attention import LONG, Attention, attend


def by_loops(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 1, a query at a time; zeros where none may be looked at."""
    found = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        open_ = [m for m in range(key.shape[2]) if mask is None or bool(mask[b, h, n, m])]
        scores = [float(query[b, h, n] @ key[b, h, m]) / query.shape[-1] ** 0.5 for m in open_]
        shares = [math.exp(score - max(scores)) for score in scores]
        for m, share in zip(open_, shares, strict=True):
            found[b, h, n] += share / sum(shares) * value[b, h, m]
    return found


def three(queries: int = 4, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, three heads, width 5."""
    return torch.randn(2, 3, queries, 5), torch.randn(2, 3, keys, 5), torch.randn(2, 3, keys, 5)


def test_attend_is_the_loop() -> None:
    query, key, value = three()
    torch.testing.assert_close(
        attend(query, key, value), by_loops(query, key, value), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 6), (4, 6), (2, 1, 1, 6), (1, 3, 4, 1), (2, 1, 4, 6)], ids=str
)
def test_masks_broadcast_and_true_means_look(shape: tuple[int, ...]) -> None:
    query, key, value = three()
    mask = torch.rand(shape) < 0.5
    full = mask.expand(2, 3, 4, 6)
    assert full.any() and not full.all()
    torch.testing.assert_close(
        attend(query, key, value, mask),
        by_loops(query, key, value, full),
        rtol=1e-5,
        atol=1e-6,
    )


def test_what_is_hidden_does_not_matter() -> None:
    """Neither its key, however large, nor its value."""
    query, key, value = three()
    mask = torch.tensor([True, False, True, True, False, True])
    before = attend(query, key, value, mask)
    key[:, :, ~mask], value[:, :, ~mask] = 1e6, -1e6
    assert torch.equal(attend(query, key, value, mask), before)
    assert not torch.allclose(attend(query, key, value), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_may_look_nowhere_gets_zeros(dtype: torch.dtype) -> None:
    """And neither it nor its neighbours spoil a gradient."""
    query, key, value = (x.to(dtype).requires_grad_() for x in three())
    mask = torch.ones(2, 3, 4, 6, dtype=torch.bool)
    mask[1, 2, 3] = False
    found = attend(query, key, value, mask)
    assert not found[1, 2, 3].any() and found.dtype == dtype
    assert (found[1, 2, :3] != 0).any(-1).all() and (found[0] != 0).any(-1).all()
    found.float().square().sum().backward()
    for x in (query, key, value):
        assert x.grad is not None and x.grad.isfinite().all()
    assert query.grad is not None and not query.grad[1, 2, 3].any()


def test_zeros_are_what_the_fused_kernel_gives() -> None:
    """The path of a GPU, run here."""
    query, key, value = three()
    mask = torch.rand(2, 3, 4, 6) < 0.4
    mask[0, 1, 2] = False
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, value, mask), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_it_can_be_differentiated_twice(masked: bool) -> None:
    """d/dk of |d sum(out^2) / dq|^2 by differences of first derivatives: gradient penalties."""
    query, key, value = (x.double().requires_grad_() for x in three(2, 3))
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None

    def steep(key: Tensor) -> Tensor:
        out = attend(query, key, value, mask).square().sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        return gradient.square().sum()

    (second,) = torch.autograd.grad(steep(key), key)
    step, way = 1e-2, torch.randn_like(key)
    apart = (steep(key + step * way) - steep(key - step * way)) / (2 * step)
    assert second.abs().max() > 1e-3
    assert (second * way).sum().item() == pytest.approx(apart.item(), rel=1e-2)


@pytest.mark.parametrize("keys", [LONG + 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_long_sequences_give_the_same_by_the_fused_kernel(masked: bool, keys: int) -> None:
    """From `LONG` on, results and gradients, against the plain products in double precision."""
    query, key, value = (torch.randn(2, 3, n, 8).requires_grad_() for n in (LONG + 2, keys, keys))
    mask = torch.rand(LONG + 2, keys) < 0.5 if masked else None
    plain = [x.detach().double().requires_grad_() for x in (query, key, value)]
    found, expected = attend(query, key, value, mask), attend(*plain, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip((query, key, value), plain, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_long_sequences_are_differentiated_twice_under_the_kernel_that_can() -> None:
    query = torch.randn(1, 1, LONG, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = attend(query, query, query).square().sum()
        (gradient,) = torch.autograd.grad(out, query, create_graph=True)
        gradient.square().sum().backward()
    assert query.grad.abs().max() > 0


# --- the module -------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
def test_heads_are_slices_of_the_width(elsewhere: bool) -> None:
    """Each head reads its own slice of query, key and value; the results stand side by side."""
    layer = Attention(6, 2, context_width=5 if elsewhere else None)
    x, context = torch.randn(2, 3, 6), torch.randn(2, 4, 5) if elsewhere else None
    mask = torch.rand(2, 1, 3, 4 if elsewhere else 3) < 0.6
    query = layer.query(x)
    key, value = layer.key_value(x if context is None else context).split(6, dim=2)
    heads = []
    for h in (0, 1):
        q, k, v = (part[:, None, :, 3 * h : 3 * h + 3] for part in (query, key, value))
        heads.append(by_loops(q.detach(), k.detach(), v.detach(), mask)[:, 0])
    expected = layer.out(torch.cat(heads, dim=2))
    torch.testing.assert_close(layer(x, context, mask), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [0, -1, 4, 7])
def test_a_width_that_cannot_be_shared_is_refused(heads: int) -> None:
    with pytest.raises(UserError, match=f"width of 6 cannot be shared by {heads} heads"):
        Attention(6, heads)
