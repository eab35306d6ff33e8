"""Verifier of diffusers' schedulers: tables, visited timesteps and sigmas, trajectories.

Its files use a model of one line, `Scheduler.denoise`. What only diffusers has (its grids of
timesteps, its stride, its scaling of x) is written out here; the rest is the package's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lineage.config import from_dict
from lineage.diffusion import samplers
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers.base import Denoise, Estimate, Sampler
from lineage.diffusion.schedules import (
    NO_NOISE,
    SCHEDULES,
    NoiseLevel,
    SamplingSchedule,
    betas_from_alphas_cumprod,
    karras_sigmas,
    rescale_zero_terminal_snr,
    shift_sigma,
)
from lineage.nn.noise import NoiseStreams
from lineage.official.sampling import FileNoise, Recorder
from lineage.official.verify import NotComputed, Verifier, output

PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "variance_type": "fixed_small",
    "set_alpha_to_one": True,
    "use_karras_sigmas": False,
    "final_sigmas_type": "zero",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
"""Keyword arguments of the official classes that have a counterpart here."""


class Scheduler:
    """A scheduler of diffusers, of the package's parts.

    Attributes:
        defaults: Defaults of this class that are not those of `DEFAULTS`.

    Args:
        case: The file's entry: class, keyword arguments, number of steps n, arguments of `step`.
        model: The two numbers of the model.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, case: Mapping[str, Any], model: Sequence[float]) -> None:
        if unknown := sorted(case["kwargs"].keys() - DEFAULTS.keys()):
            raise NotComputed(f"{', '.join(unknown)} of {case['cls']} has no counterpart here")
        self.settings = DEFAULTS | self.defaults | case["kwargs"]
        self.case, self.model, self.n = case, model, case["steps"]
        self.num_timesteps: int = self.settings["num_train_timesteps"]

    @cached_property
    def process(self) -> Process:
        name, scale = self.settings["beta_schedule"], self.num_timesteps / 1000
        if name == "squaredcos_cap_v2":
            betas = SCHEDULES["cosine"](self.num_timesteps)
        else:  # ours divide the ends by this scale, theirs do not
            ends = (self.settings[end] * scale for end in ("beta_start", "beta_end"))
            betas = SCHEDULES[name](self.num_timesteps, *ends)
        if self.settings["rescale_betas_zero_snr"]:
            betas = self.rescaled(betas)
        settings = {"prediction": PREDICTIONS[self.settings["prediction_type"]]}
        return Process(from_dict(ProcessConfig, settings), betas)

    def rescaled(self, betas: Tensor) -> Tensor:
        """Betas of zero terminal SNR; schedulers of sigmas avoid the infinite sigma."""
        alphas_cumprod = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
        alphas_cumprod[-1] = 2**-24
        return betas_from_alphas_cumprod(alphas_cumprod)

    def spaced_timesteps(self) -> np.ndarray:
        """n timesteps, those of `linspace` not yet rounded."""
        if self.settings["timestep_spacing"] == "linspace":
            return np.linspace(0, self.num_timesteps - 1, self.n)[::-1]
        if self.settings["timestep_spacing"] == "leading":
            stride = self.num_timesteps // self.n
            return np.arange(self.n)[::-1] * stride + self.settings["steps_offset"]
        return np.arange(self.num_timesteps, 0, -self.num_timesteps / self.n).round() - 1

    def interpolated_sigmas(self, timesteps: Sequence[float]) -> list[float]:
        """karras_sigmas of timesteps, interpolated linearly."""
        table = (self.process.sigma / self.process.alpha).numpy()
        sigmas: list[float] = np.interp(timesteps, np.arange(len(table)), table).tolist()
        return sigmas

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        """Levels at which the model is evaluated, and the end."""
        raise NotImplementedError

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        predicted = self.model[0] * x + self.model[1] * math.sin(level.timestep / 100)
        return Estimate(self.process.to_x0(predicted, x, level))

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        """The result of our sampler from standard normal x."""
        raise NotImplementedError

    @property
    def schedule(self) -> SamplingSchedule:
        return SamplingSchedule(tuple(self.levels), self.process.level_at)


class DDPMScheduler(Scheduler):
    """Each step leads to the next timestep in the list."""

    defaults: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading"}

    def rescaled(self, betas: Tensor) -> Tensor:
        return rescale_zero_terminal_snr(betas)

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        timesteps = self.spaced_timesteps().round().astype(int).tolist()
        return [*map(self.process.level, timesteps), NO_NOISE]

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        """With the eps of x_0 before it is clipped."""
        x0 = super().denoise(x, level).x0
        if not self.settings["clip_sample"]:
            return Estimate(x0)
        bound = self.settings["clip_sample_range"]
        return Estimate(x0.clamp(-bound, bound), eps=self.process.to_noise(x0, x, level))

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        variance = self.settings["variance_type"]
        x = samplers.ddpm(denoise, x, self.schedule, noise, variance=variance)
        last = self.levels[-2]
        if variance == "fixed_large" and last.timestep > 0:  # ours ends without noise
            x = x + last.sigma * noise.randn(*x.shape[1:])
        return x


class DDIMScheduler(DDPMScheduler):
    """Each step leads T // n timesteps down, whether or not the model is evaluated there."""

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        eta = self.case.get("step_kwargs", {}).get("eta", 0.0)
        end = NO_NOISE if self.settings["set_alpha_to_one"] else self.process.level(0)
        for level in self.levels[:-1]:
            t = int(level.timestep) - self.num_timesteps // self.n
            step = level, self.process.level(t) if t >= 0 else end
            schedule = SamplingSchedule(step, self.process.level_at)
            x = samplers.ddim(denoise, x, schedule, noise, eta=eta)
        return x


class EulerDiscreteScheduler(Scheduler):
    """x = x_0 + sigma eps, which is divided by sqrt(1 + sigma^2) for the model."""

    sampler: ClassVar[Sampler] = staticmethod(samplers.euler)

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        timesteps = self.spaced_timesteps().tolist()
        sigmas = self.interpolated_sigmas(timesteps)
        if self.settings["use_karras_sigmas"]:
            sigmas = karras_sigmas(self.n, sigmas[-1], sigmas[0])
            timesteps = [self.process.level_at(sigma).timestep for sigma in sigmas]
        zero = self.settings["final_sigmas_type"] == "zero"
        sigmas.append(0.0 if zero else self.process.level(0).karras_sigma)
        return [NoiseLevel(1.0, *pair) for pair in zip(sigmas, [*timesteps, 0.0], strict=True)]

    def denoise(self, x: Tensor, level: NoiseLevel) -> Estimate:
        c_in = 1 / math.hypot(1, level.sigma)
        return super().denoise(c_in * x, NoiseLevel(c_in, c_in * level.sigma, level.timestep))

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        sigma_max = self.levels[0].sigma
        leading = self.settings["timestep_spacing"] == "leading"
        x = x * (math.hypot(1, sigma_max) if leading else sigma_max)
        return type(self).sampler(denoise, x, self.schedule, noise)


class EulerAncestralDiscreteScheduler(EulerDiscreteScheduler):
    sampler: ClassVar[Sampler] = staticmethod(samplers.euler_ancestral)


class HeunDiscreteScheduler(EulerDiscreteScheduler):
    defaults: ClassVar[dict[str, Any]] = {"beta_start": 0.00085, "beta_end": 0.012}
    sampler: ClassVar[Sampler] = staticmethod(samplers.heun)


class DPMSolverMultistepScheduler(Scheduler):
    """n + 1 timesteps, of which the last is dropped."""

    def spaced_timesteps(self) -> np.ndarray:
        points = self.n + 1
        if self.settings["timestep_spacing"] == "linspace":
            return np.linspace(0, self.num_timesteps - 1, points)[:0:-1]
        if self.settings["timestep_spacing"] == "leading":
            stride = self.num_timesteps // points
            return np.arange(points)[:0:-1] * stride + self.settings["steps_offset"]
        return super().spaced_timesteps()

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        ends = (self.process.level(t).karras_sigma for t in (0, self.num_timesteps - 1))
        sigma_min, sigma_max = ends
        if self.settings["use_karras_sigmas"]:
            sigmas = karras_sigmas(self.n, sigma_min, sigma_max)
            timesteps = [self.process.level_at(sigma).timestep for sigma in sigmas]
            rounded = math.floor if self.settings["beta_schedule"] == "squaredcos_cap_v2" else round
            timesteps = [float(rounded(t)) for t in timesteps]
        else:
            timesteps = self.spaced_timesteps().round().tolist()
            sigmas = self.interpolated_sigmas(timesteps)
        sigmas.append(0.0 if self.settings["final_sigmas_type"] == "zero" else sigma_min)
        levels = []
        for sigma, timestep in zip(sigmas, [*timesteps, 0.0], strict=True):
            alpha = 1 / math.hypot(1, sigma)
            levels.append(NoiseLevel(alpha, alpha * sigma, timestep))
        return levels

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        order, algorithm = self.settings["solver_order"], self.settings["algorithm_type"]
        own = {"solver_type": self.settings["solver_type"]}
        if algorithm == "sde-dpmsolver++" and order == 2:
            return samplers.dpmpp_2m_sde(denoise, x, self.schedule, noise, **own)
        if algorithm not in ("dpmsolver", "dpmsolver++"):
            raise NotComputed(f"{algorithm} of order {order} has no counterpart here")
        sampler = samplers.dpm_solver if algorithm == "dpmsolver" else samplers.dpmpp_2m
        return sampler(denoise, x, self.schedule, noise, order=order, **own)


class FlowMatchEulerDiscreteScheduler(Scheduler):
    """x = (1 - sigma) x_0 + sigma eps; the timestep is sigma T."""

    @cached_property
    def process(self) -> Process:
        return Process(ProcessConfig(schedule="flow", prediction="flow"))

    @cached_property
    def levels(self) -> list[NoiseLevel]:
        """The class shifts the ends of its grid, and then the whole grid again."""
        shift, sigma_min = self.settings["shift"], 1 / self.num_timesteps
        if self.settings["use_dynamic_shifting"]:
            shift = math.exp(self.case["mu"])
        else:
            sigma_min = shift_sigma(sigma_min, shift)
        sigmas = [shift_sigma(s, shift) for s in np.linspace(1.0, sigma_min, self.n).tolist()]
        return [*(NoiseLevel(1 - s, s, s * self.num_timesteps) for s in sigmas), NO_NOISE]

    def sample(self, denoise: Denoise, x: Tensor, noise: NoiseStreams) -> Tensor:
        return samplers.flow_euler(denoise, x, self.schedule, noise)


KINDS: tuple[type[Scheduler], ...] = (
    DDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
SCHEDULERS = {kind.__name__: kind for kind in KINDS}


class DiffusersSchedulerOutputs(Verifier):
    """Outputs of schedulers; the file's config holds their cases by name."""

    name = "diffusers_schedulers"
    source = ("huggingface/diffusers",)

    def scheduler(self, name: str) -> Scheduler:
        case = self.config[name]
        if case["cls"] not in SCHEDULERS:
            raise NotComputed(f"{case['cls']} has no counterpart here")
        return SCHEDULERS[case["cls"]](case, self.inputs["model"].tolist())

    @output(r"(betas|alphas_cumprod)/(.+)")
    def table(self, kind: str, key: str) -> Tensor:
        names = [name for name, case in self.config.items() if case.get("betas_key") == key]
        table: Tensor = getattr(self.scheduler(names[0]).process, kind)
        return table

    @output(r"(.+)/(timesteps|sigmas)")
    def visited(self, name: str, kind: str) -> Tensor:
        scheduler = self.scheduler(name)
        levels = scheduler.levels
        if isinstance(scheduler, HeunDiscreteScheduler):  # all but the ends count twice
            levels = [levels[0], *(one for one in levels[1:-1] for _ in range(2)), levels[-1]]
        if kind == "timesteps":
            return torch.tensor([level.timestep for level in levels[:-1]])
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        return torch.tensor([level.sigma if flow else level.karras_sigma for level in levels])

    @output(r"(.+)/(traj|pred_x0)")
    def trajectory(self, name: str, kind: str) -> Tensor:
        scheduler = self.scheduler(name)
        recorder, noise = Recorder(scheduler.denoise), FileNoise(self.inputs.get(f"{name}/noise"))
        last = scheduler.sample(recorder, self.inputs["x_T"], noise)
        return torch.stack([*recorder.x, last] if kind == "traj" else recorder.x0)

    @output(r"add_noise/(x_t|velocity)")
    def add_noise(self, name: str) -> Tensor:
        process = Process(ProcessConfig(schedule="scaled_linear", prediction="v"))
        x0, eps, t = (self.inputs[f"add_noise/{key}"] for key in ("x0", "noise", "t"))
        return process.add_noise(x0, eps, t) if name == "x_t" else process.target(x0, eps, t)
