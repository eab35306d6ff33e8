"""`ldm`: latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

The problem: in pixels, most of a diffusion model's work goes into details that no eye would miss.
What is new: an autoencoder takes these off first; diffusion learns in its small latent space, and
attends to the text.

    section 3.1, appendix G   `KLAutoencoder`: pixels to a normal distribution over latents, pulled
                              a little towards N(0, 1); perceptual and adversarial terms as VQGAN's
    appendix G                `Latents`: their scale, so that they have deviation 1
    section 3.2, equation 2   `LatentDenoiser`: diffusion in z
    section 3.3, equation 3   `LDM`: a UNet with spatial transformers over the words

Where the authors' code differs from the paper, it is followed: pixels are compared by |x - y|, and
the KL term has weight 1e-6 beside sums over the picture. Departures: sums are means here, of the
pixels as of the KL term, which leaves their ratio as it is; at the small presets pixels are
compared by squares, which sooner leave the white ground, and there is neither adversary nor
perceptual term.

Axes: B pictures, S side, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.data.contract import Batch
from lineage.diffusion.ddpm import check_side
from lineage.diffusion.model import Denoiser, DenoiserConfig
from lineage.diffusion.networks.unet import UNet, UNetConfig
from lineage.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, PatchDiscriminator
from lineage.nn.gan import dcgan_weights
from lineage.nn.memory import Memory
from lineage.nn.noise import NoiseStreams
from lineage.nn.perceptual import LPIPS, load_lpips
from lineage.nn.vqgan_losses import adaptive_weight, judged, perceptual_distance, psnr
from lineage.system import Trainable, Turn
from lineage.text.contract import NoText, TextEncoder, TextFeatures

# --- section 3.1: perceptual compression ----------------------------------------------------------


@dataclass(frozen=True)
class KLConfig:
    """An autoencoder and its losses, under the authors' names in brackets.

    Attributes:
        net: encoder and decoder; pictures may have another side than its `size`.
        width: C, channels of the latents [embed_dim].
        kl: weight of the KL term beside a sum over pixels [kl_weight].
        error: how pixels are compared: `absolute` or `square`.
        discriminator, layers: its channels next to the picture and its strided layers [disc_ndf,
            disc_num_layers].
        adversary: factor of the adaptive weight [disc_weight]; 0 leaves the discriminator out.
        adversary_from: steps before it counts [disc_start].
        perceptual: weight of the perceptual distance [perceptual_weight].
        lpips: files of VGG16 and of LPIPS; without them the discriminator's features serve.
    """

    net: AutoencoderConfig = field(
        default_factory=lambda: AutoencoderConfig(128, (1, 2, 4, 4), 2, (), 256, 4)
    )
    width: int = 4
    kl: float = 1e-6
    error: str = "absolute"
    discriminator: int = 64
    layers: int = 3
    adversary: float = 0.5
    adversary_from: int = 50_001
    perceptual: float = 1.0
    lpips: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("autoencoder.error", self.error, ("absolute", "square"))
        for name in ("width", "discriminator", "layers"):
            at_least(f"autoencoder.{name}", getattr(self, name), 1)
        for name in ("kl", "adversary", "adversary_from", "perceptual"):
            at_least(f"autoencoder.{name}", getattr(self, name), 0)

    @property
    def factor(self) -> int:
        """Pixels of a side of a place."""
        return self.net.factor


@dataclass
class Gaussian:
    """A normal distribution over latents, (B, C, H, W) each."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Gaussian:
        """(B, 2 C, H, W): means, then log variances, which are kept from overflowing."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    @property
    def deviation(self) -> Tensor:
        return (0.5 * self.log_variance).exp()

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.deviation * noise

    def nll(self, x: Tensor) -> Tensor:
        """-log p(x) in nats, a sum over each row, (B,)."""
        square = (x - self.mean).square() / self.log_variance.exp()
        each = math.log(2 * math.pi) + self.log_variance + square
        return 0.5 * each.flatten(1).sum(1)

    def kl(self) -> Tensor:
        """To N(0, 1) in nats, a sum over each row, (B,)."""
        each = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * each.flatten(1).sum(1)


class KLAutoencoder(Trainable):
    """Pictures to latents and back. It reads no captions."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        net = config.net
        self.config, self.factor, self.text = config, config.factor, NoText()
        self.encoder, self.decoder = Encoder(net, 2 * net.latent), Decoder(net)
        self.quant_conv = nn.Conv2d(2 * net.latent, 2 * config.width, 1)
        self.post_quant_conv = nn.Conv2d(config.width, net.latent, 1)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversary > 0 or config.perceptual > 0:
            self.discriminator = PatchDiscriminator(config.discriminator, config.layers)
            self.discriminator.apply(dcgan_weights).requires_grad_(config.adversary > 0)
        # in a list, so that a network that the user has is not part of the weights
        self.lpips: list[LPIPS] = [load_lpips(config.lpips)] if config.lpips else []
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        own = [self.encoder, self.quant_conv, self.post_quant_conv, self.decoder]
        groups: dict[str, list[nn.Module]] = {"autoencoder": own}
        if self.discriminator is not None and self.config.adversary > 0:
            groups["discriminator"] = [self.discriminator]
        return groups

    def encode(self, image: Tensor) -> Gaussian:
        """Pictures (B, 3, S, S) in [-1, 1] -> latents (B, C, S / factor, S / factor)."""
        return Gaussian.of(self.quant_conv(self.encoder(image)).float())

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(latents)).float()

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """The autoencoder's turn, then the discriminator's, on the same reconstruction."""
        config, image = self.config, batch.image
        found = self.encode(image)
        decoded = self.decode(found.sample(draws.randn(*found.mean.shape[1:])))
        error = decoded - image
        pixels = error.abs() if config.error == "absolute" else error.square()
        terms = {
            "pixels": pixels.mean(),
            "kl": config.kl * found.kl().mean() / image[0].numel(),
        }
        with torch.no_grad():
            square = (decoded.clamp(-1, 1) - image).square().mean()
            self.facts = {
                "psnr": psnr(square),
                "deviation": found.mean.std(),
            }
        look = self.discriminator
        if look is not None and config.perceptual > 0:
            distance = perceptual_distance(look, self.lpips, image, decoded)
            terms["perceptual"] = config.perceptual * distance
        self.steps += 1
        adversarial = config.adversary > 0 and int(self.steps) > config.adversary_from
        if adversarial and look is not None:
            fooled = -look(decoded).float().mean()
            whole = terms["pixels"] + terms.get("perceptual", 0)
            weight = adaptive_weight(whole, fooled, self.decoder.conv_out.weight)
            self.facts["adversary_weight"] = weight
            terms["adversary"] = config.adversary * weight * fooled
        yield "autoencoder", terms

        if adversarial and look is not None:
            turn, facts = judged(look, image, decoded)
            self.facts |= facts
            yield "discriminator", turn


# --- appendix G: the latents of a data set --------------------------------------------------------


class Latents(Trainable):
    """The latents of the first `kept` pictures that it is shown, and the scale that gives all of
    them deviation 1. Nothing is learnt.

    Of a data set that is seen many times the encoder is thus paid for once. An endless one never
    shows a picture twice: there this stage finds the scale.

    Args:
        autoencoder: trained; left as it is.
        size: S of the pictures.
        kept: how many pictures' latents to keep.
    """

    def __init__(self, autoencoder: KLAutoencoder, size: int, kept: int) -> None:
        super().__init__()
        self.autoencoder, self.text = autoencoder.requires_grad_(False), NoText()
        side = size // autoencoder.factor
        self.shape = (autoencoder.config.width, side, side)
        self.memory = Memory(kept, (2 * self.shape[0], side, side))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, z and z^2
        self.sums: Tensor

    def train(self, mode: bool = True) -> Latents:
        """The autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    @property
    def scale(self) -> Tensor:
        """One over the deviation of all latents seen."""
        if self.sums.is_meta or not self.sums.any():
            return torch.ones(())
        count, first, second = self.sums.tolist()
        mean = first / count
        return torch.tensor(max(second / count - mean**2, 1e-12) ** -0.5, dtype=torch.float32)

    @torch.no_grad()
    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Find and keep the batch's latents. Nothing is to be minimised, so nothing is yielded."""
        moments = self._found(batch.image)
        self.memory.keep(batch.id, moments)
        z = Gaussian.of(moments).sample(draws.randn(*self.shape)).double()
        sums = torch.stack([torch.full_like(z.sum(), z.numel()), z.sum(), z.square().sum()])
        if torch.distributed.is_initialized():  # one scale for all processes
            torch.distributed.all_reduce(sums)
        self.sums += sums
        if self.watched:
            decoded = self.autoencoder.decode(z.float()).clamp(-1, 1)
            error = (decoded - batch.image).square().mean()
            self.facts = {
                "psnr": psnr(error),
                "scale": self.scale.to(error.device),
            }
        yield from ()

    def _found(self, image: Tensor) -> Tensor:
        """(B, 2 C, H, W), in full precision."""
        with torch.autocast(image.device.type, enabled=False):
            found = self.autoencoder.encode(image)
        return torch.cat([found.mean, found.log_variance], dim=1)

    @torch.no_grad()
    def of(self, batch: Batch) -> Gaussian:
        """The latents of a batch, from memory where they are known."""
        known = self.memory.recall(batch.id)
        moments = self._found(batch.image) if known is None else known.to(batch.image.device)
        return Gaussian.of(moments)


# --- section 3.2: diffusion in latents ------------------------------------------------------------


class LatentDenoiser(Denoiser):
    """Diffusion in the latents of an autoencoder.

    Args:
        latents: of the data, with the trained autoencoder that is left as it is.
        network: (z_t, t, text) to the prediction.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        latents: Latents,
        text: TextEncoder,
        size: int,
        network: nn.Module,
    ) -> None:
        super().__init__(config, text, size, latents.shape, network)
        self.autoencoder = latents.autoencoder.requires_grad_(False)
        self.register_buffer("scale", latents.scale)
        self.scale: Tensor
        self.known = [latents]  # in a list, so that what it keeps is not part of the weights

    def train(self, mode: bool = True) -> LatentDenoiser:
        """The autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def clean(self, batch: Batch, draws: NoiseStreams) -> Tensor:
        found = self.known[0].of(batch)
        return found.sample(draws.randn(*self.shape)) * self.scale

    def from_pictures(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images).mean * self.scale

    def to_pictures(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(x / self.scale)

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> what the autoencoder makes of them."""
        return self.to_pictures(self.from_pictures(images)).clamp(-1, 1)

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """The reconstruction's `psnr` in dB, (B,)."""
        error = (self.reconstruct(batch.image) - batch.image).square().flatten(1).mean(1)
        return {"psnr": psnr(error)}


# --- section 3.3: conditioning --------------------------------------------------------------------


@dataclass(frozen=True)
class LDMConfig(DenoiserConfig):
    """Latent diffusion by a UNet.

    Attributes:
        unet: the network.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)


class LDM(LatentDenoiser):
    """Latent diffusion by a UNet that attends to the words."""

    def __init__(self, config: LDMConfig, latents: Latents, text: TextEncoder, size: int) -> None:
        channels, side, _ = latents.shape
        check_side(config.unet, side, "side of the latents")
        outputs = 2 * channels if config.process.learned else channels
        network = UNet(config.unet, text.width, channels, outputs)
        super().__init__(config, latents, text, size, network)
