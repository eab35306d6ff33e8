"""Convolutional blocks of several systems."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lineage.errors import UserError
from lineage.nn.blocks import UpsampleConv, halved_channels, num_doublings


def test_upsample_conv_is_a_convolution_of_the_larger_picture() -> None:
    layer, x = UpsampleConv(3, 4), torch.randn(2, 3, 4, 5)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, padding=1)
    assert layer.bias is None and plain.shape == (2, 4, 8, 10)
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)


def test_sides_and_channels_double_and_halve() -> None:
    assert [num_doublings(4, side) for side in (8, 16, 256)] == [1, 2, 6]
    assert halved_channels(24, 3) == [24, 12, 6, 3]
    assert halved_channels(4, 2) == [4, 2, 1]


@pytest.mark.parametrize(("small", "large"), [(4, 4), (4, 24), (8, 4), (12, 32)])
def test_sides_that_do_not_double_are_refused(small: int, large: int) -> None:
    with pytest.raises(UserError, match=f"{large} pixels do not come from {small} by doubling"):
        num_doublings(small, large)


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"7 channels cannot be halved 3 times.*gen_channels"):
        halved_channels(7, 3)
