"""diffusers' schedulers: the official numbers, and the steps of other configurations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lineage.official.diffusers_schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    Scheduler,
)
from lineage.official.sampling import FileNoise
from lineage.official.verify import FileCheck, NotComputed, as_text

Check = Callable[..., FileCheck]
MODEL = (0.3, 0.1)
SPACINGS = ("leading", "trailing", "linspace")


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers -------------------------------------------------------------------------


def test_every_wrong_output_fails(changed: Check) -> None:
    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        return tensor + (0.01 * tensor.abs().max() if tensor.is_floating_point() else 1)

    check = changed("diffusers_schedulers", off)
    assert not any(output.passed for output in check.outputs), as_text(check)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("PNDMScheduler", {}), ("DDIMScheduler", {"thresholding": True})],
)
def test_an_unknown_scheduler_or_setting_fails_alone(
    kind: str, kwargs: dict[str, Any], changed: Check
) -> None:
    case = {"cls": kind, "kwargs": kwargs, "steps": 10, "step_kwargs": {}}
    check = changed("diffusers_schedulers", ddim_cosine_eps_clip=case)
    assert {name.split("/")[0] for name in failing(check)} == {"ddim_cosine_eps_clip"}
    reasons = {output.reason for output in check.outputs if not output.passed}
    assert all("has no counterpart here" in reason for reason in reasons)


# --- timesteps and sigmas -------------------------------------------------------------------------


def scheduler(kind: type[Scheduler], steps: int, eta: float = 0.0, **kwargs: Any) -> Scheduler:
    case = {"cls": kind.__name__, "kwargs": kwargs, "steps": steps, "step_kwargs": {"eta": eta}}
    return kind(case, MODEL)


def timesteps(kind: type[Scheduler], steps: int, **kwargs: Any) -> list[float]:
    return [level.timestep for level in scheduler(kind, steps, **kwargs).levels[:-1]]


def test_timesteps_that_do_not_divide_the_chain() -> None:
    """13 trailing steps as printed in diffusers' issue 9261; the others by hand."""
    trailing = [999, 922, 845, 768, 691, 614, 537, 461, 384, 307, 230, 153, 76]
    leading = [k * 76 + 1 for k in reversed(range(13))]
    for kind in (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler):
        assert timesteps(kind, 13, timestep_spacing="trailing") == trailing
        assert timesteps(kind, 13, timestep_spacing="leading", steps_offset=1) == leading
    assert timesteps(DDPMScheduler, 4, timestep_spacing="linspace") == [999, 666, 333, 0]
    assert timesteps(EulerDiscreteScheduler, 3) == [999, 499.5, 0]
    assert timesteps(DPMSolverMultistepScheduler, 3) == [999, 666, 333]
    assert timesteps(DPMSolverMultistepScheduler, 3, timestep_spacing="leading") == [750, 500, 250]


def test_euler_avoids_an_infinite_sigma() -> None:
    """diffusers sets the last alphas_cumprod to 2^-24."""
    kwargs = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    first = scheduler(EulerDiscreteScheduler, 5, **kwargs).levels[0]
    assert first.karras_sigma == pytest.approx(4096, rel=1e-5)
    assert scheduler(DDIMScheduler, 5, **kwargs).levels[0].alpha == 0


# --- steps by hand --------------------------------------------------------------------------------


def alphas_cumprod() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def noises(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps + 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)


def predicted_x0(x: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
    """eps of the files' model, and x_0."""
    a = alphas_cumprod()[t]
    eps = MODEL[0] * x + MODEL[1] * math.sin(t / 100)
    return eps, (x - math.sqrt(1 - a) * eps) / math.sqrt(a)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [7, 10, 30])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_steps_by_its_own_stride(spacing: str, steps: int, eta: float) -> None:
    """To t - T // n, even if the model is evaluated elsewhere next."""
    ours = scheduler(DDIMScheduler, steps, eta, timestep_spacing=spacing, clip_sample=False)
    x, *eps = noises(steps)
    end = ours.sample(ours.denoise, x, FileNoise(torch.stack(eps)))
    expected, bars = x.numpy(), alphas_cumprod()
    for level, z in zip(ours.levels[:-1], eps, strict=True):
        t = int(level.timestep)
        previous = t - 1000 // steps
        a, b = bars[t], bars[previous] if previous >= 0 else 1.0
        direction, x0 = predicted_x0(expected, t)
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        expected = math.sqrt(b) * x0 + math.sqrt(1 - b - variance) * direction
        expected = expected + math.sqrt(variance) * z.numpy()
    np.testing.assert_allclose(end, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [7, 10, 30])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_steps_to_the_next_timestep(spacing: str, steps: int, variance_type: str) -> None:
    """With noise in the last step, too, unless its timestep is 0; `fixed_small` has none there."""
    kwargs = {"timestep_spacing": spacing, "variance_type": variance_type, "clip_sample": False}
    ours = scheduler(DDPMScheduler, steps, **kwargs)
    x, *eps = noises(steps)
    end = ours.sample(ours.denoise, x, FileNoise(torch.stack(eps)))
    expected, bars = x.numpy(), alphas_cumprod()
    visited = [int(level.timestep) for level in ours.levels[:-1]]
    for t, previous, z in zip(visited, [*visited[1:], -1], eps, strict=True):
        a, b = bars[t], bars[previous] if previous >= 0 else 1.0
        beta = 1 - a / b
        _, x0 = predicted_x0(expected, t)
        mean = math.sqrt(b) * beta / (1 - a) * x0
        mean = mean + math.sqrt(a / b) * (1 - b) / (1 - a) * expected
        variance = beta if variance_type == "fixed_large" else (1 - b) / (1 - a) * beta
        expected = mean + math.sqrt(variance if t > 0 else 0.0) * z.numpy()
    np.testing.assert_allclose(end, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_steps_in_sigmas(spacing: str) -> None:
    ours = scheduler(EulerDiscreteScheduler, 7, timestep_spacing=spacing)
    x = noises(0)[0]
    end = ours.sample(ours.denoise, x, FileNoise())
    bars = alphas_cumprod()
    visited = [level.timestep for level in ours.levels[:-1]]
    sigmas = [*np.interp(visited, np.arange(1000), np.sqrt(1 / bars - 1)), 0.0]
    factor = math.hypot(1, sigmas[0]) if spacing == "leading" else sigmas[0]
    expected = x.numpy() * factor
    for t, sigma, sigma_next in zip(visited, sigmas, sigmas[1:], strict=False):
        x_in = expected / math.hypot(1, sigma)
        eps = MODEL[0] * x_in + MODEL[1] * math.sin(t / 100)
        expected = expected + (sigma_next - sigma) * eps
    np.testing.assert_allclose(end, expected, rtol=1e-6, atol=1e-6)


def test_which_dpm_solvers_have_a_counterpart() -> None:
    stochastic = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    solver = scheduler(DPMSolverMultistepScheduler, 5, **stochastic)
    with pytest.raises(NotComputed, match=r"sde-dpmsolver\+\+ of order 3"):
        solver.sample(solver.denoise, noises(0)[0], FileNoise())


def test_every_scheduler_runs_with_every_number_of_steps() -> None:
    """Results are finite for numbers of steps that do not divide 1,000."""
    for kind in SCHEDULERS.values():
        for steps in (1, 3, 13, 47):
            one = scheduler(kind, steps)
            x = one.sample(one.denoise, noises(0)[0], FileNoise(noises(2 * steps)))
            assert torch.isfinite(x).all(), (kind, steps)
