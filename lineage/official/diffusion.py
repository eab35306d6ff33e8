"""Verifiers of what is diffusion without a network: processes and samplers of guided-diffusion and
k-diffusion.

Their files use models of a line, which are written out here; all else is the package's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lineage.diffusion import samplers
from lineage.diffusion.bound import (
    Backward,
    backward,
    bits_per_dim,
    bound_terms,
    log_likelihood_of_bytes,
    normal_kl,
    prior_bits,
)
from lineage.diffusion.process import Process, ProcessConfig, Scalings
from lineage.diffusion.samplers.k_diffusion import Churn, Denoise, Estimate, Sampler
from lineage.diffusion.schedules import (
    SCHEDULES,
    Path,
    Point,
    exponential_sigmas,
    karras_sigmas,
    respaced_times,
    vp_sigmas,
)
from lineage.nn.noise import NoiseStreams
from lineage.official import Outputs
from lineage.official.verify import Reference


class Given(NoiseStreams):
    """Noise that a file holds, (n, B, C, H, W), in the order in which it was drawn."""

    def __init__(self, noise: Tensor | None = None) -> None:
        super().__init__([])
        self._left = [] if noise is None else list(noise)

    def randn(self, *shape: int) -> Tensor:
        return self._left.pop(0)


class Seen:
    """A denoiser that notes what it is asked and what it answers."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.asked: list[Tensor] = []
        self.answers: list[Tensor] = []

    def __call__(self, x: Tensor, level: Point) -> Estimate:
        found = self.denoise(x, level)
        self.asked.append(x)
        self.answers.append(found.x0)
        return found


def trajectory(
    sampler: Sampler,
    denoise: Denoise,
    x: Tensor,
    path: Path,
    noise: Tensor | None,
    **own: Any,
) -> Tensor:
    """x at each step, as the sampler's callback sees it, and at the end."""
    seen: list[Tensor] = []

    def keep(step: int, x: Tensor, x0: Tensor) -> None:
        seen.append(x)

    last = sampler(denoise, x, path, Given(noise), keep, **own)
    return torch.stack([*seen, last])


# --- guided-diffusion -----------------------------------------------------------------------------

MEANS = {"EPSILON": "noise", "START_X": "x0"}


def _toy(x: Tensor, t: Tensor) -> Tensor:
    """The model of its loops."""
    return torch.cat([0.3 * x + 0.1 * (t / 100).sin()[:, None, None, None], 0.5 * x.cos()], dim=1)


@torch.no_grad()
def guided_diffusion(reference: Reference) -> Outputs:
    """Every output of guided-diffusion's processes that a reference file may hold."""
    official, given = reference.config, reference.inputs
    steps, schedule = official["T"], official["schedule"]
    base = ProcessConfig(steps, schedule, variance="learned_range")
    process, x0, t = Process(base), given["x0"], given["t"]
    noised = process.noised(x0, given["noise"], t)
    posterior = process.posterior
    outputs: dict[str, Any] = {}

    for name in reference.outputs:
        parts = name.split("/")
        if name.startswith("betas_"):
            _, kind, count = name.split("_")
            outputs[name] = SCHEDULES[kind](int(count))
        elif name.startswith("space_timesteps_"):
            total = int(parts[0].removeprefix("space_timesteps_"))
            outputs[name] = torch.tensor(respaced_times(total, parts[1]))
        elif parts[0] == "p_mean_var":
            mean, variance = MEANS[parts[1]], parts[2].lower()
            found = _backward(base, mean, variance, given, noised, t, parts[3] == "clip")
            named = {"mean": found.mean, "log_variance": found.log_variance}
            outputs[name] = {**named, "pred_xstart": found.x0}[parts[4]]
        elif parts[0] == "loss":
            outputs[name] = _loss(base, parts, given, noised, t)

    outputs |= {
        "coef/alphas_cumprod": process.abar,
        "coef/alphas_cumprod_prev": posterior.abar_before,
        "coef/posterior_log_variance_clipped": posterior.log_variance,
        "coef/posterior_mean_coef1": posterior.of_x0,
        "coef/posterior_mean_coef2": posterior.of_noised,
        "coef/posterior_variance": posterior.variance,
        "coef/sqrt_recip_alphas_cumprod": 1 / process.signal,
        "coef/sqrt_recipm1_alphas_cumprod": process.noise / process.signal,
        "x_t": noised,
        "q_mean": process.signal[t].float()[:, None, None, None] * x0,
        "q_var": (process.noise[t] ** 2).float()[:, None, None, None].expand_as(x0),
        "q_post_mean": posterior.mean(x0, noised, t),
        "q_post_var": posterior.variance[t].float()[:, None, None, None].expand_as(x0),
        "q_post_logvar": posterior.log_variance[t].float()[:, None, None, None].expand_as(x0),
        "prior_bpd": prior_bits(process, x0),
        "normal_kl": normal_kl(*given["kl_args"]),
        "discretized_gaussian_log_likelihood": log_likelihood_of_bytes(
            x0, given["dgl_means"], given["dgl_log_scales"]
        ),
        "vb_terms_bpd": bound_terms(
            process, backward(process, given["model_output"], noised, t, clip=True), x0, noised, t
        ),
    }
    whole = bits_per_dim(process, _toy, x0, Given(given["bpd_noise"]))
    outputs |= {
        "bpd/total_bpd": whole.total,
        "bpd/vb": whole.terms,
        "bpd/prior_bpd": whole.prior,
        "bpd/xstart_mse": whole.x0_errors,
        "bpd/mse": whole.noise_errors,
    }
    return outputs | _respaced(process, official, given)


def _backward(
    base: ProcessConfig,
    mean: str,
    variance: str,
    given: Mapping[str, Tensor],
    noised: Tensor,
    t: Tensor,
    clip: bool,
) -> Backward:
    """p(x_(t-1) | x_t) of the file's output, of as many channels as the variance asks for."""
    process = Process(replace(base, prediction=mean, variance=variance))
    output = given["model_output"]
    output = output if process.config.learned else output.chunk(2, dim=1)[0]
    return backward(process, output, noised, t, clip)


def _loss(
    base: ProcessConfig,
    parts: Sequence[str],
    given: Mapping[str, Tensor],
    noised: Tensor,
    t: Tensor,
) -> Tensor:
    """loss/<mean>/<variance>/<kind>/<term>."""
    _, mean, variance, kind, term = parts
    found = _backward(base, MEANS[mean], variance.lower(), given, noised, t, clip=False)
    process = Process(replace(base, prediction=MEANS[mean], variance=variance.lower()))
    bound = bound_terms(process, found, given["x0"], noised, t)
    if kind.endswith("KL"):
        return bound * process.steps if kind == "RESCALED_KL" else bound
    predicted = given["model_output"].chunk(2, dim=1)[0]
    mse = process.mse(predicted, given["x0"], given["noise"], t)
    if not process.config.learned:
        return mse
    bound = bound * process.steps / 1000 if kind == "RESCALED_MSE" else bound
    return {"mse": mse, "vb": bound, "loss": mse + bound}[term]


def _respaced(
    process: Process, official: Mapping[str, Any], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sampling on some of the steps."""
    outputs: dict[str, Tensor] = {}
    for name, key in (("spaced", "respacing"), ("ddim", "ddim")):
        kept = process.respaced(respaced_times(process.steps, official[key]))
        outputs[f"{name}/betas"] = kept.betas
        outputs[f"{name}/timestep_map"] = torch.tensor(kept.times)
        start = given[f"{name}/x_T"]
        path, clipped = kept.path(kept.steps), _guided(kept, clip=True)
        if name == "spaced":
            noise = given["spaced/noise"]
            found = trajectory(samplers.ddpm, clipped, start, path, noise)
        else:
            found = trajectory(samplers.ddim, clipped, start, path, None)
            ahead = Path((*path.points[-2::-1], Point(0.0, 1.0, math.nan)), path.at)
            outputs["ddim/reverse_traj"] = trajectory(
                samplers.ddim, _guided(kept, clip=False), given["x0"], ahead, None
            )
        outputs[f"{name}/traj"] = found
    return outputs


def _guided(process: Process, clip: bool) -> Denoise:
    """Its model, as samplers want it."""

    def denoise(x: Tensor, level: Point) -> Estimate:
        output, learned = _toy(x, torch.full((len(x),), level.time)).chunk(2, dim=1)
        x0 = process.to_x0(output, x, level)
        return Estimate(x0.clamp(-1, 1) if clip else x0, share=(learned + 1) / 2)

    return denoise


# --- k-diffusion ----------------------------------------------------------------------------------


def by_sigmas(sigmas: Sequence[float]) -> Path:
    """Levels x = x_0 + sigma eps, whose time is sigma."""

    def level(sigma: float) -> Point:
        return Point(1.0, sigma, sigma)

    return Path(tuple(level(sigma) for sigma in sigmas), level)


SOLVERS: dict[str, tuple[Sampler, dict[str, Any]]] = {
    "euler": (samplers.euler, {}),
    "heun": (samplers.heun, {}),
    "dpm_2": (samplers.dpm_2, {}),
    "lms4": (samplers.lms, {}),
    "dpmpp_2m": (samplers.dpmpp_2m, {}),
    "euler_ancestral": (samplers.euler_ancestral, {}),
    "euler_ancestral_eta0.5": (samplers.euler_ancestral, {"eta": 0.5}),
    "dpm_2_ancestral": (samplers.dpm_2_ancestral, {}),
    "dpmpp_2s_ancestral": (samplers.dpmpp_2s_ancestral, {}),
    "dpmpp_sde": (samplers.dpmpp_sde, {"related": False}),  # as the file has its noise
    "dpmpp_2m_sde": (samplers.dpmpp_2m_sde, {}),
    "dpmpp_2m_sde_heun": (samplers.dpmpp_2m_sde, {"kind": "heun"}),
    "dpmpp_3m_sde": (samplers.dpmpp_3m_sde, {}),
}
CHURN = Churn(4.0, 0.05, 10.0, 1.003)  # of the files' `euler_churn` and `heun_churn`


@torch.no_grad()
def k_diffusion(reference: Reference) -> Outputs:
    """Every output of k-diffusion's samplers and wrappers that a reference file may hold."""
    official, given = reference.config, reference.inputs
    count, deviation = official["n"], official["sigma_data"]
    ends = official["sigma_min"], official["sigma_max"]

    def denoise(x: Tensor, level: Point) -> Estimate:
        sigma, square = level.noise, deviation**2
        drawn = x * square / (sigma**2 + square) + 0.1 * math.sin(sigma)
        return Estimate(drawn + 0.05 * (3 * x / (1 + sigma)).sin())

    grids = {
        "sigmas_karras": karras_sigmas(count, *ends, official["rho"]),
        "sigmas_exponential": exponential_sigmas(count, *ends),
        "sigmas_polyexponential_rho2": exponential_sigmas(count, *ends, 2.0),
        "sigmas_vp": vp_sigmas(count),
    }
    path = by_sigmas([*grids["sigmas_karras"], 0.0])
    outputs: dict[str, Any] = {n: torch.tensor([*s, 0.0]) for n, s in grids.items()}
    for name, (sampler, own) in SOLVERS.items():
        noise = given.get(f"{name}/noise")
        outputs[f"{name}/traj"] = trajectory(sampler, denoise, given["x"], path, noise, **own)
    for name in ("euler", "heun"):
        found = trajectory(
            SOLVERS[name][0], denoise, given["x"], path, given["churn_noise"], churn=CHURN
        )
        outputs[f"{name}_churn/traj"] = found
    return outputs | _discrete(given, count) | _preconditioned(given, deviation)


def _discrete(given: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """Sigmas of a process of steps, and models of it that are told them."""
    abar = given["alphas_cumprod"].double()
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    processes = {
        kind: Process(ProcessConfig(len(abar), "scaled_linear", prediction), betas)
        for kind, prediction in (("eps", "noise"), ("v", "v"))
    }
    process = processes["eps"]
    last = process.steps - 1
    asked = given["discrete_sigma"].double().tolist()
    grid = [process.sigma(last * (1 - k / (count - 1))) for k in range(count)]
    outputs: dict[str, Any] = {
        "discrete/sigma_min_max": torch.tensor([process.sigma(0), process.sigma(last)]),
        "discrete/sigma_to_t": torch.tensor([process.time(s) for s in asked]),
        "discrete/sigma_to_t_quantized": torch.tensor([process.nearest(s) for s in asked]),
        "discrete/t_to_sigma": torch.tensor(
            [process.sigma(t) for t in given["discrete_t"].double().tolist()]
        ),
        "discrete/sigmas_n8": torch.tensor([*grid, 0.0]),
    }
    for kind, own in processes.items():
        denoised, losses = [], []
        for x, noise, sigma in zip(
            given["wrap_x"], given["wrap_noise"], given["wrap_sigma"].tolist(), strict=True
        ):
            level = own.at(sigma)
            told = 0.1 * math.sin(level.time / 100)
            scaled = x[None] * level.signal
            denoised.append(own.to_x0(0.3 * scaled + told, scaled, level))
            noised = own.noised(x[None], noise[None], level)
            losses.append(own.mse(0.3 * noised + told, x[None], noise[None], level))
        outputs[f"wrap/{kind}_denoised"] = torch.cat(denoised)
        outputs[f"wrap/{kind}_loss"] = torch.cat(losses)
    return outputs


def _preconditioned(given: Mapping[str, Tensor], deviation: float) -> dict[str, Any]:
    """Models of a sigma: Karras et al.'s, and one in v that is told an angle."""
    process = Process(ProcessConfig(prediction="edm", deviation=deviation))
    angular = Process(ProcessConfig(prediction="v"))
    weights = {
        "karras": lambda sigma: 1.0,
        "snr": lambda sigma: deviation**2 / (sigma**2 + deviation**2),
        "soft-min-snr": lambda sigma: (sigma * deviation / (sigma**2 + deviation**2)) ** 2,
    }
    rows: dict[str, list[Any]] = {name: [] for name in ("scalings", "edm", "vdiff", "angle")}
    losses: dict[str, list[Tensor]] = {name: [] for name in weights}
    for x, noise, sigma in zip(
        given["wrap_x"], given["wrap_noise"], given["wrap_sigma"].tolist(), strict=True
    ):
        x, noise, level = x[None], noise[None], Point(1.0, sigma, sigma)
        scale = Scalings.at(sigma, deviation)
        rows["scalings"].append(torch.tensor([scale.skip, scale.out, scale.into]))
        output = 0.3 * scale.into * x + 0.1 * math.sin(sigma)
        rows["edm"].append(process.to_x0(output, x, level))
        output = 0.3 * scale.into * (x + sigma * noise) + 0.1 * math.sin(sigma)
        error = process.mse(output, x, noise, level)
        for name, weight in weights.items():
            losses[name].append(error * weight(sigma))
        angle = math.atan(sigma) * 2 / math.pi
        rows["angle"].append(torch.tensor(angle))
        signal = 1 / math.hypot(1, sigma)
        output = 0.3 * signal * x + 0.1 * math.sin(angle)
        level = Point(signal, sigma * signal, angle)
        rows["vdiff"].append(angular.to_x0(output, signal * x, level))
    return {
        "edm/scalings": torch.stack(rows["scalings"], 1),
        "edm/denoised": torch.cat(rows["edm"]),
        "vdiff/denoised": torch.cat(rows["vdiff"]),
        "vdiff/sigma_to_t": torch.stack(rows["angle"]),
        **{f"edm/loss_{name}": torch.cat(each) for name, each in losses.items()},
    }
