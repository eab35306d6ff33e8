"""Convolutional blocks that several systems share.

Axes: B pictures, C channels, H W.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lineage.errors import UserError
from lineage.nn.fast import conv_of_upsampled


def num_doublings(small: int, large: int) -> int:
    """Number of times that a side of `small` pixels doubles until it is `large`.

    Raises `UserError` if doubling does not lead there.
    """
    count = (large // small).bit_length() - 1
    if large != small * 2**count or count < 1:
        raise UserError(
            f"{large} pixels do not come from {small} by doubling: choose size (and, for stackgan, "
            "model.stage1_size below it) among 8, 16, 32, 64, 128, ..."
        )
    return count


def halved_channels(channels: int, times: int) -> list[int]:
    """`channels`, then half as many, and so on, `times` times.

    Raises `UserError` if none would be left.
    """
    if channels < 2**times:
        raise UserError(
            f"{channels} channels cannot be halved {times} times: a wider model is needed for this "
            "size (--set model.gen_channels=...)."
        )
    return [channels // 2**i for i in range(times + 1)]


def conv3x3(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution without bias that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)


class UpsampleConv(nn.Conv2d):
    """conv3x3(F.interpolate(x, scale_factor=2, mode="nearest")), computed faster."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2 H, 2 W)."""
        return conv_of_upsampled(x, self)


def upsample_block(in_channels: int, out_channels: int, activation: nn.Module) -> nn.Sequential:
    """Twice the side: nearest neighbours, convolution, batch norm, activation.

    Layer 0 is the authors' upsampling, which `UpsampleConv` includes; it keeps the numbers of their
    layers.
    """
    return nn.Sequential(
        nn.Identity(),
        UpsampleConv(in_channels, out_channels),
        nn.BatchNorm2d(out_channels),
        activation,
    )


def downsample_layers(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Half the side: a strided 4 x 4 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x))))))."""

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
