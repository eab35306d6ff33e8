"""Samplers against closed forms: data whose best estimate of x_0 can be written down.

gaussian    x_0 is normal: the estimate is linear in x, so the result is linear in all noise
pair        x_0 is 1 or -1
one_point   x_0 is known: every level on the way is then known exactly
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
from lineage.diffusion.samplers.k_diffusion import Churn, Denoise, Estimate, ignore
from lineage.diffusion.schedules import CLEAN, SPACINGS, Path, Point, karras_sigmas
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams

DEVIATION = 0.5  # of the normal data; their mean is 1
NOISE, MEAN = 0, 1  # places of `Apart` that are not draws

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
TWICE = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")  # asked in a step
WITH_ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")

FLOW = Process(ProcessConfig(schedule="flow", prediction="flow"))
LINEAR = Process(ProcessConfig(prediction="x0"))
COSINE = Process(ProcessConfig(schedule="cosine", prediction="x0"))


ON_BOTH = [
    pytest.param(name, process, id=f"{name}, {told}")
    for told, process in (("linear", LINEAR), ("flow", FLOW))
    for name in SAMPLERS
    if process is FLOW or name != "flow_euler"
]


def test_every_sampler_is_in_one_of_the_lists() -> None:
    """What is in neither would not be tested here."""
    assert sorted(DETERMINISTIC + STOCHASTIC) == sorted(SAMPLERS)


# --- data whose best estimate is known ------------------------------------------------------------


def gaussian(mean: Tensor | float = 1.0, deviation: float = DEVIATION) -> Denoise:
    """x_0 ~ N(mean, deviation^2): the mean of x_0 given x, by the rule of two normals."""

    def denoise(x: Tensor, level: Point) -> Estimate:
        a, b = level.signal, level.noise
        share = a * deviation**2 / ((a * deviation) ** 2 + b**2)
        return Estimate(mean + share * (x - a * mean))

    return denoise


def pair(share: float = 0.5) -> Denoise:
    """x_0 is 1 with probability `share`, else -1."""

    def denoise(x: Tensor, level: Point) -> Estimate:
        odds = 0.5 * math.log(share / (1 - share))
        return Estimate((x * level.signal / level.noise**2 + odds).tanh())

    return denoise


def one_point(where: Tensor | float) -> Denoise:
    """x_0 is always the same."""
    return lambda x, level: Estimate(torch.zeros_like(x) + where)


def smooth(x: Tensor, level: Point) -> Estimate:
    """Of no data in particular: it bends, never settles, and looks at the whole of a row."""
    middle = x.mean((1, 2, 3), keepdim=True)
    return Estimate((x / (level.signal + 0.5) + middle + level.noise).tanh())


class Apart(NoiseStreams):
    """Noise that keeps to itself: each draw is 1 at a place of its own and 0 elsewhere.

    Where all is linear, the result then says exactly how much each draw counts, and its variance
    is the sum of their squares.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.taken = max(NOISE, MEAN)

    def normal(self, *shape: int) -> Tensor:
        self.taken += 1
        return unit(shape[-1], self.taken)


def unit(places: int, at: int) -> Tensor:
    """(1, 1, 1, places)."""
    x = torch.zeros(1, 1, 1, places, dtype=torch.float64)
    x[..., at] = 1
    return x


@dataclass
class Moments:
    """Mean and deviation of what a sampler makes, in units of the mean of the data."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        places = x.flatten().tolist()
        return cls(places[MEAN], math.hypot(*places[:MEAN], *places[MEAN + 1 :]))


def wanted(level: Point) -> Moments:
    """What the normal data are at a level."""
    return Moments(level.signal, math.hypot(level.signal * DEVIATION, level.noise))


def sampled(name: str, path: Path, **knobs: Any) -> Moments:
    """What a sampler makes of the normal data."""
    places = 2 * len(path) + 4
    start, mean = wanted(path.points[0]), unit(places, MEAN)
    x = start.mean * mean + start.deviation * unit(places, NOISE)
    return Moments.of(SAMPLERS[name](gaussian(mean), x, path, Apart(), **knobs))


def path_of(process: Process, sigmas: list[float], *ends: Point) -> Path:
    """A path through some sigmas."""
    return Path((*(process.at(sigma) for sigma in sigmas), *ends), process.at)


def streams(count: int) -> NoiseStreams:
    return NoiseStreams(range(100, 100 + count))


def way(
    name: str, path: Path, denoise: Denoise = smooth, seeds: tuple[int, ...] = (1, 2), **knobs: Any
) -> Tensor:
    """x at each step and at the end, (steps + 1, B, 1, 4, 4)."""
    seen: list[Tensor] = []
    end = SAMPLERS[name](
        denoise,
        start_of(path),
        path,
        NoiseStreams(seeds),
        lambda step, x, x0: seen.append(x),
        **knobs,
    )
    return torch.stack([*seen, end])


def start_of(path: Path, count: int = 2) -> Tensor:
    """(B, 1, 4, 4)"""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return path.points[0].signal * 0.5 + path.points[0].noise * noise


# --- they arrive ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_normal_data_come_out_as_they_are(name: str) -> None:
    """Mean and deviation; for those without noise this is the exact solution of the equation, since
    what was one deviation from the mean stays so."""
    few, many = (sampled(name, FLOW.path(steps, "karras")) for steps in (40, 160))
    assert few.mean == pytest.approx(1) and many.mean == pytest.approx(1)
    errors = [abs(found.deviation / DEVIATION - 1) for found in (few, many)]
    assert errors[1] < 0.04 and errors[1] < errors[0] / 3, errors


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "flow_euler"])
@pytest.mark.parametrize("spacing", ["even", "trailing", "exponential"])
def test_they_arrive_along_every_spacing(name: str, spacing: str) -> None:
    found = sampled(name, LINEAR.path(250, spacing))
    assert found.mean == pytest.approx(1)
    assert found.deviation == pytest.approx(DEVIATION, rel=0.04)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_two_points_come_out_as_often_as_they_are(name: str) -> None:
    """And nothing between them. Without noise, the greater x is, the greater the result is, so that
    the shares follow from the order alone."""
    share, count = 0.7, 3000
    path = FLOW.path(80, "karras")
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.special.ndtri(ranks)[None, None, None]
    x = path.points[0].signal * (2 * share - 1) + path.points[0].noise * noise
    found = SAMPLERS[name](pair(share), x, path, streams(1)).flatten()
    assert ((found.abs() - 1).abs() < 0.02).double().mean() > 0.99
    error = (found > 0).double().mean().item() - share
    if name in DETERMINISTIC:
        assert torch.equal((found > 0).sort().values, found > 0)
        assert abs(error) < 0.004
    else:  # three deviations of so many coins
        assert abs(error) < 3 * math.sqrt(share * (1 - share) / count), error


# --- how fast they arrive -------------------------------------------------------------------------

ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 3),  # 4, but for the first steps, which know less
    ("dpmpp_2m", {"order": 1}, 1),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"kind": "heun"}, 2),
    ("dpmpp_2m", {"order": 3}, 2),  # 3, but for the first steps
    ("dpm_solver", {}, 2),
    ("dpm_solver", {"kind": "heun"}, 2),
    ("dpm_solver", {"order": 3}, 2),
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("dpm_2_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),  # for its two evaluations
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"kind": "heun"}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("euler", {"churn": Churn(10.0)}, 1),
    ("heun", {"churn": Churn(10.0)}, 2),
]


@pytest.mark.parametrize(("name", "knobs", "order"), ORDERS, ids=str)
def test_order_of_convergence(name: str, knobs: dict[str, Any], order: float) -> None:
    """Half the steps, 2^order times the error in the deviation. Levels are smooth in the number of
    steps and end before the clean picture, where each would do something else."""
    errors = []
    for steps in (128, 256):
        path = path_of(LINEAR, karras_sigmas(steps + 1, 0.1, 10.0))
        end = wanted(path.points[-1])
        found = sampled(name, path, **knobs)
        assert found.mean == pytest.approx(end.mean)
        errors.append(abs(found.deviation / end.deviation - 1))
    observed = math.log2(errors[0] / errors[1])
    assert order - 0.15 < observed < order + 0.4, observed


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_solver"])
def test_order_3_is_closer_than_order_2(name: str) -> None:
    path = path_of(LINEAR, karras_sigmas(65, 0.1, 10.0))
    end = wanted(path.points[-1]).deviation
    two, three = (abs(sampled(name, path, order=order).deviation - end) for order in (2, 3))
    assert three < two / 2


def test_lms_integrates_the_polynomial_through_the_last_slopes() -> None:
    """With slopes that depend on sigma alone, against numpy's fit of a polynomial."""
    sigmas = [9.0, 7.0, 4.0, 2.5, 1.0, 0.4, 0.1]

    def slope(sigma: float) -> float:
        return math.sin(sigma)

    def denoise(x: Tensor, level: Point) -> Estimate:
        return Estimate(x / level.signal - level.sigma * slope(level.sigma))

    for order in (1, 2, 3, 4):
        wanted = 2.0
        for step in range(len(sigmas) - 1):
            nodes = sigmas[max(0, step + 1 - order) : step + 1]
            fit = np.polyfit(nodes, [slope(s) for s in nodes], len(nodes) - 1)
            wanted += np.diff(np.polyval(np.polyint(fit), sigmas[step : step + 2])).item()
        path = path_of(LINEAR, sigmas)
        x = torch.full((1, 1, 1, 1), 2.0 * path.points[0].signal, dtype=torch.float64)
        found = SAMPLERS["lms"](denoise, x, path, streams(1), order=order)
        assert found.item() / path.points[-1].signal == pytest.approx(wanted, rel=1e-6)


# --- those that are one ---------------------------------------------------------------------------

FINITE = {
    "linear, even": LINEAR.path(20),
    "linear, trailing": LINEAR.path(20, "trailing"),
    "cosine, karras": COSINE.path(20, "karras"),
    "flow, karras": FLOW.path(20, "karras"),
    "by hand": path_of(LINEAR, [30.0, 29.0, 5.0, 4.0, 0.01], CLEAN),
}
SAME: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("euler", {}, "ddim", {}),
    ("euler", {}, "euler_ancestral", {"eta": 0.0}),
    ("euler", {}, "lms", {"order": 1}),
    ("euler", {}, "dpmpp_2m", {"order": 1}),
    ("euler", {}, "dpm_solver", {"order": 1}),
    ("ddpm", {}, "euler_ancestral", {}),
    ("ddpm", {}, "ddim", {"eta": 1.0}),
    ("dpmpp_2m", {}, "dpmpp_2m_sde", {"eta": 0.0}),
    ("dpmpp_2m", {"kind": "heun"}, "dpmpp_2m_sde", {"eta": 0.0, "kind": "heun"}),
]


@pytest.mark.parametrize("path", FINITE.values(), ids=FINITE)
@pytest.mark.parametrize(("one", "knobs", "other", "others"), SAME, ids=str)
def test_two_names_for_one(
    one: str, knobs: dict[str, Any], other: str, others: dict[str, Any], path: Path
) -> None:
    """With the same draws, all the way."""
    first, second = way(one, path, **knobs), way(other, path, **others)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_order_3_without_noise_is_one_too() -> None:
    """Of 15 steps or more: with fewer, the last steps of `dpmpp_2m` are of lower order."""
    path = COSINE.path(20, "karras")
    first = way("dpmpp_2m", path, order=3, kind="heun")
    second = way("dpmpp_3m_sde", path, eta=0.0)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpm_solver"])
def test_the_last_of_few_steps_is_of_the_first_order(name: str) -> None:
    """Lu et al.'s code has it so below 15 steps, where a higher order is not stable."""
    for steps in (14, 15):
        path = path_of(LINEAR, karras_sigmas(steps + 1, 0.05, 20.0))
        *_, before, end = way(name, path)
        last = Path(path.points[-2:], path.at)
        euler = SAMPLERS["euler"](smooth, before, last, streams(2))
        assert torch.allclose(end, euler, atol=1e-9) == (steps == 14), steps


def test_lms_is_of_order_4_unless_told() -> None:
    path = LINEAR.path(9, "karras")
    ways = {order: way("lms", path, order=order) for order in (2, 3, 4)}
    assert torch.equal(way("lms", path), ways[4])
    assert not torch.equal(ways[4], ways[3]) and not torch.equal(ways[3], ways[2])


@pytest.mark.parametrize("spacing", ["even", "trailing", "karras"])
def test_flow_euler_is_ddim_on_the_straight_line(spacing: str) -> None:
    """From noise alone too, where sigma has no end."""
    path = FLOW.path(12, spacing)
    straight, ddim = way("flow_euler", path), way("ddim", path)
    torch.testing.assert_close(straight, ddim, atol=1e-6, rtol=1e-6)


def test_flow_euler_wants_a_straight_line() -> None:
    path = COSINE.path(4)
    with pytest.raises(UserError, match=r"process\.schedule=flow"):
        SAMPLERS["flow_euler"](pair(), start_of(path), path, streams(2))


# --- ddpm -----------------------------------------------------------------------------------------


def test_a_step_of_ddpm_is_equation_7() -> None:
    """Written out with the betas of the paper, neighbouring steps and a stride alike."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t, s in ((500, 499), (999, 700), (20, 0)):
        beta = 1 - abar[t] / abar[s]
        small = (1 - abar[s]) / (1 - abar[t]) * beta
        of_x0 = abar[s].sqrt() * beta / (1 - abar[t])
        of_x = (abar[t] / abar[s]).sqrt() * (1 - abar[s]) / (1 - abar[t])
        path = Path((LINEAR.point(t), LINEAR.point(s)), LINEAR.at)
        x0, share = 0.3 * unit(8, 3), torch.linspace(-0.5, 1.5, 8, dtype=torch.float64)
        x, z = unit(8, NOISE), unit(8, 2)  # `Apart` gives its first draw the place 2

        def step(path: Path = path, x: Tensor = x, x0: Tensor = x0, **found: Any) -> Tensor:
            knobs = {"variance": found.pop("variance")} if "variance" in found else {}
            return SAMPLERS["ddpm"](lambda *_: Estimate(x0, **found), x, path, Apart(), **knobs)

        mean = of_x0 * x0 + of_x * x
        torch.testing.assert_close(step(), mean + small.sqrt() * z)
        torch.testing.assert_close(step(variance="fixed_large"), mean + beta.sqrt() * z)
        geometric = (beta**share * small ** (1 - share)).sqrt()
        torch.testing.assert_close(step(share=share), mean + geometric * z)
        torch.testing.assert_close(step(log_variance=share), mean + (share / 2).exp() * z)


def test_learnt_variances_add_no_noise_to_the_picture() -> None:
    """Nor do they change what a fixed variance gives where they say the same."""
    path, inner = COSINE.path(6, "karras"), smooth

    def small(x: Tensor, level: Point) -> Estimate:
        return Estimate(inner(x, level).x0, share=torch.zeros_like(x))

    def large(x: Tensor, level: Point) -> Estimate:
        return Estimate(inner(x, level).x0, share=torch.ones_like(x))

    for denoise, variance in ((small, "fixed_small"), (large, "fixed_large")):
        learnt = way("ddpm", path, denoise)
        torch.testing.assert_close(learnt, way("ddpm", path, variance=variance))


# --- the way --------------------------------------------------------------------------------------


class Watched:
    """A denoiser that keeps what it was asked and what it said."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.asked: list[tuple[Tensor, Point]] = []
        self.said: list[Tensor] = []

    def __call__(self, x: Tensor, level: Point) -> Estimate:
        found = self.denoise(x, level)
        self.asked.append((x, level))
        self.said.append(found.x0)
        return found


def straight(name: str, steps: int, spacing: str = "karras") -> Path:
    """A path that starts at a finite sigma and that the sampler can take."""
    return (FLOW if name == "flow_euler" else LINEAR).path(steps, spacing)


@pytest.mark.parametrize(("name", "process"), ON_BOTH)
def test_every_level_on_the_way_is_right(name: str, process: Process) -> None:
    """x = a x_0 + b eps wherever the network is asked and wherever the callback looks: where there
    is but one x_0, all samplers are exact."""
    path, places = process.path(9, "karras"), 24
    clean = 0.7 * unit(places, MEAN)
    first = path.points[0]
    watched, steps = Watched(one_point(clean)), []

    def right(x: Tensor, level: Point) -> bool:
        found = Moments.of(x)
        close = [pytest.approx(0.7 * level.signal), pytest.approx(level.noise)]
        return [found.mean, found.deviation] == close

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        steps.append(step)
        assert right(x, path.points[step]), step
        assert torch.equal(x0, clean)

    x = first.signal * clean + first.noise * unit(places, NOISE)
    end = SAMPLERS[name](watched, x, path, Apart(), callback)
    assert steps == list(range(9))
    assert all(right(x, level) for x, level in watched.asked)
    assert Moments.of(end).deviation == pytest.approx(0, abs=1e-6)
    assert Moments.of(end).mean == pytest.approx(0.7)


@pytest.mark.parametrize("name", WITH_ETA)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_any_eta_keeps_the_level(name: str, eta: float) -> None:
    """It moves variance from old noise to new, and changes no sum."""
    path = path_of(LINEAR, karras_sigmas(8, 0.5, 20.0))
    first = path.points[0]
    x = first.signal * unit(16, MEAN) + first.noise * unit(16, NOISE)
    end = SAMPLERS[name](one_point(unit(16, MEAN)), x, path, Apart(), eta=eta)
    assert Moments.of(end).deviation == pytest.approx(path.points[-1].noise)
    new = math.hypot(*end.flatten()[2:].tolist())
    assert (new > 0) == (eta > 0)


@pytest.mark.parametrize("name", WITH_ETA)
def test_eta_is_how_much_of_the_noise_is_new(name: str) -> None:
    """In one step from sigma s to r: of `ddim` and of ancestral steps, eta^2 r^2 (1 - r^2 / s^2);
    of the equation of DPM-Solver++, r^2 (1 - (r / s)^(2 eta))."""
    s, r = 8.0, 3.0
    path = path_of(LINEAR, [s, r])
    for eta in (0.25, 0.5, 1.0):
        end = SAMPLERS[name](one_point(0.0), unit(8, NOISE), path, Apart(), eta=eta)
        variance = eta**2 * (1 - (r / s) ** 2)
        if name.endswith("sde"):
            variance = 1 - (r / s) ** (2 * eta)
        new = end.flatten()[2:].square().sum().item() / path.points[-1].noise ** 2
        assert new == pytest.approx(variance)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_last_step_returns_the_estimate(name: str) -> None:
    """To the bit, so that what was kept in range is in range; but for `lms`, which goes on along
    earlier slopes, and for rounding on the straight line."""
    path = straight(name, 7)
    watched = Watched(pair(0.6))
    found = SAMPLERS[name](watched, start_of(path).float(), path, streams(2))
    if name == "lms":
        assert (found - watched.said[-1]).abs().max() < 0.1
    elif name == "flow_euler":
        torch.testing.assert_close(found, watched.said[-1], atol=1e-6, rtol=0)
    else:
        assert torch.equal(found, watched.said[-1])


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_how_often_the_network_is_asked(name: str) -> None:
    """Once a step, or twice in all but the last."""
    path = straight(name, 6)
    watched = Watched(pair())
    SAMPLERS[name](watched, start_of(path), path, streams(2))
    assert len(watched.asked) == (11 if name in TWICE else 6)
    own = [level for _, level in watched.asked if level in path.points]
    assert [p for p in path.points[:-1] if p in own] == list(path.points[:-1])


@pytest.mark.parametrize(("name", "process"), ON_BOTH)
def test_one_step_is_the_first_estimate(name: str, process: Process) -> None:
    path = process.path(1)
    x, steps = start_of(path), []
    found = SAMPLERS[name](
        gaussian(), x, path, streams(2), lambda step, x, x0: steps.append((step, x))
    )
    assert [step for step, _ in steps] == [0]
    torch.testing.assert_close(steps[0][1], x)
    # from noise alone nothing of the picture is known; a far sigma may stand for it
    torch.testing.assert_close(found, gaussian()(x, path.points[0]).x0, atol=0.02, rtol=0)


def test_ddim_backwards_finds_the_noise() -> None:
    """The way from a picture to its noise and the way back are one."""
    forth = path_of(LINEAR, karras_sigmas(401, 0.02, 20.0))
    back = Path(forth.points[::-1], forth.at)
    x0 = torch.linspace(-2, 3, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    low, high = back.points[0], back.points[-1]
    start = low.signal * x0
    found = SAMPLERS["ddim"](gaussian(), start, back, streams(1))
    away = (start - low.signal) / wanted(low).deviation  # in deviations, which the way leaves alone
    exact = high.signal + away * wanted(high).deviation
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)
    again = SAMPLERS["ddim"](gaussian(), found, forth, streams(1))
    torch.testing.assert_close(again, start, atol=0.02, rtol=0.02)


# --- churn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_asks_at_a_higher_sigma_within_its_band(name: str) -> None:
    """Karras et al., algorithm 2: sigma (1 + gamma), gamma = min(amount / steps, sqrt 2 - 1)."""
    sigmas = [20.0, 10.0, 5.0, 2.0, 0.5]
    path = path_of(LINEAR, sigmas, CLEAN)
    for amount, gamma in ((1.0, 0.2), (100.0, math.sqrt(2) - 1)):
        watched = Watched(pair())
        churn = Churn(amount, least=1.0, most=10.0)
        SAMPLERS[name](watched, start_of(path), path, streams(2), churn=churn)
        asked = [level.sigma for _, level in watched.asked][:: 2 if name == "heun" else 1]
        expected = [s * (1 + gamma) if 1 <= s <= 10 else s for s in sigmas]
        assert asked == pytest.approx(expected)


def test_churn_adds_as_much_noise_as_it_says() -> None:
    """x is of the level at which it is asked; with more deviation, there is more of it."""
    path = path_of(LINEAR, [10.0, 4.0, 1.0], CLEAN)
    first = path.points[0]
    x = first.signal * unit(12, MEAN) + first.noise * unit(12, NOISE)
    for deviation in (1.0, 1.1):
        watched = Watched(one_point(unit(12, MEAN)))
        churn = Churn(1.0, deviation=deviation)
        SAMPLERS["euler"](watched, x, path, Apart(), churn=churn)
        asked, level = watched.asked[0]
        added = deviation * math.sqrt((4 / 3) ** 2 - 1) * 10
        assert level.sigma == pytest.approx(10 * 4 / 3)
        found = Moments.of(asked / level.signal)
        assert found.mean == pytest.approx(1)
        assert found.deviation == pytest.approx(math.hypot(10, added))


def test_no_churn_takes_no_noise() -> None:
    path, none = path_of(LINEAR, [10.0, 1.0], CLEAN), Apart()
    SAMPLERS["heun"](pair(), unit(8, NOISE), path, none, churn=Churn(0.0))
    assert none.taken == 1


# --- paths that begin far away --------------------------------------------------------------------


def from_noise_alone(process: Process) -> Path:
    """Noise alone, then levels that leave no step too long."""
    sigmas = karras_sigmas(60, 0.005, 60.0)
    return Path((process.point(999), *(process.at(s) for s in sigmas), CLEAN), process.at)


ZERO = Process(ProcessConfig(schedule="cosine", prediction="v", zero_snr=True))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_from_noise_alone(name: str) -> None:
    """Sigma has no end there; mean and deviation must be there all the same."""
    for process in (FLOW,) if name == "flow_euler" else (FLOW, ZERO):
        path = from_noise_alone(process)
        assert math.isinf(path.points[0].sigma)
        found = sampled(name, path)
        assert found.mean == pytest.approx(1, abs=0.01)
        assert found.deviation == pytest.approx(DEVIATION, rel=0.12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 99, 100])
def test_sigmas_fall_along_every_path(spacing: str, steps: int) -> None:
    """A solver divides by the width of a step; a level that comes twice has none."""
    configs = [
        ProcessConfig(100, schedule, "v", zero_snr=zero)
        for schedule in ("linear", "cosine", "flow")
        for zero in (False, True)
    ]
    for config in configs:
        sigmas = [point.sigma for point in Process(config).path(steps, spacing).points]
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0, config
        assert all(now > then for now, then in pairwise(sigmas)), (config, sigmas[:3])


FAR = {
    "flow, 250 steps": FLOW.path(250),
    "flow, shift 3, 50 steps": Process(
        ProcessConfig(schedule="flow", prediction="v", shift=3.0)
    ).path(50),
    "linear, zero_snr, 50 steps": Process(ProcessConfig(prediction="v", zero_snr=True)).path(50),
}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_from_noise_alone_the_second_level_may_be_far_too(name: str) -> None:
    """Sigmas must fall: what stands for noise alone may not be nearer than the level behind it."""
    for told, path in FAR.items():
        if name == "flow_euler" and not told.startswith("flow"):
            continue
        watched = Watched(pair())
        found = SAMPLERS[name](watched, start_of(path), path, streams(2))
        sigmas = [level.sigma for _, level in watched.asked]
        assert all(now > then * (1 - 1e-9) for now, then in pairwise(sigmas)), (told, sigmas[:4])
        assert ((found.abs() - 1).abs() < 0.1).all(), told


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 3.0])
def test_a_shifted_line_begins_at_noise_alone(shift: float) -> None:
    """Rounding may leave no trace of a picture, which would make a sigma of 1e15 of it."""
    process = Process(ProcessConfig(schedule="flow", prediction="v", shift=shift))
    path = process.path(500)
    assert path.points[0] == Point(0.0, 1.0, 999.0)
    assert sampled("heun", path).deviation == pytest.approx(DEVIATION, rel=0.05)


# --- knobs, and rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_an_unknown_knob_is_told(name: str) -> None:
    path = straight(name, 3)
    with pytest.raises(TypeError, match="flavour"):
        SAMPLERS[name](pair(), start_of(path), path, streams(2), ignore, flavour=1)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_row_knows_nothing_of_the_others(name: str) -> None:
    """Its result follows from its start and its own stream, and from no other dice."""
    path = straight(name, 6)
    x = start_of(path, 3)
    together = SAMPLERS[name](smooth, x, path, streams(3))
    torch.rand(5)
    for row in range(3):
        alone = SAMPLERS[name](smooth, x[row : row + 1], path, NoiseStreams([100 + row]))
        torch.testing.assert_close(alone[0], together[row])
    other = SAMPLERS[name](smooth, x, path, NoiseStreams([7, 8, 9]))
    assert torch.equal(other, together) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_row_with_churn_knows_nothing_of_the_others(name: str) -> None:
    path, churn = straight(name, 6), Churn(5.0)
    x = start_of(path, 2)
    together = SAMPLERS[name](smooth, x, path, streams(2), churn=churn)
    alone = SAMPLERS[name](smooth, x[1:], path, NoiseStreams([101]), churn=churn)
    torch.testing.assert_close(alone[0], together[1])
