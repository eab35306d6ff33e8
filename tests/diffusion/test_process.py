"""The diffusion process against closed forms in numpy, and two samplers against their papers.

A chain is a schedule with or without zero terminal SNR. Tables are exact in double precision, so
most checks run in double and can be strict.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.diffusion.process import PREDICTIONS, EDMPrediction, Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS, ddim, ddpm
from lineage.diffusion.samplers.base import Estimate
from lineage.diffusion.schedules import NO_NOISE, SCHEDULES, SPACINGS, NoiseLevel
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams

B = 4
T = 40
Chain = tuple[str, bool]  # schedule, zero_snr
PLAIN: list[Chain] = [(name, False) for name in SCHEDULES]
CHAINS: list[Chain] = [*PLAIN, *((name, True) for name in SCHEDULES), ("flow", False)]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c[0] + "_zero" * c[1])
beta_chains = pytest.mark.parametrize("chain", CHAINS[:-1], ids=lambda c: c[0] + "_zero" * c[1])
# every prediction on every chain, except noise where eps says nothing about the picture
PAIRS = [
    pytest.param(chain, prediction, id=f"{chain[0]}{'_zero' * chain[1]}-{prediction}")
    for chain in CHAINS
    for prediction in PREDICTIONS
    if prediction != "noise" or chain in PLAIN
]
pairs = pytest.mark.parametrize(("chain", "prediction"), PAIRS)


def make_process(
    chain: Chain, prediction: str = "x0", num_timesteps: int = T, **settings: Any
) -> Process:
    schedule, zero_snr = chain
    return Process(
        ProcessConfig(
            num_timesteps=num_timesteps,
            schedule=schedule,
            prediction=prediction,
            zero_snr=zero_snr,
            **settings,
        )
    )


def pictures(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x.to(dtype)


def noise(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def loss(
    process: Process, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor | NoiseLevel
) -> Tensor:
    """The loss of each row, as `DiffusionModel.losses` writes it."""
    error = F.mse_loss(output.float(), process.target(x0, eps, t), reduction="none")
    return error.flatten(1).mean(1) * process.loss_weight(t)


def expected_levels(chain: Chain, num_timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma (T,), from the papers."""
    schedule, zero_snr = chain
    if schedule == "flow":
        s = (np.arange(num_timesteps) + 1) / num_timesteps
        return 1 - s, s
    share = (np.arange(num_timesteps) + 1) / num_timesteps
    if schedule == "linear":
        betas = 1000 / num_timesteps * np.linspace(1e-4, 0.02, num_timesteps)
        alphas_cumprod = np.cumprod(1 - betas)
    elif schedule == "scaled_linear":
        root = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), num_timesteps)
        alphas_cumprod = np.cumprod(1 - 1000 / num_timesteps * root**2)
    else:
        if schedule == "cosine":
            alphas_cumprod = np.cos((share + 0.008) / 1.008 * np.pi / 2) ** 2
            alphas_cumprod = alphas_cumprod / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        else:
            low, high = 1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-3.0))
            alphas_cumprod = (high - 1 / (1 + np.exp(3 - 6 * share))) / (high - low)
        alphas_cumprod[-1] = alphas_cumprod[-2] * 0.001  # the last beta is clipped at 0.999
    if zero_snr:
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_timesteps": 1}, "num_timesteps=1 must be at least 2"),
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"num_timesteps": -5}, "num_timesteps=-5"),
        ({"num_timesteps": 20}, "num_timesteps=20 is too small for schedule=linear"),
        ({"num_timesteps": 12, "schedule": "scaled_linear"}, "num_timesteps=12 .*scaled_linear"),
        ({"num_timesteps": 1, "schedule": "flow", "prediction": "v"}, "num_timesteps=1"),
        ({"schedule": "cosin"}, "schedule='cosin'.*did you mean 'cosine'"),
        ({"schedule": ""}, "schedule=''"),
        ({"prediction": "eps"}, "prediction='eps'"),
        ({"weighting": "min-snr"}, "weighting='min-snr'.*did you mean 'min_snr'"),
        ({"variance": "fixed"}, "variance='fixed'"),
        ({"snr_gamma": -1.0}, "snr_gamma=-1.0"),
        ({"snr_gamma": 0.0}, "snr_gamma=0.0"),  # would give every step the weight 0
        ({"snr_gamma": math.nan}, "snr_gamma=nan"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"shift": -3.0}, "shift=-3.0"),
        ({"shift": math.nan}, "shift=nan"),
        ({"sigma_data": 0.0}, "sigma_data=0.0"),
        ({"sigma_data": -0.5}, "sigma_data=-0.5"),
        ({"sigma_data": math.nan}, "sigma_data=nan"),
        ({"schedule": "flow"}, "prediction=noise"),
        ({"zero_snr": True}, "prediction=noise"),
        ({"schedule": "flow", "prediction": "v", "variance": "learned"}, "learned variance"),
        ({"schedule": "flow", "prediction": "v", "variance": "learned_range"}, "schedule=flow"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """In one sentence with the wrong value."""
    with pytest.raises(UserError, match=sentence) as error:
        ProcessConfig(**settings)
    assert "\n" not in str(error.value)


def test_the_shortest_chains() -> None:
    """One timestep fewer is refused; these have betas below 1, and finite estimates."""
    for schedule, num_timesteps in (
        ("linear", 21),
        ("scaled_linear", 13),
        ("cosine", 2),
        ("sigmoid", 2),
        ("flow", 2),
    ):
        prediction = "x0" if schedule == "flow" else "noise"
        process = make_process((schedule, False), prediction, num_timesteps)
        assert process.num_timesteps == num_timesteps
        t = torch.full((B,), num_timesteps - 1)
        x = process.add_noise(pictures(), noise(), t)
        assert torch.isfinite(process.to_x0(noise(2), x, t)).all()


def test_which_variances_are_learned() -> None:
    for variance in ("fixed_small", "fixed_large"):
        assert not ProcessConfig(variance=variance).learns_variance
    for variance in ("learned", "learned_range"):
        assert ProcessConfig(variance=variance).learns_variance


# --- tables -------------------------------------------------------------------------------------


@chains
@pytest.mark.parametrize("num_timesteps", [T, 1000])
def test_tables_are_those_of_the_papers(chain: Chain, num_timesteps: int) -> None:
    process = make_process(chain, num_timesteps=num_timesteps)
    alpha, sigma = expected_levels(chain, num_timesteps)
    assert process.alpha.dtype == process.sigma.dtype == torch.float64
    np.testing.assert_allclose(process.alpha, alpha, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(process.sigma, sigma, rtol=1e-9)
    if chain[0] != "flow":
        np.testing.assert_allclose(process.alphas_cumprod, alpha**2, rtol=1e-6, atol=1e-15)
        product = np.cumprod(1 - process.betas.numpy())
        np.testing.assert_allclose(product, process.alphas_cumprod, rtol=1e-6, atol=1e-15)
    assert process.timesteps == list(range(num_timesteps))


@chains
def test_tables_are_used_in_float32(chain: Chain) -> None:
    """They are computed in double: in single precision, 1 - alphas_cumprod loses four digits."""
    ours = make_process(chain, num_timesteps=1000).alpha_sigma(torch.arange(1000))
    for table, exact in zip(ours, expected_levels(chain, 1000), strict=True):
        assert isinstance(table, Tensor)
        assert table.dtype == torch.float32 and table.shape == (1000, 1, 1, 1)
        np.testing.assert_allclose(table.flatten().double(), exact, rtol=1e-6, atol=1e-12)


@chains
def test_which_chains_end_in_pure_noise(chain: Chain) -> None:
    last = make_process(chain).level(T - 1)
    if chain[1] or chain[0] == "flow":
        assert (last.alpha, last.sigma, last.karras_sigma) == (0.0, 1.0, math.inf)
    else:
        assert last.alpha > 0 and math.isfinite(last.karras_sigma)


def test_levels_are_the_tables() -> None:
    process = make_process(("cosine", False))
    alpha, sigma = expected_levels(("cosine", False), T)
    for t in (0, 7, T - 1):
        level = process.level(t)
        assert level.alpha == pytest.approx(alpha[t], rel=1e-9)
        assert level.sigma == pytest.approx(sigma[t], rel=1e-9)
        assert level.timestep == t
        assert process.alpha_sigma(level) == (level.alpha, level.sigma)


@pytest.mark.parametrize("chain", [("cosine", True), ("linear", False), ("flow", False)])
def test_a_process_built_on_meta_has_real_tables(chain: Chain) -> None:
    """Large networks are built on `meta` and filled later; the tables are no part of them."""
    expected = make_process(chain)
    with torch.device("meta"):
        process = Process(expected.config)
    for name in ("alpha", "sigma"):
        assert torch.equal(getattr(process, name), getattr(expected, name))
    t, x0, eps = torch.tensor([0, 5, 20, T - 1]), pictures(), noise()
    assert torch.equal(process.add_noise(x0, eps, t), expected.add_noise(x0, eps, t))
    assert process.sampling_schedule(5).levels == expected.sampling_schedule(5).levels


def test_a_configuration_can_be_built_on_meta() -> None:
    """As in `with torch.device("meta"): build(Config(), ...)`."""
    with torch.device("meta"):
        assert ProcessConfig(num_timesteps=T).num_timesteps == T
        with pytest.raises(UserError, match="num_timesteps=20"):
            ProcessConfig(num_timesteps=20)


def test_tables_follow_the_timesteps_from_device_to_device() -> None:
    process, t = make_process(("cosine", False)), torch.tensor([0, 5, 20, T - 1])
    expected = [table.clone() for table in process.alpha_sigma(t)]  # type: ignore[union-attr]
    for table in process.alpha_sigma(t.to("meta")):
        assert isinstance(table, Tensor)
        assert table.device.type == "meta" and table.shape == (B, 1, 1, 1)
    again = process.alpha_sigma(t)
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


# --- forward ------------------------------------------------------------------------------------


@chains
def test_add_noise_is_equation_4(chain: Chain) -> None:
    """By hand, with another t in each row."""
    process, t = make_process(chain, num_timesteps=1000), torch.tensor([0, 10, 500, 999])
    alpha, sigma = (table[t][:, None, None, None] for table in expected_levels(chain, 1000))
    expected = alpha * pictures().numpy() + sigma * noise().numpy()
    np.testing.assert_allclose(process.add_noise(pictures(), noise(), t), expected, atol=2e-6)


@chains
def test_a_timestep_and_its_level_are_the_same(chain: Chain) -> None:
    process = make_process(chain)
    for t in range(T):
        by_timestep = process.add_noise(pictures(), noise(), torch.full((B,), t))
        by_level = process.add_noise(pictures(), noise(), process.level(t))
        torch.testing.assert_close(by_timestep, by_level, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_never_added_in_half_precision(dtype: torch.dtype) -> None:
    x0, eps = pictures(dtype=dtype), noise(dtype=dtype)
    x = make_process(("linear", False)).add_noise(x0, eps, torch.arange(B))
    assert x.dtype == torch.promote_types(dtype, torch.float32)


@beta_chains
def test_noised_pictures_keep_their_variance(chain: Chain) -> None:
    """If x_0 has variance 1, x_t has variance 1 at every t."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, B, 3, 64, 64, generator=generator)
    x = make_process(chain).add_noise(x0, eps, torch.tensor([0, 12, 25, T - 1]))
    torch.testing.assert_close(x.var(dim=(1, 2, 3)), torch.ones(B), atol=0.05, rtol=0)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_many_small_steps_are_one_large_one(schedule: str) -> None:
    """Equation 2 against equation 4: noise added beta by beta, and all at once."""
    process = make_process((schedule, False))
    x = torch.full((20000,), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for t, beta in enumerate(process.betas.tolist()):
        z = torch.randn(20000, generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * z
        if t in (3, 15, T - 1):
            level = process.level(t)
            assert x.mean().item() == pytest.approx(0.7 * level.alpha, abs=4 * level.sigma / 141)
            assert x.std().item() == pytest.approx(level.sigma, rel=0.025)


# --- predictions --------------------------------------------------------------------------------


@pairs
def test_a_perfect_output_gives_back_picture_and_noise(chain: Chain, prediction: str) -> None:
    """target -> to_x0 -> to_noise is a circle at every timestep, pure noise included."""
    process, x0, eps = make_process(chain, prediction), pictures(), noise()
    for t in torch.arange(T).split(B):
        x = process.add_noise(x0, eps, t)
        estimate = process.to_x0(process.target(x0, eps, t), x, t)
        torch.testing.assert_close(estimate, x0, atol=5e-7, rtol=0)  # the tables are float32
        torch.testing.assert_close(process.to_noise(x0, x, t), eps, atol=1e-9, rtol=0)


@pairs
def test_a_perfect_output_at_a_level_gives_back_picture_and_noise(
    chain: Chain, prediction: str
) -> None:
    """At levels of timesteps, and between them."""
    process, x0, eps = make_process(chain, prediction), pictures(), noise()
    levels = [process.level(t) for t in range(T)]
    levels += [process.level_at(sigma) for sigma in (0.02, 0.7, 3.3, 79.0)]
    for level in levels:
        x = process.add_noise(x0, eps, level)
        estimate = process.to_x0(process.target(x0, eps, level), x, level)
        torch.testing.assert_close(estimate, x0, atol=1e-9, rtol=0)
        torch.testing.assert_close(process.to_noise(estimate, x, level), eps, atol=1e-9, rtol=0)


@pairs
def test_an_output_means_the_same_by_timestep_and_by_level(chain: Chain, prediction: str) -> None:
    """Training uses timesteps, sampling uses levels."""
    process, output, x = make_process(chain, prediction), noise(5), noise(6)
    for t in (0, 3, 20, T - 1):
        both = torch.full((B,), t), process.level(t)
        targets = (process.target(pictures(), noise(), at) for at in both)
        torch.testing.assert_close(*targets, atol=1e-5, rtol=1e-5)
        estimates = (process.to_x0(output, x, at) for at in both)
        torch.testing.assert_close(*estimates, atol=1e-5, rtol=1e-5)


@pairs
def test_rows_do_not_mix(chain: Chain, prediction: str) -> None:
    """Each row has its own t."""
    process, output, x = make_process(chain, prediction), noise(5), noise(6)
    t = torch.tensor([0, 9, 25, T - 1])
    together = process.to_x0(output, x, t)
    for row in range(B):
        one = slice(row, row + 1)
        alone = process.to_x0(output[one], x[one], t[one])
        torch.testing.assert_close(together[one], alone)


@chains
def test_targets_are_those_of_their_names(chain: Chain) -> None:
    x0, eps = pictures(), noise()
    for t in torch.arange(T).split(B):
        if chain in PLAIN:
            assert torch.equal(make_process(chain, "noise").target(x0, eps, t), eps)
        assert torch.equal(make_process(chain, "x0").target(x0, eps, t), x0)
        assert torch.equal(make_process(chain, "flow").target(x0, eps, t), eps - x0)


@beta_chains
def test_v_is_the_velocity_along_the_circle(chain: Chain) -> None:
    """Salimans and Ho, appendix D: d(cos(angle) x_0 + sin(angle) eps) / d angle."""
    process, x0, eps, h = make_process(chain, "v"), pictures(), noise(), 1e-6
    for level in map(process.level, range(T)):
        angle = math.atan2(level.sigma, level.alpha)
        ahead, behind = (
            math.cos(angle + side * h) * x0 + math.sin(angle + side * h) * eps for side in (1, -1)
        )
        expected = (ahead - behind) / (2 * h)
        torch.testing.assert_close(process.target(x0, eps, level), expected, atol=1e-8, rtol=0)


def test_flow_is_the_velocity_along_the_line() -> None:
    """d x_t / d t at every t; T timesteps have length 1."""
    process, x0, eps = make_process(("flow", False), "flow"), pictures(), noise()
    for t in range(T - 1):
        here, there = (process.add_noise(x0, eps, process.level(k)) for k in (t, t + 1))
        velocity = process.target(x0, eps, process.level(t))
        torch.testing.assert_close(T * (there - here), velocity, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_table_1(sigma_data: float) -> None:
    """Karras et al.: D(x) = c_skip x + c_out F, of x / alpha, at each sigma."""
    process = make_process(("cosine", False), "edm", sigma_data=sigma_data)
    output, x = noise(5), noise(6)
    for level in map(process.level, range(T)):
        sigma, variance = level.karras_sigma, level.karras_sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / math.sqrt(variance)
        ours = EDMPrediction(sigma_data).c_skip_and_out(1.0, sigma)
        assert ours == pytest.approx((c_skip, c_out), rel=1e-12)
        expected = c_skip * x / level.alpha + c_out * output
        torch.testing.assert_close(process.to_x0(output, x, level), expected, atol=1e-9, rtol=1e-9)


@chains
def test_edm_has_targets_of_standard_deviation_1(chain: Chain) -> None:
    """For data of standard deviation sigma_data, at every level."""
    process = make_process(chain, "edm", sigma_data=0.25)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 64, 64, generator=generator, dtype=torch.float64)
    for t in (0, 10, 20, 30, T - 1):
        target = process.target(0.25 * x0, eps, process.level(t))
        assert target.std().item() == pytest.approx(1, abs=0.03)


# --- loss ---------------------------------------------------------------------------------------


@pairs
def test_the_simple_loss_is_the_mean_square(chain: Chain, prediction: str) -> None:
    """A mean over pixels for each row, which does not grow with the picture."""
    process, x0, eps = make_process(chain, prediction), pictures(), noise()
    t = torch.tensor([0, 9, 25, T - 1])
    offset = torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    row_losses = loss(process, process.target(x0, eps, t) + offset, x0, eps, t)
    assert row_losses.shape == (B,)
    np.testing.assert_allclose(row_losses, [0, 0.25, 1, 4], rtol=1e-5, atol=1e-10)
    assert torch.equal(process.loss_weight(t), torch.ones(B))


@pairs
def test_min_snr_is_the_same_loss_for_each_prediction(chain: Chain, prediction: str) -> None:
    """Hang et al., section 3.4: min(snr, gamma) |x_0 - estimate|^2, in terms of each output.

    A wrong guess of the picture is converted to each prediction.
    """
    x0, eps, wrong = pictures(), noise(), pictures(7)
    squares = (wrong - x0).square().mean(dim=(1, 2, 3)).numpy()
    alpha, sigma = expected_levels(chain, T)
    for gamma in (1.0, 5.0):
        process = make_process(chain, prediction, weighting="min_snr", snr_gamma=gamma)
        for t in torch.arange(T).split(B):
            x = process.add_noise(x0, eps, t)
            output = process.target(wrong, process.to_noise(wrong, x, t), t)
            expected = np.minimum((alpha[t] / sigma[t]) ** 2, gamma) * squares
            row_losses = loss(process, output, x0, eps, t)
            np.testing.assert_allclose(row_losses, expected, rtol=2e-3, atol=1e-9)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """Section 3.4: min(snr, gamma) / snr for noise, and / (snr + 1) for v."""
    chain = ("cosine", False)
    alpha, sigma = expected_levels(chain, T)
    snr = (alpha / sigma) ** 2
    clipped = np.minimum(snr, 5.0)
    for prediction, expected in (
        ("x0", clipped),
        ("noise", clipped / snr),
        ("v", clipped / (snr + 1)),
    ):
        process = make_process(chain, prediction, weighting="min_snr")
        weights = process.loss_weight(torch.arange(T))
        assert weights.dtype == torch.float32
        np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_the_loss_is_the_same_by_timestep_and_by_level(weighting: str) -> None:
    process = make_process(("cosine", False), "v", weighting=weighting)
    for t in (0, 9, 25, T - 1):
        by_timestep, by_level = (
            loss(process, noise(3), pictures(), noise(), at)
            for at in (torch.full((B,), t), process.level(t))
        )
        torch.testing.assert_close(by_timestep, by_level, rtol=1e-4, atol=1e-9, check_dtype=False)


# --- sampling schedules -------------------------------------------------------------------------


@chains
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_schedule_goes_from_noise_to_the_picture(chain: Chain, spacing: str) -> None:
    """Of as many steps as it should, with falling noise, on the circle or the line."""
    process, power = make_process(chain), 1 if chain[0] == "flow" else 2
    for steps in (1, 2, 7, T - 1, T):
        schedule = process.sampling_schedule(steps, spacing)
        assert len(schedule) == steps == len(schedule.steps())
        assert len(schedule.levels) == steps + 1
        sigmas = [level.karras_sigma for level in schedule.levels]
        assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
        assert schedule.levels[-1] == NO_NOISE and sigmas[-1] == 0
        timesteps = [level.timestep for level in schedule.levels[:-1]]
        assert timesteps[0] <= T - 1 and timesteps[-1] >= 0
        assert all(t >= t_next for t, t_next in pairwise(timesteps))
        for level in schedule.levels[:-1]:
            assert level.alpha**power + level.sigma**power == pytest.approx(1, abs=1e-12)


@chains
def test_which_timesteps_a_schedule_visits(chain: Chain) -> None:
    """T = 40 and 8 steps, by hand. `leading` adds 1, as latent diffusion does."""
    process = make_process(chain)
    for spacing, timesteps in {
        "even": [39, 33, 28, 22, 17, 11, 6, 0],
        "leading": [36, 31, 26, 21, 16, 11, 6, 1],
        "trailing": [39, 34, 29, 24, 19, 14, 9, 4],
    }.items():
        levels = process.sampling_schedule(8, spacing).levels
        assert list(levels[:-1]) == [process.level(t) for t in timesteps]
        assert [level.timestep for level in levels[:-1]] == timesteps


@chains
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
def test_a_schedule_of_t_steps_visits_all_timesteps(chain: Chain, spacing: str) -> None:
    levels = make_process(chain).sampling_schedule(T, spacing).levels
    assert [level.timestep for level in levels[:-1]] == list(range(T - 1, -1, -1))


@chains
def test_schedules_by_sigma_have_the_ends_of_the_process(chain: Chain) -> None:
    """They start at 80 at most, which counts as pure noise (Karras et al.)."""
    process = make_process(chain)
    alpha, sigma = expected_levels(chain, T)
    sigma_max = 80.0 if alpha[-1] == 0 else min(80.0, sigma[-1] / alpha[-1])
    sigma_min = sigma[0] / alpha[0]
    i = np.arange(6) / 5
    karras = (sigma_max ** (1 / 7) + i * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7
    exponential = sigma_max * (sigma_min / sigma_max) ** i
    for spacing, expected in (("karras", karras), ("exponential", exponential)):
        levels = process.sampling_schedule(6, spacing).levels[:-1]
        np.testing.assert_allclose([level.karras_sigma for level in levels], expected, rtol=1e-6)
        assert levels[-1].timestep == pytest.approx(0, abs=1e-6)
        first = process.sampling_schedule(1, spacing).levels[0]
        assert first.karras_sigma == pytest.approx(sigma_max, rel=1e-6)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
def test_a_shift_moves_the_levels_of_a_straight_line(shift: float, spacing: str) -> None:
    """Each karras_sigma is multiplied, and timesteps stay within the chain."""
    plain = make_process(("flow", False)).sampling_schedule(8, spacing).levels
    shifted = make_process(("flow", False), shift=shift).sampling_schedule(8, spacing).levels
    assert shifted[-1] == NO_NOISE
    for before, after in zip(plain[:-1], shifted[:-1], strict=True):
        assert after.alpha + after.sigma == pytest.approx(1, abs=1e-12)
        assert after.karras_sigma == pytest.approx(shift * before.karras_sigma, rel=1e-9)
        expected = max(after.sigma * T - 1, 0)  # timestep t has sigma (t + 1) / T
        assert after.timestep == pytest.approx(expected, abs=1e-9)


@beta_chains
def test_a_shift_concerns_the_straight_line_alone(chain: Chain) -> None:
    plain, shifted = (make_process(chain, shift=s).sampling_schedule(8) for s in (1.0, 3.0))
    assert plain.levels == shifted.levels


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, T + 1, 1000])
def test_an_impossible_number_of_steps_is_refused(spacing: str, steps: int) -> None:
    with pytest.raises(UserError, match=rf"sampling_steps={steps} .*1 to {T}\.") as error:
        make_process(("cosine", False)).sampling_schedule(steps, spacing)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spacing", "hint"), [("karas", "did you mean 'karras'"), ("", "there is: even")]
)
def test_an_unknown_spacing_is_refused(spacing: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"spacing='{spacing}'.*{hint}") as error:
        make_process(("cosine", False)).sampling_schedule(5, spacing)
    assert "\n" not in str(error.value)


# --- levels of a karras_sigma -------------------------------------------------------------------


@chains
def test_levels_of_sigmas_between_two_timesteps(chain: Chain) -> None:
    """The timestep is interpolated in log(karras_sigma)."""
    process = make_process(chain)
    sigmas = [process.level(t).karras_sigma for t in range(T)]
    for t, (low, high) in enumerate(pairwise(sigmas)):
        if math.isinf(high):
            continue
        for share in (0.1, 0.25, 0.5, 0.9):
            level = process.level_at(low ** (1 - share) * high**share)
            assert level.timestep == pytest.approx(t + share, abs=1e-6)


@chains
def test_levels_of_sigmas_beyond_the_chain(chain: Chain) -> None:
    """A large sigma has the last finite timestep, an infinite one the last, a small one 0."""
    process = make_process(chain)
    last_finite = T - 2 if math.isinf(process.level(T - 1).karras_sigma) else T - 1
    large = 1.5 * process.level(last_finite).karras_sigma
    assert process.level_at(large).timestep == last_finite
    for sigma in (0.5 * process.level(0).karras_sigma, 1e-9, 0.0):
        assert process.level_at(sigma).timestep == 0


@chains
def test_a_level_has_the_sigma_that_it_is_of(chain: Chain) -> None:
    """At timesteps it is theirs; between them it stays on the circle, or on the line."""
    process = make_process(chain)
    for t in range(T):
        expected = process.level(t)
        level = process.level_at(expected.karras_sigma)
        assert level.alpha == pytest.approx(expected.alpha, rel=1e-9, abs=1e-15)
        assert level.sigma == pytest.approx(expected.sigma, rel=1e-9)
        assert level.timestep == pytest.approx(t, abs=1e-5)
    for sigma in (1e-3, 0.05, 1.0, 7.7, 80.0, 1e6):
        level = process.level_at(sigma)
        assert level.karras_sigma == pytest.approx(sigma, rel=1e-9)
        power = 1 if chain[0] == "flow" else 2
        assert level.alpha**power + level.sigma**power == pytest.approx(1, abs=1e-12)


@chains
def test_levels_of_no_noise_and_of_pure_noise_are_finite(chain: Chain) -> None:
    """No NaN may reach a network."""
    process = make_process(chain)
    clean, pure = process.level_at(0.0), process.level_at(math.inf)
    assert (clean.alpha, clean.sigma, clean.timestep) == (1, 0, 0)
    assert (pure.alpha, pure.sigma, pure.timestep) == (0, 1, T - 1)


@chains
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_schedule_has_the_levels_between_its_own(chain: Chain, spacing: str) -> None:
    """Solvers of second order evaluate the network there; their timesteps lie between, too."""
    schedule = make_process(chain).sampling_schedule(7, spacing)
    for level, next_level in schedule.steps()[:-1]:
        sigma = math.sqrt(min(level.karras_sigma, 1e3) * next_level.karras_sigma)
        between = schedule.at(sigma)
        assert between.karras_sigma == pytest.approx(sigma, rel=1e-9)
        assert next_level.timestep - 1e-6 <= between.timestep <= level.timestep + 1e-6


# --- samplers along these schedules -------------------------------------------------------------


def imperfect(x: Tensor, level: NoiseLevel) -> Estimate:
    """An imperfect denoiser, the same for two programs."""
    return Estimate(torch.tanh(0.7 * x + 0.01 * level.timestep))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_perfect_denoiser_gives_the_picture(name: str) -> None:
    """From any noise, on any schedule, in any number of steps."""
    x0 = pictures()

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        assert x.shape == x0.shape and torch.isfinite(x).all() and math.isfinite(level.timestep)
        return Estimate(x0.clone())

    for chain in CHAINS if name != "flow_euler" else [("flow", False)]:
        for steps in (1, 2, 7):
            schedule = make_process(chain).sampling_schedule(steps)
            picture = SAMPLERS[name](denoise, noise(), schedule, NoiseStreams(range(B)))
            torch.testing.assert_close(picture, x0, atol=1e-5, rtol=0)


def algorithm_2(x: Tensor, betas: Tensor, streams: NoiseStreams) -> Tensor:
    """Ho et al. 2020, equations 6 and 7, step by step in double precision."""
    alphas = 1 - betas
    alphas_cumprod = torch.cumprod(alphas, 0)
    for t in range(len(betas) - 1, -1, -1):
        x0 = torch.tanh(0.7 * x + 0.01 * t)
        if t == 0:
            return x0  # the mean of the last step; algorithm 2 adds no noise there
        previous = alphas_cumprod[t - 1]
        mean = (previous.sqrt() * betas[t] / (1 - alphas_cumprod[t])) * x0
        mean = mean + (alphas[t].sqrt() * (1 - previous) / (1 - alphas_cumprod[t])) * x
        variance = (1 - previous) / (1 - alphas_cumprod[t]) * betas[t]
        x = mean + variance.sqrt() * streams.randn(*x.shape[1:]).double()
    raise AssertionError


@pytest.mark.parametrize("chain", PLAIN, ids=lambda c: c[0])
def test_ddpm_on_all_timesteps_is_algorithm_2(chain: Chain) -> None:
    schedule = make_process(chain).sampling_schedule(T)
    expected = algorithm_2(noise(), SCHEDULES[chain[0]](T), NoiseStreams(range(B)))
    for sampler, own in ((ddpm, {}), (ddim, {"eta": 1.0})):
        picture = sampler(imperfect, noise(), schedule, NoiseStreams(range(B)), **own)
        torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)  # the noise is float32


@pytest.mark.parametrize("chain", PLAIN, ids=lambda c: c[0])
def test_ddim_adds_no_noise(chain: Chain) -> None:
    """Song et al. 2021, equation 12 at sigma = 0, by hand; the seed does not matter."""
    schedule, x = make_process(chain).sampling_schedule(6), noise()
    alpha, sigma = expected_levels(chain, T)
    for t, t_next in pairwise([39, 31, 23, 16, 8, 0]):
        x0 = torch.tanh(0.7 * x + 0.01 * t)
        x = alpha[t_next] * x0 + sigma[t_next] * (x - alpha[t] * x0) / sigma[t]
    expected = torch.tanh(0.7 * x)
    first, second = (
        ddim(imperfect, noise(), schedule, NoiseStreams([seed] * B)) for seed in (0, 1)
    )
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert torch.equal(first, second)


def test_ddpm_draws_from_the_stream_of_each_row() -> None:
    """Rows with the same stream are the same picture; others are not."""
    schedule = make_process(("cosine", False)).sampling_schedule(8)
    start = noise()[:1].expand(B, -1, -1, -1)
    rows = ddpm(imperfect, start, schedule, NoiseStreams([5, 6, 5, 7]))
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)
    assert not torch.allclose(rows[1], rows[3], atol=1e-2)


def test_sampling_can_start_at_any_level() -> None:
    """The last steps of a schedule lead to the same picture."""
    schedule = make_process(("cosine", False)).sampling_schedule(8)
    xs: list[Tensor] = []
    streams = NoiseStreams(range(B))
    whole = ddim(imperfect, noise(), schedule, streams, lambda step, x, x0: xs.append(x))
    part = ddim(imperfect, xs[5], schedule.shortened(3), streams)
    torch.testing.assert_close(part, whole)
