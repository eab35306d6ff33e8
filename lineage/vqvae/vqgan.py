"""VQGAN's codec (Esser, Rombach and Ommer 2021, arXiv:2012.09841, section 3.1).

The problem: a codec that is judged by its pixels spends its codes on what no eye would miss. What
is new: it is judged by how its pictures look, to a perceptual distance and to a discriminator of
patches, so that fewer codes suffice for a transformer.

    equation 4      `VQGAN.losses`: reconstruction and the quantiser's terms
    equations 5, 7  `lineage/nn/vqgan_losses.py`: the discriminator, its weight, the perceptual distance
    table 7         `lineage/nn/autoencoder.py`

Where the authors' code differs from the paper, it is followed: pixels are compared by |x - y|, not
by the square. Departure: beta is on the encoder's term, as in the paper
(`quantiser.misplaced_beta` has the authors' code).

Axes: B pictures, D width of a code, H W places, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least
from lineage.data.contract import Batch
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.nn.gan import dcgan_weights
from lineage.nn.noise import NoiseStreams
from lineage.nn.perceptual import LPIPS, load_lpips
from lineage.nn.vqgan_losses import adaptive_weight, judged, perceptual_distance
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import Codec
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes, and weights of the losses under the authors' names in brackets.

    Attributes:
        net: encoder and decoder; pictures may have another side than its `size`.
        quantiser: the codebook [n_embed, embed_dim, beta].
        discriminator, layers: its channels next to the picture and its strided layers [disc_ndf,
            disc_num_layers].
        adversary: factor of the adaptive weight [disc_weight]; 0 leaves the discriminator out.
        adversary_from: steps before it counts [disc_start].
        perceptual: weight of the perceptual distance [perceptual_weight].
        lpips: files of VGG16 and of LPIPS; without them the discriminator's features serve, which
            say little where `adversary` is 0 and it never learns.
    """

    net: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantiser: QuantiserConfig = field(
        default_factory=lambda: QuantiserConfig(1024, 256, codebook="loss", start="normal")
    )
    discriminator: int = 64
    layers: int = 3
    adversary: float = 0.8
    adversary_from: int = 0
    perceptual: float = 1.0
    lpips: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("discriminator", "layers"):
            at_least(f"codec.{name}", getattr(self, name), 1)
        for name in ("adversary", "adversary_from", "perceptual"):
            at_least(f"codec.{name}", getattr(self, name), 0)

    @property
    def factor(self) -> int:
        """Pixels of a side of a place."""
        return self.net.factor


class VQGAN(Codec):
    """Encoder, codebook, decoder, and the discriminator that teaches them."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        net, width = config.net, config.quantiser.width
        self.config, self.codes, self.factor = config, config.quantiser.codes, config.factor
        self.encoder, self.decoder = Encoder(net, net.latent), Decoder(net)
        self.quant_conv = nn.Conv2d(net.latent, width, 1)
        self.post_quant_conv = nn.Conv2d(width, net.latent, 1)
        self.quantiser = VectorQuantiser(config.quantiser)
        self.discriminator = PatchDiscriminator(config.discriminator, config.layers)
        self.discriminator.apply(dcgan_weights)
        # in a list, so that a network that the user has is not part of the codec's weights
        self.lpips: list[LPIPS] = [load_lpips(config.lpips)] if config.lpips else []
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        own = [self.encoder, self.quant_conv, self.quantiser, self.post_quant_conv, self.decoder]
        groups: dict[str, list[nn.Module]] = {"codec": own}
        if self.config.adversary > 0:
            groups["discriminator"] = [self.discriminator]
        return groups

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """The codec's turn, then the discriminator's, on the same reconstruction."""
        config, image, look = self.config, batch.image, self.discriminator
        found = self.quantiser(self._vectors(image))
        decoded = self._decoded(found.values)
        terms = {"pixels": (decoded.float() - image).abs().mean()}
        if config.perceptual > 0:
            terms["perceptual"] = config.perceptual * perceptual_distance(
                look, self.lpips, image, decoded
            )
        self.facts = {**self.note(image, decoded.detach()), **self.quantiser.usage()}
        adversarial = config.adversary > 0 and int(self.steps) >= config.adversary_from
        self.steps += 1
        if adversarial:
            fooled = -look(decoded).float().mean()
            whole = torch.stack(list(terms.values())).sum()
            weight = adaptive_weight(whole, fooled, self.decoder.conv_out.weight)
            self.facts["adversary_weight"] = weight
            terms["adversary"] = config.adversary * weight * fooled
        yield "codec", {**terms, **found.terms}

        if adversarial:
            turn, facts = judged(look, image, decoded)
            self.facts |= facts
            yield "discriminator", turn

    def _vectors(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, H, W, D), not yet codes."""
        return rearrange(self.quant_conv(self.encoder(image)), "b d h w -> b h w d")

    def _decoded(self, values: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(rearrange(values, "b h w d -> b d h w")))

    def encode(self, image: Tensor) -> Tensor:
        return self.quantiser.nearest(self._vectors(image))

    def decode(self, ids: Tensor) -> Tensor:
        return self._decoded(self.quantiser.values(ids)).float().clamp(-1, 1)
