"""Noise on its way to other noise."""

from __future__ import annotations

import math

import pytest
import torch

from lineage.nn.draws import Draws

WIDTHS = (6, 4000, 5)


def turned(share: float) -> list[torch.Tensor]:
    return Draws(range(3)).turned(WIDTHS, share)


def test_at_the_start_it_is_the_noise_that_there_would_be() -> None:
    """So the default of the knob changes no picture."""
    draws = Draws(range(3))
    for part, width in zip(turned(0.0), WIDTHS, strict=True):
        assert torch.equal(part, draws.normal(width))


def test_at_the_end_it_is_other_noise() -> None:
    """Of the same streams, what follows; nothing of the start is left."""
    draws = Draws(range(3))
    for width in WIDTHS:
        draws.normal(width)
    for start, end, width in zip(turned(0.0), turned(1.0), WIDTHS, strict=True):
        assert end.shape == (3, width)
        torch.testing.assert_close(end, draws.normal(width))
        if width > 1000:
            assert torch.corrcoef(torch.stack([start[0], end[0]]))[0, 1].abs() < 0.06


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_variance_is_kept_on_the_way(share: float) -> None:
    """A straight line would lose up to half of it, and generators know the radius of their noise.
    The way is a quarter of a circle, the same for each part."""
    turn = share * math.pi / 2
    for start, between, end in zip(turned(0.0), turned(share), turned(1.0), strict=True):
        torch.testing.assert_close(between, math.cos(turn) * start + math.sin(turn) * end)
        if between.shape[1] > 1000:
            assert between.var().item() == pytest.approx(1, abs=0.05)
