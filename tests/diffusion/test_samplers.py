"""Samplers against closed forms: data whose best estimate of x_0 can be written down.

gaussian    x_0 is normal: the estimate is linear in x, so the result is linear in all noise
pair        x_0 is 1 or -1
constant    x_0 is known: every level on the way is then known exactly
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Denoise, Estimate, no_callback
from lineage.diffusion.schedules import (
    NO_NOISE,
    SPACINGS,
    NoiseLevel,
    SamplingSchedule,
    karras_sigmas,
)
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams

DEVIATION = 0.5  # of the normal data, whose mean is 1
START, MEAN = 0, 1  # entries of x: the initial noise and the mean; UnitNoise uses the others

DETERMINISTIC = ("ddim", "flow_euler", "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpm_solver")
STOCHASTIC = (
    "ddpm",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
)
TWO_EVALUATIONS = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
WITH_ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")

FLOW = Process(ProcessConfig(schedule="flow", prediction="flow"))
LINEAR = Process(ProcessConfig(prediction="x0"))
COSINE = Process(ProcessConfig(schedule="cosine", prediction="x0"))


ON_BOTH = [
    pytest.param(name, process, id=f"{name}, {label}")
    for label, process in (("linear", LINEAR), ("flow", FLOW))
    for name in SAMPLERS
    if process is FLOW or name != "flow_euler"
]


def test_every_sampler_is_in_one_of_the_lists() -> None:
    """A sampler in neither would not be tested here."""
    assert sorted(DETERMINISTIC + STOCHASTIC) == sorted(SAMPLERS)


# --- data whose best estimate is known ------------------------------------------------------------


def gaussian(mean: Tensor | float = 1.0, deviation: float = DEVIATION) -> Denoise:
    """x_0 ~ N(mean, deviation^2): the mean of x_0 given x, by the rule of two normals."""

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        alpha, sigma = level.alpha, level.sigma
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        return Estimate(mean + gain * (x - alpha * mean))

    return denoise


def pair(probability: float = 0.5) -> Denoise:
    """x_0 is 1 with a probability, else -1."""

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        log_odds = 0.5 * math.log(probability / (1 - probability))
        return Estimate((x * level.alpha / level.sigma**2 + log_odds).tanh())

    return denoise


def constant(x0: Tensor | float) -> Denoise:
    """x_0 is always the same."""
    return lambda x, level: Estimate(torch.zeros_like(x) + x0)


def smooth(x: Tensor, level: NoiseLevel) -> Estimate:
    """No data in particular: nonlinear, and it depends on the whole of a row."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return Estimate((x / (level.alpha + 0.5) + mean + level.sigma).tanh())


class UnitNoise(NoiseStreams):
    """Noise that is 1 in an entry of its own and 0 elsewhere, at each call.

    Where all is linear, the result shows the weight of each noise, and its variance is the sum of
    their squares.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.last_entry = max(START, MEAN)

    def randn(self, *shape: int) -> Tensor:
        self.last_entry += 1
        return unit(shape[-1], self.last_entry)


def unit(length: int, entry: int) -> Tensor:
    """(1, 1, 1, length) with a 1."""
    x = torch.zeros(1, 1, 1, length, dtype=torch.float64)
    x[..., entry] = 1
    return x


@dataclass
class Moments:
    """Mean and standard deviation of a sampler's result, in units of the data's mean."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        entries = x.flatten().tolist()
        return cls(entries[MEAN], math.hypot(*entries[:MEAN], *entries[MEAN + 1 :]))


def data_at(level: NoiseLevel) -> Moments:
    """Moments of the normal data at a level."""
    return Moments(level.alpha, math.hypot(level.alpha * DEVIATION, level.sigma))


def sampled(name: str, schedule: SamplingSchedule, **own: Any) -> Moments:
    """Moments of a sampler's result on the normal data."""
    length = 2 * len(schedule) + 4
    start, mean = data_at(schedule.levels[0]), unit(length, MEAN)
    x = start.mean * mean + start.deviation * unit(length, START)
    return Moments.of(SAMPLERS[name](gaussian(mean), x, schedule, UnitNoise(), **own))


def schedule_of(process: Process, sigmas: list[float], *ends: NoiseLevel) -> SamplingSchedule:
    """A schedule of karras_sigmas."""
    return SamplingSchedule((*map(process.level_at, sigmas), *ends), process.level_at)


def streams(count: int) -> NoiseStreams:
    return NoiseStreams(range(100, 100 + count))


def trajectory(
    name: str,
    schedule: SamplingSchedule,
    denoise: Denoise = smooth,
    seeds: tuple[int, ...] = (1, 2),
    **own: Any,
) -> Tensor:
    """x at each step and at the end, (steps + 1, B, 1, 4, 4)."""
    xs: list[Tensor] = []
    end = SAMPLERS[name](
        denoise,
        initial_x(schedule),
        schedule,
        NoiseStreams(seeds),
        lambda step, x, x0: xs.append(x),
        **own,
    )
    return torch.stack([*xs, end])


def initial_x(schedule: SamplingSchedule, count: int = 2) -> Tensor:
    """(B, 1, 4, 4) at the first level."""
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return schedule.levels[0].alpha * 0.5 + schedule.levels[0].sigma * eps


# --- they converge --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_result_has_the_moments_of_normal_data(name: str) -> None:
    """For deterministic samplers this is the exact solution of the equation, since the distance
    from the mean, in standard deviations, stays constant."""
    few, many = (sampled(name, FLOW.sampling_schedule(steps, "karras")) for steps in (40, 160))
    assert few.mean == pytest.approx(1) and many.mean == pytest.approx(1)
    errors = [abs(moments.deviation / DEVIATION - 1) for moments in (few, many)]
    assert errors[1] < 0.04 and errors[1] < errors[0] / 3, errors


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "flow_euler"])
@pytest.mark.parametrize("spacing", ["even", "trailing", "exponential"])
def test_samplers_converge_with_every_spacing(name: str, spacing: str) -> None:
    moments = sampled(name, LINEAR.sampling_schedule(250, spacing))
    assert moments.mean == pytest.approx(1)
    assert moments.deviation == pytest.approx(DEVIATION, rel=0.04)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_two_points_have_their_probabilities(name: str) -> None:
    """Without noise, the result grows with x, so that the share of ones follows from the order."""
    probability, count = 0.7, 3000
    schedule = FLOW.sampling_schedule(80, "karras")
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    eps = torch.special.ndtri(ranks)[None, None, None]
    x = schedule.levels[0].alpha * (2 * probability - 1) + schedule.levels[0].sigma * eps
    x0 = SAMPLERS[name](pair(probability), x, schedule, streams(1)).flatten()
    assert ((x0.abs() - 1).abs() < 0.02).double().mean() > 0.99
    error = (x0 > 0).double().mean().item() - probability
    if name in DETERMINISTIC:
        assert torch.equal((x0 > 0).sort().values, x0 > 0)
        assert abs(error) < 0.004
    else:  # three standard deviations of that many coins
        assert abs(error) < 3 * math.sqrt(probability * (1 - probability) / count), error


# --- orders of convergence ------------------------------------------------------------------------

ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 3),  # 4, except in the first steps, which have fewer values
    ("dpmpp_2m", {"order": 1}, 1),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_2m", {"order": 3}, 2),  # 3, except in the first steps
    ("dpm_solver", {}, 2),
    ("dpm_solver", {"solver_type": "heun"}, 2),
    ("dpm_solver", {"order": 3}, 2),
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("dpm_2_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("euler", {"s_churn": 10.0}, 1),
    ("heun", {"s_churn": 10.0}, 2),
]


@pytest.mark.parametrize(("name", "own", "order"), ORDERS, ids=str)
def test_order_of_convergence(name: str, own: dict[str, Any], order: float) -> None:
    """Half the steps have 2^order times the error in the standard deviation. The levels are smooth
    in the number of steps and end before the picture, where samplers differ."""
    errors = []
    for steps in (128, 256):
        schedule = schedule_of(LINEAR, karras_sigmas(steps + 1, 0.1, 10.0))
        end = data_at(schedule.levels[-1])
        moments = sampled(name, schedule, **own)
        assert moments.mean == pytest.approx(end.mean)
        errors.append(abs(moments.deviation / end.deviation - 1))
    observed = math.log2(errors[0] / errors[1])
    assert order - 0.15 < observed < order + 0.4, observed


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_solver"])
def test_order_3_is_closer_than_order_2(name: str) -> None:
    schedule = schedule_of(LINEAR, karras_sigmas(65, 0.1, 10.0))
    end = data_at(schedule.levels[-1]).deviation
    two, three = (abs(sampled(name, schedule, order=order).deviation - end) for order in (2, 3))
    assert three < two / 2


def test_lms_integrates_the_polynomial_through_the_last_slopes() -> None:
    """With slopes that depend on sigma alone, against numpy's fit of a polynomial."""
    sigmas = [9.0, 7.0, 4.0, 2.5, 1.0, 0.4, 0.1]

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        sigma = level.karras_sigma
        return Estimate(x / level.alpha - sigma * math.sin(sigma))

    for order in (1, 2, 3, 4):
        expected = 2.0
        for step in range(len(sigmas) - 1):
            nodes = sigmas[max(0, step + 1 - order) : step + 1]
            fit = np.polyfit(nodes, np.sin(nodes), len(nodes) - 1)
            expected += np.diff(np.polyval(np.polyint(fit), sigmas[step : step + 2])).item()
        schedule = schedule_of(LINEAR, sigmas)
        x = torch.full((1, 1, 1, 1), 2.0 * schedule.levels[0].alpha, dtype=torch.float64)
        end = SAMPLERS["lms"](denoise, x, schedule, streams(1), order=order)
        assert end.item() / schedule.levels[-1].alpha == pytest.approx(expected, rel=1e-6)


# --- samplers that are equal ----------------------------------------------------------------------

FINITE = {
    "linear, even": LINEAR.sampling_schedule(20),
    "linear, trailing": LINEAR.sampling_schedule(20, "trailing"),
    "cosine, karras": COSINE.sampling_schedule(20, "karras"),
    "flow, karras": FLOW.sampling_schedule(20, "karras"),
    "by hand": schedule_of(LINEAR, [30.0, 29.0, 5.0, 4.0, 0.01], NO_NOISE),
}
EQUAL: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("euler", {}, "ddim", {}),
    ("euler", {}, "euler_ancestral", {"eta": 0.0}),
    ("euler", {}, "lms", {"order": 1}),
    ("euler", {}, "dpmpp_2m", {"order": 1}),
    ("euler", {}, "dpm_solver", {"order": 1}),
    ("ddpm", {}, "euler_ancestral", {}),
    ("ddpm", {}, "ddim", {"eta": 1.0}),
    ("dpmpp_2m", {}, "dpmpp_2m_sde", {"eta": 0.0}),
    ("dpmpp_2m", {"solver_type": "heun"}, "dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
]


@pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
@pytest.mark.parametrize(("one", "own", "other", "other_own"), EQUAL, ids=str)
def test_equal_samplers(
    one: str,
    own: dict[str, Any],
    other: str,
    other_own: dict[str, Any],
    schedule: SamplingSchedule,
) -> None:
    """With the same noise, at every step."""
    first, second = trajectory(one, schedule, **own), trajectory(other, schedule, **other_own)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_equal_samplers_of_order_3() -> None:
    """For 15 steps or more: with fewer, the last steps of `dpmpp_2m` are of lower order."""
    schedule = COSINE.sampling_schedule(20, "karras")
    first = trajectory("dpmpp_2m", schedule, order=3, solver_type="heun")
    second = trajectory("dpmpp_3m_sde", schedule, eta=0.0)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_solver"])
def test_the_last_of_few_steps_is_of_the_first_order(name: str) -> None:
    """As in Lu et al.'s code below 15 steps, where a higher order is not stable."""
    for steps in (14, 15):
        schedule = schedule_of(LINEAR, karras_sigmas(steps + 1, 0.05, 20.0))
        *_, before, end = trajectory(name, schedule)
        euler = SAMPLERS["euler"](smooth, before, schedule.shortened(1), streams(2))
        assert torch.allclose(end, euler, atol=1e-9) == (steps == 14), steps


def test_lms_is_of_order_4_by_default() -> None:
    schedule = LINEAR.sampling_schedule(9, "karras")
    by_order = {order: trajectory("lms", schedule, order=order) for order in (2, 3, 4)}
    assert torch.equal(trajectory("lms", schedule), by_order[4])
    assert not torch.equal(by_order[4], by_order[3])
    assert not torch.equal(by_order[3], by_order[2])


@pytest.mark.parametrize("spacing", ["even", "trailing", "karras"])
def test_flow_euler_is_ddim_on_the_straight_line(spacing: str) -> None:
    """From pure noise too, where the karras_sigma is infinite."""
    schedule = FLOW.sampling_schedule(12, spacing)
    flow_euler, ddim = trajectory("flow_euler", schedule), trajectory("ddim", schedule)
    torch.testing.assert_close(flow_euler, ddim, atol=1e-6, rtol=1e-6)


def test_flow_euler_needs_a_straight_line() -> None:
    schedule = COSINE.sampling_schedule(4)
    with pytest.raises(UserError, match=r"process\.schedule=flow"):
        SAMPLERS["flow_euler"](pair(), initial_x(schedule), schedule, streams(2))


# --- ddpm -----------------------------------------------------------------------------------------


def test_a_step_of_ddpm_is_equation_7() -> None:
    """With the betas of the paper, for neighbouring timesteps and for a stride."""
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t, s in ((500, 499), (999, 700), (20, 0)):
        beta = 1 - alphas_cumprod[t] / alphas_cumprod[s]
        small = (1 - alphas_cumprod[s]) / (1 - alphas_cumprod[t]) * beta
        x0_coef = alphas_cumprod[s].sqrt() * beta / (1 - alphas_cumprod[t])
        xt_coef = (alphas_cumprod[t] / alphas_cumprod[s]).sqrt()
        xt_coef = xt_coef * (1 - alphas_cumprod[s]) / (1 - alphas_cumprod[t])
        schedule = SamplingSchedule((LINEAR.level(t), LINEAR.level(s)), LINEAR.level_at)
        x0, learned = 0.3 * unit(8, 3), torch.linspace(-0.5, 1.5, 8, dtype=torch.float64)
        x, z = unit(8, START), unit(8, 2)  # entry 2 is the first noise of UnitNoise
        mean = x0_coef * x0 + xt_coef * x
        geometric = beta**learned * small ** (1 - learned)
        for estimate, own, variance in (
            (Estimate(x0), {}, small),
            (Estimate(x0), {"variance": "fixed_large"}, beta),
            (Estimate(x0, variance_fraction=learned), {}, geometric),
            (Estimate(x0, log_variance=learned), {}, learned.exp()),
        ):
            step = SAMPLERS["ddpm"](
                lambda x, level, estimate=estimate: estimate, x, schedule, UnitNoise(), **own
            )
            torch.testing.assert_close(step, mean + variance.sqrt() * z)


def test_learned_variances_equal_fixed_ones_at_their_ends() -> None:
    """A fraction of 0 is `fixed_small`, one of 1 is `fixed_large`; the last step has no noise."""
    schedule = COSINE.sampling_schedule(6, "karras")
    for fraction, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):

        def denoise(x: Tensor, level: NoiseLevel, fraction: float = fraction) -> Estimate:
            x0 = smooth(x, level).x0
            return Estimate(x0, variance_fraction=torch.full_like(x, fraction))

        learned = trajectory("ddpm", schedule, denoise)
        torch.testing.assert_close(learned, trajectory("ddpm", schedule, variance=variance))


# --- the way --------------------------------------------------------------------------------------


class Recorder:
    """A denoiser that records its arguments and estimates."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.arguments: list[tuple[Tensor, NoiseLevel]] = []
        self.x0: list[Tensor] = []

    def __call__(self, x: Tensor, level: NoiseLevel) -> Estimate:
        estimate = self.denoise(x, level)
        self.arguments.append((x, level))
        self.x0.append(estimate.x0)
        return estimate

    def sigmas(self) -> list[float]:
        return [level.karras_sigma for _, level in self.arguments]


def finite_schedule(name: str, steps: int, spacing: str = "karras") -> SamplingSchedule:
    """A schedule that starts at a finite sigma and that the sampler can use."""
    return (FLOW if name == "flow_euler" else LINEAR).sampling_schedule(steps, spacing)


@pytest.mark.parametrize(("name", "process"), ON_BOTH)
def test_every_x_on_the_way_has_its_level(name: str, process: Process) -> None:
    """x = alpha x_0 + sigma eps in each evaluation and callback, where x_0 is constant."""
    schedule, length = process.sampling_schedule(9, "karras"), 24
    x0 = 0.7 * unit(length, MEAN)
    first = schedule.levels[0]
    recorder, steps = Recorder(constant(x0)), []

    def is_at(x: Tensor, level: NoiseLevel) -> bool:
        moments = Moments.of(x)
        close = [pytest.approx(0.7 * level.alpha), pytest.approx(level.sigma)]
        return [moments.mean, moments.deviation] == close

    def callback(step: int, x: Tensor, estimate: Tensor) -> None:
        steps.append(step)
        assert is_at(x, schedule.levels[step]), step
        assert torch.equal(estimate, x0)

    x = first.alpha * x0 + first.sigma * unit(length, START)
    end = SAMPLERS[name](recorder, x, schedule, UnitNoise(), callback)
    assert steps == list(range(9))
    assert all(is_at(x, level) for x, level in recorder.arguments)
    assert Moments.of(end).deviation == pytest.approx(0, abs=1e-6)
    assert Moments.of(end).mean == pytest.approx(0.7)


@pytest.mark.parametrize("name", WITH_ETA)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_any_eta_leads_to_the_same_level(name: str, eta: float) -> None:
    """It moves variance from old noise to new, and their sum stays."""
    schedule = schedule_of(LINEAR, karras_sigmas(8, 0.5, 20.0))
    first = schedule.levels[0]
    x = first.alpha * unit(16, MEAN) + first.sigma * unit(16, START)
    end = SAMPLERS[name](constant(unit(16, MEAN)), x, schedule, UnitNoise(), eta=eta)
    assert Moments.of(end).deviation == pytest.approx(schedule.levels[-1].sigma)
    new = math.hypot(*end.flatten()[2:].tolist())
    assert (new > 0) == (eta > 0)


@pytest.mark.parametrize("name", WITH_ETA)
def test_eta_is_the_share_of_new_noise(name: str) -> None:
    """In one step from sigma s to r: eta^2 r^2 (1 - r^2 / s^2) for `ddim` and ancestral steps;
    r^2 (1 - (r / s)^(2 eta)) for the equation of DPM-Solver++."""
    s, r = 8.0, 3.0
    schedule = schedule_of(LINEAR, [s, r])
    for eta in (0.25, 0.5, 1.0):
        end = SAMPLERS[name](constant(0.0), unit(8, START), schedule, UnitNoise(), eta=eta)
        variance = eta**2 * (1 - (r / s) ** 2)
        if name.endswith("sde"):
            variance = 1 - (r / s) ** (2 * eta)
        new = end.flatten()[2:].square().sum().item() / schedule.levels[-1].sigma ** 2
        assert new == pytest.approx(variance)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_last_step_returns_the_estimate(name: str) -> None:
    """Bit for bit, so that a clipped estimate stays in range; except `lms`, which uses earlier
    slopes, and rounding on the straight line."""
    schedule = finite_schedule(name, 7)
    recorder = Recorder(pair(0.6))
    x0 = SAMPLERS[name](recorder, initial_x(schedule).float(), schedule, streams(2))
    if name == "lms":
        assert (x0 - recorder.x0[-1]).abs().max() < 0.1
    elif name == "flow_euler":
        torch.testing.assert_close(x0, recorder.x0[-1], atol=1e-6, rtol=0)
    else:
        assert torch.equal(x0, recorder.x0[-1])


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_number_of_evaluations(name: str) -> None:
    """One a step, or two in all but the last."""
    schedule = finite_schedule(name, 6)
    recorder = Recorder(pair())
    SAMPLERS[name](recorder, initial_x(schedule), schedule, streams(2))
    assert len(recorder.arguments) == (11 if name in TWO_EVALUATIONS else 6)
    evaluated = [level for _, level in recorder.arguments]
    assert all(level in evaluated for level in schedule.levels[:-1])


@pytest.mark.parametrize(("name", "process"), ON_BOTH)
def test_one_step_is_the_first_estimate(name: str, process: Process) -> None:
    schedule = process.sampling_schedule(1)
    x, xs = initial_x(schedule), []
    x0 = SAMPLERS[name](
        gaussian(), x, schedule, streams(2), lambda step, x, x0: xs.append((step, x))
    )
    assert [step for step, _ in xs] == [0]
    torch.testing.assert_close(xs[0][1], x)
    # pure noise holds nothing of the picture; a large sigma may replace the infinite one
    torch.testing.assert_close(x0, gaussian()(x, schedule.levels[0]).x0, atol=0.02, rtol=0)


def test_ddim_inversion() -> None:
    """The way from a picture to its noise and the way back are one."""
    forth = schedule_of(LINEAR, karras_sigmas(401, 0.02, 20.0))
    back = SamplingSchedule(forth.levels[::-1], forth.at)
    x0 = torch.linspace(-2, 3, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    low, high = back.levels[0], back.levels[-1]
    start = low.alpha * x0
    latent = SAMPLERS["ddim"](gaussian(), start, back, streams(1))
    distance = (start - low.alpha) / data_at(low).deviation  # which the equation leaves constant
    exact = high.alpha + distance * data_at(high).deviation
    torch.testing.assert_close(latent, exact, atol=0.02, rtol=0.02)
    again = SAMPLERS["ddim"](gaussian(), latent, forth, streams(1))
    torch.testing.assert_close(again, start, atol=0.02, rtol=0.02)


# --- churn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_evaluates_at_a_higher_sigma(name: str) -> None:
    """Karras et al., algorithm 2: sigma (1 + gamma), gamma = min(s_churn / steps, sqrt 2 - 1), from
    s_tmin to s_tmax."""
    sigmas = [20.0, 10.0, 5.0, 2.0, 0.5]
    schedule = schedule_of(LINEAR, sigmas, NO_NOISE)
    for s_churn, gamma in ((1.0, 0.2), (100.0, math.sqrt(2) - 1)):
        recorder = Recorder(pair())
        own = {"s_churn": s_churn, "s_tmin": 1.0, "s_tmax": 10.0}
        SAMPLERS[name](recorder, initial_x(schedule), schedule, streams(2), **own)
        evaluated = recorder.sigmas()[:: 2 if name == "heun" else 1]
        expected = [s * (1 + gamma) if 1 <= s <= 10 else s for s in sigmas]
        assert evaluated == pytest.approx(expected)


def test_churn_adds_the_noise_of_its_sigma() -> None:
    """x has the level of its evaluation; s_noise multiplies the new noise."""
    schedule = schedule_of(LINEAR, [10.0, 4.0, 1.0], NO_NOISE)
    first = schedule.levels[0]
    x = first.alpha * unit(12, MEAN) + first.sigma * unit(12, START)
    for s_noise in (1.0, 1.1):
        recorder = Recorder(constant(unit(12, MEAN)))
        own = {"s_churn": 1.0, "s_noise": s_noise}
        SAMPLERS["euler"](recorder, x, schedule, UnitNoise(), **own)
        x_hat, level = recorder.arguments[0]
        added = s_noise * math.sqrt((4 / 3) ** 2 - 1) * 10
        assert level.karras_sigma == pytest.approx(10 * 4 / 3)
        moments = Moments.of(x_hat / level.alpha)
        assert moments.mean == pytest.approx(1)
        assert moments.deviation == pytest.approx(math.hypot(10, added))


def test_no_churn_draws_no_noise() -> None:
    schedule, noise = schedule_of(LINEAR, [10.0, 1.0], NO_NOISE), UnitNoise()
    SAMPLERS["heun"](pair(), unit(8, START), schedule, noise, s_churn=0.0)
    assert noise.last_entry == max(START, MEAN)


# --- schedules that start at pure noise -----------------------------------------------------------


ZERO_SNR = Process(ProcessConfig(schedule="cosine", prediction="v", zero_snr=True))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_from_pure_noise(name: str) -> None:
    """The karras_sigma is infinite there; mean and standard deviation are right all the same."""
    for process in (FLOW,) if name == "flow_euler" else (FLOW, ZERO_SNR):
        levels = (process.level(999), *map(process.level_at, karras_sigmas(60, 0.005, 60.0)))
        schedule = SamplingSchedule((*levels, NO_NOISE), process.level_at)
        assert math.isinf(levels[0].karras_sigma)
        moments = sampled(name, schedule)
        assert moments.mean == pytest.approx(1, abs=0.01)
        assert moments.deviation == pytest.approx(DEVIATION, rel=0.12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 99, 100])
def test_sigmas_fall_in_every_schedule(spacing: str, steps: int) -> None:
    """A solver divides by the size of a step, which a repeated level would make 0."""
    for name in ("linear", "cosine", "flow"):
        for zero_snr in (False, True):
            config = ProcessConfig(
                num_timesteps=100, schedule=name, prediction="v", zero_snr=zero_snr
            )
            levels = Process(config).sampling_schedule(steps, spacing).levels
            sigmas = [level.karras_sigma for level in levels]
            assert len(sigmas) == steps + 1 and sigmas[-1] == 0, config
            falling = all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
            assert falling, (config, sigmas[:3])


LARGE_SIGMAS = {
    "flow, 250 steps": FLOW.sampling_schedule(250),
    "flow, shift 3, 50 steps": Process(
        ProcessConfig(schedule="flow", prediction="v", shift=3.0)
    ).sampling_schedule(50),
    "linear, zero_snr, 50 steps": Process(
        ProcessConfig(prediction="v", zero_snr=True)
    ).sampling_schedule(50),
}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_from_pure_noise_with_a_large_second_sigma(name: str) -> None:
    """The sigma that replaces the infinite one must be above the next."""
    for label, schedule in LARGE_SIGMAS.items():
        if name == "flow_euler" and not label.startswith("flow"):
            continue
        recorder = Recorder(pair())
        x0 = SAMPLERS[name](recorder, initial_x(schedule), schedule, streams(2))
        sigmas = recorder.sigmas()
        falling = all(sigma > sigma_next * (1 - 1e-9) for sigma, sigma_next in pairwise(sigmas))
        assert falling, (label, sigmas[:4])
        assert ((x0.abs() - 1).abs() < 0.1).all(), label


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 3.0])
def test_a_shifted_line_starts_at_pure_noise(shift: float) -> None:
    """A rounding error in alpha would give a sigma of 1e15."""
    process = Process(ProcessConfig(schedule="flow", prediction="v", shift=shift))
    schedule = process.sampling_schedule(500)
    assert schedule.levels[0] == NoiseLevel(0.0, 1.0, 999.0)
    assert sampled("heun", schedule).deviation == pytest.approx(DEVIATION, rel=0.05)


# --- arguments and rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_an_unknown_argument_is_refused(name: str) -> None:
    schedule = finite_schedule(name, 3)
    with pytest.raises(TypeError, match="flavour"):
        SAMPLERS[name](pair(), initial_x(schedule), schedule, streams(2), no_callback, flavour=1)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_rows_are_independent(name: str) -> None:
    """A row's result follows from its start and its own stream, and from no other random state."""
    schedule = finite_schedule(name, 6)
    x = initial_x(schedule, 3)
    together = SAMPLERS[name](smooth, x, schedule, streams(3))
    torch.rand(5)
    for row in range(3):
        alone = SAMPLERS[name](smooth, x[row : row + 1], schedule, NoiseStreams([100 + row]))
        torch.testing.assert_close(alone[0], together[row])
    other = SAMPLERS[name](smooth, x, schedule, NoiseStreams([7, 8, 9]))
    assert torch.equal(other, together) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_rows_with_churn_are_independent(name: str) -> None:
    schedule = finite_schedule(name, 6)
    x = initial_x(schedule, 2)
    together = SAMPLERS[name](smooth, x, schedule, streams(2), s_churn=5.0)
    alone = SAMPLERS[name](smooth, x[1:], schedule, NoiseStreams([101]), s_churn=5.0)
    torch.testing.assert_close(alone[0], together[1])
