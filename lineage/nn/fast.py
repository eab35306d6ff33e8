"""Ways that are here for speed only. Each computes a plain line, which its docstring states;
`tests/nn/test_fast.py` holds it to that line.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """x (B, C, H, W), with its channels last in memory on a CPU.

    Convolutions in float32 are faster in this layout (measured on x86); in bfloat16 they are not.
    On a GPU `train.channels_last` chooses the layout.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def conv_of_upsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution with padding 1 of x at twice the side, (B, C, H, W) -> (B, C', 2H, 2W).

        conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    Each of the four pixels that come from one input pixel depends on 2 x 2 input pixels only. Taps
    that fall on the same input pixel are therefore summed first: 4 / 9 of the products. A GPU has
    kernels for 3 x 3 convolutions and takes the plain line.
    """
    if x.is_cuda:
        upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(upsampled, conv.weight, conv.bias, padding=1)

    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    dim = 1 if channels_last else 0  # four channels of one pixel side by side, or four blocks
    kernels = [kernel for rows in _merged(conv.weight, 2) for kernel in _merged(rows, 3)]
    weight = torch.stack(kernels, dim).flatten(0, 1)  # (4 C', C, 2, 2)
    bias = None if conv.bias is None else torch.stack([conv.bias] * 4, dim).flatten()
    y = F.conv2d(x, weight, bias, padding=1)  # (B, 4 C', H + 1, W + 1)
    if channels_last:
        return F.pixel_shuffle(y, 2)[..., 1:-1, 1:-1]
    down_right, down_left, up_right, up_left = y.chunk(4, dim=1)
    upper = torch.stack([up_left[..., :-1, :-1], up_right[..., :-1, 1:]], dim=-1)
    lower = torch.stack([down_left[..., 1:, :-1], down_right[..., 1:, 1:]], dim=-1)
    return torch.stack([upper, lower], dim=3).flatten(4, 5).flatten(2, 3)


def _merged(kernel: Tensor, dim: int) -> list[Tensor]:
    """Kernels, along `dim`, of the second and of the first of the two pixels of one input pixel.

    In this order, because output k, of one more than there are inputs, reads inputs k - 1 and k: it
    holds the second pixel of the former and the first of the latter.
    """
    before, at, after = kernel.unbind(dim)
    return [torch.stack([before + at, after], dim), torch.stack([before, at + after], dim)]
