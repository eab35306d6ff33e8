"""Convolutional blocks that several systems have in common.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError


def doublings(small: int, large: int) -> int:
    """How often a side of `small` pixels doubles on its way to `large`; `UserError` if it does not
    end there.
    """
    count = (large // small).bit_length() - 1
    if large != small * 2**count or count < 1:
        raise UserError(
            f"{large} pixels do not come from {small} by doubling: choose size (and model.start, "
            "where there is one, below it) among 8, 16, 32, 64, 128, ..."
        )
    return count


def halvings(channels: int, times: int) -> list[int]:
    """`channels`, half of them, and so on, `times` times; `UserError` if none would be left."""
    if channels < 2**times:
        raise UserError(
            f"{channels} channels cannot be halved {times} times: a wider model is needed for this "
            "size (--set model.generator=...)."
        )
    return [channels // 2**i for i in range(times + 1)]


def conv3x3(inputs: int, outputs: int, dilation: int = 1) -> nn.Conv2d:
    """Keeps the side; with a `dilation` of 2 it looks at every second pixel."""
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)


def laid_for_convolutions(x: Tensor) -> Tensor:
    """x (B, C, H, W), its channels last in memory where convolutions are faster so: on a CPU (x86
    was measured) in float32, not in bfloat16. On a GPU `train.channels_last` says how they lie.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def conv_of_doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What a 3 x 3 convolution of padding 1 gives for x at twice the side (nearest neighbours).

    x (B, C, H, W) -> (B, C', 2 H, 2 W). Each of the four pixels that come from one sees but 2 x 2
    different ones, so taps that fall on the same pixel are summed first: 4 / 9 of the products. On
    a GPU, whose kernels are made for 3 x 3, the plain way is taken.
    """
    if x.is_cuda:
        large = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(large, conv.weight, conv.bias, padding=1)

    def merged(kernel: Tensor, dim: int) -> list[Tensor]:
        """The kernels of the second and of the first of two pixels along `dim`.

        In this order, as place k of the result, which has one place more, sees pixels k - 1 and k:
        it holds the second half of the one and the first half of the other.
        """
        before, own, after = kernel.unbind(dim)
        return [torch.stack([before + own, after], dim), torch.stack([before, own + after], dim)]

    last = x.is_contiguous(memory_format=torch.channels_last)
    beside = 1 if last else 0  # the four channels of one pixel side by side, or a block for each
    kernels = [kernel for rows in merged(conv.weight, 2) for kernel in merged(rows, 3)]
    bias = None if conv.bias is None else torch.stack([conv.bias] * 4, beside).flatten()
    kernel = torch.stack(kernels, beside).flatten(0, 1)  # (4 C', C, 2, 2)
    made = F.conv2d(x, kernel, bias, padding=1)  # (B, 4 C', H + 1, W + 1)
    if last:
        return F.pixel_shuffle(made, 2)[..., 1:-1, 1:-1]
    down_right, down_left, up_right, up_left = made.chunk(4, dim=1)
    upper = torch.stack([up_left[..., :-1, :-1], up_right[..., :-1, 1:]], dim=-1)
    lower = torch.stack([down_left[..., 1:, :-1], down_right[..., 1:, 1:]], dim=-1)
    return torch.stack([upper, lower], dim=3).flatten(4, 5).flatten(2, 3)


class DoublingConv(nn.Conv2d):
    """`conv_of_doubled` as a layer: 3 x 3 and padding 1, twice the side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2 H, 2 W)."""
        return conv_of_doubled(x, self)


def up(inputs: int, outputs: int, gate: nn.Module) -> nn.Sequential:
    """Twice the side: nearest neighbours, then a convolution, batch norm, and `gate`.

    Layer 0 does nothing: the authors' is the doubling, and the others keep the numbers of theirs.
    """
    return nn.Sequential(
        nn.Identity(), DoublingConv(inputs, outputs), nn.BatchNorm2d(outputs), gate
    )


def down(inputs: int, outputs: int) -> list[nn.Module]:
    """Half the side: a convolution over 4 x 4, as layers, so that their names stay flat."""
    layer = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), as wide as it is."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(channels, channels, dilation),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.block(x))
