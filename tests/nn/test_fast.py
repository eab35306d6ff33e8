"""Fast ways, against the plain lines that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.fast import channels_last_on_cpu, conv_of_upsampled


def test_channels_are_last_in_float32_only() -> None:
    x = torch.randn(2, 3, 4, 5)
    y = channels_last_on_cpu(x)
    assert y.stride() == (60, 1, 15, 3) and torch.equal(y, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert channels_last_on_cpu(x) is x
    assert channels_last_on_cpu(x.to("meta")).device.type == "meta"
    for dtype in (torch.bfloat16, torch.float64):
        other = x.to(dtype)
        assert channels_last_on_cpu(other) is other


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


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
