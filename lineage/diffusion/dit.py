"""`dit`: latent diffusion by a transformer (Peebles and Xie 2023, arXiv:2212.09748), conditioned on
text.

The problem: diffusion models are UNets by habit; is the UNet needed? What is new: a plain
transformer over patches of the latents, with adaptive layer norms that start as the identity, gets
better the larger it is.

    section 3.2    the network                                             `networks/dit.py`
    section 3.1    diffusion in the latents of an autoencoder, with learned variances: algorithm 1
                   and L_hybrid                                            `DiffusionModel.losses`
                   classifier-free guidance                                `guidance.py`

Departures: captions in place of classes, see `networks/dit.py`. At the presets other than `paper`
the network predicts x_0, as in `ddpm`.
"""

from __future__ import annotations

from dataclasses import field

from lineage.config import configuration
from lineage.diffusion.ldm import KLAutoencoder, LatentDiffusionModel, LatentSpace
from lineage.diffusion.model import DiffusionConfig
from lineage.diffusion.networks.dit import DiT, DiTConfig
from lineage.diffusion.process import Process
from lineage.text.contract import TextEncoder


@configuration
class LatentDiTConfig(DiffusionConfig):
    """Latent diffusion by a transformer.

    Attributes:
        net: Sizes of the network.
    """

    net: DiTConfig = field(default_factory=DiTConfig)


def build_dit(
    config: LatentDiTConfig, autoencoder: KLAutoencoder, text: TextEncoder, size: int
) -> LatentDiffusionModel:
    """Latent diffusion by a transformer.

    Args:
        config: Network, process and sampling.
        autoencoder: Trained autoencoder; it is frozen.
        text: Encoder of the captions; trained with the network.
        size: S, side of the pictures in pixels.
    """
    space = LatentSpace(autoencoder, size)
    process = Process(config.process)
    out_channels = (2 if config.process.learns_variance else 1) * space.shape[0]
    network = DiT(config.net, text.word_dim, text.sentence_dim, space.shape, out_channels)
    return LatentDiffusionModel(network, process, text, space, config)
