"""What every network's layers are laid out with."""

from __future__ import annotations

import torch

from lineage.nn.blocks import well_laid


def test_channels_are_last_in_float32_only() -> None:
    x = torch.randn(2, 3, 4, 5)
    laid = well_laid(x)
    assert laid.stride() == (60, 1, 15, 3) and torch.equal(laid, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert well_laid(x) is x
    assert well_laid(x.to("meta")).device.type == "meta"
