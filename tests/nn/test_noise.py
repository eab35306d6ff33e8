"""The noise of a batch, for one process or several."""

from __future__ import annotations

import pytest
import torch

from lineage.nn.noise import BatchNoise, NoiseStreams


def some_of_each(noise: NoiseStreams) -> list[torch.Tensor]:
    return [noise.randn(3, 2), noise.rand(), noise.randint(7, 4)]


@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 2, 3]], ids=str)
def test_processes_that_share_a_batch_draw_its_rows(parts: list[int]) -> None:
    """Each process draws its rows of every kind of noise."""
    whole = some_of_each(BatchNoise(5, 6, range(6)))
    starts = [sum(parts[:i]) for i in range(len(parts))]
    shared = [
        some_of_each(BatchNoise(5, 6, range(start, start + part)))
        for start, part in zip(starts, parts, strict=True)
    ]
    for one, *others in zip(whole, *shared, strict=True):
        assert torch.equal(one, torch.cat(others))


def test_rows_and_batches_are_independent() -> None:
    one, other = (BatchNoise(seed, 4000, range(4000)).randn(2) for seed in (5, 6))
    for a, b in ((one[:-1, 0], one[1:, 0]), (one[:, 0], one[:, 1]), (one[:, 0], other[:, 0])):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.06
    assert one.mean().abs() < 0.05 and one.std().item() == pytest.approx(1, abs=0.05)


def test_noise_has_the_bounds_and_rows_of_its_batch() -> None:
    noise = BatchNoise(1, 600, range(100, 500))
    assert len(noise) == 400
    assert noise.randn(3, 2).shape == (400, 3, 2)
    uniform, integers = noise.rand(), noise.randint(7, 2)
    assert uniform.shape == (400,) and uniform.min() >= 0 and 0.9 < uniform.max() < 1
    assert integers.dtype == torch.int64 and set(integers.flatten().tolist()) == set(range(7))
