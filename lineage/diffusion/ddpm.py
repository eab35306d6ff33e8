"""`ddpm`: denoising diffusion in pixels (Ho, Jain and Abbeel 2020, arXiv:2006.11239), told what to
draw.

The problem: to draw from p(picture | caption) without an adversary. What is new: learn to undo
noise. A picture is noised in T small steps; a network that predicts what the noise hid, trained by
plain least squares, can walk back from pure noise, one step at a time.

    algorithm 1 (training)   `Denoiser.losses`:  t ~ U, eps ~ N(0, 1), minimise |target - UNet(x_t,
                             t, text)|^2
    algorithm 2 (sampling)   `samplers.ddpm`, and its faster descendants
    equation 4, 7, 14        `process.py`; the bound of equation 5 is in `bound.py`
    appendix B               `unet.py`

Added to the paper, which knows no captions: text, by attention to the words and by the sentence
(`unet.py`), and guidance without a classifier (`guidance.py`).

Departures, at the presets that are not `paper`: the network predicts x_0 instead of the noise,
which on a small budget is the largest single gain (results/ has the trial), over the cosine
schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lineage.diffusion.model import Denoiser, DenoiserConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.errors import UserError
from lineage.text.contract import TextEncoder


@dataclass(frozen=True)
class DDPMConfig(DenoiserConfig):
    """A pixel diffusion model.

    Attributes:
        unet: the network.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)


def check_side(config: UNetConfig, side: int, what: str) -> None:
    """Raises `UserError` if a UNet cannot halve a side as often as it has to."""
    if side % config.smallest:
        raise UserError(
            f"A UNet of {len(config.multipliers)} levels at patch {config.patch} needs a side that "
            f"is a multiple of {config.smallest}, not {what}={side}."
        )


class DDPM(Denoiser):
    """Diffusion in pixels.

    Args:
        config: network, process and sampling.
        text: encoder of the captions; trained along.
        size: S, side of the pictures in pixels.
    """

    def __init__(self, config: DDPMConfig, text: TextEncoder, size: int) -> None:
        check_side(config.unet, size, "size")
        outputs = 6 if config.process.learned else 3
        network = UNet(config.unet, text.width, 3, outputs)
        super().__init__(config, text, size, (3, size, size), network)

    def from_pictures(self, images: Tensor) -> Tensor:
        return images

    def to_pictures(self, x: Tensor) -> Tensor:
        return x
