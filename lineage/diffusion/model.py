"""A diffusion model: a network, a diffusion process, a text encoder and a space, put together.

`ddpm`, `ldm`, `dit` and their successors differ in these four and in nothing else. The space holds
the pictures while they are noised: pixels (`space.py`) or latents (`ldm.py`).

    training    Ho et al. 2020, algorithm 1, with some captions dropped (Ho and Salimans 2022):
                minimise w_t |target - network(x_t, t, text)|^2,  x_t = alpha_t x_0 + sigma_t eps,
                and, where variances are learned, 0.001 L_vlb of `bound.py`
    sampling    a sampler of `samplers/` on a schedule of noise levels, with guidance of scale s:
                uncond + s (cond - uncond)                                      `guidance.py`
    editing     SDEdit (Meng et al. 2022, arXiv:2108.01073, section 3.2): add noise to a picture, up
                to a level in the middle of the schedule, and denoise it for the caption
    inpainting  by replacement, as in the notebook of GLIDE (Nichol et al. 2021, arXiv:2112.10741):
                outside the mask, each estimate of x_0 is replaced by the picture. (Song et al.
                2021, arXiv:2011.13456, appendix I.2, replace x_t.)

Axes: B pictures, C channels, H W of the space; 3, S S of the pictures.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Float, Floats, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from lineage.config import configuration
from lineage.data.contract import Batch, nearest_shape
from lineage.diffusion.bound import vlb_loss
from lineage.diffusion.guidance import Guidance, Threshold, apply_threshold
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.base import Denoise, Estimate, Sampler
from lineage.diffusion.schedules import NoiseLevel, SamplingSchedule, Spacing
from lineage.diffusion.space import Space
from lineage.errors import UserError, nearest
from lineage.nn.noise import NoiseStreams
from lineage.system import LabelledImage, System, Turn
from lineage.text.contract import TextEncoder, TextFeatures, caption_list

MAX_BATCH_VALUES = 2**22
"""Largest number of pixel values that are sampled at once; it bounds memory."""
EVENLY_SPACED = ("ddpm", "ddim", "flow_euler")
"""Samplers whose spacing is `even` if it is `auto`; the others have `karras`."""

SpacingOption = Literal["auto", Spacing]


@configuration
class DiffusionConfig:
    """Configuration that all diffusion systems share.

    Attributes:
        process: Schedule, prediction and loss.
        cond_drop_prob: Share of training captions that are dropped, for guidance.
        sampling_steps, guidance, sampler, spacing, threshold: Defaults of the options of
            `DiffusionModel.sample`.
    """

    process: ProcessConfig = field(default_factory=ProcessConfig)
    cond_drop_prob: Fraction = 0.1
    sampling_steps: PositiveInt = 50
    guidance: Float = 2.0
    sampler: str = "ddim"
    spacing: SpacingOption = "auto"
    threshold: Threshold = "clip"

    def __post_init__(self) -> None:
        _check_sampler(self.sampler)
        if self.sampling_steps > self.process.num_timesteps:
            raise UserError(
                f"model.sampling_steps={self.sampling_steps} must be at most "
                f"model.process.num_timesteps={self.process.num_timesteps}."
            )


def _check_sampler(name: str) -> None:
    if name not in SAMPLERS:
        raise UserError(f"sampler={name!r} is not possible: {nearest(name, SAMPLERS)}")


@runtime_checkable
class TakesShapes(Protocol):
    """A network of which x_t may have another height and width at each call."""

    def check_shape(self, height: int, width: int) -> None:
        """Raise `UserError` if x_t cannot have this height and width."""


# --- one step of sampling -------------------------------------------------------------------------


class SamplingStep(NamedTuple):
    """One step of a sampling: the noise level, x_t at that level, and the estimate of x_0 there,
    both (B, C, H, W) in the model's space.
    """

    level: NoiseLevel
    x_t: Tensor
    x0: Tensor


# --- the model ------------------------------------------------------------------------------------


class DiffusionModel(System):
    """A diffusion model of any network, process, text encoder and space.

    Args:
        network: (x_t, t, text) to the prediction (B, C, H, W); if the process learns variances, C
            more channels hold v or log variances.
        process: Diffusion process.
        text: Encoder of the captions; trained with the network.
        space: Space of x_t.
        config: Dropping of captions, and defaults of sampling.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        text: TextEncoder,
        space: Space,
        config: DiffusionConfig,
    ) -> None:
        super().__init__()
        self.network, self.process, self.text, self.space = network, process, text, space
        self.size, self.config = space.size, config
        max_pictures = MAX_BATCH_VALUES // (3 * space.size**2)
        self.sample_batch_size = max(1, min(System.sample_batch_size, max_pictures))

    # --- training -------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"denoiser": [self.network, self.text]}

    def check_shape(self, height: int, width: int) -> None:
        if not isinstance(self.network, TakesShapes):
            super().check_shape(height, width)
        else:
            self.network.check_shape(*self.space.shape_of(height, width)[1:])

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """Algorithm 1, with some captions dropped."""
        process = self.process
        x0 = self.space.encode(batch, noise)  # (B, C, H, W)
        t = noise.randint(process.num_timesteps)  # (B,)
        keep = noise.rand() >= self.config.cond_drop_prob  # (B,)
        eps = noise.randn(*x0.shape[1:])  # (B, C, H, W)
        x_t = process.add_noise(x0, eps, t)
        output = self.network(x_t, t, text.where(keep, self.text.null(len(batch))))
        prediction, _ = self.split_output(output)

        target = process.target(x0, eps, t)
        mse = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)  # (B,)
        rows = {f"mse_{process.config.prediction}": process.loss_weight(t) * mse}
        if process.config.learns_variance:
            rows["vlb"] = vlb_loss(process, output, x0, x_t, t)
        yield self.turn(rows)

    def turn(self, rows: Mapping[str, Tensor]) -> Turn:
        """The turn of a step: the mean over the rows of each term, (B,)."""
        return Turn("denoiser", {name: values.mean() for name, values in rows.items()})

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output in float32 as the prediction and, if variances are learned, their
        parameters: 2 v - 1 for `learned_range` (v of Nichol and Dhariwal 2021, equation 15), or log
        variances for `learned`.
        """
        output = output.float()
        if not self.process.config.learns_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    # --- sampling -------------------------------------------------------------------------------

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        sampling_steps: PositiveInt | None = None,
        guidance: Float | None = None,
        sampler: str | None = None,
        negative: str = "",
        spacing: SpacingOption | None = None,
        eta: NonNegativeFloat | None = None,
        rescale: Float = 0.0,
        interval: Floats = (),
        threshold: Literal["", Threshold] = "",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        aspect: PositiveFloat = 1.0,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions; of another height and width if `aspect` is not 1.
        Options that are None are those of the configuration.

        Args:
            sampling_steps: Number of the sampler's steps, from 1 to T.
            guidance: Guidance scale; 1 is no guidance, more follows the caption more closely.
            sampler: Name of the sampler.
            negative: Caption that guidance moves away from, in place of no caption.
            spacing: Spacing of the steps; `auto` is `even` for `ddpm`, `ddim` and `flow_euler`, and
                `karras` for the others.
            eta: Factor on the noise of a step, for samplers that have it; of `ddim`, 0 is
                deterministic and 1 is DDPM's (Song et al. 2020, equation 16).
            rescale: Weight of the prediction rescaled to the deviation of the conditional one, from
                0 to 1 (phi of Lin et al. 2023, equation 16).
            interval: Two karras_sigmas between which guidance acts, as in 0.3,3.
            threshold: Limit of x_0: `none`, `clip` or `dynamic`.
            image: Pictures to start from.
            mask: Pixels of `image` to repaint; the others are not changed.
            strength: Share of the steps that are taken, counted from the end, above 0 up to 1 (t_0
                of SDEdit); by default 0.6, or 1 with a mask.
            aspect: Width divided by height; the nearest of `bucket_shapes` is drawn, in about as
                many pixels. A model that was trained on squares alone knows no other composition.
        """
        config = self.config
        sampler_fn, schedule = self._sampler_and_schedule(sampler, sampling_steps, spacing, eta)
        if len(interval) not in (0, 2):
            raise UserError(f"interval={interval} must be two sigmas, as in interval=0.3,3.")
        scale = config.guidance if guidance is None else guidance
        denoise = self.denoiser(
            captions,
            Guidance(scale, rescale, *interval),
            threshold or config.threshold,
            negative,
        )
        if image is None:
            for name, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise UserError(f"{name} has no effect without an image to start from.")
            height, width = nearest_shape(aspect, self.size)
            self.check_shape(height, width)
            x = noise.randn(*self.space.shape_of(height, width))
            return self.space.decode(sampler_fn(denoise, x, schedule, noise))

        if aspect != 1:
            raise UserError("aspect has no effect beside an image to start from: leave it out.")
        strength = _strength(strength, mask)
        schedule = schedule.shortened(max(1, round(strength * len(schedule))))
        if mask is None:
            mask = torch.ones_like(image[:, :1], dtype=torch.bool)
        init_latents, latent_mask = self._init_latents(image, mask, strength)
        level = schedule.levels[0]
        x = level.alpha * init_latents + level.sigma * noise.randn(*self.space.shape)
        x0 = sampler_fn(keep_outside(denoise, init_latents, latent_mask), x, schedule, noise)
        return torch.where(mask, self.space.decode(x0), image)

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        names = ("sampler", "sampling_steps", "spacing", "eta")
        _, schedule = self._sampler_and_schedule(*map(options.get, names))
        if "image" in options:
            strength = _strength(options.get("strength"), options.get("mask"))
            schedule = schedule.shortened(max(1, round(strength * len(schedule))))
        sigmas = [level.karras_sigma for level in schedule.levels[:-1]]
        interval = options.get("interval", ())
        low, high = interval if len(interval) == 2 else (0.0, math.inf)
        idle: dict[str, str] = {}
        if low > sigmas[0] or high < sigmas[-1]:
            reason = f"no step lies between the sigmas {low:g} and {high:g} of interval"
            idle = dict.fromkeys(("guidance", "negative", "rescale"), reason)
        if options.get("guidance", self.config.guidance) == 1:
            idle |= dict.fromkeys(("negative", "rescale", "interval"), "guidance=1 is no guidance")
        if len(schedule) == 1:
            idle["eta"] = "a single step adds no noise"
        return {name: reason for name, reason in idle.items() if options.get(name)}

    def denoiser(
        self, captions: list[str], guidance: Guidance, threshold: str, negative: str = ""
    ) -> Denoise:
        """The network as samplers call it: x_t and its noise level -> estimate of x_0, for the
        captions, with guidance and threshold applied.
        """
        captions, process = caption_list(captions), self.process
        batch_size = len(captions)
        text = self.text.encode(captions)
        uncond_text = (
            self.text.encode([negative] * batch_size) if negative else self.text.null(batch_size)
        )
        both = TextFeatures.cat([text, uncond_text])

        def denoise(x_t: Tensor, level: NoiseLevel) -> Estimate:
            t = torch.full((batch_size,), level.timestep, device=x_t.device)
            if guidance.acts(level.karras_sigma):
                output = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
                predictions, variance = self.split_output(output)
                prediction = guidance.combine(*predictions.chunk(2))
                variance = None if variance is None else variance[:batch_size]
            else:
                prediction, variance = self.split_output(self.network(x_t, t, text))
            x0 = apply_threshold(process.to_x0(prediction, x_t, level), threshold)
            if variance is not None and process.config.variance == "learned_range":
                return Estimate(x0, variance_fraction=(variance + 1) / 2)
            return Estimate(x0, log_variance=variance)

        return denoise

    def _sampler_and_schedule(
        self,
        sampler: str | None = None,
        sampling_steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
    ) -> tuple[Sampler, SamplingSchedule]:
        """The sampler with its own arguments, and its schedule."""
        config = self.config
        name = config.sampler if sampler is None else sampler
        _check_sampler(name)
        parameters = inspect.signature(SAMPLERS[name]).parameters
        options: dict[str, float | str] = {}
        if eta is not None:
            if "eta" not in parameters:
                raise UserError(f"sampler={name} takes no eta: choose ddim or one with noise.")
            options["eta"] = eta
        if "variance" in parameters and not config.process.learns_variance:
            options["variance"] = config.process.variance
        spacing = config.spacing if spacing is None else spacing
        if spacing == "auto":
            spacing = "even" if name in EVENLY_SPACED else "karras"
        steps = config.sampling_steps if sampling_steps is None else sampling_steps
        return partial(SAMPLERS[name], **options), self.process.sampling_schedule(steps, spacing)

    def _init_latents(self, image: Tensor, mask: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """x_0 of `image`, (B, C, H, W), and its mask (B, 1, H, W): 1 where a pixel is masked.

        At strength 1 the masked pixels must not leak into the start: they are grey for the encoder,
        and x_0 is 0 under the mask.
        """
        latent_mask = F.max_pool2d(mask.float(), self.size // self.space.shape[-1])
        if strength < 1:
            return self.space.encode_image(image), latent_mask
        init_latents = self.space.encode_image(image.masked_fill(mask, 0.0))
        return init_latents * (1 - latent_mask), latent_mask

    # --- inspection --------------------------------------------------------------------

    def trajectory(
        self, captions: str | list[str], *, seed: int = 0, **options: Any
    ) -> list[SamplingStep]:
        """Every step of a sampling: x_t, its noise level and the estimate of x_0.

        Args:
            captions: B captions.
            seed: Seed of the noise, as of `generate`.
            **options: `sampling_steps`, `sampler`, `spacing`, `eta`, `guidance`, `negative`.

        Raises:
            UserError: for an unknown option, or a value that does not fit it.
        """
        captions, options = caption_list(captions), self.typed_options(options)
        scale = options.pop("guidance", self.config.guidance)
        negative = options.pop("negative", "")
        for name in options.keys() - {"sampling_steps", "sampler", "spacing", "eta"}:
            raise UserError(f"trajectory has no option {name}: leave it out.")
        sampler_fn, schedule = self._sampler_and_schedule(**options)
        steps: list[SamplingStep] = []

        def callback(step: int, x_t: Tensor, x0: Tensor) -> None:
            steps.append(SamplingStep(schedule.levels[step], x_t, x0))

        noise = NoiseStreams.for_pictures(seed, len(captions), self.device)
        with self.inference():
            denoise = self.denoiser(captions, Guidance(scale), self.config.threshold, negative)
            sampler_fn(denoise, noise.randn(*self.space.shape), schedule, noise, callback)
        return steps

    def frames(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """Every step of sampling: x_t, and the estimate of x_0."""
        frames = []
        for step in self.trajectory(caption, seed=seed):
            labels = (f"x_t, {_level_label(step)}", "estimate of x_0")
            frames.append(
                [LabelledImage(*one) for one in zip(labels, self._decoded(step), strict=True)]
            )
        return frames

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """Eight steps of sampling: x_t, and the estimate of x_0 below it."""
        steps = self.trajectory(caption, seed=seed)
        rows: list[list[LabelledImage]] = [[], []]
        for number in sorted({round(k * (len(steps) - 1) / 7) for k in range(8)}):
            label = _level_label(steps[number])
            for row, image in zip(rows, self._decoded(steps[number]), strict=True):
                row.append(LabelledImage(label, image))
        return rows

    def _decoded(self, step: SamplingStep) -> list[Tensor]:
        """Pictures (3, S, S) of x_t and of the estimate of x_0."""
        with self.inference():
            return [self.space.decode(x)[0].float().clamp(-1, 1) for x in (step.x_t, step.x0)]


def _level_label(step: SamplingStep) -> str:
    sigma = step.level.karras_sigma
    return f"sigma {sigma:.2g}" if math.isfinite(sigma) else "noise"


def _strength(strength: float | None, mask: Tensor | None) -> float:
    """Share of the steps that are taken from a picture."""
    if strength is None:
        return 0.6 if mask is None else 1.0
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength} must be above 0 and at most 1.")
    return strength


def keep_outside(denoise: Denoise, init_latents: Tensor, latent_mask: Tensor) -> Denoise:
    """`denoise` with x_0 replaced by `init_latents` outside the mask."""

    def inpaint(x_t: Tensor, level: NoiseLevel) -> Estimate:
        estimate = denoise(x_t, level)
        estimate.x0 = latent_mask * estimate.x0 + (1 - latent_mask) * init_latents
        return estimate

    return inpaint
