"""What all diffusion systems of this package share: the training step, sampling and editing. The
network and the space that it works in (pixels or latents) are theirs.

    training    Ho et al. 2020, algorithm 1, with captions dropped for guidance
    sampling    a sampler of `samplers.py` along a path, guided as in `guidance.py`
    editing     SDEdit (Meng et al. 2022, arXiv:2108.01073, section 3.2): noise a given picture part
                of the way, and come back by the caption; inpainting by replacement (Song et al.
                2021, arXiv:2011.13456, appendix I.2; GLIDE, section 2.4): where the picture is
                given, it is put in place of each estimate of x_0

Axes: B pictures, C channels, H W of the space; 3, S S of the pictures.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.data.contract import Batch
from lineage.diffusion.bound import hybrid_term
from lineage.diffusion.guidance import THRESHOLDS, Guidance, bounded
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.samplers.k_diffusion import Callback, Denoise, Estimate, ignore
from lineage.diffusion.schedules import SPACINGS, Path, Point
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Named, System, Turn
from lineage.text.contract import TextEncoder, TextFeatures

AT_ONCE = 2**22  # pixels' values of the pictures that are drawn together, at most
AUTO = "auto"  # even steps for the samplers of the process's coordinates, Karras' for the others
EVEN = ("ddpm", "ddim", "flow_euler")


@dataclass(frozen=True)
class DenoiserConfig:
    """What every diffusion system has.

    Attributes:
        process: schedule, prediction and loss.
        drop_text: share of training rows whose caption is dropped.
        steps, guidance, sampler, spacing, threshold: what `generate` uses unless told otherwise;
            see `Denoiser.draw`.
    """

    process: ProcessConfig = field(default_factory=ProcessConfig)
    drop_text: float = 0.1
    steps: int = 50
    guidance: float = 2.0
    sampler: str = "ddim"
    spacing: str = AUTO
    threshold: str = "clip"

    def __post_init__(self) -> None:
        one_of("model.sampler", self.sampler, tuple(SAMPLERS))
        one_of("model.spacing", self.spacing, (AUTO, *SPACINGS))
        one_of("model.threshold", self.threshold, THRESHOLDS)
        at_least("model.steps", self.steps, 1)
        if not 0 <= self.drop_text < 1:
            raise UserError(f"model.drop_text={self.drop_text} must be from 0 to below 1.")


@dataclass(frozen=True)
class Plan:
    """How one call samples: the knobs of `Denoiser.draw`, settled."""

    sampler: str
    path: Path
    guidance: Guidance
    threshold: str
    own: dict[str, Any]


class Denoiser(System):
    """Noise to picture, caption in hand.

    Args:
        config: process and sampling.
        text: encoder of the captions; trained along.
        size: S, side of the pictures in pixels.
        shape: (C, H, W) of the space.
        network: (x_t, t, text) to the prediction.
    """

    begun = "edit"

    def __init__(
        self,
        config: DenoiserConfig,
        text: TextEncoder,
        size: int,
        shape: tuple[int, int, int],
        network: nn.Module,
    ) -> None:
        super().__init__()
        self.config, self.text, self.size, self.shape = config, text, size, shape
        self.process = Process(config.process)
        self.network = network
        self.at_once = max(1, min(self.at_once, AT_ONCE // (3 * size**2)))

    # --- the space: pixels unless a system says otherwise -------------------------------------

    def clean(self, batch: Batch, draws: NoiseStreams) -> Tensor:
        """x_0 of a batch, (B, C, H, W)."""
        return self.from_pictures(batch.image)

    @abstractmethod
    def from_pictures(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> x_0 (B, C, H, W)."""

    @abstractmethod
    def to_pictures(self, x: Tensor) -> Tensor:
        """x_0 (B, C, H, W) -> (B, 3, S, S)."""

    # --- training -------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"denoiser": [self.network, self.text]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Algorithm 1, with some captions dropped."""
        process, config = self.process, self.config
        x0 = self.clean(batch, draws)
        t = draws.randint(process.steps)  # (B,)
        keep = draws.rand() >= config.drop_text  # (B,)
        noise = draws.randn(*self.shape)  # (B, C, H, W)
        noised = process.noised(x0, noise, t)
        output = self.network(noised, t, text.where(keep, self.text.null(len(batch))))
        predicted = output.chunk(2, dim=1)[0] if config.process.learned else output
        terms = {f"mse_{config.process.prediction}": process.mse(predicted, x0, noise, t).mean()}
        if config.process.learned:
            terms["bound"] = hybrid_term(process, output, x0, noised, t).mean()
        yield "denoiser", terms

    # --- sampling -------------------------------------------------------------------------------

    def draw(
        self,
        captions: list[str],
        draws: NoiseStreams,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        negative: str = "",
        spacing: str | None = None,
        eta: float | None = None,
        rescale: float = 0.0,
        interval: tuple[float, ...] = (),
        threshold: str = "",
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            steps: of the sampler, from 1 to T; some evaluate the network twice in each.
            guidance: 1 follows the caption as training did, more follows it more closely.
            sampler: a name in `samplers.SAMPLERS`.
            negative: what guidance moves away from, in place of "no caption".
            spacing: of the steps, a name in `schedules.SPACINGS`; `auto` is `even` for `ddpm`,
                `ddim` and `flow_euler`, and `karras` for the others.
            eta: how much noise the sampler adds, where it can be told.
            rescale: see `guidance.py`.
            interval: two sigmas between which there is guidance, such as 0.3,3; none for always.
            threshold: keeps x_0 in range: `none`, `clip` or `dynamic`.
        """
        plan = self._plan(
            steps, guidance, sampler, spacing, eta, rescale, tuple(interval), threshold
        )
        return self.to_pictures(self.sample(captions, draws, plan, negative))

    def _plan(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        rescale: float = 0.0,
        interval: tuple[float, ...] = (),
        threshold: str = "",
    ) -> Plan:
        """The knobs that are given, and the configuration's for those that are None."""

        def or_else(value: Any, name: str) -> Any:
            return getattr(self.config, name) if value is None else value

        name, kind = or_else(sampler, "sampler"), or_else(threshold or None, "threshold")
        one_of("sampler", name, tuple(SAMPLERS))
        one_of("threshold", kind, THRESHOLDS)
        takes = inspect.signature(SAMPLERS[name]).parameters
        if eta is not None and "eta" not in takes:
            raise UserError(f"sampler={name} takes no eta: choose ddim or one with noise.")
        if eta is not None:
            at_least("eta", eta, 0)
        if len(interval) not in (0, 2):
            raise UserError(f"interval={interval} must be two sigmas, as in interval=0.3,3.")
        own: dict[str, Any] = {} if eta is None else {"eta": eta}
        if "variance" in takes and not self.config.process.learned:
            own["variance"] = self.config.process.variance
        placed = or_else(spacing, "spacing")
        if placed == AUTO:
            placed = "even" if name in EVEN else "karras"
        path = self.process.path(or_else(steps, "steps"), placed)
        joined = Guidance(or_else(guidance, "guidance"), rescale, *interval)
        return Plan(name, path, joined, kind, own)

    def sample(
        self,
        captions: list[str],
        draws: NoiseStreams,
        plan: Plan,
        negative: str = "",
        callback: Callback = ignore,
    ) -> Tensor:
        """x_0 (B, C, H, W) from noise."""
        x = draws.randn(*self.shape)
        denoise = self.denoise(captions, plan, negative)
        return SAMPLERS[plan.sampler](denoise, x, plan.path, draws, callback, **plan.own)

    def denoise(self, captions: list[str], plan: Plan, negative: str = "") -> Denoise:
        """The network as samplers want it: told the captions, guided, and kept in range."""
        count, guidance, process = len(captions), plan.guidance, self.process
        text = self.text.encode(captions)
        away = self.text.encode([negative] * count) if negative else self.text.null(count)
        both = TextFeatures.cat([text, away]) if guidance.scale != 1 else text

        def denoise(noised: Tensor, level: Point) -> Estimate:
            time = torch.full((count,), level.time, device=noised.device)
            if not guidance.acts(level.sigma):
                output, variance = self._parts(self.network(noised, time, text))
            else:
                outputs = self.network(torch.cat([noised, noised]), torch.cat([time, time]), both)
                output, variance = self._parts(outputs)
                output = guidance.join(*output.chunk(2))
                variance = None if variance is None else variance[:count]
            x0 = bounded(process.to_x0(output, noised, level), plan.threshold)
            if process.config.variance == "learned_range":
                return Estimate(x0, share=None if variance is None else (variance + 1) / 2)
            return Estimate(x0, log_variance=variance)

        return denoise

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output, in full precision, as prediction and what it says of variances."""
        output = output.float()
        if not self.config.process.learned:
            return output, None
        predicted, variance = output.chunk(2, dim=1)
        return predicted, variance

    # --- editing --------------------------------------------------------------------------------

    def edit(
        self,
        captions: str | Sequence[str],
        images: Tensor,
        *,
        mask: Tensor | None = None,
        strength: float | None = None,
        seed: int = 0,
        **knobs: Any,
    ) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] made from `images` by the captions.

        Args:
            images: (B, 3, S, S) in [-1, 1].
            mask: (B, 1, S, S) bool, True where to paint anew; the rest stays as it is, to the bit.
                None for all of the picture.
            strength: share of the way to noise from which to come back, above 0 up to 1. By default
                0.6 without a mask and 1 with one.
            **knobs: those of `generate`.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        wanted = (len(captions), 3, self.size, self.size)
        if images.shape != wanted:
            raise UserError(
                f"{len(captions)} captions need as many pictures of {self.size} x {self.size} "
                f"pixels, not {tuple(images.shape)}."
            )
        if mask is not None and mask.shape != (wanted[0], 1, *wanted[2:]):
            raise UserError(
                f"The mask must be {(wanted[0], 1, *wanted[2:])}, not {tuple(mask.shape)}."
            )
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"The mask must be of bool, not of {mask.dtype}.")
        share = (0.6 if mask is None else 1.0) if strength is None else strength
        if not 0 < share <= 1:
            raise UserError(f"strength={share} must be above 0 and at most 1.")
        settled = self.typed_knobs(knobs)
        negative = settled.pop("negative", "")
        plan = self._plan(**settled)
        everywhere = torch.ones(wanted[0], 1, *wanted[2:], dtype=torch.bool)
        masks = iter((everywhere if mask is None else mask).to(self.device).split(self.at_once))
        parts = iter(images.to(self.device).split(self.at_once))

        def part(chunk: list[str], draws: NoiseStreams) -> Tensor:
            given, anew = next(parts), next(masks)
            x = self._repainted(chunk, draws, plan, negative, given, anew, share)
            return torch.where(anew, self.to_pictures(x).float().clamp(-1, 1), given)

        return torch.cat(list(self.in_parts(captions, seed, part)))

    def _repainted(
        self,
        captions: list[str],
        draws: NoiseStreams,
        plan: Plan,
        negative: str,
        given: Tensor,
        anew: Tensor,
        share: float,
    ) -> Tensor:
        """x_0 (B, C, H, W) that is `given` where it is not `anew`."""
        seen = given if share < 1 else given.masked_fill(anew, 0.0)  # no trace of what is to go
        known = self.from_pictures(seen)
        factor = self.size // self.shape[-1]
        free = F.max_pool2d(anew.float(), factor)  # every place with a pixel to paint
        path = plan.path.shortened(max(1, round(share * len(plan.path))))
        guess = self.denoise(captions, plan, negative)

        def denoise(noised: Tensor, level: Point) -> Estimate:
            found = guess(noised, level)
            found.x0 = free * found.x0 + (1 - free) * known
            return found

        start = path.points[0]
        begun = known if share < 1 else known * (1 - free)  # no trace of what is to go
        x = start.signal * begun + start.noise * draws.randn(*self.shape)
        return SAMPLERS[plan.sampler](denoise, x, path, draws, ignore, **plan.own)

    # --- what a reader wants to see -------------------------------------------------------------

    def inside(self, caption: str, *, seed: int = 0) -> list[list[Named]]:
        """The way from noise to picture, at eight moments: x_t, and the estimate of x_0 there."""
        plan = self._plan()
        last = len(plan.path) - 1
        moments = sorted({round(k * last / 7) for k in range(8)})

        def film(chunk: list[str], draws: NoiseStreams) -> list[list[Named]]:
            rows: list[list[Named]] = [[], []]

            def keep(step: int, x: Tensor, x0: Tensor) -> None:
                if step in moments:
                    sigma = plan.path.points[step].sigma
                    name = f"sigma {sigma:.2g}" if math.isfinite(sigma) else "noise"
                    for row, each in zip(rows, (x, x0), strict=True):
                        row.append((name, self.to_pictures(each)[0].float().clamp(-1, 1)))

            self.sample(chunk, draws, plan, callback=keep)
            return rows

        return next(iter(self.in_parts([caption], seed, film)))
