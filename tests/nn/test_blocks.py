"""Layouts, and the picture of twice the side as a GPU computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lineage.nn.autoencoder import Double
from lineage.nn.blocks import DoublingConv, laid_for_convolutions


def test_channels_are_last_in_float32_only() -> None:
    x = torch.randn(2, 3, 4, 5)
    laid = laid_for_convolutions(x)
    assert laid.stride() == (60, 1, 15, 3) and torch.equal(laid, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert laid_for_convolutions(x) is x
    assert laid_for_convolutions(x.to("meta")).device.type == "meta"
    for dtype in (torch.bfloat16, torch.float64):
        other = x.to(dtype)
        assert laid_for_convolutions(other) is other


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("layer", [Double(3), DoublingConv(3, 4)], ids=["module", "layer"])
def test_the_plain_way_of_a_gpu_gives_the_same(layer: Double | DoublingConv) -> None:
    x = torch.randn(2, 3, 4, 5)
    found = layer(x.as_subclass(OnGPU)).as_subclass(Tensor)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)
