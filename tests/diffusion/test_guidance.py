"""Guidance and what was added to it, against the papers' formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.diffusion.guidance import THRESHOLDS, Guidance, bounded, deviation
from lineage.errors import UserError


def tensor(seed: int, scale: float = 1.0) -> Tensor:
    """(3, 2, 8, 8), each row of another deviation and mean."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([0.5, 1.0, 3.0])[:, None, None, None]
    return scale * (rows * x + rows.sqrt())


# --- guidance -----------------------------------------------------------------------------------


def test_guidance_is_equation_6() -> None:
    """Ho and Salimans: (1 + w) towards - w without, with scale = 1 + w."""
    towards, without = tensor(0), tensor(1)
    for scale in (-1.0, 0.0, 2.0, 7.5):
        w = scale - 1
        expected = (1 + w) * towards.double() - w * without.double()
        found = Guidance(scale).join(towards, without)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(Guidance(0.0).join(towards, without), without)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_scale_1_is_the_identity(rescale: float) -> None:
    """And there is no need to ask the network twice."""
    towards, without = tensor(0), tensor(1)
    found = Guidance(1.0, rescale).join(towards, without)
    torch.testing.assert_close(found, towards, atol=1e-5, rtol=1e-5)
    assert not Guidance(1.0, rescale).acts(1.0)


def test_nothing_to_tell_apart_is_the_identity() -> None:
    towards = tensor(0)
    for scale in (0.0, 1.0, 9.0):
        torch.testing.assert_close(Guidance(scale, 0.5).join(towards, towards), towards)


def test_deviation_is_that_of_each_row() -> None:
    x = tensor(2)
    assert deviation(x).shape == (3, 1, 1, 1)
    expected = np.std(x.double().numpy(), axis=(1, 2, 3), ddof=1)
    np.testing.assert_allclose(deviation(x).flatten(), expected, rtol=1e-5)


def test_rescale_1_brings_the_deviation_back() -> None:
    """Of each row to that of its own output with the caption; the direction stays."""
    towards, without = tensor(0), tensor(1)
    plain, found = (Guidance(8.0, rescale).join(towards, without) for rescale in (0.0, 1.0))
    wanted = np.std(towards.double().numpy(), axis=(1, 2, 3))
    before = np.std(plain.double().numpy(), axis=(1, 2, 3))
    after = np.std(found.double().numpy(), axis=(1, 2, 3))
    assert np.all(before > 2 * wanted)
    np.testing.assert_allclose(after, wanted, rtol=1e-5)
    ratio = (found / plain).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rescale", [0.0, 0.25, 0.7, 1.0])
def test_rescale_is_equations_15_and_16(rescale: float) -> None:
    """Lin et al., row by row: phi of the rescaled output, 1 - phi of the plain one."""
    towards, without = tensor(0), tensor(1)
    found = Guidance(6.0, rescale).join(towards, without)
    for row in range(3):
        positive, negative = towards[row].double().numpy(), without[row].double().numpy()
        plain = negative + 6.0 * (positive - negative)
        rescaled = plain * positive.std() / plain.std()
        expected = rescale * rescaled + (1 - rescale) * plain
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_an_output_without_contrast_stays_finite() -> None:
    """Rows where guidance leaves a constant have no deviation to divide by."""
    towards, without = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.isfinite(Guidance(3.0, 1.0).join(towards, without)).all()


def test_guidance_acts_within_its_interval() -> None:
    """Kynkäänniemi et al., equation 5; everywhere unless told otherwise, noise alone too."""
    limited = Guidance(2.0, least=0.3, most=3.0)
    assert [limited.acts(s) for s in (0.1, 0.29, 0.31, 1.0, 2.99, 3.01, math.inf)] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert all(Guidance(2.0).acts(s) for s in (0.0, 1.0, 1e9, math.inf))
    assert all(Guidance(0.0).acts(s) for s in (0.0, 1.0, math.inf))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rescale": -0.1}, "rescale=-0.1"),
        ({"rescale": 1.1}, "rescale=1.1"),
        ({"rescale": math.nan}, "rescale=nan"),
        ({"least": 3.0, "most": 0.3}, "interval=3.0,0.3"),
        ({"least": -1.0}, "interval=-1.0"),
        ({"most": math.nan}, "interval=0.0,nan"),
    ],
    ids=str,
)
def test_wrong_settings_are_told(change: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named) as told:
        Guidance(2.0, **change)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


# --- thresholds ---------------------------------------------------------------------------------


def test_no_threshold_is_the_identity() -> None:
    assert THRESHOLDS[0] == "none"
    x = tensor(0, 10.0)
    assert torch.equal(bounded(x, "none"), x)


def test_clipping_clips() -> None:
    x = tensor(0, 3.0)
    np.testing.assert_array_equal(bounded(x, "clip"), np.clip(x.numpy(), -1, 1))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
def test_the_dynamic_threshold_is_that_of_imagen(quantile: float) -> None:
    """Saharia et al., section 2.3: s is a quantile of each picture's absolute values."""
    x = tensor(3, 1.5)
    found = bounded(x, "dynamic", quantile)
    for row in range(3):
        values = x[row].double().numpy()
        s = max(1.0, float(np.quantile(np.abs(values), quantile)))
        np.testing.assert_allclose(found[row], np.clip(values, -s, s) / s, atol=1e-5)
    assert found.abs().max() <= 1


def test_the_dynamic_threshold_never_enlarges() -> None:
    """A picture within the range stays as it is; a dim one is not made bright."""
    dim = tensor(4).clamp(-1, 1) * 0.2
    assert torch.equal(bounded(dim, "dynamic"), dim)
    x = tensor(4, 5.0)
    assert (bounded(x, "dynamic").abs() <= x.abs()).all()


def test_the_dynamic_threshold_ignores_the_few_that_are_far_out() -> None:
    """One wild pixel of a thousand is clipped, and the others keep their contrast."""
    x = torch.full((1, 1, 32, 32), 0.8)
    x[0, 0, 0, 0] = 50.0
    found = bounded(x, "dynamic")
    assert found[0, 0, 0, 0] == 1
    assert torch.equal(found.flatten()[1:], x.flatten()[1:])


def test_each_picture_has_its_own_threshold() -> None:
    x = tensor(5, 2.0)
    together = bounded(x, "dynamic")
    alone = torch.cat([bounded(row[None], "dynamic") for row in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_keep_shape_and_precision(threshold: str) -> None:
    """Quantiles are not made for half precision; what comes back is."""
    x = tensor(6, 4.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = bounded(x.to(dtype), threshold)
        assert found.shape == x.shape and found.dtype == dtype
        torch.testing.assert_close(found.float(), bounded(x, threshold), atol=0.05, rtol=0.01)
