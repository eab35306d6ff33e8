"""Noise schedules and the levels that a sampler visits, against closed forms in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path as File

import numpy as np
import pytest
import torch

from lineage.diffusion.schedules import (
    CLEAN,
    SCHEDULES,
    Path,
    Point,
    betas_of,
    cosine_betas,
    even_times,
    exponential_sigmas,
    karras_sigmas,
    leading_times,
    linear_betas,
    respaced_times,
    scaled_linear_betas,
    shifted,
    sigmoid_betas,
    trailing_times,
    vp_sigmas,
    without_snr_at_end,
)
from lineage.errors import UserError

REFERENCE = File(__file__).resolve().parents[3] / "shared" / "reference"


def reference(name: str) -> torch.Tensor:
    """An output of the official code; skips the test where the numbers are not at hand."""
    safetensors = pytest.importorskip("safetensors")
    path = REFERENCE / "guided_diffusion.safetensors"
    if not path.exists():
        pytest.skip("the reference numbers do not lie beside this checkout")
    with safetensors.safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(f"output/{name}")
    return tensor


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
    steps = np.diff(np.sqrt(betas.numpy()))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


@pytest.mark.parametrize("steps", [40, 250, 4000])
def test_chains_of_other_lengths_get_proportionally_other_steps(steps: int) -> None:
    """A chain half as long has betas twice as large, both at the ends and in sum."""
    for make, first, last in (
        (linear_betas, 1e-4, 0.02),
        (scaled_linear_betas, 0.00085, 0.012),
    ):
        betas = make(steps)
        assert betas[0].item() == pytest.approx(first * 1000 / steps)
        assert betas[-1].item() == pytest.approx(last * 1000 / steps)
        assert betas.sum().item() == pytest.approx(make(1000).sum().item(), rel=0.02)


def test_cosine_betas_give_the_curve_of_the_paper() -> None:
    """Nichol and Dhariwal, equation 17: abar(t) = f(t) / f(0)."""
    steps = 200
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = np.cumprod(1 - cosine_betas(steps).numpy())
    np.testing.assert_allclose(abar[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert cosine_betas(steps)[-1] == 0.999  # where the curve asks for 1


def test_sigmoid_betas_give_the_curve_of_the_paper() -> None:
    """Jabri et al., algorithm 1, with start -3, end 3 and tau 1."""
    steps = 200
    ends = 1 / (1 + np.exp([3.0, -3.0]))
    curve = 1 / (1 + np.exp(-(np.arange(steps + 1) / steps * 6 - 3)))
    curve = (ends[1] - curve) / (ends[1] - ends[0])
    assert curve[0] == 1 and curve[-1] == pytest.approx(0, abs=1e-12)
    abar = np.cumprod(1 - sigmoid_betas(steps).numpy())
    np.testing.assert_allclose(abar[:-1], curve[1:-1], rtol=1e-9)
    assert sigmoid_betas(steps)[-1] == 0.999


def test_a_sigmoid_can_have_other_ends() -> None:
    """The paper tries several; one that is not symmetric tells `start` from `end`."""
    curve = 1 / (1 + np.exp(-(np.arange(11) / 10 * 3.0)))  # from 0 to 3
    curve = (curve[-1] - curve) / (curve[-1] - curve[0])
    abar = np.cumprod(1 - sigmoid_betas(10, 0.0, 3.0).numpy())
    np.testing.assert_allclose(abar[:-1], curve[1:-1], rtol=1e-9)


def test_betas_of_a_falling_function() -> None:
    """Of exp(-t) every beta is the same; of a step to nothing it is cut at 0.999."""
    np.testing.assert_allclose(betas_of(lambda t: (-t).exp(), 8), 1 - math.exp(-1 / 8), rtol=1e-12)
    assert betas_of(lambda t: (t < 0.5).double(), 2)[0] == 0.999


@pytest.mark.parametrize(
    ("name", "root", "ratio"),
    [
        ("linear", 0.006353, 4.035993e-05),
        ("cosine", 4.928220e-05, 2.428735e-09),
        ("scaled_linear", 0.068265, 0.004682),
    ],
)
def test_what_is_left_at_the_end_is_what_lin_et_al_found(
    name: str, root: float, ratio: float
) -> None:
    """Their table 1: the root of abar, and the signal-to-noise ratio, at T = 1,000."""
    abar = np.prod(1 - SCHEDULES[name](1000).numpy())
    assert math.sqrt(abar) == pytest.approx(root, rel=1e-4)
    assert abar / (1 - abar) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [40, 1000])
def test_betas_are_variances(name: str, steps: int) -> None:
    """A beta above 1 makes the square root of a negative number: NaN in the first batch."""
    betas = SCHEDULES[name](steps)
    assert betas.shape == (steps,) and betas.dtype == torch.float64
    assert (betas > 0).all() and (betas < 1).all()
    assert (betas.diff() >= -1e-12).all()  # ever larger steps


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_longer_chain_is_the_same_process_in_finer_steps(name: str) -> None:
    """At each share of the way, a chain of 1,000 and one of 8,000 hold as much of the picture."""
    short, long = (np.log(np.cumprod(1 - SCHEDULES[name](T).numpy())) for T in (1000, 8000))
    for share in (0.25, 0.5, 0.75, 0.95):
        both = short[int(share * 1000) - 1], long[int(share * 8000) - 1]
        assert both[0] == pytest.approx(both[1], rel=0.01)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [40, 1000])
def test_betas_are_those_of_the_official_code(name: str, steps: int) -> None:
    official = reference(f"betas_{name}_{steps}")
    torch.testing.assert_close(SCHEDULES[name](steps), official, atol=1e-9, rtol=0)


# --- no trace at the end ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_last_trace_is_taken_out_as_in_algorithm_1(name: str) -> None:
    """Lin et al., algorithm 1, a number at a time. A root of abar is moved, not abar."""
    abar = torch.cumprod(1 - SCHEDULES[name](50), 0)
    roots = [math.sqrt(value) for value in abar.tolist()]
    first, last = roots[0], roots[-1]
    expected = [((root - last) * first / (first - last)) ** 2 for root in roots]
    found = without_snr_at_end(abar)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert found[-1] == 0 and found[0].item() == pytest.approx(abar[0].item(), rel=1e-12)
    assert (found.diff() < 0).all()
    torch.testing.assert_close(without_snr_at_end(found), found)  # nothing more to take


# --- points and paths ---------------------------------------------------------------------------


def test_a_point_knows_its_sigma() -> None:
    assert Point(0.6, 0.8, 7.0).sigma == pytest.approx(4 / 3)
    assert Point(0.0, 1.0, 9.0).sigma == math.inf
    assert CLEAN.sigma == 0 and (CLEAN.signal, CLEAN.noise) == (1, 0)


def test_a_path_is_a_list_of_steps() -> None:
    points = (*(Point(1 - s, s, 10 * s) for s in (1.0, 0.7, 0.4)), CLEAN)
    path = Path(points, lambda sigma: CLEAN)
    assert len(path) == 3
    assert path.steps() == [(points[0], points[1]), (points[1], points[2]), (points[2], CLEAN)]
    for count in (1, 2, 3):
        short = path.shortened(count)
        assert len(short) == count and short.points == points[-count - 1 :]
        assert short.at is path.at


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


def test_exponential_sigmas_of_another_rho() -> None:
    """With rho = 2, the logarithms fall by squares of 1, 3/4, 1/2, 1/4, 0."""
    found = np.log10(exponential_sigmas(5, 0.01, 1.0, rho=2.0))
    np.testing.assert_allclose(found, [0, -0.875, -1.5, -1.875, -2], atol=1e-12)


@pytest.mark.parametrize("make", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_grids_fall_from_the_largest_to_the_least(
    make: Callable[..., list[float]], steps: int
) -> None:
    found = make(steps, 0.03, 14.6)
    assert len(found) == steps and np.all(np.diff(found) < 0)
    assert found[0] == pytest.approx(14.6) and found[-1] == pytest.approx(0.03)


@pytest.mark.parametrize("make", [karras_sigmas, exponential_sigmas])
def test_a_grid_of_one_is_the_largest(make: Callable[..., list[float]]) -> None:
    """A sampler of one step begins at noise, not at the clean end."""
    assert make(1, 0.03, 14.6) == pytest.approx([14.6])


def test_vp_sigmas_integrate_beta() -> None:
    """Song et al., equations 29 and 32: abar(t) = exp of minus the integral of beta."""
    found = vp_sigmas(6, rate=19.9, least=0.1, end=1e-3)
    for t, sigma in zip(np.linspace(1, 1e-3, 6), found, strict=True):
        s = np.linspace(0, t, 20001)
        integral = np.trapezoid(0.1 + 19.9 * s, s)
        assert sigma == pytest.approx(math.sqrt(math.exp(integral) - 1), rel=1e-6)


# --- which steps --------------------------------------------------------------------------------


def test_times_are_those_of_table_2() -> None:
    """Lin et al., table 2, whose steps count from 1: T = 1,000, ten steps."""
    leading, even, trailing = (
        [t + 1 for t in reversed(times)]
        for times in (leading_times(1000, 10), even_times(1000, 10), trailing_times(1000, 10))
    )
    assert leading == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert even == [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
    assert trailing == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


@pytest.mark.parametrize("make", [even_times, leading_times, trailing_times])
@pytest.mark.parametrize("total", [2, 7, 40, 1000])
def test_times_are_distinct_and_fall(make: Callable[[int, int], list[int]], total: int) -> None:
    for steps in {1, 2, total // 2, total - 1, total} - {0}:
        times = make(total, steps)
        assert len(times) == steps and np.all(np.diff(times) < 0)
        assert times[-1] >= 0 and times[0] < total
        assert all(isinstance(t, int) for t in times)
    assert make(total, total) == list(range(total - 1, -1, -1))


def test_times_that_do_not_divide_the_chain() -> None:
    """By hand, T = 10 and four steps; `leading` leaves the end out, `trailing` the start."""
    assert even_times(10, 4) == [9, 6, 3, 0]
    assert even_times(40, 8) == [39, 33, 28, 22, 17, 11, 6, 0]
    assert leading_times(10, 4) == [6, 4, 2, 0]
    assert leading_times(10, 4, 1) == [7, 5, 3, 1]
    assert trailing_times(10, 4) == [9, 7, 4, 1]  # 10, 7.5, 5 and 2.5, less 1; halves to even
    assert even_times(10, 1) == trailing_times(10, 1) == [9]
    assert leading_times(10, 1) == [0]


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.0, 12.0])
def test_a_shift_multiplies_sigma(shift: float) -> None:
    """Esser et al., equation 23: noise against signal grows by the factor.

    The ends stay, exactly: a trace of signal in noise alone, or less than none, is divided by.
    """
    for s in (0.01, 0.2, 0.5, 0.97):
        moved = shifted(s, shift)
        assert moved / (1 - moved) == pytest.approx(shift * s / (1 - s), rel=1e-12)
        assert shifted(moved, 1 / shift) == pytest.approx(s, rel=1e-12)
    assert shifted(0.0, shift) == 0 and shifted(1.0, shift) == 1


# --- which steps to keep ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "how"), [(300, "10,15,20"), (300, "25"), (1000, "ddim25"), (1000, "ddim50")]
)
def test_kept_steps_are_those_of_the_official_code(total: int, how: str) -> None:
    assert respaced_times(total, how) == reference(f"space_timesteps_{total}/{how}").tolist()


def test_an_equal_stride() -> None:
    assert respaced_times(1000, "ddim25") == list(range(0, 1000, 40))
    assert respaced_times(10, "ddim4") == [0, 3, 6, 9]
    assert respaced_times(10, "ddim10") == list(range(10))


def test_so_many_of_each_part() -> None:
    """Of 0..99, of 100..199 and of 200..299, both ends of each among them."""
    found = respaced_times(300, "10,12,20")
    expected = [
        np.round(first + np.linspace(0, 99, count)).astype(int)
        for first, count in ((0, 10), (100, 12), (200, 20))
    ]
    assert found == np.concatenate(expected).tolist()


def test_parts_of_unequal_length() -> None:
    """Ten steps in three parts: 0..3, 4..6 and 7..9. One of a part is its first."""
    assert respaced_times(10, "2,2,2") == [0, 3, 4, 6, 7, 9]
    assert respaced_times(10, "1,3,1") == [0, 4, 5, 6, 7]
    assert respaced_times(10, "4,3,3") == list(range(10))
    assert respaced_times(10, "10") == list(range(10))


@pytest.mark.parametrize(
    ("total", "how", "number"),
    [
        (1000, "ddim999", "999"),  # no stride keeps all but one
        (1000, "ddim1001", "1001"),
        (1000, "ddim0", "0"),
        (10, "11", "11"),
        (10, "2,4,2", "4"),  # of a part of three
        (10, "0,3,3", "0"),
        (10, "3,-1,3", "-1"),
        (2, "1,1,1", "1"),
    ],
)
def test_steps_that_cannot_be_kept_are_told(total: int, how: str, number: str) -> None:
    with pytest.raises(UserError, match=rf"(^|\s){number}\b") as told:
        respaced_times(total, how)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


@pytest.mark.parametrize("how", ["ddim", "ddimx", "a,b", "", "10,", "2.5"])
def test_what_is_no_way_to_keep_steps_is_told(how: str) -> None:
    with pytest.raises(UserError):
        respaced_times(100, how)
