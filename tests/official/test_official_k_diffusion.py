"""k-diffusion: the official numbers, and the grids and tables that only that code has."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineage.diffusion.process import Process, ProcessConfig
from lineage.official.k_diffusion import (
    nearest_timestep,
    polyexponential_sigmas,
    t_to_sigma,
    vp_sigmas,
)
from lineage.official.verify import FileCheck, as_text, verify

Check = Callable[..., FileCheck]
T = 40
PROCESSES = {
    "linear": Process(ProcessConfig(num_timesteps=T)),
    "flow": Process(ProcessConfig(num_timesteps=T, schedule="flow", prediction="v")),
    "cosine_zero": Process(
        ProcessConfig(num_timesteps=T, schedule="cosine", prediction="v", zero_snr=True)
    ),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def failing(check: FileCheck) -> set[str]:
    return {output.name for output in check.outputs if not output.passed}


# --- the official numbers -------------------------------------------------------------------------


def test_every_wrong_output_fails(changed: Check) -> None:
    def off(key: str, tensor: Tensor) -> Tensor:
        if not key.startswith("output/"):
            return tensor
        return tensor + (0.01 * tensor.abs().max() if tensor.is_floating_point() else 1)

    check = changed("k_diffusion", off)
    assert not any(output.passed for output in check.outputs), as_text(check)


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"rho": 5.0}, {"sigmas_karras", "heun/traj"}),
        ({"sigma_data": 0.6}, {"edm/denoised", "edm/scalings", "edm/loss_snr", "euler/traj"}),
        ({"n": 7}, {"sigmas_vp", "sigmas_exponential", "sigmas_polyexponential_rho2", "lms4/traj"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_other_settings_fail_where_they_matter(
    settings: dict[str, Any], outputs: set[str], changed: Check
) -> None:
    failed = failing(changed("k_diffusion", **settings))
    assert outputs <= failed and not any(name.startswith("discrete/") for name in failed)


def test_the_noise_of_the_file_is_used_in_its_order(changed: Check) -> None:
    def flip(key: str, tensor: Tensor) -> Tensor:
        return tensor.flip(0) if key == "input/churn_noise" else tensor

    assert failing(changed("k_diffusion", flip)) == {"euler_churn/traj", "heun_churn/traj"}


def renamed(path: Path, out: Path, names: dict[str, str]) -> FileCheck:
    """Verify a copy of a file that holds its outputs `names.values()` under other names."""
    with safe_open(path, framework="pt") as file:
        keys = {key: key for key in file.keys() if key.startswith("input/")}  # noqa: SIM118
        keys |= {f"output/{new}": f"output/{old}" for new, old in names.items()}
        save_file({new: file.get_tensor(old) for new, old in keys.items()}, out, file.metadata())
    (check,) = verify([out])
    return check


def test_numbers_in_names_are_read(reference_file: Callable[[str], Path], tmp_path: Path) -> None:
    """polyexponential with rho 1 is exponential, lms is lms4, and eta 1 is not eta 0."""
    check = renamed(
        reference_file("k_diffusion.safetensors"),
        tmp_path / "renamed.safetensors",
        {
            "sigmas_polyexponential_rho1": "sigmas_exponential",
            "lms/traj": "lms4/traj",
            "euler_ancestral_eta1.0/traj": "euler/traj",  # of other noise
            "flavour": "sigmas_vp",
        },
    )
    assert failing(check) == {"euler_ancestral_eta1.0/traj", "flavour"}, as_text(check)


# --- grids and tables -----------------------------------------------------------------------------


def test_polyexponential_sigmas() -> None:
    """With rho = 2, the logarithms fall by squares of 1, 3/4, 1/2, 1/4, 0."""
    logs = np.log10(polyexponential_sigmas(5, 0.01, 1.0, rho=2.0))
    np.testing.assert_allclose(logs, [0, -0.875, -1.5, -1.875, -2], atol=1e-12)


def test_vp_sigmas_integrate_beta() -> None:
    """Song et al., equations 29 and 32: alpha(t)^2 = exp of minus the integral of beta."""
    sigmas = vp_sigmas(6, beta_d=19.9, beta_min=0.1, eps_s=1e-3)
    for t, sigma in zip(np.linspace(1, 1e-3, 6), sigmas, strict=True):
        s = np.linspace(0, t, 20001)
        integral = np.trapezoid(0.1 + 19.9 * s, s)
        assert sigma == pytest.approx(math.sqrt(math.exp(integral) - 1), rel=1e-6)


@processes
def test_sigmas_at_timesteps(process: Process) -> None:
    """Pure noise and the step before it included."""
    for t in range(T):
        sigma = process.level(t).karras_sigma
        assert t_to_sigma(process, t) == pytest.approx(sigma, rel=1e-9)
        assert nearest_timestep(process, sigma) == t


@processes
def test_sigmas_between_timesteps(process: Process) -> None:
    """Interpolated in log sigma: halfway is the geometric mean."""
    for t, (low, high) in enumerate(pairwise(process.level(t).karras_sigma for t in range(T))):
        if math.isinf(high):
            continue
        for share in (0.1, 0.25, 0.9):
            sigma = low ** (1 - share) * high**share
            assert t_to_sigma(process, t + share) == pytest.approx(sigma, rel=1e-6)
            assert nearest_timestep(process, sigma) == t + round(share)
        middle = (low**0.52 * high**0.48, low**0.48 * high**0.52)
        assert [nearest_timestep(process, sigma) for sigma in middle] == [t, t + 1]


@processes
def test_sigmas_beyond_the_chain_are_those_of_its_ends(process: Process) -> None:
    first, last = (process.level(t).karras_sigma for t in (0, T - 1))
    for t in (-0.5, -1.5, -float(T)):
        assert t_to_sigma(process, t) == pytest.approx(first, rel=1e-9)
    for t in (T - 0.5, T, 2.0 * T):
        assert t_to_sigma(process, t) == pytest.approx(last, rel=1e-9)
    assert nearest_timestep(process, math.inf) == T - 1
    assert nearest_timestep(process, 0.0) == nearest_timestep(process, 0.5 * first) == 0
    if not math.isinf(last):
        assert nearest_timestep(process, 2 * last) == T - 1
