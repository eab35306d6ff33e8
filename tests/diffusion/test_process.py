"""The diffusion process against closed forms in numpy, and two samplers against their papers.

A chain is a schedule with or without a last trace of the picture. Tables are exact in double, so
most checks run in double and can be strict: what is wrong by one digit is wrong.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.diffusion.process import PREDICTIONS, Process, ProcessConfig, Scalings
from lineage.diffusion.samplers import SAMPLERS, ddim, ddpm
from lineage.diffusion.samplers.k_diffusion import Estimate
from lineage.diffusion.schedules import CLEAN, SCHEDULES, SPACINGS, Path, Point
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams

B = 4
T = 40
Chain = tuple[str, bool]  # schedule, and whether its last step is made noise alone
PLAIN: list[Chain] = [(name, False) for name in SCHEDULES]
CHAINS: list[Chain] = [*PLAIN, *((name, True) for name in SCHEDULES), ("flow", False)]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c[0] + "_zero" * c[1])
beta_chains = pytest.mark.parametrize("chain", CHAINS[:-1], ids=lambda c: c[0] + "_zero" * c[1])
# every prediction on every chain, but for noise where a picture could not be told from it
PAIRS = [
    pytest.param(chain, prediction, id=f"{chain[0]}{'_zero' * chain[1]}-{prediction}")
    for chain in CHAINS
    for prediction in PREDICTIONS
    if prediction != "noise" or chain in PLAIN
]
pairs = pytest.mark.parametrize(("chain", "prediction"), PAIRS)


def process_of(chain: Chain, prediction: str = "x0", steps: int = T, **settings: Any) -> Process:
    schedule, zero = chain
    return Process(ProcessConfig(steps, schedule, prediction, zero_snr=zero, **settings))


def pictures(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x.to(dtype)


def noise(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def at_each(steps: int = T) -> list[Tensor]:
    """All steps, B in a batch."""
    return list(torch.arange(steps).split(B))


def expected_levels(chain: Chain, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) a and b, from the papers."""
    schedule, zero = chain
    if schedule == "flow":
        s = (np.arange(steps) + 1) / steps
        return 1 - s, s
    share = (np.arange(steps) + 1) / steps
    if schedule == "linear":
        abar = np.cumprod(1 - 1000 / steps * np.linspace(1e-4, 0.02, steps))
    elif schedule == "scaled_linear":
        root = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), steps)
        abar = np.cumprod(1 - 1000 / steps * root**2)
    else:
        if schedule == "cosine":
            abar = np.cos((share + 0.008) / 1.008 * np.pi / 2) ** 2
            abar = abar / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        else:
            low, high = 1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-3.0))
            abar = (high - 1 / (1 + np.exp(3 - 6 * share))) / (high - low)
        abar[-1] = abar[-2] * 0.001  # the beta of the last step is cut at 0.999
    if zero:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.sqrt(abar), np.sqrt(1 - abar)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 1}, "steps=1 are too few for a linear schedule"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -5}, "steps=-5"),
        ({"steps": 20}, "steps=20 are too few for a linear schedule"),
        ({"steps": 12, "schedule": "scaled_linear"}, "steps=12 are too few for a scaled_linear"),
        ({"steps": 1, "schedule": "cosine"}, "steps=1"),
        ({"steps": 1, "schedule": "flow", "prediction": "v"}, "steps=1 are too few for a flow"),
        ({"schedule": "cosin"}, "process.schedule='cosin'.*did you mean 'cosine'"),
        ({"schedule": ""}, "process.schedule=''"),
        ({"prediction": "eps"}, "process.prediction='eps'"),
        ({"weighting": "min-snr"}, "process.weighting='min-snr'.*did you mean 'min_snr'"),
        ({"variance": "fixed"}, "process.variance='fixed'"),
        ({"gamma": -1.0}, "process.gamma=-1.0"),
        ({"gamma": 0.0}, "process.gamma=0.0"),  # would weigh every step nothing
        ({"gamma": math.nan}, "process.gamma=nan"),
        ({"shift": 0.0}, "process.shift=0.0"),
        ({"shift": -3.0}, "process.shift=-3.0"),
        ({"shift": math.nan}, "process.shift=nan"),
        ({"deviation": 0.0}, "process.deviation=0.0"),
        ({"deviation": -0.5}, "process.deviation=-0.5"),
        ({"deviation": math.nan}, "process.deviation=nan"),
        ({"schedule": "flow"}, "prediction=noise"),
        ({"zero_snr": True}, "prediction=noise"),
        ({"schedule": "flow", "prediction": "v", "variance": "learned"}, "learned variance"),
        ({"schedule": "flow", "prediction": "v", "variance": "learned_range"}, "schedule=flow"),
    ],
    ids=str,
)
def test_wrong_settings_are_told(change: dict[str, Any], named: str) -> None:
    """In one sentence that holds the value at fault."""
    with pytest.raises(UserError, match=named) as told:
        ProcessConfig(**change)
    assert "\n" not in str(told.value)


def test_the_shortest_chains_that_can_be() -> None:
    """One step less is told; these have betas below 1, and sampling divides by nothing."""
    for schedule, steps in (
        ("linear", 21),
        ("scaled_linear", 13),
        ("cosine", 2),
        ("sigmoid", 2),
        ("flow", 2),
    ):
        process = process_of((schedule, False), "x0" if schedule == "flow" else "noise", steps)
        assert process.steps == steps
        t = torch.full((B,), steps - 1)
        x = process.noised(pictures(), noise(), t)
        assert torch.isfinite(process.to_x0(noise(2), x, t)).all()


def test_a_learned_variance_is_known() -> None:
    for variance in ("fixed_small", "fixed_large"):
        assert not ProcessConfig(variance=variance).learned
    for variance in ("learned", "learned_range"):
        assert ProcessConfig(variance=variance).learned


# --- tables -------------------------------------------------------------------------------------


@chains
@pytest.mark.parametrize("steps", [T, 1000])
def test_tables_are_those_of_the_papers(chain: Chain, steps: int) -> None:
    process = process_of(chain, steps=steps)
    signal, level = expected_levels(chain, steps)
    assert process.signal.dtype == process.noise.dtype == torch.float64
    np.testing.assert_allclose(process.signal, signal, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(process.noise, level, rtol=1e-9)
    if chain[0] != "flow":
        np.testing.assert_allclose(process.abar, signal**2, rtol=1e-6, atol=1e-15)
        kept = np.cumprod(1 - process.betas.numpy())
        np.testing.assert_allclose(kept, process.abar, rtol=1e-6, atol=1e-15)
    assert process.times == list(range(steps))


@chains
def test_tables_are_used_in_float32(chain: Chain) -> None:
    """Made in double: 1 - abar taken in single loses four digits at t = 0."""
    process = process_of(chain, steps=1000)
    t = torch.arange(1000)
    signal, level = process.levels(t)
    expected = expected_levels(chain, 1000)
    for found, exact in zip((signal, level), expected, strict=True):
        assert isinstance(found, Tensor)
        assert found.dtype == torch.float32 and found.shape == (1000, 1, 1, 1)
        np.testing.assert_allclose(found.flatten().double(), exact, rtol=1e-6, atol=1e-12)


@chains
def test_noise_alone_at_the_end(chain: Chain) -> None:
    last = process_of(chain).point(T - 1)
    if chain[1] or chain[0] == "flow":
        assert (last.signal, last.noise, last.sigma) == (0.0, 1.0, math.inf)
    else:
        assert last.signal > 0 and math.isfinite(last.sigma)


def test_points_are_the_tables() -> None:
    process = process_of(("cosine", False))
    signal, level = expected_levels(("cosine", False), T)
    for t in (0, 7, T - 1):
        point = process.point(t)
        assert point.signal == pytest.approx(signal[t], rel=1e-9)
        assert point.noise == pytest.approx(level[t], rel=1e-9)
        assert point.time == t
        assert process.levels(point) == (point.signal, point.noise)


@pytest.mark.parametrize("chain", [("cosine", True), ("linear", False), ("flow", False)])
def test_a_process_built_without_memory_has_real_tables(chain: Chain) -> None:
    """Large networks are built on `meta` and filled later; the tables are no part of them."""
    expected = process_of(chain)
    config = expected.config
    with torch.device("meta"):
        process = Process(config)
    for name in ("signal", "noise"):
        assert torch.equal(getattr(process, name), getattr(expected, name))
    t, x0, eps = torch.tensor([0, 5, 20, T - 1]), pictures(), noise()
    assert torch.equal(process.noised(x0, eps, t), expected.noised(x0, eps, t))
    assert process.path(5).points == expected.path(5).points


def test_a_configuration_can_be_made_without_memory() -> None:
    """`with torch.device("meta"): DDPM(DDPMConfig(), ...)` makes it there."""
    with torch.device("meta"):
        assert ProcessConfig(T).steps == T
        with pytest.raises(UserError, match="steps=20"):
            ProcessConfig(20)


def test_tables_follow_the_steps_from_device_to_device() -> None:
    """Being asked on one device must not spoil the answer on another."""
    process, t = process_of(("cosine", False)), torch.tensor([0, 5, 20, T - 1])
    expected = [level.clone() for level in process.levels(t)]  # type: ignore[union-attr]
    for level in process.levels(t.to("meta")):
        assert isinstance(level, Tensor)
        assert level.device.type == "meta" and level.shape == (B, 1, 1, 1)
    found = process.levels(t)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# --- forward ------------------------------------------------------------------------------------


@chains
def test_noised_is_equation_4(chain: Chain) -> None:
    """By hand, for each row its own t."""
    process, t = process_of(chain, steps=1000), torch.tensor([0, 10, 500, 999])
    a, b = (level[t][:, None, None, None] for level in expected_levels(chain, 1000))
    expected = a * pictures().numpy() + b * noise().numpy()
    np.testing.assert_allclose(process.noised(pictures(), noise(), t), expected, atol=2e-6)


@chains
def test_a_step_and_its_point_are_the_same_level(chain: Chain) -> None:
    process = process_of(chain)
    for t in range(T):
        by_step = process.noised(pictures(), noise(), torch.full((B,), t))
        by_point = process.noised(pictures(), noise(), process.point(t))
        torch.testing.assert_close(by_step, by_point, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_never_added_in_half_precision(dtype: torch.dtype) -> None:
    x = process_of(("linear", False)).noised(
        pictures(dtype=dtype), noise(dtype=dtype), torch.arange(B)
    )
    assert x.dtype == torch.promote_types(dtype, torch.float32)


@beta_chains
def test_noised_pictures_keep_their_variance(chain: Chain) -> None:
    """Of data with variance 1, x_t has variance 1 at every t: that is what the roots are for."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, B, 3, 64, 64, generator=generator)
    x = process_of(chain).noised(x0, eps, torch.tensor([0, 12, 25, T - 1]))
    torch.testing.assert_close(x.var(dim=(1, 2, 3)), torch.ones(B), atol=0.05, rtol=0)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_many_small_steps_are_one_large_one(schedule: str) -> None:
    """Equation 2 against equation 4: noise added beta by beta, and all at once."""
    process = process_of((schedule, False))
    x = torch.full((20000,), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for t, beta in enumerate(process.betas.tolist()):
        drawn = torch.randn(20000, generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * drawn
        if t in (3, 15, T - 1):
            point = process.point(t)
            assert x.mean().item() == pytest.approx(0.7 * point.signal, abs=4 * point.noise / 141)
            assert x.std().item() == pytest.approx(point.noise, rel=0.025)


# --- what the network's output means ------------------------------------------------------------


@pairs
def test_a_perfect_output_gives_back_picture_and_noise(chain: Chain, prediction: str) -> None:
    """target -> to_x0 -> to_noise is a circle at every step, noise alone among them."""
    process, x0, eps = process_of(chain, prediction), pictures(), noise()
    for t in at_each():
        x = process.noised(x0, eps, t)
        found = process.to_x0(process.target(x0, eps, t), x, t)
        torch.testing.assert_close(found, x0, atol=5e-7, rtol=0)  # the tables are float32
        torch.testing.assert_close(process.to_noise(x0, x, t), eps, atol=1e-9, rtol=0)


@pairs
def test_a_perfect_output_gives_back_picture_and_noise_at_a_point(
    chain: Chain, prediction: str
) -> None:
    """At levels of steps, and between them."""
    process, x0, eps = process_of(chain, prediction), pictures(), noise()
    points = [process.point(t) for t in range(T)] + [process.at(s) for s in (0.02, 0.7, 3.3, 79.0)]
    for point in points:
        x = process.noised(x0, eps, point)
        found = process.to_x0(process.target(x0, eps, point), x, point)
        torch.testing.assert_close(found, x0, atol=1e-9, rtol=0)
        torch.testing.assert_close(process.to_noise(found, x, point), eps, atol=1e-9, rtol=0)


@pairs
def test_an_output_means_the_same_by_step_and_by_point(chain: Chain, prediction: str) -> None:
    """Training asks by step, sampling by point."""
    process, output, x = process_of(chain, prediction), noise(5), noise(6)
    for t in (0, 3, 20, T - 1):
        step, point = torch.full((B,), t), process.point(t)
        targets = (process.target(pictures(), noise(), at) for at in (step, point))
        torch.testing.assert_close(*targets, atol=1e-5, rtol=1e-5)
        read = (process.to_x0(output, x, at) for at in (step, point))
        torch.testing.assert_close(*read, atol=1e-5, rtol=1e-5)


@pairs
def test_rows_do_not_mix(chain: Chain, prediction: str) -> None:
    """Each row is read at its own t."""
    process, output, x = process_of(chain, prediction), noise(5), noise(6)
    t = torch.tensor([0, 9, 25, T - 1])
    together = process.to_x0(output, x, t)
    for row in range(B):
        one = slice(row, row + 1)
        alone = process.to_x0(output[one], x[one], t[one])
        torch.testing.assert_close(together[one], alone)


@chains
def test_targets_are_what_their_names_say(chain: Chain) -> None:
    x0, eps = pictures(), noise()
    for t in at_each():
        if chain in PLAIN:
            assert torch.equal(process_of(chain, "noise").target(x0, eps, t), eps)
        assert torch.equal(process_of(chain, "x0").target(x0, eps, t), x0)
        assert torch.equal(process_of(chain, "flow").target(x0, eps, t), eps - x0)


@beta_chains
def test_v_is_the_velocity_along_the_circle(chain: Chain) -> None:
    """Salimans and Ho, appendix D: of cos(angle) x_0 + sin(angle) eps, by the angle."""
    process, x0, eps, step = process_of(chain, "v"), pictures(), noise(), 1e-6
    for point in map(process.point, range(T)):
        angle = math.atan2(point.noise, point.signal)
        ahead, behind = (
            math.cos(angle + side * step) * x0 + math.sin(angle + side * step) * eps
            for side in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        torch.testing.assert_close(process.target(x0, eps, point), expected, atol=1e-8, rtol=0)


def test_flow_is_the_velocity_along_the_line() -> None:
    """Of x_t by t, wherever on the line; t counts T steps."""
    process, x0, eps = process_of(("flow", False), "flow"), pictures(), noise()
    for t in range(T - 1):
        here, there = (process.noised(x0, eps, process.point(k)) for k in (t, t + 1))
        velocity = process.target(x0, eps, process.point(t))
        torch.testing.assert_close(T * (there - here), velocity, atol=1e-9, rtol=0)


@pytest.mark.parametrize("deviation", [0.5, 1.3])
def test_edm_is_table_1(deviation: float) -> None:
    """Karras et al.: D(x) = skip x + out F, in x / a, at each sigma; Scalings are its columns."""
    process = process_of(("cosine", False), "edm", deviation=deviation)
    output, noised = noise(5), noise(6)
    for point in map(process.point, range(T)):
        sigma, variance = point.sigma, point.sigma**2 + deviation**2
        skip, out = deviation**2 / variance, sigma * deviation / math.sqrt(variance)
        scale = Scalings.at(sigma, deviation)
        assert scale.skip == pytest.approx(skip, rel=1e-12)
        assert scale.out == pytest.approx(out, rel=1e-12)
        assert scale.into == pytest.approx(1 / math.sqrt(variance), rel=1e-12)
        expected = skip * noised / point.signal + out * output
        found = process.to_x0(output, noised, point)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@chains
def test_edm_has_targets_and_inputs_of_deviation_1(chain: Chain) -> None:
    """What its factors are for: of data with the deviation that is set, at every level."""
    process = process_of(chain, "edm", deviation=0.25)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 64, 64, generator=generator, dtype=torch.float64)
    for t in (0, 10, 20, 30, T - 1):
        point = process.point(t)
        target = process.target(0.25 * x0, eps, point)
        assert target.std().item() == pytest.approx(1, abs=0.03)
        if math.isfinite(point.sigma):
            x = process.noised(0.25 * x0, eps, point) / point.signal
            into = Scalings.at(point.sigma, 0.25).into
            assert (into * x).std().item() == pytest.approx(1, abs=0.03)


# --- loss ---------------------------------------------------------------------------------------


@pairs
def test_the_loss_is_the_mean_square(chain: Chain, prediction: str) -> None:
    """A mean over pixels, for each row: it must not grow with the picture."""
    process, x0, eps = process_of(chain, prediction), pictures(), noise()
    t = torch.tensor([0, 9, 25, T - 1])
    target = process.target(x0, eps, t)
    off = torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    found = process.mse(target + off, x0, eps, t)
    assert found.shape == (B,)
    np.testing.assert_allclose(found, [0, 0.25, 1, 4], rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(process.weight(t), torch.ones(B))


def test_the_loss_is_taken_in_single_precision() -> None:
    """An error of bfloat16 outputs, squared in bfloat16, would keep two digits."""
    process, t = process_of(("linear", False), "noise"), torch.tensor([0, 9, 25, T - 1])
    output = noise(3).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        x0, eps = pictures(dtype=dtype), noise(dtype=dtype)
        found = process.mse(output, x0, eps, t)
        assert found.dtype == torch.float32
        exact = (output.double() - eps.double()).square().mean(dim=(1, 2, 3))
        np.testing.assert_allclose(found, exact, rtol=1e-5)


@pairs
def test_min_snr_is_the_same_loss_whatever_the_prediction(chain: Chain, prediction: str) -> None:
    """Hang et al., section 3.4: min(snr, gamma) |x_0 - estimate|^2, said in each output's terms.

    A wrong guess of the picture is put in the words of each prediction.
    """
    x0, eps, wrong = pictures(), noise(), pictures(7)
    squares = (wrong - x0).square().mean(dim=(1, 2, 3)).numpy()
    a, b = expected_levels(chain, T)
    for gamma in (1.0, 5.0):
        process = process_of(chain, prediction, weighting="min_snr", gamma=gamma)
        for t in at_each():
            x = process.noised(x0, eps, t)
            output = process.target(wrong, process.to_noise(wrong, x, t), t)
            expected = np.minimum((a[t] / b[t]) ** 2, gamma) * squares
            found = process.mse(output, x0, eps, t)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-9)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Section 3.4: min(snr, gamma) / snr for noise, and / (snr + 1) for v."""
    chain = ("cosine", False)
    a, b = expected_levels(chain, T)
    snr = (a / b) ** 2
    cut = np.minimum(snr, 5.0)
    for prediction, expected in (("x0", cut), ("noise", cut / snr), ("v", cut / (snr + 1))):
        process = process_of(chain, prediction, weighting="min_snr")
        found = process.weight(torch.arange(T))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_loss_is_the_same_by_step_and_by_point(weighting: str) -> None:
    process = process_of(("cosine", False), "v", weighting=weighting)
    for t in (0, 9, 25, T - 1):
        by_step, by_point = (
            process.mse(noise(3), pictures(), noise(), at)
            for at in (torch.full((B,), t), process.point(t))
        )
        torch.testing.assert_close(by_step, by_point, rtol=1e-4, atol=1e-9, check_dtype=False)


# --- respacing ----------------------------------------------------------------------------------


@beta_chains
@pytest.mark.parametrize("kept", [[0, 7, 19, T - 1], [0, 10, 20, 30], [5, 6], list(range(T))])
def test_respacing_keeps_abar(chain: Chain, kept: list[int]) -> None:
    """What is left of the picture at a step is the same, whichever other steps there are."""
    process = process_of(chain, "v")
    fewer = process.respaced(kept)
    assert fewer.steps == len(kept) and fewer.times == kept
    torch.testing.assert_close(fewer.abar, process.abar[kept], rtol=1e-9, atol=1e-15)
    for number, t in enumerate(kept):
        point, whole = fewer.point(number), process.point(t)
        assert point.time == t
        assert point.signal == pytest.approx(whole.signal, rel=1e-6, abs=1e-12)
        assert point.noise == pytest.approx(whole.noise, rel=1e-9)
    # the beta of a stride takes abar from one kept step to the next
    left = process.abar[kept].numpy()
    before = np.concatenate([[1.0], left[:-1]])
    np.testing.assert_allclose((1 - fewer.betas.numpy()) * before, left, rtol=1e-9, atol=1e-15)


@beta_chains
def test_respacing_twice_is_respacing_once(chain: Chain) -> None:
    process = process_of(chain)
    twice = process.respaced([0, 5, 10, 20, T - 1]).respaced([0, 2, 4])
    once = process.respaced([0, 10, T - 1])
    assert twice.times == once.times == [0, 10, T - 1]
    torch.testing.assert_close(twice.abar, once.abar, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("chain", PLAIN, ids=lambda c: c[0])
def test_a_respaced_process_tells_the_network_what_it_was_trained_on(chain: Chain) -> None:
    """At its own steps, and between them the same as the whole process would."""
    process = process_of(chain)
    kept = [0, 7, 19, T - 1]
    fewer = process.respaced(kept)
    for number, t in enumerate(kept):
        assert fewer.at(fewer.point(number).sigma).time == pytest.approx(t, abs=1e-6)
    for number in range(3):  # half the way in log sigma is half the way in time
        low, high = fewer.point(number), fewer.point(number + 1)
        middle = fewer.at(math.sqrt(low.sigma * high.sigma))
        assert middle.time == pytest.approx((low.time + high.time) / 2, abs=1e-6)


# --- paths --------------------------------------------------------------------------------------


@chains
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_path_goes_from_noise_to_the_clean_picture(chain: Chain, spacing: str) -> None:
    """So many steps, ever less noise, each level on the circle, or on the line."""
    process, power = process_of(chain), 1 if chain[0] == "flow" else 2
    for steps in (1, 2, 7, T - 1, T):
        path = process.path(steps, spacing)
        assert len(path) == steps == len(path.steps()) and len(path.points) == steps + 1
        sigmas = [point.sigma for point in path.points]
        assert all(now > then for now, then in pairwise(sigmas))
        assert path.points[-1] == CLEAN and sigmas[-1] == 0
        times = [point.time for point in path.points[:-1]]
        assert times[0] <= T - 1 and times[-1] >= 0
        assert all(now >= then for now, then in pairwise(times))
        for point in path.points[:-1]:
            assert point.signal**power + point.noise**power == pytest.approx(1, abs=1e-12)


@chains
def test_paths_by_step_visit_these_steps(chain: Chain) -> None:
    """T = 40 and 8 steps, by hand. `leading` adds 1, as latent diffusion does."""
    process = process_of(chain)
    for spacing, times in {
        "even": [39, 33, 28, 22, 17, 11, 6, 0],
        "leading": [36, 31, 26, 21, 16, 11, 6, 1],
        "trailing": [39, 34, 29, 24, 19, 14, 9, 4],
    }.items():
        points = process.path(8, spacing).points
        assert list(points[:-1]) == [process.point(t) for t in times]
        assert [point.time for point in points[:-1]] == times


@chains
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
def test_a_path_of_all_steps_visits_all_steps(chain: Chain, spacing: str) -> None:
    process = process_of(chain)
    times = [point.time for point in process.path(T, spacing).points[:-1]]
    assert times == list(range(T - 1, -1, -1))


@chains
def test_paths_by_sigma_end_where_the_process_ends(chain: Chain) -> None:
    """And begin where it begins, or at 80, as good as noise alone (Karras et al.)."""
    process = process_of(chain)
    a, b = expected_levels(chain, T)
    most = 80.0 if a[-1] == 0 else min(80.0, b[-1] / a[-1])
    least = b[0] / a[0]
    i = np.arange(6) / 5
    karras = (most ** (1 / 7) + i * (least ** (1 / 7) - most ** (1 / 7))) ** 7
    exponential = most * (least / most) ** i
    for spacing, expected in (("karras", karras), ("exponential", exponential)):
        points = process.path(6, spacing).points[:-1]
        np.testing.assert_allclose([p.sigma for p in points], expected, rtol=1e-6)
        assert points[-1].time == pytest.approx(0, abs=1e-6)
        assert process.path(1, spacing).points[0].sigma == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
def test_a_shift_moves_the_levels_of_a_straight_line(shift: float, spacing: str) -> None:
    """Each sigma is multiplied; the network is told where on the line that is, within the chain."""
    plain = process_of(("flow", False)).path(8, spacing).points
    found = process_of(("flow", False), shift=shift).path(8, spacing).points
    assert found[-1] == CLEAN
    for before, after in zip(plain[:-1], found[:-1], strict=True):
        assert after.signal + after.noise == pytest.approx(1, abs=1e-12)
        assert after.sigma == pytest.approx(shift * before.sigma, rel=1e-9)
        expected = max(after.noise * T - 1, 0)  # step t has noise (t + 1) / T
        assert after.time == pytest.approx(expected, abs=1e-9)


@beta_chains
def test_a_shift_is_of_the_straight_line_alone(chain: Chain) -> None:
    plain, found = (process_of(chain, shift=shift).path(8) for shift in (1.0, 3.0))
    assert plain.points == found.points


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, T + 1, 1000])
def test_a_number_of_steps_that_cannot_be_is_told(spacing: str, steps: int) -> None:
    with pytest.raises(UserError, match=rf"steps={steps} .*1 to {T}\.") as told:
        process_of(("cosine", False)).path(steps, spacing)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("spacing", "hint"), [("karas", "did you mean 'karras'"), ("", "there is: even")]
)
def test_a_spacing_that_there_is_not_is_told(spacing: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"spacing='{spacing}'.*{hint}") as told:
        process_of(("cosine", False)).path(5, spacing)
    assert "\n" not in str(told.value)


# --- sigma and time -----------------------------------------------------------------------------


@chains
def test_time_and_sigma_are_inverse_at_the_steps(chain: Chain) -> None:
    """Of noise alone too, and of the step before it."""
    process = process_of(chain)
    a, b = expected_levels(chain, T)
    for t in range(T):
        sigma = math.inf if a[t] == 0 else b[t] / a[t]
        assert process.sigma(t) == pytest.approx(sigma, rel=1e-6)
        assert process.time(sigma) == pytest.approx(t, abs=1e-5)
        assert process.nearest(sigma) == t


@chains
def test_time_and_sigma_are_inverse_between_the_steps(chain: Chain) -> None:
    """By the logarithms: halfway in time is the geometric mean."""
    process = process_of(chain)
    sigmas = [process.point(t).sigma for t in range(T)]
    for t, (low, high) in enumerate(pairwise(sigmas)):
        if math.isinf(high):
            continue
        assert process.sigma(t + 0.5) == pytest.approx(math.sqrt(low * high), rel=1e-9)
        for share in (0.1, 0.25, 0.9):
            sigma = low ** (1 - share) * high**share
            assert process.time(sigma) == pytest.approx(t + share, abs=1e-6)
            assert process.sigma(t + share) == pytest.approx(sigma, rel=1e-6)
            assert process.nearest(sigma) == t + round(share)
        near_middle = (low**0.52 * high**0.48, low**0.48 * high**0.52)
        assert [process.nearest(sigma) for sigma in near_middle] == [t, t + 1]


@chains
def test_beyond_the_last_sigma_that_can_be_told(chain: Chain) -> None:
    """A large sigma is the last finite step, unless it is infinite; a small one is step 0."""
    process = process_of(chain)
    finite = T - 2 if math.isinf(process.point(T - 1).sigma) else T - 1
    large = 1.5 * process.point(finite).sigma
    assert process.time(large) == finite and process.nearest(large) == finite
    assert process.time(math.inf) == T - 1 and process.nearest(math.inf) == T - 1
    small = 0.5 * process.point(0).sigma
    for sigma in (small, 1e-9, 0.0):
        assert process.time(sigma) == 0 and process.nearest(sigma) == 0


@chains
def test_sigma_beyond_the_chain_is_that_of_its_end(chain: Chain) -> None:
    """As `time` never leaves the chain, its inverse never looks beyond it."""
    process = process_of(chain)
    first, last = process.point(0).sigma, process.point(T - 1).sigma
    for time in (-0.5, -1.5, -float(T)):
        assert process.sigma(time) == pytest.approx(first, rel=1e-9)
    for time in (T - 0.5, T, 2.0 * T):
        assert process.sigma(time) == pytest.approx(last, rel=1e-9)


@chains
def test_a_level_has_the_sigma_that_was_asked_for(chain: Chain) -> None:
    """At steps it is the step; between them it stays on the circle, or on the line."""
    process = process_of(chain)
    for t in range(T):
        point = process.point(t)
        found = process.at(point.sigma)
        assert found.signal == pytest.approx(point.signal, rel=1e-9, abs=1e-15)
        assert found.noise == pytest.approx(point.noise, rel=1e-9)
        assert found.time == pytest.approx(t, abs=1e-6)
    for sigma in (1e-3, 0.05, 1.0, 7.7, 80.0, 1e6):
        found = process.at(sigma)
        assert found.sigma == pytest.approx(sigma, rel=1e-9)
        power = 1 if chain[0] == "flow" else 2
        assert found.signal**power + found.noise**power == pytest.approx(1, abs=1e-12)
        assert found.time == process.time(sigma)


@chains
def test_levels_of_all_sigmas_are_numbers(chain: Chain) -> None:
    """The clean picture and noise alone among them: no NaN may reach a network."""
    process = process_of(chain)
    clean, alone = process.at(0.0), process.at(math.inf)
    assert (clean.signal, clean.noise, clean.time) == (1, 0, 0)
    assert (alone.signal, alone.noise, alone.time) == (0, 1, T - 1)


@chains
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_path_finds_the_levels_between_its_points(chain: Chain, spacing: str) -> None:
    """Solvers of second order ask there; what they are told lies between, too."""
    path = process_of(chain).path(7, spacing)
    for now, then in path.steps()[:-1]:
        sigma = math.sqrt(min(now.sigma, 1e3) * then.sigma)
        between = path.at(sigma)
        assert between.sigma == pytest.approx(sigma, rel=1e-9)
        assert then.time - 1e-6 <= between.time <= now.time + 1e-6


# --- samplers, along these paths ----------------------------------------------------------------


def guess(x: Tensor, level: Point) -> Estimate:
    """An imperfect denoiser: what matters is that both programs ask the same."""
    return Estimate(torch.tanh(0.7 * x + 0.01 * level.time))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_perfect_denoiser_finds_the_picture(name: str) -> None:
    """From whatever noise, by whatever schedule, in any number of steps."""
    x0 = pictures()

    def denoise(x: Tensor, level: Point) -> Estimate:
        assert x.shape == x0.shape and torch.isfinite(x).all() and math.isfinite(level.time)
        return Estimate(x0.clone())

    for chain in CHAINS if name != "flow_euler" else [("flow", False)]:
        for steps in (1, 2, 7):
            path = process_of(chain).path(steps)
            found = SAMPLERS[name](denoise, noise(), path, NoiseStreams(range(B)))
            torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)


def algorithm_2(x: Tensor, betas: Tensor, draws: NoiseStreams) -> Tensor:
    """Ho et al. 2020, equations 6 and 7, step by step in double precision."""
    alphas = 1 - betas
    abar = torch.cumprod(alphas, 0)
    for t in range(len(betas) - 1, -1, -1):
        x0 = torch.tanh(0.7 * x + 0.01 * t)
        if t == 0:
            return x0  # the mean of the last step; algorithm 2 adds no noise there
        before = abar[t - 1]
        mean = (before.sqrt() * betas[t] / (1 - abar[t])) * x0
        mean = mean + (alphas[t].sqrt() * (1 - before) / (1 - abar[t])) * x
        variance = (1 - before) / (1 - abar[t]) * betas[t]
        x = mean + variance.sqrt() * draws.randn(*x.shape[1:]).double()
    raise AssertionError


@pytest.mark.parametrize("chain", PLAIN, ids=lambda c: c[0])
def test_ddpm_on_all_steps_is_algorithm_2(chain: Chain) -> None:
    process = process_of(chain)
    expected = algorithm_2(noise(), SCHEDULES[chain[0]](T), NoiseStreams(range(B)))
    for found in (
        ddpm(guess, noise(), process.path(T), NoiseStreams(range(B))),
        ddim(guess, noise(), process.path(T), NoiseStreams(range(B)), eta=1.0),
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32 draws


@pytest.mark.parametrize("chain", PLAIN, ids=lambda c: c[0])
def test_ddim_adds_no_noise(chain: Chain) -> None:
    """Song et al. 2021, equation 12 at sigma = 0, by hand; and no stream is touched."""
    process, x = process_of(chain), noise()
    a, b = expected_levels(chain, T)
    visited = [39, 31, 23, 16, 8, 0]
    for now, following in pairwise(visited):
        x0 = torch.tanh(0.7 * x + 0.01 * now)
        x = a[following] * x0 + b[following] * (x - a[now] * x0) / b[now]
    expected = torch.tanh(0.7 * x)
    found = [ddim(guess, noise(), process.path(6), NoiseStreams([seed] * B)) for seed in (0, 1)]
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
    assert torch.equal(found[0], found[1])


def test_ddpm_draws_from_the_stream_of_each_row() -> None:
    """Rows that share a stream would be the same picture; so would two seeds."""
    process = process_of(("cosine", False))
    start = noise()[:1].expand(B, -1, -1, -1)
    found = ddpm(guess, start, process.path(8), NoiseStreams([5, 6, 5, 7]))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert not torch.allclose(found[1], found[3], atol=1e-2)


def test_a_path_can_be_walked_from_any_point() -> None:
    """The last steps of a path are what a shorter walk needs, and lead to the same picture."""
    path: Path = process_of(("cosine", False)).path(8)
    seen: list[Tensor] = []
    whole = ddim(guess, noise(), path, NoiseStreams(range(B)), lambda _, x, x0: seen.append(x))
    part = ddim(guess, seen[5], path.shortened(3), NoiseStreams(range(B)))
    torch.testing.assert_close(part, whole)
