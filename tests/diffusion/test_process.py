"""The diffusion process and its samplers against the papers' formulas, written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lineage.diffusion.process import (
    PREDICTIONS,
    SCHEDULES,
    Process,
    ProcessConfig,
    cosine_betas,
    linear_betas,
)
from lineage.diffusion.samplers import SAMPLERS, ddim_sample, ddpm_sample, timesteps
from lineage.errors import UserError
from lineage.nn.draws import Draws

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
B = 4


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(seed: int = 1) -> Tensor:
    return torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


# --- schedules --------------------------------------------------------------------------------


def test_linear_betas_run_between_the_ends_of_the_paper() -> None:
    """Section 4: from 1e-4 to 0.02 over T = 1,000."""
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64 and betas.shape == (1000,)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert torch.allclose(betas.diff(), betas.diff()[0].expand(999), rtol=1e-9)
    naive = math.prod(1 - b for b in betas.tolist())
    assert Process(ProcessConfig()).abar[-1].item() == pytest.approx(naive, rel=1e-9)
    assert naive == pytest.approx(4.0e-5, rel=0.02)  # almost nothing of the picture is left


def test_cosine_betas_give_the_curve_of_the_paper() -> None:
    """Nichol and Dhariwal, equation 17: abar(t) = f(t) / f(0)."""
    steps = 200
    abar = torch.cumprod(1 - cosine_betas(steps), 0)

    def f(t: float) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 50, 100, 198):
        assert abar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert cosine_betas(steps)[-1] == 0.999


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [40, 1000])
def test_betas_are_those_of_the_official_code(name: str, steps: int) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = REFERENCE / "guided_diffusion.safetensors"
    if not path.exists():
        pytest.skip("the reference numbers do not lie beside this checkout")
    with safetensors.safe_open(path, "pt") as file:
        official = file.get_tensor(f"output/betas_{name}_{steps}")
    torch.testing.assert_close(SCHEDULES[name](steps), official, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [2, 20, 1000])
def test_betas_are_variances(name: str, steps: int) -> None:
    """A beta above 1 makes the square root of a negative number: NaN in the first batch."""
    if name == "linear" and steps <= 20:
        pytest.skip("the linear schedule is made for long chains")
    betas = SCHEDULES[name](steps)
    assert (betas > 0).all() and (betas < 1).all()


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_a_linear_chain_that_is_too_short_is_told(steps: int) -> None:
    """With T = 20, beta reaches 1: nothing of the picture is left and sampling divides by it."""
    try:
        process = Process(ProcessConfig(steps=steps, schedule="linear", prediction="noise"))
    except UserError:
        return
    assert (process.betas < 1).all()
    t = torch.full((B,), steps - 1)
    x = process.noised(pictures(), noise(), t)
    assert torch.isfinite(process.to_x0(noise(), x, t)).all()


def test_wrong_settings_are_told() -> None:
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        ProcessConfig(schedule="cosin")
    with pytest.raises(UserError, match="'eps'"):
        ProcessConfig(prediction="eps")
    with pytest.raises(UserError, match="too few for a linear schedule"):
        ProcessConfig(steps=1)


# --- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_noised_is_equation_4(schedule: str) -> None:
    """In double precision, by hand, for each row its own t."""
    process = Process(ProcessConfig(schedule=schedule))
    t = torch.tensor([0, 10, 500, 999])
    x0, eps = pictures(), noise()
    abar = torch.cumprod(1 - SCHEDULES[schedule](1000), 0)[t][:, None, None, None]
    expected = abar.sqrt() * x0.double() + (1 - abar).sqrt() * eps.double()
    torch.testing.assert_close(process.noised(x0, eps, t).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_noise_level_is_exact_where_it_is_small(schedule: str) -> None:
    """1 - abar taken in single precision loses four digits at t = 0, where abar is almost 1."""
    process = Process(ProcessConfig(schedule=schedule))
    _, sigma = process.signal_and_noise(torch.tensor([0, 1]))
    exact = (1 - torch.cumprod(1 - SCHEDULES[schedule](1000), 0)[:2]).sqrt()
    torch.testing.assert_close(sigma.flatten().double(), exact, rtol=1e-5, atol=0)


def test_noised_pictures_keep_their_variance() -> None:
    """Of data with variance 1, x_t has variance 1 at every t: that is what the roots are for."""
    process = Process(ProcessConfig())
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(B, 3, 64, 64, generator=generator)
    eps = torch.randn(B, 3, 64, 64, generator=generator)
    x = process.noised(x0, eps, torch.tensor([0, 100, 500, 999]))
    torch.testing.assert_close(x.var(dim=(1, 2, 3)), torch.ones(B), atol=0.05, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_back_picture_and_noise(prediction: str) -> None:
    """target -> to_x0 -> to_noise is a circle, whichever quantity the network predicts."""
    process = Process(ProcessConfig(schedule="linear", prediction=prediction))
    x0, eps = pictures(), noise()
    for t in (torch.tensor([0, 3, 50, 100]), torch.tensor([300, 500, 700, 800])):
        x = process.noised(x0, eps, t)
        found = process.to_x0(process.target(x0, eps, t), x, t)
        torch.testing.assert_close(found, x0, atol=2e-4, rtol=0)
        torch.testing.assert_close(process.to_noise(x0, x, t), eps, atol=2e-4, rtol=0)


def test_targets_are_what_their_names_say() -> None:
    x0, eps, t = pictures(), noise(), torch.tensor([5, 100, 600, 990])
    named = {p: Process(ProcessConfig(prediction=p)) for p in PREDICTIONS}
    assert torch.equal(named["noise"].target(x0, eps, t), eps)
    assert torch.equal(named["x0"].target(x0, eps, t), x0)
    abar = named["v"].abar[t][:, None, None, None].float()
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    torch.testing.assert_close(named["v"].target(x0, eps, t), v, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_square(prediction: str) -> None:
    """A mean over rows and pixels: it must not grow with the batch or the picture."""
    process = Process(ProcessConfig(prediction=prediction))
    x0, eps, t = pictures(), noise(), torch.tensor([5, 100, 600, 990])
    target = process.target(x0, eps, t)
    assert process.loss(target, x0, eps, t) == 0
    assert process.loss(target + 0.5, x0, eps, t).item() == pytest.approx(0.25, rel=1e-4)
    assert process.loss((target + 0.5).bfloat16(), x0, eps, t).dtype == torch.float32


# --- sampling ---------------------------------------------------------------------------------


def test_timesteps() -> None:
    assert timesteps(10, 10) == list(range(9, -1, -1))
    assert timesteps(1000, 1) == [999]
    assert timesteps(1000, 2) == [999, 0]
    for steps in (3, 7, 50, 999):
        visited = timesteps(1000, steps)
        assert len(visited) == len(set(visited)) == steps
        assert visited == sorted(visited, reverse=True)
        assert (visited[0], visited[-1]) == (999, 0)
    for steps in (0, -1, 1001):
        with pytest.raises(UserError, match=f"steps={steps}"):
            timesteps(1000, steps)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_perfect_denoiser_finds_the_picture_at_any_number_of_steps(name: str, steps: int) -> None:
    x0 = pictures()
    calls: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert x.shape == x0.shape and t.shape == (B,) and (t == t[0]).all()
        calls.append(int(t[0]))
        return x0

    process = Process(ProcessConfig(steps=50, schedule="cosine"))
    found = SAMPLERS[name](denoise, noise(), process, steps, Draws(range(B)))
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
    assert calls == timesteps(50, steps)


def guess(x: Tensor, t: Tensor) -> Tensor:
    """An imperfect denoiser: what matters is that both programs ask the same."""
    return torch.tanh(0.7 * x + 0.01 * t[:, None, None, None].to(x))


def algorithm_2(x: Tensor, betas: Tensor, draws: Draws) -> Tensor:
    """Ho et al. 2020, equations 6 and 7, step by step in double precision."""
    alphas = 1 - betas
    abar = torch.cumprod(alphas, 0)
    for t in range(len(betas) - 1, -1, -1):
        x0 = guess(x, torch.full((len(x),), t))
        if t == 0:
            return x0  # the mean of the last step; algorithm 2 adds no noise there
        before = abar[t - 1]
        mean = (before.sqrt() * betas[t] / (1 - abar[t])) * x0
        mean = mean + (alphas[t].sqrt() * (1 - before) / (1 - abar[t])) * x
        variance = (1 - before) / (1 - abar[t]) * betas[t]
        x = mean + variance.sqrt() * draws.normal(*x.shape[1:]).double()
    raise AssertionError


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_ddpm_on_all_steps_is_algorithm_2(schedule: str) -> None:
    process = Process(ProcessConfig(steps=40, schedule=schedule))
    expected = algorithm_2(noise().double(), SCHEDULES[schedule](40), Draws(range(B)))
    for found in (
        ddpm_sample(guess, noise(), process, 40, Draws(range(B))),
        ddim_sample(guess, noise(), process, 40, Draws(range(B)), eta=1.0),
    ):
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


def test_ddim_adds_no_noise() -> None:
    """Song et al. 2021, equation 12 at sigma = 0, by hand; and no stream is touched."""
    process = Process(ProcessConfig(steps=40, schedule="cosine"))
    x = noise().double()
    visited = timesteps(40, 6)
    for now, following in zip(visited, visited[1:], strict=False):
        x0 = guess(x, torch.full((B,), now))
        eps = (x - process.abar[now].sqrt() * x0) / (1 - process.abar[now]).sqrt()
        x = process.abar[following].sqrt() * x0 + (1 - process.abar[following]).sqrt() * eps
    expected = guess(x, torch.full((B,), 0))
    found = [ddim_sample(guess, noise(), process, 6, Draws([seed] * B)) for seed in (0, 1)]
    torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(found[0], found[1])


def test_ddpm_draws_from_the_stream_of_each_row() -> None:
    """Rows that share a stream would be the same picture; so would two seeds."""
    process = Process(ProcessConfig(steps=40, schedule="cosine"))
    start = noise()[:1].expand(B, -1, -1, -1)
    found = ddpm_sample(guess, start, process, 8, Draws([5, 6, 5, 7]))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert not torch.allclose(found[1], found[3], atol=1e-2)
