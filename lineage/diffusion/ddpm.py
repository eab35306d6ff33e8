"""`ddpm`: denoising diffusion in pixels (Ho, Jain and Abbeel 2020, arXiv:2006.11239), told what to
draw.

The problem: to draw from p(picture | caption) without an adversary. What is new: learn to undo
noise. A picture is noised in T small steps; a network that predicts what the noise hid, trained by
plain least squares, can walk back from pure noise, one step at a time.

    algorithm 1 (training)   `DDPM.losses`:  t ~ U, eps ~ N(0, 1), minimise |target - UNet(x_t, t,
    text)|^2 algorithm 2 (sampling)   `samplers.ddpm_sample`, and its faster descendant
    `ddim_sample` (the default) equation 4, 7, 14        `process.py`
    appendix B               `unet.py`

Added to the paper, which knows no captions:
    text     by attention to the words and by the sentence (`unet.py`);
    guidance without a classifier (Ho and Salimans 2022, arXiv:2207.12598): captions are dropped in
    training with
             probability `drop_text`; in sampling, x_0 is moved away from what the network would
             draw without a
             caption: x_0 = x_0(null) + guidance * (x_0(text) - x_0(null)). guidance = 1 is plain
                 sampling.

Departures, at the presets that are not `paper`: the network predicts x_0 instead of the noise,
which on a small budget is the largest single gain (results/ has the trial), over the cosine
schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lineage.contract import System, Turn
from lineage.data.contract import Batch
from lineage.diffusion.process import Process, ProcessConfig
from lineage.diffusion.samplers import SAMPLERS
from lineage.diffusion.unet import UNet, UNetConfig
from lineage.errors import UserError, nearest
from lineage.nn.draws import Draws
from lineage.text.contract import TextEncoder, TextFeatures


@dataclass(frozen=True)
class DDPMConfig:
    """A pixel diffusion model.

    Attributes:
        unet: the network.
        process: schedule and prediction.
        drop_text: share of training rows whose caption is dropped.
        steps, guidance, sampler: what `generate` uses unless told otherwise.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    drop_text: float = 0.1
    steps: int = 50
    guidance: float = 2.0
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(
                f"There is no sampler {self.sampler!r}: {nearest(self.sampler, SAMPLERS)}"
            )


class DDPM(System):
    """Noise to picture, caption in hand.

    Args:
        config: network, process and sampling.
        text: encoder of the captions; trained along.
        size: S, side of the pictures in pixels.
    """

    def __init__(self, config: DDPMConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        levels, patch = len(config.unet.multipliers), config.unet.patch
        smallest = patch * 2 ** (levels - 1)
        if size % smallest:
            raise UserError(
                f"A UNet of {levels} levels at patch {patch} needs a picture side that is a "
                f"multiple of {smallest}, not size={size}."
            )
        self.config, self.text, self.size = config, text, size
        self.process = Process(config.process)
        self.unet = UNet(config.unet, text.width)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"denoiser": [self.unet, self.text]}

    def losses(self, batch: Batch, text: TextFeatures, draws: Draws) -> Iterator[Turn]:
        """Algorithm 1, with some captions dropped."""
        x0 = batch.image  # (B, 3, S, S)
        t = draws.integers(self.process.steps)  # (B,)
        keep = draws.uniform() >= self.config.drop_text  # (B,)
        noise = draws.normal(*x0.shape[1:])  # (B, 3, S, S)
        output = self.unet(
            self.process.noised(x0, noise, t), t, text.where(keep, self.text.null(len(batch)))
        )
        yield (
            "denoiser",
            {f"mse_{self.config.process.prediction}": self.process.loss(output, x0, noise, t)},
        )

    def draw(
        self,
        captions: list[str],
        draws: Draws,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        negative: str = "",
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            steps: network evaluations, from 1 to T.
            guidance: 1 follows the caption as training did, more follows it more closely.
            sampler: `ddim` or `ddpm`.
            negative: what guidance moves away from, in place of "no caption".
        """
        name = self.config.sampler if sampler is None else sampler
        if name not in SAMPLERS:
            raise UserError(f"There is no sampler {name!r}: {nearest(name, SAMPLERS)}")
        scale = self.config.guidance if guidance is None else guidance
        wanted = self.config.steps if steps is None else steps
        text = self.text.encode(captions)
        away = (
            self.text.encode([negative] * len(captions))
            if negative
            else self.text.null(len(captions))
        )
        both = TextFeatures.cat([text, away])

        def denoise(noised: Tensor, t: Tensor) -> Tensor:
            if scale == 1.0:
                x0 = self.process.to_x0(self.unet(noised, t, text).float(), noised, t)
            else:
                output = self.unet(torch.cat([noised, noised]), torch.cat([t, t]), both).float()
                towards, without = (self.process.to_x0(o, noised, t) for o in output.chunk(2))
                x0 = without + scale * (towards - without)
            return x0.clamp(-1, 1)

        x = draws.normal(3, self.size, self.size)
        return SAMPLERS[name](denoise, x, self.process, wanted, draws)
