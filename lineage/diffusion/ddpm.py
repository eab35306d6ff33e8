"""`ddpm`: denoising diffusion in pixels (Ho, Jain and Abbeel 2020, arXiv:2006.11239), conditioned
on text.

The problem: sample from p(picture | caption) without an adversary. What is new: learn to remove
noise. T small steps turn a picture into noise; a network that predicts the noise, trained by least
squares, leads from pure noise back to a picture, one step at a time.

    equation 4      x_t = alpha_t x_0 + sigma_t eps                        `Process.add_noise`
    algorithm 1     training: t ~ U, eps ~ N(0, 1), minimise
                    |eps - network(x_t, t, text)|^2                        `DiffusionModel.losses`
    algorithm 2     sampling: from x_T ~ N(0, 1), draw x_(t-1) from q(x_(t-1) | x_t, x_0) at the
                    estimate of x_0                                        `samplers/ddpm.py`
    equation 5, 7   the variational bound and the posterior                `bound.py`, `process.py`
    appendix B      the UNet                                               `networks/unet.py`

Added to the paper, which has no captions: text, by attention to the words and by the sentence
(`networks/unet.py`), and classifier-free guidance (`guidance.py`).

Departure, at the presets other than `paper`: the network predicts x_0 instead of the noise, over
the cosine schedule. On a small budget this is the largest single gain (results/ddpm/trials.md).
"""

from __future__ import annotations

from dataclasses import field

from lineage.config import configuration
from lineage.diffusion.model import DiffusionConfig, DiffusionModel
from lineage.diffusion.networks.unet import UNetConfig, make_unet
from lineage.diffusion.process import Process
from lineage.diffusion.space import PixelSpace
from lineage.text.contract import TextEncoder


@configuration
class DDPMConfig(DiffusionConfig):
    """A diffusion model in pixels.

    Attributes:
        unet: Sizes of the network.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)


def build_ddpm(config: DDPMConfig, text: TextEncoder, size: int) -> DiffusionModel:
    """Diffusion in pixels by a UNet.

    Args:
        config: Network, process and sampling.
        text: Encoder of the captions; trained with the network.
        size: S, side of the pictures in pixels.
    """
    config.unet.check_side(size, "size")
    process = Process(config.process)
    out_channels = 6 if config.process.learns_variance else 3
    network = make_unet(config.unet, text.word_dim, text.sentence_dim, 3, out_channels)
    return DiffusionModel(network, process, text, PixelSpace(size), config)
