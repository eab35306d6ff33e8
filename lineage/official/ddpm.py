"""Verifier of guided-diffusion's processes: tables, losses, the variational bound, sampling.

Its files use a model of one line, `toy_model`. Respacing and the bound of a whole chain are part of
that code only, and are written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.config import from_dict
from lineage.diffusion import samplers
from lineage.diffusion.bound import (
    MeanVariance,
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    normal_kl,
    p_mean_variance,
    vlb_terms,
)
from lineage.diffusion.process import Process, ProcessConfig, gather
from lineage.diffusion.samplers.base import Denoise, Estimate
from lineage.diffusion.schedules import (
    SCHEDULES,
    NoiseLevel,
    SamplingSchedule,
    betas_from_alphas_cumprod,
)
from lineage.nn.noise import NoiseStreams
from lineage.official.sampling import FileNoise, trajectory
from lineage.official.verify import Verifier, output

# --- respacing ------------------------------------------------------------------------------------


def space_timesteps(num_timesteps: int, section_counts: str) -> list[int]:
    """Timesteps of a respaced process, sorted.

    Args:
        num_timesteps: Number of timesteps T of the whole process.
        section_counts: `10,15,20` takes that many of each of three equal sections, both ends of a
            section included; `ddim25` takes 25 at an equal stride, from 0 on.

    Raises:
        ValueError: for counts that do not fit.
    """
    if section_counts.startswith("ddim"):
        count = int(section_counts.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no stride of {num_timesteps} timesteps gives {count}")
    counts = [int(count) for count in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} timesteps cannot give {count}")
        strides = [0.0] + [(length - 1) / (count - 1)] * (count - 1) if count > 1 else [0.0]
        timesteps += [start + round(t) for t in accumulate(strides)]  # with its own rounding
        start += length
    return timesteps


def respaced(process: Process, timesteps: Sequence[int]) -> Process:
    """The process of some timesteps: their alphas_cumprod stay, and new betas follow."""
    betas = betas_from_alphas_cumprod(process.alphas_cumprod[list(timesteps)])
    return Process(process.config, betas, [process.timesteps[t] for t in timesteps])


# --- the bound of a chain -------------------------------------------------------------------------


def prior_bpd(process: Process, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) | N(0, 1)) in bits per dimension, (B,); no network changes it."""
    last = torch.full((len(x0),), process.num_timesteps - 1)
    zero = torch.zeros_like(x0)
    mean, log_variance = gather(process.alpha, last) * x0, gather(2 * process.sigma.log(), last)
    return bits_per_dim(normal_kl(mean, zero + log_variance, zero, zero))


@torch.no_grad()
def calc_bpd_loop(
    process: Process,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: NoiseStreams,
    clip: bool = True,
) -> dict[str, Tensor]:
    """The bound of pictures (B, C, H, W) of bytes in [-1, 1], in bits per dimension.

    Args:
        network: Function from x_t and its timestep (B,) to the output.
        clip: If true, estimates of x_0 are clipped to [-1, 1].

    Returns:
        `vb` (B, T) L_(t-1) from t = T - 1 down, `prior_bpd` (B,) L_T, `total_bpd` (B,) their sum,
        `xstart_mse` and `mse` (B, T) the squared errors of x_0 and eps.
    """
    terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for step in reversed(range(process.num_timesteps)):
        t = torch.full((len(x0),), step)
        eps = noise.randn(*x0.shape[1:])
        x = process.add_noise(x0, eps, t)
        predicted = network(x, torch.full((len(x0),), process.timesteps[step]))
        p = p_mean_variance(process, predicted, x, t, clip)
        terms["vb"].append(vlb_terms(process, p, x0, x, t))
        terms["xstart_mse"].append((p.x0 - x0).square().flatten(1).mean(1))
        eps_error = process.to_noise(p.x0, x, t) - eps
        terms["mse"].append(eps_error.square().flatten(1).mean(1))
    bound = {name: torch.stack(rows, 1) for name, rows in terms.items()}
    bound["prior_bpd"] = prior_bpd(process, x0)
    bound["total_bpd"] = bound["vb"].sum(1) + bound["prior_bpd"]
    return bound


# --- the verifier ---------------------------------------------------------------------------------

PREDICTIONS = {"EPSILON": "noise", "START_X": "x0"}


def toy_model(x: Tensor, t: Tensor) -> Tensor:
    """The model of the files' loops."""
    return torch.cat([0.3 * x + 0.1 * (t / 100).sin()[:, None, None, None], 0.5 * x.cos()], dim=1)


class GuidedDiffusionOutputs(Verifier):
    """Outputs of GaussianDiffusion and SpacedDiffusion."""

    name = "guided_diffusion"
    source = ("openai/guided-diffusion", "gaussian_diffusion.py")

    def make_process(self, prediction: str = "EPSILON", variance: str = "LEARNED_RANGE") -> Process:
        """The file's process with one prediction and variance, under their official names."""
        settings = {
            "num_timesteps": self.config["T"],
            "schedule": self.config["schedule"],
            "prediction": PREDICTIONS[prediction],
            "variance": variance.lower(),
        }
        return Process(from_dict(ProcessConfig, settings))

    @cached_property
    def process(self) -> Process:
        return self.make_process()

    @cached_property
    def x_t(self) -> Tensor:
        return self.process.add_noise(self.inputs["x0"], self.inputs["noise"], self.inputs["t"])

    @output(r"betas_(\w+)_(\d+)")
    def betas(self, schedule: str, num_timesteps: str) -> Tensor:
        return SCHEDULES[schedule](int(num_timesteps))

    @output(r"space_timesteps_(\d+)/(.+)")
    def space_timesteps(self, num_timesteps: str, section_counts: str) -> Tensor:
        return torch.tensor(space_timesteps(int(num_timesteps), section_counts))

    @output(r"coef/(\w+)")
    def coefficients(self, name: str) -> Tensor:
        process, posterior = self.process, self.process.posterior
        return {
            "alphas_cumprod": process.alphas_cumprod,
            "alphas_cumprod_prev": posterior.alphas_cumprod_prev,
            "posterior_variance": posterior.variance,
            "posterior_log_variance_clipped": posterior.log_variance,
            "posterior_mean_coef1": posterior.x0_coef,
            "posterior_mean_coef2": posterior.xt_coef,
            "sqrt_recip_alphas_cumprod": 1 / process.alpha,
            "sqrt_recipm1_alphas_cumprod": process.sigma / process.alpha,
        }[name]

    @output("x_t")
    def noised(self) -> Tensor:
        return self.x_t

    @output(r"q_(mean|var|post_mean|post_var|post_logvar)")
    def q(self, name: str) -> Tensor:
        process, posterior = self.process, self.process.posterior
        x0, t = self.inputs["x0"], self.inputs["t"]
        if name == "post_mean":
            return posterior.mean(x0, self.x_t, t)
        if name == "mean":
            return gather(process.alpha, t) * x0
        tables = {
            "var": process.sigma**2,
            "post_var": posterior.variance,
            "post_logvar": posterior.log_variance,
        }
        return gather(tables[name], t).expand_as(x0)

    def p(self, process: Process, clip: bool) -> MeanVariance:
        """p(x_(t-1) | x_t) of the file's output, of as many channels as the variance takes."""
        predicted = self.inputs["model_output"]
        if not process.config.learns_variance:
            predicted = predicted.chunk(2, dim=1)[0]
        return p_mean_variance(process, predicted, self.x_t, self.inputs["t"], clip)

    @output(r"p_mean_var/(\w+)/(\w+)/(clip|noclip)/(mean|log_variance|pred_xstart)")
    def p_mean_var(self, prediction: str, variance: str, clip: str, name: str) -> Tensor:
        p = self.p(self.make_process(prediction, variance), clip == "clip")
        return {"mean": p.mean, "log_variance": p.log_variance, "pred_xstart": p.x0}[name]

    def vlb_terms(self, process: Process, clip: bool = False) -> Tensor:
        x0, t = self.inputs["x0"], self.inputs["t"]
        return vlb_terms(process, self.p(process, clip), x0, self.x_t, t)

    @output("vb_terms_bpd")
    def vb_terms_bpd(self) -> Tensor:
        return self.vlb_terms(self.process, clip=True)

    @output(r"loss/(\w+)/(\w+)/(RESCALED_)?KL/loss")
    def kl_loss(self, prediction: str, variance: str, rescaled: str | None) -> Tensor:
        process = self.make_process(prediction, variance)
        return self.vlb_terms(process) * (process.num_timesteps if rescaled else 1)

    @output(r"loss/(\w+)/(\w+)/(RESCALED_)?MSE/(loss|mse|vb)")
    def mse_loss(self, prediction: str, variance: str, rescaled: str | None, name: str) -> Tensor:
        process = self.make_process(prediction, variance)
        x0, noise, t = (self.inputs[key] for key in ("x0", "noise", "t"))
        predicted = self.inputs["model_output"].chunk(2, dim=1)[0]
        error = F.mse_loss(predicted, process.target(x0, noise, t), reduction="none")
        mse = error.flatten(1).mean(1)
        if not process.config.learns_variance:
            return mse
        vb = self.vlb_terms(process) * (process.num_timesteps / 1000 if rescaled else 1)
        return {"mse": mse, "vb": vb, "loss": mse + vb}[name]

    @output("normal_kl")
    def normal_kl(self) -> Tensor:
        return normal_kl(*self.inputs["kl_args"])

    @output("discretized_gaussian_log_likelihood")
    def log_likelihood(self) -> Tensor:
        means, log_scales = self.inputs["dgl_means"], self.inputs["dgl_log_scales"]
        return discretized_gaussian_log_likelihood(self.inputs["x0"], means, log_scales)

    @output("prior_bpd")
    def prior(self) -> Tensor:
        return prior_bpd(self.process, self.inputs["x0"])

    @cached_property
    def bound(self) -> dict[str, Tensor]:
        noise = FileNoise(self.inputs["bpd_noise"])
        return calc_bpd_loop(self.process, toy_model, self.inputs["x0"], noise)

    @output(r"bpd/(\w+)")
    def bpd(self, name: str) -> Tensor:
        return self.bound[name]

    def spaced_process(self, kind: str) -> Process:
        section_counts = self.config[{"spaced": "respacing", "ddim": "ddim"}[kind]]
        timesteps = space_timesteps(self.process.num_timesteps, section_counts)
        return respaced(self.process, timesteps)

    @output(r"(spaced|ddim)/(betas|timestep_map)")
    def spaced_tables(self, kind: str, name: str) -> Tensor:
        process = self.spaced_process(kind)
        return process.betas if name == "betas" else torch.tensor(process.timesteps)

    @output(r"(spaced|ddim)/traj")
    def spaced_trajectory(self, kind: str) -> Tensor:
        process = self.spaced_process(kind)
        schedule = process.sampling_schedule(process.num_timesteps)
        sampler = samplers.ddpm if kind == "spaced" else samplers.ddim
        x, noise = self.inputs[f"{kind}/x_T"], self.inputs.get(f"{kind}/noise")
        return trajectory(sampler, denoise_toy(process, clip=True), x, schedule, noise)

    @output("ddim/reverse_traj")
    def reverse_trajectory(self) -> Tensor:
        process = self.spaced_process("ddim")
        levels = process.sampling_schedule(process.num_timesteps).levels[-2::-1]
        pure_noise = NoiseLevel(0.0, 1.0, float("nan"))
        schedule = SamplingSchedule((*levels, pure_noise), process.level_at)
        denoise = denoise_toy(process, clip=False)
        return trajectory(samplers.ddim, denoise, self.inputs["x0"], schedule)


def denoise_toy(process: Process, clip: bool) -> Denoise:
    """The toy model as samplers take it."""

    def denoise(x: Tensor, level: NoiseLevel) -> Estimate:
        timestep = torch.full((len(x),), level.timestep)
        prediction, learned = toy_model(x, timestep).chunk(2, dim=1)
        x0 = process.to_x0(prediction, x, level)
        x0 = x0.clamp(-1, 1) if clip else x0
        return Estimate(x0, variance_fraction=(learned + 1) / 2)

    return denoise
