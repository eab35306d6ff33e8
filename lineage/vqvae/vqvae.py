"""VQ-VAE's codec (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937).

The problem: an autoencoder whose latents are free numbers leaves nothing for a language model to
read, and with a strong decoder it ignores them. What is new: between encoder and decoder stands a
codebook, so a picture is a grid of tokens; a prior over them is learnt afterwards (`dalle.py`).

    section 3.1, 3.2   the codebook, straight-through gradient and losses: `quantise.py`
    section 4.1        `VQVAEEncoder`, `VQVAEDecoder`: strided convolutions of 4 x 4, and residual
                       blocks (ReLU, 3 x 3, ReLU, 1 x 1)
    equation 3         `VQVAE.losses`: reconstruction, and what the quantiser adds

The reconstruction is a Gaussian's: the squared error, as a mean over pixels and not a sum, so that
its weight does not depend on the side; it is divided by the variance of the data in the authors'
code, for which `variance` stands.

Axes: B pictures, C channels, D width of a code, H W places, S side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.config import at_least
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import Turn
from lineage.text.contract import TextFeatures
from lineage.vqvae.codec import Codec
from lineage.vqvae.quantise import QuantiserConfig, VectorQuantiser


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes.

    Attributes:
        quantiser: the codebook.
        channels: C, of all layers but the first, which has half of them.
        inner: of the residual blocks' 3 x 3 convolutions.
        blocks: residual blocks on each side.
        halvings: strided convolutions; the factor is 2 to that power.
        variance: of the data, by which the squared error is divided.
    """

    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    channels: int = 256
    inner: int = 256
    blocks: int = 2
    halvings: int = 2
    variance: float = 1.0

    def __post_init__(self) -> None:
        at_least("codec.channels", self.channels, 2)
        for name in ("inner", "halvings"):
            at_least(f"codec.{name}", getattr(self, name), 1)
        at_least("codec.blocks", self.blocks, 0)
        if not self.variance > 0:
            raise UserError(f"codec.variance={self.variance} must be above 0.")

    @property
    def factor(self) -> int:
        """Pixels of a side of a place."""
        return int(2**self.halvings)

    def widths(self) -> list[int]:
        """Channels from the picture's side down to the places'."""
        return [self.channels // 2, *[self.channels] * (self.halvings - 1)]


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, inner, 3, padding=1)
        self.conv1 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class VQVAEEncoder(nn.Module):
    """Pictures to a grid of vectors."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in config.widths():
            layers += [nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.Conv2d(inputs, config.channels, 3, padding=1))
        layers += [Residual(config.channels, config.inner) for _ in range(config.blocks)]
        width = config.quantiser.width
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(config.channels, width, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D, H, W)."""
        return self.layers(image)


class VQVAEDecoder(nn.Module):
    """A grid of codes to pictures."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(config.quantiser.width, config.channels, 3, padding=1),
            *(Residual(config.channels, config.inner) for _ in range(config.blocks)),
            nn.ReLU(),
        ]
        inputs = config.channels
        for width in [*reversed(config.widths()[:-1]), 3]:
            layers += [nn.ConvTranspose2d(inputs, width, 4, stride=2, padding=1), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, grid: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 3, S, S)."""
        return self.layers(grid)


class VQVAE(Codec):
    """Encoder, codebook, decoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config, self.codes, self.factor = config, config.quantiser.codes, config.factor
        self.encoder, self.decoder = VQVAEEncoder(config), VQVAEDecoder(config)
        self.quantiser = VectorQuantiser(config.quantiser)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"codec": [self.encoder, self.quantiser, self.decoder]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Equation 3."""
        z = rearrange(self.encoder(batch.image), "b d h w -> b h w d")
        found = self.quantiser(z)
        decoded = self.decoder(rearrange(found.values, "b h w d -> b d h w"))
        self.facts = {**self.note(batch.image, decoded), **self.quantiser.usage()}
        error = F.mse_loss(decoded.float(), batch.image) / self.config.variance
        yield "codec", {"reconstruction": error, **found.terms}

    def encode(self, image: Tensor) -> Tensor:
        return self.quantiser.nearest(rearrange(self.encoder(image), "b d h w -> b h w d"))

    def decode(self, ids: Tensor) -> Tensor:
        grid = rearrange(self.quantiser.values(ids), "b h w d -> b d h w")
        return self.decoder(grid).float().clamp(-1, 1)
