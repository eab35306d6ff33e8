"""Noise schedules and grids of noise levels, against closed forms in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lineage.diffusion.schedules import (
    NO_NOISE,
    SCHEDULES,
    NoiseLevel,
    SamplingSchedule,
    betas_for_alpha_bar,
    betas_from_alphas_cumprod,
    cosine_betas,
    even_timesteps,
    exponential_sigmas,
    karras_sigmas,
    leading_timesteps,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    shift_sigma,
    sigmoid_betas,
    trailing_timesteps,
)

# --- schedules --------------------------------------------------------------------------------


def test_linear_betas_run_between_the_ends_of_the_paper() -> None:
    """Ho et al., section 4: from 1e-4 to 0.02 over T = 1,000."""
    betas = linear_betas(1000)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    np.testing.assert_allclose(betas, 1e-4 + (0.02 - 1e-4) / 999 * np.arange(1000), rtol=1e-12)


def test_scaled_linear_betas_have_a_linear_root() -> None:
    """Latent diffusion: from 0.00085 to 0.012."""
    betas = scaled_linear_betas(1000)
    assert betas[0].item() == pytest.approx(0.00085) and betas[-1].item() == pytest.approx(0.012)
    differences = np.diff(np.sqrt(betas.numpy()))
    np.testing.assert_allclose(differences, differences[0], rtol=1e-9)


@pytest.mark.parametrize("num_timesteps", [40, 250, 4000])
def test_betas_scale_with_the_number_of_timesteps(num_timesteps: int) -> None:
    """Half as many timesteps have betas twice as large, at the ends and in sum."""
    for make, first, last in (
        (linear_betas, 1e-4, 0.02),
        (scaled_linear_betas, 0.00085, 0.012),
    ):
        betas = make(num_timesteps)
        assert betas[0].item() == pytest.approx(first * 1000 / num_timesteps)
        assert betas[-1].item() == pytest.approx(last * 1000 / num_timesteps)
        assert betas.sum().item() == pytest.approx(make(1000).sum().item(), rel=0.02)


def test_cosine_betas_give_the_curve_of_the_paper() -> None:
    """Nichol and Dhariwal, equation 17: alphas_cumprod(t) = f(t) / f(0)."""
    num_timesteps = 200
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    alphas_cumprod = np.cumprod(1 - cosine_betas(num_timesteps).numpy())
    np.testing.assert_allclose(alphas_cumprod[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert cosine_betas(num_timesteps)[-1] == 0.999  # where the curve would give 1


def test_sigmoid_betas_give_the_curve_of_the_paper() -> None:
    """Jabri et al., algorithm 1, with start -3, end 3 and tau 1."""
    num_timesteps = 200
    ends = 1 / (1 + np.exp([3.0, -3.0]))
    curve = 1 / (1 + np.exp(-(np.arange(num_timesteps + 1) / num_timesteps * 6 - 3)))
    curve = (ends[1] - curve) / (ends[1] - ends[0])
    assert curve[0] == 1 and curve[-1] == pytest.approx(0, abs=1e-12)
    alphas_cumprod = np.cumprod(1 - sigmoid_betas(num_timesteps).numpy())
    np.testing.assert_allclose(alphas_cumprod[:-1], curve[1:-1], rtol=1e-9)
    assert sigmoid_betas(num_timesteps)[-1] == 0.999


def test_a_sigmoid_can_have_other_ends() -> None:
    """The paper tries several; asymmetric ends distinguish `start` from `end`."""
    curve = 1 / (1 + np.exp(-(np.arange(11) / 10 * 3.0)))  # from 0 to 3
    curve = (curve[-1] - curve) / (curve[-1] - curve[0])
    alphas_cumprod = np.cumprod(1 - sigmoid_betas(10, 0.0, 3.0).numpy())
    np.testing.assert_allclose(alphas_cumprod[:-1], curve[1:-1], rtol=1e-9)


def test_betas_of_a_falling_function() -> None:
    """exp(-t) has constant betas; a step to 0 is clipped at 0.999."""
    betas = betas_for_alpha_bar(lambda t: (-t).exp(), 8)
    np.testing.assert_allclose(betas, 1 - math.exp(-1 / 8), rtol=1e-12)
    assert betas_for_alpha_bar(lambda t: (t < 0.5).double(), 2)[0] == 0.999


@pytest.mark.parametrize(
    ("name", "root", "ratio"),
    [
        ("linear", 0.006353, 4.035993e-05),
        ("cosine", 4.928220e-05, 2.428735e-09),
        ("scaled_linear", 0.068265, 0.004682),
    ],
)
def test_the_terminal_snr_is_that_of_lin_et_al(name: str, root: float, ratio: float) -> None:
    """Their table 1: sqrt(alphas_cumprod) and the signal-to-noise ratio, at T = 1,000."""
    last = np.prod(1 - SCHEDULES[name](1000).numpy())
    assert math.sqrt(last) == pytest.approx(root, rel=1e-4)
    assert last / (1 - last) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("num_timesteps", [40, 1000])
def test_betas_are_variances(name: str, num_timesteps: int) -> None:
    """A beta above 1 would give the square root of a negative number: NaN in the first batch."""
    betas = SCHEDULES[name](num_timesteps)
    assert betas.shape == (num_timesteps,) and betas.dtype == torch.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert (betas.diff() >= -1e-12).all()


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_more_timesteps_are_the_same_process_in_finer_steps(name: str) -> None:
    """At each share of T, 1,000 and 8,000 timesteps have the same alphas_cumprod."""
    few, many = (np.log(np.cumprod(1 - SCHEDULES[name](T).numpy())) for T in (1000, 8000))
    for share in (0.25, 0.5, 0.75, 0.95):
        ours = few[int(share * 1000) - 1]
        assert ours == pytest.approx(many[int(share * 8000) - 1], rel=0.01)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_betas_follow_from_alphas_cumprod(name: str) -> None:
    betas = SCHEDULES[name](50)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(betas_from_alphas_cumprod(alphas_cumprod), betas)


# --- zero terminal SNR --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_zero_terminal_snr_is_algorithm_1(name: str) -> None:
    """Lin et al., algorithm 1, one number at a time: sqrt(alphas_cumprod) is shifted and scaled."""
    alphas_cumprod = torch.cumprod(1 - SCHEDULES[name](50), 0)
    roots = [math.sqrt(value) for value in alphas_cumprod.tolist()]
    first, last = roots[0], roots[-1]
    expected = [((root - last) * first / (first - last)) ** 2 for root in roots]
    betas = rescale_zero_terminal_snr(SCHEDULES[name](50))
    rescaled = torch.cumprod(1 - betas, 0)
    np.testing.assert_allclose(rescaled, expected, rtol=1e-9, atol=1e-15)
    assert rescaled[-1] == 0 and betas[-1] == 1
    assert betas[0].item() == pytest.approx(SCHEDULES[name](50)[0].item(), rel=1e-10)
    assert (rescaled.diff() < 0).all()
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), betas)


# --- noise levels and sampling schedules --------------------------------------------------------


def test_karras_sigma_is_sigma_over_alpha() -> None:
    assert NoiseLevel(0.6, 0.8, 7.0).karras_sigma == pytest.approx(4 / 3)
    assert NoiseLevel(0.0, 1.0, 9.0).karras_sigma == math.inf
    assert NO_NOISE.karras_sigma == 0 and (NO_NOISE.alpha, NO_NOISE.sigma) == (1, 0)


def test_a_sampling_schedule_is_a_list_of_steps() -> None:
    levels = (*(NoiseLevel(1 - s, s, 10 * s) for s in (1.0, 0.7, 0.4)), NO_NOISE)
    schedule = SamplingSchedule(levels, lambda sigma: NO_NOISE)
    assert len(schedule) == 3
    assert schedule.steps() == [
        (levels[0], levels[1]),
        (levels[1], levels[2]),
        (levels[2], NO_NOISE),
    ]
    for count in (1, 2, 3):
        short = schedule.shortened(count)
        assert len(short) == count and short.levels == levels[-count - 1 :]
        assert short.at is schedule.at


# --- grids of sigmas ----------------------------------------------------------------------------


def test_karras_sigmas_are_equation_5() -> None:
    """With the paper's numbers: 18 sigmas from 80 to 0.002, rho = 7."""
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(karras_sigmas(18, 0.002, 80.0), expected, rtol=1e-9)


def test_karras_sigmas_are_even_at_rho_1() -> None:
    np.testing.assert_allclose(karras_sigmas(5, 2.0, 10.0, rho=1.0), [10, 8, 6, 4, 2], rtol=1e-12)


def test_exponential_sigmas_fall_by_a_factor() -> None:
    np.testing.assert_allclose(exponential_sigmas(4, 0.01, 10.0), [10, 1, 0.1, 0.01], rtol=1e-12)


@pytest.mark.parametrize("make", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_grids_fall_from_sigma_max_to_sigma_min(make: Callable[..., list[float]], n: int) -> None:
    sigmas = make(n, 0.03, 14.6)
    assert len(sigmas) == n and np.all(np.diff(sigmas) < 0)
    assert sigmas[0] == pytest.approx(14.6) and sigmas[-1] == pytest.approx(0.03)


@pytest.mark.parametrize("make", [karras_sigmas, exponential_sigmas])
def test_a_grid_of_one_is_sigma_max(make: Callable[..., list[float]]) -> None:
    """A sampler of one step starts at noise."""
    assert make(1, 0.03, 14.6) == pytest.approx([14.6])


# --- timesteps ----------------------------------------------------------------------------------


def test_timesteps_are_those_of_table_2() -> None:
    """Lin et al., table 2, whose timesteps count from 1: T = 1,000, ten steps."""
    leading, even, trailing = (
        [t + 1 for t in reversed(make(1000, 10))]
        for make in (leading_timesteps, even_timesteps, trailing_timesteps)
    )
    assert leading == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert even == [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
    assert trailing == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


@pytest.mark.parametrize("make", [even_timesteps, leading_timesteps, trailing_timesteps])
@pytest.mark.parametrize("total", [2, 7, 40, 1000])
def test_timesteps_are_distinct_and_fall(make: Callable[[int, int], list[int]], total: int) -> None:
    for n in {1, 2, total // 2, total - 1, total} - {0}:
        timesteps = make(total, n)
        assert len(timesteps) == n and np.all(np.diff(timesteps) < 0)
        assert timesteps[-1] >= 0 and timesteps[0] < total
        assert all(isinstance(t, int) for t in timesteps)
    assert make(total, total) == list(range(total - 1, -1, -1))


def test_timesteps_that_do_not_divide_the_chain() -> None:
    """T = 10 and four steps by hand; `leading` omits the end, `trailing` the start."""
    assert even_timesteps(10, 4) == [9, 6, 3, 0]
    assert even_timesteps(40, 8) == [39, 33, 28, 22, 17, 11, 6, 0]
    assert leading_timesteps(10, 4) == [6, 4, 2, 0]
    assert leading_timesteps(10, 4, 1) == [7, 5, 3, 1]
    assert trailing_timesteps(10, 4) == [9, 7, 4, 1]  # 10, 7.5, 5 and 2.5, less 1; halves to even
    assert even_timesteps(10, 1) == trailing_timesteps(10, 1) == [9]
    assert leading_timesteps(10, 1) == [0]


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.0, 12.0])
def test_a_shift_multiplies_karras_sigma(shift: float) -> None:
    """Esser et al., equation 23: sigma / alpha is multiplied by `shift`.

    The ends stay exactly, since samplers divide by them.
    """
    for sigma in (0.01, 0.2, 0.5, 0.97):
        shifted = shift_sigma(sigma, shift)
        assert shifted / (1 - shifted) == pytest.approx(shift * sigma / (1 - sigma), rel=1e-12)
        assert shift_sigma(shifted, 1 / shift) == pytest.approx(sigma, rel=1e-12)
    assert shift_sigma(0.0, shift) == 0 and shift_sigma(1.0, shift) == 1
