"""Fast ways, against the plain lines that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.fast import (
    MANY_QUERIES,
    GroupNorm,
    channels_last_on_cpu,
    conv_of_upsampled,
    linear_chunks,
    parallel_linears,
    scaled_dot_product_attention,
    squared_lengths,
)

# --- convolutions -----------------------------------------------------------------------------


def test_channels_are_last_in_float32_and_without_norms() -> None:
    x = torch.randn(2, 3, 4, 5)
    y = channels_last_on_cpu(x)
    assert y.stride() == (60, 1, 15, 3) and torch.equal(y, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert channels_last_on_cpu(x) is x
        assert channels_last_on_cpu(x, norms=False).stride() == y.stride()
    assert channels_last_on_cpu(x.to("meta")).device.type == "meta"
    other = x.bfloat16()
    assert channels_last_on_cpu(other) is other
    assert channels_last_on_cpu(other, norms=False).stride() == y.stride()
    other = x.double()
    assert channels_last_on_cpu(other) is channels_last_on_cpu(other, norms=False) is other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_pytorch_s(
    layout: torch.memory_format, groups: int, dtype: torch.dtype
) -> None:
    """Values and gradients, against it in double precision."""
    norm = GroupNorm(groups, 8, eps=1e-3)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(2, 8, 4, 5)).to(dtype).contiguous(memory_format=layout)
    inputs = [x.requires_grad_(), norm.weight, norm.bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, factors = norm(x), torch.randn(2, 8, 4, 5)
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-3)
    low = dtype == torch.bfloat16
    limits = {"rtol": 0, "atol": 0.03} if low else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **limits)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    gradients = torch.autograd.grad((y * factors).sum(), inputs)
    theirs = torch.autograd.grad((expected * factors).sum(), exact)
    limits = {"rtol": 0, "atol": 0.1} if low else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **limits)


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "GPU"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_of_upsampled_is_the_convolution_of_the_larger_picture(
    bias: bool, layout: str
) -> None:
    """Values and gradients, in each layout and as a GPU computes it."""
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    plain = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    inputs = [x, *conv.parameters()]
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    if layout == "channels_last":
        y = conv_of_upsampled(x.contiguous(memory_format=torch.channels_last), conv)
    elif layout == "GPU":
        y = conv_of_upsampled(x.as_subclass(OnGPU), conv).as_subclass(Tensor)
    else:
        y = conv_of_upsampled(x, conv)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- attention and linear layers --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [MANY_QUERIES + 2, 5])
@pytest.mark.parametrize("queries", [4, MANY_QUERIES + 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_fused_kernel(
    masked: bool, queries: int, keys: int, dtype: torch.dtype
) -> None:
    """Values and gradients, against it in double precision; one query has no key."""
    shapes = (queries, 8), (keys, 8), (keys, 8)
    inputs = [torch.randn(2, 3, *shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.rand(queries, keys) < 0.5 if masked else None
    if mask is not None:
        mask[2] = False
    out = scaled_dot_product_attention(*inputs, mask)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.03}
    torch.testing.assert_close(out.double(), expected, **limits)
    assert out.dtype == dtype and (mask is None or not out[:, :, 2].any())
    out.double().square().sum().backward()
    expected.square().sum().backward()
    limits = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.3}
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **limits)


@pytest.mark.parametrize("fixed", [True, False])
def test_squared_lengths_are_those_of_the_sums(fixed: bool) -> None:
    """Values and gradients."""
    x, vectors = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 4, 3)
    inputs = [x] if fixed else [x, vectors.requires_grad_()]
    ours, expected = squared_lengths(x, vectors @ vectors.mT), (x @ vectors).square().sum(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    factors = torch.randn(2, 5)
    gradients = [torch.autograd.grad((y * factors).sum(), inputs) for y in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_linear_chunks_are_chunks_of_the_layer(chunks: int, bias: bool) -> None:
    """Values and gradients."""
    layer, x = nn.Linear(5, 12, bias), torch.randn(2, 4, 5, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected, parts = layer(x).chunk(chunks, dim=-1), linear_chunks(x, layer, chunks)
    assert len(parts) == chunks
    for ours, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum(x.square().sum() * k for k, x in enumerate(some, 1)), inputs)
        for some in (parts, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parallel_linears_are_the_layers(bias: bool, autocast: bool) -> None:
    """Values and gradients."""
    layers = [nn.Linear(6, width, bias) for width in (4, 4, 8)]
    x = torch.randn(2, 3, 6, requires_grad=True)
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    results = []
    for joined in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts = parallel_linears(x, *layers) if joined else [layer(x) for layer in layers]
        loss = sum(part.float().square().sum() * k for k, part in enumerate(parts, 1))
        results.append([*parts, *torch.autograd.grad(loss, inputs)])
    atol = 0.1 if autocast else 1e-5  # gradients of x are sums of bfloat16 products
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=atol)


class Doubled(nn.Linear):
    """An adapter: a layer whose result is not that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["class", "hook", "pre-hook"])
def test_parallel_linears_call_layers_with_adapters(kind: str) -> None:
    plain, other = nn.Linear(6, 4), Doubled(6, 4) if kind == "class" else nn.Linear(6, 4)
    if kind == "hook":
        other.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "pre-hook":
        other.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        parts = parallel_linears(x, plain, other)
        assert torch.equal(parts[1], other(x)) and torch.equal(parts[0], plain(x))
