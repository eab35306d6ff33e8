"""guided-diffusion: the official numbers, respacing, and the bound of a whole chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lineage.diffusion.bound import p_mean_variance, vlb_terms
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.schedules import SCHEDULES
from lineage.nn.noise import NoiseStreams
from lineage.official.ddpm import calc_bpd_loop, prior_bpd, respaced, space_timesteps
from lineage.official.verify import FileCheck, as_text

Check = Callable[..., FileCheck]
B, T = 4, 40


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers -------------------------------------------------------------------------


def test_every_wrong_output_fails(changed: Check) -> None:
    """A verifier that returned the file's values would pass anything."""

    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        largest = tensor[tensor.isfinite()].abs().max().clamp(min=1e-3)
        return tensor + (0.01 * largest if tensor.is_floating_point() else 1)

    check = changed("guided_diffusion", off)
    assert not any(output.passed for output in check.outputs), as_text(check)


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"schedule": "linear", "T": 50}, {"x_t", "coef/alphas_cumprod", "bpd/vb"}),
        ({"respacing": "5,5"}, {"spaced/traj", "spaced/timestep_map", "spaced/betas"}),
        ({"ddim": "ddim10"}, {"ddim/traj", "ddim/reverse_traj", "ddim/betas", "ddim/timestep_map"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_other_settings_fail_where_they_matter(
    settings: dict[str, Any], outputs: set[str], changed: Check
) -> None:
    failed = failing(changed("guided_diffusion", **settings))
    assert outputs <= failed and ("schedule" in settings or outputs == failed)


def test_the_noise_of_the_file_is_used_in_its_order(changed: Check) -> None:
    def flip(key: str, tensor: Tensor) -> Tensor:
        return tensor.flip(0) if key == "input/spaced/noise" else tensor

    assert failing(changed("guided_diffusion", flip)) == {"spaced/traj"}


# --- respacing ------------------------------------------------------------------------------------


def test_an_equal_stride() -> None:
    assert space_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert space_timesteps(10, "ddim4") == [0, 3, 6, 9]
    assert space_timesteps(10, "ddim10") == list(range(10))


def test_a_number_from_each_section() -> None:
    """Of 0..99, of 100..199 and of 200..299, both ends of each included."""
    expected = [
        np.round(first + np.linspace(0, 99, count)).astype(int)
        for first, count in ((0, 10), (100, 12), (200, 20))
    ]
    assert space_timesteps(300, "10,12,20") == np.concatenate(expected).tolist()


def test_sections_of_unequal_length() -> None:
    """Ten timesteps in three sections: 0..3, 4..6 and 7..9. One of a section is its first."""
    assert space_timesteps(10, "2,2,2") == [0, 3, 4, 6, 7, 9]
    assert space_timesteps(10, "1,3,1") == [0, 4, 5, 6, 7]
    assert space_timesteps(10, "4,3,3") == list(range(10))
    assert space_timesteps(10, "10") == list(range(10))


@pytest.mark.parametrize(
    ("total", "counts"),
    [
        *((1000, counts) for counts in ("ddim999", "ddim1001", "ddim0", "ddim", "ddimx")),
        *((10, counts) for counts in ("11", "2,4,2", "0,3,3", "3,-1,3", "a,b", "", "10,", "2.5")),
        (2, "1,1,1"),
    ],
)
def test_impossible_counts_are_refused(total: int, counts: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        space_timesteps(total, counts)


CHAINS = [(name, zero_snr) for name in SCHEDULES for zero_snr in (False, True)]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c[0] + "_zero" * c[1])


def make_process(chain: tuple[str, bool] = ("cosine", False), **settings: Any) -> Process:
    settings = {"num_timesteps": T, "prediction": "x0", **settings}
    return Process(ProcessConfig(schedule=chain[0], zero_snr=chain[1], **settings))


@chains
@pytest.mark.parametrize(
    "timesteps",
    [[0, 7, 19, T - 1], [0, 10, 20, 30], [5, 6], list(range(T))],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_respacing_keeps_alphas_cumprod(chain: tuple[str, bool], timesteps: list[int]) -> None:
    """The noise level of a timestep does not depend on the other timesteps."""
    process = make_process(chain)
    fewer = respaced(process, timesteps)
    assert fewer.num_timesteps == len(timesteps) and fewer.timesteps == timesteps
    expected = process.alphas_cumprod[timesteps]
    torch.testing.assert_close(fewer.alphas_cumprod, expected, rtol=1e-9, atol=1e-15)
    for number, t in enumerate(timesteps):
        level, whole = fewer.level(number), process.level(t)
        assert level.timestep == t
        assert level.alpha == pytest.approx(whole.alpha, rel=1e-6, abs=1e-12)
        assert level.sigma == pytest.approx(whole.sigma, rel=1e-9)
    # the beta of a stride leads from one alphas_cumprod to the next
    previous = np.concatenate([[1.0], expected[:-1].numpy()])
    product = (1 - fewer.betas.numpy()) * previous
    np.testing.assert_allclose(product, expected.numpy(), rtol=1e-9, atol=1e-15)


@chains
def test_respacing_twice_is_respacing_once(chain: tuple[str, bool]) -> None:
    process = make_process(chain)
    twice = respaced(respaced(process, [0, 5, 10, 20, T - 1]), [0, 2, 4])
    once = respaced(process, [0, 10, T - 1])
    assert twice.timesteps == once.timesteps == [0, 10, T - 1]
    torch.testing.assert_close(twice.alphas_cumprod, once.alphas_cumprod, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_respaced_process_has_the_timesteps_of_the_whole(schedule: str) -> None:
    """At its own timesteps; between them they are interpolated in log(karras_sigma)."""
    timesteps = [0, 7, 19, T - 1]
    fewer = respaced(make_process((schedule, False)), timesteps)
    for number, t in enumerate(timesteps):
        level = fewer.level_at(fewer.level(number).karras_sigma)
        assert level.timestep == pytest.approx(t, abs=1e-6)
    for number in range(3):
        low, high = fewer.level(number), fewer.level(number + 1)
        middle = fewer.level_at(math.sqrt(low.karras_sigma * high.karras_sigma))
        assert middle.timestep == pytest.approx((low.timestep + high.timestep) / 2, abs=1e-6)


# --- the bound of a chain -------------------------------------------------------------------------


def pictures() -> Tensor:
    """(B, 3, 4, 4) of bytes, both ends included."""
    values = torch.randint(256, (B, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    values[:, 0, 0, :2] = torch.tensor([0, 255])
    return values / 127.5 - 1


@chains
def test_the_prior_is_that_of_torch(chain: tuple[str, bool]) -> None:
    """KL(q(x_T | x_0) | N(0, 1)), which is 0 for zero terminal SNR."""
    process, x0 = make_process(chain), pictures()
    last = process.level(T - 1)
    nats = kl_divergence(Normal(last.alpha * x0.double(), last.sigma), Normal(0.0, 1.0))
    expected = nats.mean(dim=(1, 2, 3)) / math.log(2)
    prior = prior_bpd(process, x0)
    torch.testing.assert_close(prior.double(), expected, atol=1e-6, rtol=1e-4)
    assert not chain[1] or (prior == 0).all()


def network(x: Tensor, t: Tensor) -> Tensor:
    """An imperfect network of a learned range, near the picture where there is little noise."""
    assert t.shape == (len(x),)
    return torch.cat([0.98 * x + 0.1 * (t / 10).sin()[:, None, None, None], 0.5 * x.cos()], dim=1)


@pytest.mark.parametrize("clip", [False, True])
def test_the_bound_is_the_sum_of_its_terms(clip: bool) -> None:
    """From the last timestep down, with the noise in that order."""
    process, x0 = make_process(variance="learned_range"), pictures()
    bound = calc_bpd_loop(process, network, x0, NoiseStreams(range(B)), clip)
    streams = NoiseStreams(range(B))
    for column, step in enumerate(reversed(range(T))):
        eps, t = streams.randn(3, 4, 4), torch.full((B,), step)
        x = process.add_noise(x0, eps, t)
        p = p_mean_variance(process, network(x, t), x, t, clip)
        level = process.level(step)
        errors = p.x0 - x0, (x - level.alpha * p.x0) / level.sigma - eps
        for name, expected in (
            ("vb", vlb_terms(process, p, x0, x, t)),
            ("xstart_mse", errors[0].square().mean(dim=(1, 2, 3))),
            ("mse", errors[1].square().mean(dim=(1, 2, 3))),
        ):
            torch.testing.assert_close(bound[name][:, column], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(bound["prior_bpd"], prior_bpd(process, x0))
    torch.testing.assert_close(bound["total_bpd"], bound["vb"].sum(1) + bound["prior_bpd"])


def test_a_perfect_network_has_a_tiny_bound() -> None:
    """It returns the picture, with a tiny variance at the last step."""
    process, x0 = make_process(("cosine", True), variance="learned"), pictures()

    def perfect(x: Tensor, timestep: Tensor) -> Tensor:
        t = int(timestep[0])
        log_variance = float(process.posterior.log_variance[t]) if t else -14.0
        return torch.cat([x0, torch.full_like(x0, log_variance)], dim=1)

    bound = calc_bpd_loop(process, perfect, x0, NoiseStreams(range(B)))
    assert bound["total_bpd"].abs().max() < 1e-4
    assert bound["xstart_mse"].abs().max() == 0 and bound["mse"].max() < 1e-6
    worse = calc_bpd_loop(process, lambda x, t: 0.9 * perfect(x, t), x0, NoiseStreams(range(B)))
    assert (worse["total_bpd"] > 1).all()


def test_the_bound_is_above_the_entropy_of_the_data() -> None:
    """Uniform bytes hold 8 bits a value, even for the best network: the mean over all bytes."""
    process = make_process(num_timesteps=60)

    def best(x: Tensor, timestep: Tensor) -> Tensor:
        level = process.level(int(timestep[0]))
        values = torch.arange(256) / 127.5 - 1
        distance = (x[..., None] - level.alpha * values) / level.sigma
        return (torch.softmax(-0.5 * distance.square(), dim=-1) * values).sum(-1)

    x0 = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    total = calc_bpd_loop(process, best, x0, NoiseStreams(range(2)))["total_bpd"]
    assert (total > 8 - 0.1).all() and (total < 9.5).all()


def test_the_network_of_a_respaced_process_takes_the_whole_process_timesteps() -> None:
    process, timesteps = respaced(make_process(), [0, 9, 20, T - 1]), []

    def record(x: Tensor, t: Tensor) -> Tensor:
        timesteps.append(t.tolist())
        return 0.3 * x

    bound = calc_bpd_loop(process, record, pictures(), NoiseStreams(range(B)))
    assert timesteps == [[t] * B for t in (T - 1, 20, 9, 0)]
    assert bound["vb"].shape == (B, 4)
