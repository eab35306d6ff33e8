"""VQGAN, the codec (Esser, Rombach and Ommer 2021, arXiv:2012.09841, section 3.1).

The problem: a codec that is trained on squared errors spends its codes on details that nobody
notices. What is new: a perceptual distance and a discriminator of patches take their place, so that
fewer codes suffice, and a transformer can model them.

    equation 4        L_VQ = |x - x^| + LPIPS(x, x^) + codebook and commitment loss
                      `VQGAN.losses`; the last two in `quantise.py`
    equations 5 to 7  min_G max_D  L_VQ + lambda L_GAN
                      L_GAN, lambda and LPIPS in `lineage/nn/vqgan_losses.py`
    table 7           encoder, decoder and discriminator, in `lineage/nn/autoencoder.py`

Where the authors' code differs from the paper, this file follows the code: pixels are compared by
|x - x^|, not by its square. Departure: beta is the weight of the commitment loss, as in the paper
(`quantiser.misplaced_beta` has the authors' code).

Axes: B pictures, D width of a code, H W grid of codes, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.bounds import Dim, Halvings, NonNegativeFloat, NonNegativeInt, Texts
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.nn.gan import dcgan_weights
from lineage.nn.noise import NoiseStreams
from lineage.nn.perceptual import LPIPS, load_lpips
from lineage.nn.vqgan_losses import (
    adaptive_disc_weight,
    hinge_disc_loss,
    perceptual_distance,
    psnr,
)
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import Codec
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser, codebook_usage


@configuration
class VQGANConfig:
    """Sizes and weights of the losses, under the authors' names in brackets.

    Attributes:
        net: Sizes of encoder and decoder.
        quantiser: The codebook [n_embed, embed_dim, beta].
        disc_channels: Number of channels of the discriminator's first layer [disc_ndf].
        disc_layers: Number of its convolutions of stride 2 [disc_num_layers].
        disc_weight: Weight of the adversarial loss beside the adaptive one [disc_weight]; 0 trains
            no discriminator.
        disc_start: Number of steps before the adversarial loss sets in [disc_start].
        perceptual_weight: Weight of the perceptual distance [perceptual_weight].
        lpips: Files of VGG16 and of LPIPS. Without them the discriminator's features are compared,
            which say little if `disc_weight` is 0.
    """

    net: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantiser: QuantiserConfig = field(
        default_factory=lambda: QuantiserConfig(
            num_codes=1024, code_dim=256, update="loss", init="normal"
        )
    )
    disc_channels: Dim = 64
    disc_layers: Halvings = 3
    disc_weight: NonNegativeFloat = 0.8
    disc_start: NonNegativeInt = 0
    perceptual_weight: NonNegativeFloat = 1.0
    lpips: Texts = ()


class VQGAN(Codec):
    """Encoder, codebook, decoder, and the discriminator that they are trained with."""

    step: Tensor

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        net, code_dim = config.net, config.quantiser.code_dim
        self.config, self.factor = config, net.factor
        self.num_codes = config.quantiser.num_codes
        self.encoder, self.decoder = Encoder(net, net.z_channels), Decoder(net)
        self.quant_conv = nn.Conv2d(net.z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, net.z_channels, 1)
        self.quantiser = VectorQuantiser(config.quantiser)
        self.discriminator = PatchDiscriminator(config.disc_channels, config.disc_layers)
        self.discriminator.apply(dcgan_weights)
        self.lpips: LPIPS | None = load_lpips(config.lpips) if config.lpips else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def groups(self) -> dict[str, list[nn.Module]]:
        codec = [self.encoder, self.quant_conv, self.quantiser, self.post_quant_conv, self.decoder]
        groups: dict[str, list[nn.Module]] = {"codec": codec}
        if self.config.disc_weight > 0:
            groups["discriminator"] = [self.discriminator]
        return groups

    def losses(
        self, batch: Batch, text: TextFeatures | None, noise: NoiseStreams
    ) -> Iterator[Turn]:
        """Equations 4 to 7: the codec's turn, then the discriminator's on the same pictures."""
        config, image, disc = self.config, batch.image, self.discriminator
        quantised = self.quantiser(self.encode_latents(image))
        decoded = self.decode_latents(quantised.z_q)
        mse = self.track_mse(image, decoded)
        metrics = {"psnr": psnr(mse)}

        terms = {"pixels": F.l1_loss(decoded.float(), image)}
        if config.perceptual_weight > 0:
            distance = perceptual_distance(disc, self.lpips, image, decoded)
            terms["perceptual"] = config.perceptual_weight * distance
        adversarial = config.disc_weight > 0 and int(self.step) >= config.disc_start
        self.step += 1
        if adversarial:
            nll_loss = torch.stack(list(terms.values())).sum()
            generator_loss = -disc(decoded).float().mean()
            last_layer = self.decoder.conv_out.weight
            weight = adaptive_disc_weight(nll_loss, generator_loss, last_layer)
            terms["generator"] = config.disc_weight * weight * generator_loss
            metrics["adaptive_disc_weight"] = weight
        terms |= quantised.terms
        yield Turn("codec", terms, lambda: metrics | codebook_usage(self.quantiser.cluster_size))

        if adversarial:
            yield Turn("discriminator", *hinge_disc_loss(disc, image, decoded))

    @property
    def codebook(self) -> Tensor:
        """(K, D) the code vectors."""
        return self.quantiser.codebook

    def encode_latents(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> vectors (B, H, W, D) before quantisation."""
        return rearrange(self.quant_conv(self.encoder(image)), "b d h w -> b h w d")

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(rearrange(z_q, "b h w d -> b d h w")))

    def encode(self, image: Tensor) -> Tensor:
        return self.quantiser.nearest(self.encode_latents(image))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decode_latents(self.quantiser.lookup(ids)).float().clamp(-1, 1)
