"""Noise on its way to other noise, and the noise of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from lineage.nn.noise import BatchNoise, NoiseStreams

WIDTHS = (6, 4000, 5)


def turned(share: float) -> list[torch.Tensor]:
    return NoiseStreams(range(3)).turned(WIDTHS, share)


def test_at_the_start_it_is_the_noise_that_there_would_be() -> None:
    """So the default of the knob changes no picture."""
    draws = NoiseStreams(range(3))
    for part, width in zip(turned(0.0), WIDTHS, strict=True):
        assert torch.equal(part, draws.randn(width))


def test_at_the_end_it_is_other_noise() -> None:
    """Of the same streams, what follows; nothing of the start is left."""
    draws = NoiseStreams(range(3))
    for width in WIDTHS:
        draws.randn(width)
    for start, end, width in zip(turned(0.0), turned(1.0), WIDTHS, strict=True):
        assert end.shape == (3, width)
        torch.testing.assert_close(end, draws.randn(width))
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


# --- one stream for a batch ---------------------------------------------------------------------


def some_of_each(draws: NoiseStreams) -> list[torch.Tensor]:
    return [draws.randn(3, 2), draws.rand(), draws.randint(7, 4), *draws.turned(WIDTHS, 0.3)]


@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 2, 3]], ids=str)
def test_those_who_share_a_batch_draw_what_one_would(parts: list[int]) -> None:
    """Each its rows, in every kind of draw, one after the other."""
    whole = some_of_each(BatchNoise(5, 6, range(6)))
    starts = [sum(parts[:i]) for i in range(len(parts))]
    shared = [
        some_of_each(BatchNoise(5, 6, range(start, start + part)))
        for start, part in zip(starts, parts, strict=True)
    ]
    for one, *others in zip(whole, *shared, strict=True):
        assert torch.equal(one, torch.cat(others))


def test_rows_and_batches_draw_numbers_of_their_own() -> None:
    one, other = (BatchNoise(seed, 4000, range(4000)).randn(2) for seed in (5, 6))
    for a, b in ((one[:-1, 0], one[1:, 0]), (one[:, 0], one[:, 1]), (one[:, 0], other[:, 0])):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.06
    assert one.mean().abs() < 0.05 and one.std().item() == pytest.approx(1, abs=0.05)


def test_a_batch_draws_within_its_bounds_and_knows_its_rows() -> None:
    draws = BatchNoise(1, 600, range(100, 500))
    assert len(draws) == 400
    assert draws.randn(3, 2).shape == (400, 3, 2)
    uniform, integers = draws.rand(), draws.randint(7, 2)
    assert uniform.shape == (400,) and uniform.min() >= 0 and 0.9 < uniform.max() < 1
    assert integers.dtype == torch.int64 and set(integers.flatten().tolist()) == set(range(7))
