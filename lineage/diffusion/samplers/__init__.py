"""Samplers: pure functions (denoise, x, schedule, noise, callback, **own) -> x_0, of no network.

`base.py` has the signature; `ddpm.py`, `flow.py`, `k_diffusion.py` and `dpm_solver.py` have the
samplers.
"""

from __future__ import annotations

from lineage.diffusion.samplers.base import Sampler
from lineage.diffusion.samplers.ddpm import ddim, ddpm
from lineage.diffusion.samplers.dpm_solver import (
    dpm_solver,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from lineage.diffusion.samplers.flow import flow_euler
from lineage.diffusion.samplers.k_diffusion import (
    dpm_2,
    dpm_2_ancestral,
    euler,
    euler_ancestral,
    heun,
    lms,
)

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "flow_euler": flow_euler,
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpm_solver": dpm_solver,
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}
