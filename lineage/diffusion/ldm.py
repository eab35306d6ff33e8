"""`ldm`: latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

The problem: in pixels, a diffusion model spends most of its work on details that hardly anybody
sees. What is new: an autoencoder removes them first; diffusion happens in its small latent space,
and attends to the text.

    section 3.1, appendix G   z ~ q(z | x) = N(mean, variance), x^ = D(z):
                              |x - x^| + perceptual + lambda L_GAN + kl_weight KL(q | N(0, 1))
                                                                    `KLAutoencoder.losses`
    appendix G                z / std(z) is what diffusion works on                `latent_scale`
    section 3.2, equation 2   minimise |target - network(z_t, t, text)|^2          `LatentSpace` in
                                                                           `DiffusionModel.losses`
    section 3.3, equation 3   cross-attention to the words    `networks/spatial_transformer.py`

Where the authors' code differs from the paper, the code is followed: pixels are compared by
|x - x^|, and the KL term has weight 1e-6 beside a sum over the picture. Departures: all sums are
means here, of the pixels and of the KL term, which leaves their ratio unchanged. At the small
presets pixels are compared by squares, which leave the white background sooner, and there is
neither an adversarial nor a perceptual term.

Axes: B pictures, S side, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Dim, Halvings, NonNegativeFloat, NonNegativeInt, Texts
from lineage.config import configuration
from lineage.data.contract import Batch, CaptionedDataset
from lineage.diffusion.model import DiffusionConfig, DiffusionModel
from lineage.diffusion.networks.unet import UNetConfig, make_unet
from lineage.diffusion.process import Process
from lineage.diffusion.space import Space
from lineage.errors import UserError
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.nn.gan import dcgan_weights
from lineage.nn.noise import NoiseStreams, stream_seed
from lineage.nn.perceptual import LPIPS, load_lpips
from lineage.nn.vqgan_losses import (
    adaptive_disc_weight,
    hinge_disc_loss,
    perceptual_distance,
    psnr,
)
from lineage.system import Trainable, Turn
from lineage.text.contract import TextEncoder, TextFeatures

# --- section 3.1: perceptual compression ----------------------------------------------------------


@configuration
class KLConfig:
    """An autoencoder and its losses, under the authors' names in brackets.

    Attributes:
        net: Sizes of encoder and decoder; pictures may have another side than its `resolution`.
        latent_channels: C, number of channels of the latents [embed_dim].
        kl_weight: Weight of the KL term beside a sum over pixels [kl_weight].
        pixel_loss: Loss of a pixel: `l1` or `l2`.
        disc_channels: Number of channels of the discriminator's first layer [disc_ndf].
        disc_layers: Number of its convolutions of stride 2 [disc_num_layers].
        disc_weight: Factor of the adaptive weight; 0 leaves the adversarial loss out [disc_weight].
        disc_start: Number of steps before the adversarial loss starts [disc_start].
        perceptual_weight: Weight of the perceptual distance [perceptual_weight].
        lpips: Files of VGG16 and of LPIPS; without them the discriminator's features are compared.
    """

    net: AutoencoderConfig = field(
        default_factory=lambda: AutoencoderConfig(
            channel_mult=(1, 2, 4, 4), attn_resolutions=(), z_channels=4
        )
    )
    latent_channels: Dim = 4
    kl_weight: NonNegativeFloat = 1e-6
    pixel_loss: Literal["l1", "l2"] = "l1"
    disc_channels: Dim = 64
    disc_layers: Halvings = 3
    disc_weight: NonNegativeFloat = 0.5
    disc_start: NonNegativeInt = 50_001
    perceptual_weight: NonNegativeFloat = 1.0
    lpips: Texts = ()


@dataclass
class DiagonalGaussian:
    """A normal distribution over latents, mean and log variance (B, C, H, W) each."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """From means and log variances (B, 2 C, H, W); log variances are clipped against
        overflow.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    @property
    def std(self) -> Tensor:
        return (0.5 * self.log_variance).exp()

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std eps."""
        return self.mean + self.std * eps

    def kl(self) -> Tensor:
        """KL to N(0, 1) in nats, a sum over each row, (B,)."""
        kl = 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)
        return kl.flatten(1).sum(1)


class KLAutoencoder(Trainable):
    """Pictures to latents and back. It reads no captions."""

    step: Tensor

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        net, channels = config.net, config.latent_channels
        self.config, self.factor, self.text = config, net.factor, None
        self.encoder, self.decoder = Encoder(net, 2 * net.z_channels), Decoder(net)
        self.quant_conv = nn.Conv2d(2 * net.z_channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, net.z_channels, 1)
        self.discriminator: PatchDiscriminator | None = None
        if config.disc_weight > 0 or config.perceptual_weight > 0:
            self.discriminator = PatchDiscriminator(config.disc_channels, config.disc_layers)
            self.discriminator.apply(dcgan_weights).requires_grad_(config.disc_weight > 0)
        self.lpips: LPIPS | None = load_lpips(config.lpips) if config.lpips else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def groups(self) -> dict[str, list[nn.Module]]:
        own = [self.encoder, self.quant_conv, self.post_quant_conv, self.decoder]
        groups: dict[str, list[nn.Module]] = {"autoencoder": own}
        if self.discriminator is not None and self.config.disc_weight > 0:
            groups["discriminator"] = [self.discriminator]
        return groups

    def check_shape(self, height: int, width: int) -> None:
        for side in (height, width):
            if side % self.factor:
                raise UserError(
                    f"A side of {side} pixels must be a multiple of {self.factor}, the side of a "
                    "latent in pixels."
                )

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Pictures (B, 3, S, S) in [-1, 1] -> latents (B, C, S / factor, S / factor)."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)).float())

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(latents)).float()

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        """The autoencoder's turn, then the discriminator's, on the same reconstruction."""
        config, image, disc = self.config, batch.image, self.discriminator
        posterior = self.encode(image)
        decoded = self.decode(posterior.sample(noise.randn(*posterior.mean.shape[1:])))
        pixel_loss = F.l1_loss if config.pixel_loss == "l1" else F.mse_loss
        terms = {
            "pixels": pixel_loss(decoded, image),
            "kl": config.kl_weight * posterior.kl().mean() / image[0].numel(),
        }
        if disc is not None and config.perceptual_weight > 0:
            distance = perceptual_distance(disc, self.lpips, image, decoded)
            terms["perceptual"] = config.perceptual_weight * distance
        adversarial = config.disc_weight > 0 and int(self.step) >= config.disc_start
        self.step += 1
        weights: dict[str, Tensor] = {}
        if disc is not None and adversarial:
            generator_loss = -disc(decoded).float().mean()
            nll_loss = terms["pixels"] + terms.get("perceptual", 0)
            last_layer = self.decoder.conv_out.weight
            weight = adaptive_disc_weight(nll_loss, generator_loss, last_layer)
            terms["generator"] = config.disc_weight * weight * generator_loss
            weights["adaptive_disc_weight"] = weight

        def metrics() -> dict[str, Tensor]:
            mse = F.mse_loss(decoded.detach().clamp(-1, 1), image)
            return {"psnr": psnr(mse), "latent_std": posterior.mean.detach().std(), **weights}

        yield Turn("autoencoder", terms, metrics)

        if disc is not None and adversarial:
            yield Turn("discriminator", *hinge_disc_loss(disc, image, decoded))


# --- section 3.2: the latent space ----------------------------------------------------------------


class LatentSpace(Space):
    """Latents of a frozen autoencoder, scaled to standard deviation 1.

    Attributes:
        scale: Factor on the latents, (); see `latent_scale`.

    Args:
        autoencoder: Trained autoencoder.
        size: S, side of the pictures in pixels.
    """

    scale: Tensor

    def __init__(self, autoencoder: KLAutoencoder, size: int) -> None:
        super().__init__()
        if size % autoencoder.factor:
            raise UserError(
                f"size={size} must be a multiple of {autoencoder.factor}, the side of a latent in "
                "pixels."
            )
        self.autoencoder, self.size = autoencoder.requires_grad_(False), size
        self.shape = self.shape_of(size, size)
        self.register_buffer("scale", torch.ones(()))

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        self.autoencoder.check_shape(height, width)
        factor = self.autoencoder.factor
        return self.autoencoder.config.latent_channels, height // factor, width // factor

    def train(self, mode: bool = True) -> LatentSpace:
        """The autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Means and log variances (B, 2 C, H, W) of pictures, in float32 under any autocast."""
        images = images.to(self.scale.device)
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.autoencoder.encode(images)
        return torch.cat([posterior.mean, posterior.log_variance], dim=1)

    def posterior(self, batch: Batch) -> DiagonalGaussian:
        """q(z | x) of a batch, from its cached moments `batch.extra["latents"]` if it has them."""
        moments = batch.extra.get("latents")
        moments = self.moments(batch.image) if moments is None else moments.to(self.scale.device)
        return DiagonalGaussian.from_moments(moments)

    def encode(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        posterior = self.posterior(batch)
        return posterior.sample(noise.randn(*posterior.mean.shape[1:])) * self.scale

    def encode_image(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images).mean * self.scale

    def decode(self, x0: Tensor) -> Tensor:
        return self.autoencoder.decode(x0 / self.scale)


SCALE_PICTURES = 1024
"""Number of pictures over which `latent_scale` measures, at most."""


@torch.no_grad()
def latent_scale(space: LatentSpace, dataset: CaptionedDataset) -> Tensor:
    """Appendix G: 1 / std(z) over the latents of the first pictures of a data set, ()."""
    latents, device = [], space.scale.device
    for first in range(0, min(SCALE_PICTURES, len(dataset)), 32):
        rows = range(first, min(first + 32, SCALE_PICTURES, len(dataset)))
        noise = NoiseStreams((stream_seed("latent scale", row) for row in rows), device)
        posterior = space.posterior(dataset.batch(rows, [0] * len(rows), seed=0))
        latents.append(posterior.sample(noise.randn(*space.shape)).double())
    scale = 1 / torch.cat(latents).std(correction=0).clamp(min=1e-6).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(scale, src=0)  # the same to the bit in all processes
    return scale


class LatentDiffusionModel(DiffusionModel):
    """A diffusion model in latents, whose autoencoder can be measured by itself."""

    space: LatentSpace

    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1], encoded and decoded by the autoencoder."""
        return self.space.decode(self.space.encode_image(images)).clamp(-1, 1)

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """The autoencoder's `psnr` in dB, (B,)."""
        error = (self.reconstruct(batch.image) - batch.image).square().flatten(1).mean(1)
        return {"psnr": psnr(error)}


# --- section 3.3: conditioning --------------------------------------------------------------------


@configuration
class LDMConfig(DiffusionConfig):
    """Latent diffusion by a UNet.

    Attributes:
        unet: Sizes of the network.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)


def build_ldm(
    config: LDMConfig, autoencoder: KLAutoencoder, text: TextEncoder, size: int
) -> LatentDiffusionModel:
    """Latent diffusion by a UNet that attends to the words.

    Args:
        config: Network, process and sampling.
        autoencoder: Trained autoencoder; it is frozen.
        text: Encoder of the captions; trained with the network.
        size: S, side of the pictures in pixels.
    """
    space = LatentSpace(autoencoder, size)
    channels, side, _ = space.shape
    config.unet.check_side(side, "side of the latents")
    process = Process(config.process)
    out_channels = (2 if config.process.learns_variance else 1) * channels
    network = make_unet(config.unet, text.word_dim, text.sentence_dim, channels, out_channels)
    return LatentDiffusionModel(network, process, text, space, config)
