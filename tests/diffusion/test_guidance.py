"""Guidance and thresholds, against the papers' formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.diffusion.guidance import THRESHOLDS, Guidance, apply_threshold, std
from lineage.errors import UserError


def tensor(seed: int, scale: float = 1.0) -> Tensor:
    """(3, 2, 8, 8); the rows differ in mean and standard deviation."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([0.5, 1.0, 3.0])[:, None, None, None]
    return scale * (rows * x + rows.sqrt())


# --- guidance -----------------------------------------------------------------------------------


def test_guidance_is_equation_6() -> None:
    """Ho and Salimans: (1 + w) cond - w uncond, with scale = 1 + w."""
    cond, uncond = tensor(0), tensor(1)
    for scale in (-1.0, 0.0, 2.0, 7.5):
        w = scale - 1
        expected = (1 + w) * cond.double() - w * uncond.double()
        guided = Guidance(scale).combine(cond, uncond)
        torch.testing.assert_close(guided.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(Guidance(0.0).combine(cond, uncond), uncond)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_scale_1_is_the_identity(rescale: float) -> None:
    """The second evaluation of the network is then not needed."""
    cond, uncond = tensor(0), tensor(1)
    guided = Guidance(1.0, rescale).combine(cond, uncond)
    torch.testing.assert_close(guided, cond, atol=1e-5, rtol=1e-5)
    assert not Guidance(1.0, rescale).acts(1.0)


def test_equal_predictions_are_unchanged() -> None:
    cond = tensor(0)
    for scale in (0.0, 1.0, 9.0):
        torch.testing.assert_close(Guidance(scale, 0.5).combine(cond, cond), cond)


def test_std_is_that_of_each_row() -> None:
    x = tensor(2)
    assert std(x).shape == (3, 1, 1, 1)
    expected = np.std(x.double().numpy(), axis=(1, 2, 3), ddof=1)
    np.testing.assert_allclose(std(x).flatten(), expected, rtol=1e-5)


def test_rescale_1_restores_the_standard_deviation() -> None:
    """Each row has the standard deviation of its `cond`, and its direction stays."""
    cond, uncond = tensor(0), tensor(1)
    plain, rescaled = (Guidance(8.0, rescale).combine(cond, uncond) for rescale in (0.0, 1.0))
    expected, before, after = (
        np.std(x.double().numpy(), axis=(1, 2, 3)) for x in (cond, plain, rescaled)
    )
    assert np.all(before > 2 * expected)
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    ratio = (rescaled / plain).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rescale", [0.0, 0.25, 0.7, 1.0])
def test_rescale_is_equations_15_and_16(rescale: float) -> None:
    """Lin et al., row by row: phi of the rescaled output, 1 - phi of the plain one."""
    cond, uncond = tensor(0), tensor(1)
    guided = Guidance(6.0, rescale).combine(cond, uncond)
    for row in range(3):
        positive, negative = cond[row].double().numpy(), uncond[row].double().numpy()
        plain = negative + 6.0 * (positive - negative)
        rescaled = plain * positive.std() / plain.std()
        expected = rescale * rescaled + (1 - rescale) * plain
        np.testing.assert_allclose(guided[row], expected, atol=1e-4)


def test_an_output_without_contrast_stays_finite() -> None:
    """A constant row has a standard deviation of 0."""
    zeros = torch.zeros(2, 3, 4, 4)
    assert torch.isfinite(Guidance(3.0, 1.0).combine(zeros, zeros)).all()


def test_guidance_acts_within_its_interval() -> None:
    """Kynkäänniemi et al., equation 5; by default at every level, pure noise included."""
    limited = Guidance(2.0, sigma_min=0.3, sigma_max=3.0)
    active = [s for s in (0.1, 0.29, 0.31, 1.0, 2.99, 3.01, math.inf) if limited.acts(s)]
    assert active == [0.31, 1.0, 2.99]
    assert all(Guidance(2.0).acts(s) for s in (0.0, 1.0, 1e9, math.inf))
    assert all(Guidance(0.0).acts(s) for s in (0.0, 1.0, math.inf))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rescale": -0.1}, "rescale=-0.1"),
        ({"rescale": 1.1}, "rescale=1.1"),
        ({"rescale": math.nan}, "rescale=nan"),
        ({"sigma_min": 3.0, "sigma_max": 0.3}, "interval=3.0,0.3"),
        ({"sigma_min": -1.0}, "interval=-1.0"),
        ({"sigma_max": math.nan}, "interval=0.0,nan"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        Guidance(2.0, **settings)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


# --- thresholds ---------------------------------------------------------------------------------


def test_no_threshold_is_the_identity() -> None:
    assert THRESHOLDS[0] == "none"
    x = tensor(0, 10.0)
    assert torch.equal(apply_threshold(x, "none"), x)


def test_clip_clips() -> None:
    x = tensor(0, 3.0)
    np.testing.assert_array_equal(apply_threshold(x, "clip"), np.clip(x.numpy(), -1, 1))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
def test_the_dynamic_threshold_is_that_of_imagen(quantile: float) -> None:
    """Saharia et al., section 2.3: s is a quantile of each picture's absolute values."""
    x = tensor(3, 1.5)
    x0 = apply_threshold(x, "dynamic", quantile)
    for row in range(3):
        values = x[row].double().numpy()
        s = max(1.0, float(np.quantile(np.abs(values), quantile)))
        np.testing.assert_allclose(x0[row], np.clip(values, -s, s) / s, atol=1e-5)
    assert x0.abs().max() <= 1


def test_the_dynamic_threshold_never_enlarges() -> None:
    """A picture within the range is unchanged; a dark one does not become bright."""
    dark = tensor(4).clamp(-1, 1) * 0.2
    assert torch.equal(apply_threshold(dark, "dynamic"), dark)
    x = tensor(4, 5.0)
    assert (apply_threshold(x, "dynamic").abs() <= x.abs()).all()


def test_the_dynamic_threshold_ignores_outliers() -> None:
    """One extreme pixel of a thousand is clipped, and the others keep their contrast."""
    x = torch.full((1, 1, 32, 32), 0.8)
    x[0, 0, 0, 0] = 50.0
    x0 = apply_threshold(x, "dynamic")
    assert x0[0, 0, 0, 0] == 1
    assert torch.equal(x0.flatten()[1:], x.flatten()[1:])


def test_each_picture_has_its_own_threshold() -> None:
    x = tensor(5, 2.0)
    together = apply_threshold(x, "dynamic")
    alone = torch.cat([apply_threshold(row[None], "dynamic") for row in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_keep_shape_and_precision(threshold: str) -> None:
    """torch.quantile takes no half precision; the result has it all the same."""
    x = tensor(6, 4.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x0 = apply_threshold(x.to(dtype), threshold)
        assert x0.shape == x.shape and x0.dtype == dtype
        expected = apply_threshold(x, threshold)
        torch.testing.assert_close(x0.float(), expected, atol=0.05, rtol=0.01)
