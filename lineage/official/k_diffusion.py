"""Verifier of k-diffusion's samplers, grids of sigmas and model wrappers.

Its files use models of one line, which are written out here.
"""

from __future__ import annotations

import math
import re
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.diffusion.process import EDMPrediction, Process, ProcessConfig, VPrediction
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Estimate
from lineage.diffusion.schedules import (
    NoiseLevel,
    SamplingSchedule,
    betas_from_alphas_cumprod,
    exponential_sigmas,
    karras_sigmas,
)
from lineage.official.sampling import trajectory
from lineage.official.verify import Verifier, output

# --- grids and tables that the package has no use for ---------------------------------------------


def polyexponential_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0
) -> list[float]:
    """n sigmas from `sigma_max` to `sigma_min` whose logarithms fall by the rho-th power of evenly
    spaced shares.
    """
    ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    return (low + ramp * (high - low)).exp().tolist()


def vp_sigmas(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3
) -> list[float]:
    """n sigmas at evenly spaced times of the variance-preserving process in continuous time, whose
    beta rises from `beta_min` by `beta_d` (Song et al. 2021, arXiv:2011.13456, equation 32).
    """
    t = torch.linspace(1, eps_s, n, dtype=torch.float64)
    return ((beta_d * t**2 / 2 + beta_min * t).expm1().sqrt()).tolist()


def log_sigmas(process: Process) -> list[float]:
    """log karras_sigma of each timestep."""
    logs: list[float] = (process.sigma / process.alpha).log().tolist()
    return logs


def t_to_sigma(process: Process, t: float) -> float:
    """karras_sigma of a timestep; between two timesteps, interpolated in log sigma."""
    table = log_sigmas(process)
    t = min(max(t, 0.0), process.num_timesteps - 1.0)
    low = min(int(t), process.num_timesteps - 2)
    return math.exp(
        table[low] + (t - low) * (table[low + 1] - table[low]) if t > low else table[low]
    )


def nearest_timestep(process: Process, sigma: float) -> int:
    """The timestep whose log karras_sigma is nearest."""
    if math.isinf(sigma):
        return process.num_timesteps - 1
    log_sigma, table = math.log(max(sigma, 1e-12)), log_sigmas(process)
    return min(range(process.num_timesteps), key=lambda t: abs(table[t] - log_sigma))


# --- the verifier ---------------------------------------------------------------------------------


def unscaled_level(sigma: float) -> NoiseLevel:
    """x_0 + sigma eps, whose timestep is sigma."""
    return NoiseLevel(1.0, sigma, sigma)


class KDiffusionOutputs(Verifier):
    """Outputs of sampling.py, external.py and layers.py."""

    name = "k_diffusion"
    source = ("crowsonkb/k-diffusion",)

    # --- samplers ---

    @cached_property
    def grid(self) -> tuple[int, float, float]:
        """Number of sigmas and their ends."""
        return self.config["n"], self.config["sigma_min"], self.config["sigma_max"]

    @output("sigmas_karras")
    def sigmas_karras(self) -> Tensor:
        return torch.tensor([*karras_sigmas(*self.grid, self.config["rho"]), 0.0])

    @output("sigmas_exponential")
    def sigmas_exponential(self) -> Tensor:
        return torch.tensor([*exponential_sigmas(*self.grid), 0.0])

    @output(r"sigmas_polyexponential_rho([\d.]+)")
    def sigmas_polyexponential(self, rho: str) -> Tensor:
        return torch.tensor([*polyexponential_sigmas(*self.grid, float(rho)), 0.0])

    @output("sigmas_vp")
    def sigmas_vp(self) -> Tensor:
        return torch.tensor([*vp_sigmas(self.config["n"]), 0.0])

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        """The denoiser of all trajectories."""
        sigma, variance = level.sigma, self.config["sigma_data"] ** 2
        x0 = x * variance / (sigma**2 + variance) + 0.1 * math.sin(sigma)
        return Estimate(x0 + 0.05 * (3 * x / (1 + sigma)).sin())

    def trajectory(self, sampler: str, noise: str, **own: object) -> Tensor:
        sigmas = [*karras_sigmas(*self.grid, self.config["rho"]), 0.0]
        schedule = SamplingSchedule(tuple(map(unscaled_level, sigmas)), unscaled_level)
        x, eps = self.inputs["x"], self.inputs.get(noise)
        return trajectory(SAMPLERS[sampler], self.denoise, x, schedule, eps, **own)

    @output(r"lms(\d*)/traj")
    def lms(self, order: str) -> Tensor:
        return self.trajectory("lms", "", order=int(order or 4))

    @output(r"(euler|heun)_churn/traj")
    def churn(self, sampler: str) -> Tensor:
        """The file's sentence about the noise states s_churn, s_tmin, s_tmax and s_noise."""
        sentence = self.reference.sentences["input/churn_noise"]
        own = {name: float(value) for name, value in re.findall(r"(s_\w+) ([\d.]+)", sentence)}
        return self.trajectory(sampler, "churn_noise", **own)

    @output(rf"(({'|'.join(SAMPLERS)})(?:_(heun|midpoint))?(?:_eta([\d.]+))?)/traj")
    def sampler(self, name: str, sampler: str, solver_type: str | None, eta: str | None) -> Tensor:
        own: dict[str, object] = {"brownian": False} if sampler == "dpmpp_sde" else {}
        own |= {"solver_type": solver_type} if solver_type else {}
        own |= {"eta": float(eta)} if eta else {}
        return self.trajectory(sampler, f"{name}/noise", **own)

    # --- models of a discrete process ---

    def discrete(self, kind: str) -> Process:
        """The process of the file's alphas_cumprod, whose network predicts eps or v."""
        betas = betas_from_alphas_cumprod(self.inputs["alphas_cumprod"].double())
        config = ProcessConfig(prediction="v" if kind == "v" else "noise")
        return Process(config, betas)

    @output("discrete/sigma_min_max")
    def sigma_min_max(self) -> Tensor:
        process = self.discrete("eps")
        return torch.tensor([process.level(t).karras_sigma for t in (0, process.num_timesteps - 1)])

    @output("discrete/sigma_to_t")
    def sigma_to_t(self) -> Tensor:
        process = self.discrete("eps")
        sigmas = self.inputs["discrete_sigma"].double().tolist()
        return torch.tensor([process.level_at(sigma).timestep for sigma in sigmas])

    @output("discrete/sigma_to_t_quantized")
    def sigma_to_t_quantized(self) -> Tensor:
        process = self.discrete("eps")
        sigmas = self.inputs["discrete_sigma"].double().tolist()
        return torch.tensor([nearest_timestep(process, sigma) for sigma in sigmas])

    @output("discrete/t_to_sigma")
    def t_to_sigma(self) -> Tensor:
        process = self.discrete("eps")
        return torch.tensor([t_to_sigma(process, t) for t in self.inputs["discrete_t"].tolist()])

    @output(r"discrete/sigmas_n(\d+)")
    def discrete_sigmas(self, n: str) -> Tensor:
        process = self.discrete("eps")
        timesteps = torch.linspace(process.num_timesteps - 1, 0, int(n), dtype=torch.float64)
        return torch.tensor([*(t_to_sigma(process, t) for t in timesteps.tolist()), 0.0])

    @cached_property
    def wrapped(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, noise (B, C, H, W) and sigma (B, 1, 1, 1) of the wrappers."""
        sigma = self.inputs["wrap_sigma"][:, None, None, None]
        return self.inputs["wrap_x"], self.inputs["wrap_noise"], sigma

    def levels(self, process: Process) -> list[Tensor]:
        """alpha, sigma and t, (B, 1, 1, 1) each, of the rows' karras_sigmas."""
        levels = [process.level_at(sigma) for sigma in self.inputs["wrap_sigma"].tolist()]
        names = ("alpha", "sigma", "timestep")
        rows = (torch.tensor([getattr(level, name) for level in levels]) for name in names)
        return [row[:, None, None, None] for row in rows]

    @output(r"wrap/(eps|v)_denoised")
    def wrap_denoised(self, kind: str) -> Tensor:
        process = self.discrete(kind)
        alpha, sigma, t = self.levels(process)
        x = self.inputs["wrap_x"] * alpha
        return process.prediction.to_x0(linear_model(x, t / 100), x, alpha, sigma)

    @output(r"wrap/(eps|v)_loss")
    def wrap_loss(self, kind: str) -> Tensor:
        process, (x0, eps, _) = self.discrete(kind), self.wrapped
        alpha, sigma, t = self.levels(process)
        predicted = linear_model(alpha * x0 + sigma * eps, t / 100)
        return mean_squared_error(predicted, process.prediction.target(x0, eps, alpha, sigma))

    # --- models of a sigma ---

    def edm_coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in."""
        sigma_data = self.config["sigma_data"]
        c_skip, c_out = EDMPrediction(sigma_data).c_skip_and_out(torch.ones_like(sigma), sigma)
        return c_skip, c_out, (sigma**2 + sigma_data**2).rsqrt()

    @output("edm/scalings")
    def edm_scalings(self) -> Tensor:
        return torch.stack(self.edm_coefficients(self.inputs["wrap_sigma"]))

    @output("edm/denoised")
    def edm_denoised(self) -> Tensor:
        x, _, sigma = self.wrapped
        predicted = linear_model(self.edm_coefficients(sigma)[2] * x, sigma)
        return EDMPrediction(self.config["sigma_data"]).to_x0(
            predicted, x, torch.ones_like(sigma), sigma
        )

    @output(r"edm/loss_(karras|snr|soft-min-snr)")
    def edm_loss(self, weighting: str) -> Tensor:
        x0, eps, sigma = self.wrapped
        c_skip, c_out, c_in = self.edm_coefficients(sigma)
        weights = {
            "karras": torch.ones_like(sigma),
            "snr": c_skip,
            "soft-min-snr": (c_out * c_in) ** 2,
        }
        predicted = linear_model(c_in * (x0 + sigma * eps), sigma)
        edm = EDMPrediction(self.config["sigma_data"])
        target = edm.target(x0, eps, torch.ones_like(sigma), sigma)
        return weights[weighting].flatten() * mean_squared_error(predicted, target)

    @output("vdiff/sigma_to_t")
    def vdiff_timesteps(self) -> Tensor:
        return self.inputs["wrap_sigma"].atan() * 2 / math.pi

    @output("vdiff/denoised")
    def vdiff_denoised(self) -> Tensor:
        x, _, sigma = self.wrapped
        alpha = (1 + sigma**2).rsqrt()
        predicted = linear_model(x * alpha, sigma.atan() * 2 / math.pi)
        return VPrediction(1.0).to_x0(predicted, x * alpha, alpha, sigma * alpha)


def linear_model(x: Tensor, t: Tensor) -> Tensor:
    """The inner model of all wrappers."""
    return 0.3 * x + 0.1 * t.sin()


def mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """(B,)"""
    return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)
