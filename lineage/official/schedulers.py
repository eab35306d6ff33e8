"""Verifier of diffusers' schedulers: processes, the steps that they visit, and samplers.

Its files use a model of a line, which is written out here. A path that only diffusers has (a grid,
an offset) is put together here from the package's parts; all else is the package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineage.diffusion import samplers
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers.k_diffusion import Estimate
from lineage.diffusion.schedules import (
    CLEAN,
    SCHEDULES,
    Path,
    Point,
    even_times,
    karras_sigmas,
    leading_times,
    shifted,
    trailing_times,
    without_snr_at_end,
)
from lineage.official import Outputs
from lineage.official.diffusion import Given, Seen
from lineage.official.verify import Reference

PREDICTED = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}
NAMED = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def diffusers_process(settings: Mapping[str, Any]) -> Process:
    """The process of a scheduler's keyword arguments."""
    total, name = settings.get("num_train_timesteps", 1000), settings["beta_schedule"]
    ends = (
        {}
        if name == "squaredcos_cap_v2"
        else {
            "start": settings.get("beta_start", 1e-4) * total / 1000,
            "end": settings.get("beta_end", 0.02) * total / 1000,
        }
    )  # ours scale with the length of the chain, theirs do not
    betas = SCHEDULES[NAMED[name]](total, **ends)
    if settings.get("rescale_betas_zero_snr"):
        abar = without_snr_at_end(torch.cumprod(1 - betas, 0))
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    prediction = PREDICTED[settings.get("prediction_type", "epsilon")]
    return Process(ProcessConfig(total, "scaled_linear", prediction), betas)


def diffusers_times(settings: Mapping[str, Any], kind: str, total: int, steps: int) -> list[float]:
    """The steps that a scheduler visits."""
    ours = kind in ("DDPMScheduler", "DDIMScheduler")
    spacing = settings.get("timestep_spacing", "leading" if ours else "linspace")
    offset, solver = settings.get("steps_offset", 0), kind == "DPMSolverMultistepScheduler"
    if spacing == "trailing":
        return [float(t) for t in trailing_times(total, steps)]
    if spacing == "leading":
        if solver:  # one step more, of which the last is dropped
            return [float(k * (total // (steps + 1)) + offset) for k in range(steps, 0, -1)]
        return [float(t) for t in leading_times(total, steps, offset)]
    if solver:
        return [float(t) for t in even_times(total, steps + 1)[:-1]]
    if ours:
        return [float(t) for t in even_times(total, steps)]
    return np.linspace(0, total - 1, steps)[::-1].tolist()


def _ours(settings: Mapping[str, Any], kind: str, process: Process, steps: int) -> Path:
    """The path of DDPM and DDIM."""
    times = diffusers_times(settings, kind, process.steps, steps)
    to_one = kind == "DDPMScheduler" or settings.get("set_alpha_to_one", True)
    last = CLEAN if to_one else process.point(0)
    return Path((*(process.point(int(t)) for t in times), last), process.at)


def _by_sigmas(settings: Mapping[str, Any], kind: str, process: Process, steps: int) -> Path:
    """The path of those that go by sigma; DPM-Solver's in the process's coordinates."""
    table = (process.noise / process.signal).tolist()
    times = diffusers_times(settings, kind, process.steps, steps)
    sigmas = np.interp(times, np.arange(process.steps), table).tolist()
    solver = kind == "DPMSolverMultistepScheduler"
    if settings.get("use_karras_sigmas"):
        sigmas = karras_sigmas(steps, table[0], table[-1])
        times = [process.time(sigma) for sigma in sigmas]
        times = [float(round(t)) for t in times] if solver else times
    sigmas.append(table[0] if settings.get("final_sigmas_type") == "sigma_min" else 0.0)
    points = []
    for sigma, time in zip(sigmas, [*times, 0.0], strict=True):
        signal = 1 / math.hypot(1, sigma) if solver else 1.0
        points.append(Point(signal, sigma * signal, time))
    return Path(tuple(points), process.at)


def _flow(settings: Mapping[str, Any], steps: int, mu: float) -> Path:
    """The path of flow matching; time is sigma * T."""
    total, shift = settings.get("num_train_timesteps", 1000), settings.get("shift", 1.0)
    dynamic = settings.get("use_dynamic_shifting", False)
    ends = [1.0, 1 / total] if dynamic else [1.0, shifted(1 / total, shift)]
    grid = [ends[0] + k / max(1, steps - 1) * (ends[1] - ends[0]) for k in range(steps)]
    levels = [shifted(s, math.exp(mu) if dynamic else shift) for s in grid]
    points = [Point(1 - s, s, s * total) for s in levels]
    return Path((*points, CLEAN), lambda sigma: CLEAN)


def _case(
    case: Mapping[str, Any], model: Sequence[float], x: Tensor, noise: Tensor | None
) -> dict[str, Tensor]:
    """One scheduler: timesteps, sigmas, trajectory and estimates."""
    kind, settings, steps = case["cls"], case["kwargs"], case["steps"]
    flow = kind == "FlowMatchEulerDiscreteScheduler"
    process = Process(ProcessConfig(schedule="flow", prediction="flow")) if flow else None
    process = process or diffusers_process(settings)
    ours = kind in ("DDPMScheduler", "DDIMScheduler")
    scaled = kind.startswith(("Euler", "Heun"))  # x = x_0 + sigma eps; the model gets x / hypot
    clip = ours and settings.get("clip_sample", True)
    if flow:
        path = _flow(settings, steps, case.get("mu", 0.0))
    else:
        make = _ours if ours else _by_sigmas
        path = make(settings, kind, process, steps)

    def denoise(x: Tensor, level: Point) -> Estimate:
        into = 1 / math.hypot(1, level.noise) if scaled else 1.0
        told = Point(into, level.noise * into, level.time) if scaled else level
        output = model[0] * into * x + model[1] * math.sin(level.time / 100)
        x0 = process.to_x0(output, into * x, told)
        if not clip:
            return Estimate(x0)
        return Estimate(x0.clamp(-1, 1), noise=process.to_noise(x0, x, level))

    sampler, own = _sampler(kind, settings, case.get("step_kwargs", {}))
    start = path.points[0].noise if scaled else 1.0
    if scaled and settings.get("timestep_spacing", "linspace") == "leading":
        start = math.hypot(1, start)
    seen = Seen(denoise)
    last = sampler(seen, x * start, path, Given(noise), **own)
    points = list(path.points)
    if kind.startswith("Heun"):
        points = [points[0], *(p for p in points[1:-1] for _ in range(2)), points[-1]]
    levels = [p.noise if flow else p.sigma for p in points]
    return {
        "traj": torch.stack([*seen.asked, last]),
        "pred_x0": torch.stack(seen.answers),
        "timesteps": torch.tensor([p.time for p in points[:-1]]),
        "sigmas": torch.tensor(levels),
    }


def _sampler(
    kind: str, settings: Mapping[str, Any], step: Mapping[str, Any]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Our sampler for a scheduler's class."""
    if kind == "DDPMScheduler":
        return samplers.ddpm, {"variance": settings.get("variance_type", "fixed_small")}
    if kind == "DDIMScheduler":
        return samplers.ddim, {"eta": step.get("eta", 0.0)}
    if kind != "DPMSolverMultistepScheduler":
        return {
            "EulerDiscreteScheduler": samplers.euler,
            "EulerAncestralDiscreteScheduler": samplers.euler_ancestral,
            "HeunDiscreteScheduler": samplers.heun,
            "FlowMatchEulerDiscreteScheduler": samplers.flow_euler,
        }[kind], {}
    bent = settings.get("solver_type", "midpoint")
    algorithm = settings.get("algorithm_type", "dpmsolver++")
    if algorithm == "sde-dpmsolver++":
        return samplers.dpmpp_2m_sde, {"kind": bent}
    sampler = samplers.dpm_solver if algorithm == "dpmsolver" else samplers.dpmpp_2m
    return sampler, {"order": settings.get("solver_order", 2), "kind": bent}


@torch.no_grad()
def diffusers_schedulers(reference: Reference) -> Outputs:
    """Every output of diffusers' schedulers that a reference file may hold."""
    given, model = reference.inputs, reference.inputs["model"].tolist()
    outputs: dict[str, Any] = {}
    for name, case in reference.config.items():
        if not isinstance(case, dict) or "cls" not in case:
            continue
        found = _case(case, model, given["x_T"], given.get(f"{name}/noise"))
        for part, value in found.items():
            wanted = reference.outputs.get(f"{name}/{part}")
            outputs[f"{name}/{part}"] = value if wanted is None else value.to(wanted.dtype)
        key = case.get("betas_key")
        if key and f"betas/{key}" not in outputs:
            process = diffusers_process(case["kwargs"])
            outputs[f"betas/{key}"] = process.betas.float()
            outputs[f"alphas_cumprod/{key}"] = process.abar.float()
    noised = Process(ProcessConfig(schedule="scaled_linear", prediction="v"))
    x0, noise, t = (given[f"add_noise/{n}"] for n in ("x0", "noise", "t"))
    outputs["add_noise/x_t"] = noised.noised(x0, noise, t)
    outputs["add_noise/velocity"] = noised.target(x0, noise, t)
    return outputs
