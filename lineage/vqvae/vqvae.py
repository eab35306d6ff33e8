"""VQ-VAE, the codec (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937).

The problem: a strong decoder ignores the continuous latents of a variational autoencoder, and no
language model can read them. What is new: a codebook between encoder and decoder, so that a picture
becomes a grid of tokens; a prior over the tokens is trained afterwards (`ar_prior.py`).

    equation 3    L = -ln p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2
                  the first term                         `VQVAE.losses`
                  the other two, and the codebook        `quantise.py`
    section 4.1   strided 4 x 4 convolutions and residual blocks (ReLU, 3 x 3, ReLU, 1 x 1)
                                                         `VQVAEEncoder`, `VQVAEDecoder`

-ln p(x | z_q) is a Gaussian's: the squared error over the variance of the data, as in the authors'
code. It is a mean over pixels, not a sum, so that its weight does not depend on the picture's size.

Axes: B pictures, C channels, D width of a code, H W grid of codes, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from lineage.bounds import DepthFromZero, Dim, Halvings, Int, PositiveFloat
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.nn.fast import channels_last_on_cpu
from lineage.nn.noise import NoiseStreams
from lineage.nn.vqgan_losses import psnr
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import Codec
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser, codebook_usage


@configuration
class VQVAEConfig:
    """Sizes of a VQ-VAE.

    Attributes:
        quantiser: The codebook.
        channels: C, number of channels of all layers but the first, which has half of them.
        res_channels: Number of channels inside a residual block.
        num_res_blocks: Number of residual blocks of the encoder, and of the decoder.
        num_downsamples: Number of strided convolutions; the factor is 2 to this power.
        data_variance: Variance of the data, by which the squared error is divided.
    """

    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    channels: Annotated[Int, Field(ge=2, le=2**16)] = 256
    res_channels: Dim = 256
    num_res_blocks: DepthFromZero = 2
    num_downsamples: Halvings = 2
    data_variance: PositiveFloat = 1.0

    @property
    def factor(self) -> int:
        """Number of pixels on a side of one grid cell."""
        return int(2**self.num_downsamples)

    @property
    def level_channels(self) -> list[int]:
        """Number of channels after each strided convolution of the encoder."""
        return [self.channels // 2, *[self.channels] * (self.num_downsamples - 1)]


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, res_channels: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, res_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(res_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


def residual_blocks(config: VQVAEConfig) -> list[nn.Module]:
    """The residual blocks of encoder or decoder."""
    return [
        ResidualBlock(config.channels, config.res_channels) for _ in range(config.num_res_blocks)
    ]


class VQVAEEncoder(nn.Module):
    """Pictures to a grid of vectors."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for channels in config.level_channels:
            layers += [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.ReLU()]
            in_channels = channels
        layers += [nn.Conv2d(in_channels, config.channels, 3, padding=1), *residual_blocks(config)]
        layers += [nn.ReLU(), nn.Conv2d(config.channels, config.quantiser.code_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D, H, W)."""
        return self.layers(channels_last_on_cpu(image, norms=False))


class VQVAEDecoder(nn.Module):
    """A grid of codes to pictures."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(config.quantiser.code_dim, config.channels, 3, padding=1),
            *residual_blocks(config),
            nn.ReLU(),
        ]
        in_channels = config.channels
        for channels in [*reversed(config.level_channels[:-1]), 3]:
            layers += [nn.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1), nn.ReLU()]
            in_channels = channels
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU on pixels

    def forward(self, z_q: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 3, S, S)."""
        return self.layers(channels_last_on_cpu(z_q, norms=False))


class VQVAE(Codec):
    """Encoder, codebook, decoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config, self.factor = config, config.factor
        self.num_codes = config.quantiser.num_codes
        self.encoder, self.decoder = VQVAEEncoder(config), VQVAEDecoder(config)
        self.quantiser = VectorQuantiser(config.quantiser)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self.encoder, self.quantiser, self.decoder]}

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        """Equation 3."""
        quantised = self.quantiser(self.encode_latents(batch.image))
        decoded = self.decode_latents(quantised.z_q)
        mse = self.track_mse(batch.image, decoded)
        nll = F.mse_loss(decoded.float(), batch.image) / self.config.data_variance
        yield Turn(
            "codec",
            {"reconstruction": nll, **quantised.terms},
            metrics=lambda: {"psnr": psnr(mse), **codebook_usage(self.quantiser.cluster_size)},
        )

    @property
    def codebook(self) -> Tensor:
        """(K, D) the code vectors."""
        return self.quantiser.codebook

    def encode_latents(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> vectors (B, H, W, D) before quantisation."""
        return rearrange(self.encoder(image), "b d h w -> b h w d")

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, 3, S, S)."""
        return self.decoder(rearrange(z_q, "b h w d -> b d h w"))

    def encode(self, image: Tensor) -> Tensor:
        return self.quantiser.nearest(self.encode_latents(image))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decode_latents(self.quantiser.lookup(ids)).float().clamp(-1, 1)
