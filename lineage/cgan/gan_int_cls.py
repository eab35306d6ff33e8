"""`gan_int_cls`: the first GAN that drew pictures from captions (Reed et al. 2016,
arXiv:1605.05396).

The problem: a discriminator that only separates real from generated pictures teaches a generator to
draw well, but not to draw what the caption says. What is new: a third kind of pair. Beside (real
picture, its caption) and (generated picture, its caption), the discriminator takes (real picture,
another caption) and must reject it, so that it learns to compare picture and caption (GAN-CLS). And
a mixture of two captions is a caption without a picture, on which the generator can be trained as
well (GAN-INT).

    figure 2       `Generator`, `Discriminator`: a DCGAN (Radford et al. 2016) with the sentence as
                   condition
    algorithm 1    `GanIntCls.losses`, line by line
    equation 5     text interpolation, in the generator's turn of `GanIntCls.losses`

With picture x, sentence h, another sentence h^, and x^ = G(z, h), the losses to be minimised are

    L_D = -log D(x, h) - (log(1 - D(x, h^)) + log(1 - D(x^, h))) / 2         (algorithm 1, line 10)
    L_G = -log D(x^, h)                                                      (algorithm 1, line 12)

The sentence comes from an encoder that was trained beforehand (`joint_embedding.py`) and stays as
it is.

Departures: a mismatched caption with the same words, which happens where captions are short, does
not count; `r1_weight`, 0 in the paper, is the weight of the gradient penalty on real pictures of
Mescheder et al. (2018), taken every `r1_every` steps.

Axes: B pictures, D width of the sentence, T of its projection, Z of the noise, C channels, S side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.bounds import Dim, NonNegativeFloat, PositiveInt
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.gan import (
    dcgan_weights,
    diagnose_gan,
    gan_metrics,
    is_mismatched,
    masked_mean,
    r1_is_due,
    r1_penalty,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@configuration
class GANConfig:
    """Sizes of both networks and weights of the losses.

    Attributes:
        z_dim: Width Z of the noise.
        text_dim: Width T to which both networks project the sentence.
        gen_channels: Number of generator channels next to the picture; they double as the side
            halves, to 8 times as many.
        disc_channels: Number of discriminator channels next to the picture; they double likewise.
        interpolation_weight: Weight of the generator's loss on mixed captions; 0 leaves it out.
        r1_weight: Weight of the gradient penalty; 0 leaves it out.
        r1_every: Number of steps between penalties, each weighted by as many.
    """

    z_dim: Dim = 100
    text_dim: Dim = 128
    gen_channels: Dim = 64
    disc_channels: Dim = 64
    interpolation_weight: NonNegativeFloat = 1.0
    r1_weight: NonNegativeFloat = 0.0
    r1_every: PositiveInt = 16


def dcgan_channels(channels: int, size: int) -> list[int]:
    """Numbers of channels at sides `size` / 2 down to 4: doubling, at most 8 times `channels`."""
    levels = (size // 4).bit_length() - 1
    if size != 4 * 2**levels or levels < 1:
        raise UserError(
            f"gan_int_cls draws pictures of 8, 16, 32, 64, ... pixels a side, not size={size}."
        )
    return [channels * min(8, 2**level) for level in range(levels)]


class TextProjection(nn.Sequential):
    """Section 4.1: sentence (B, D) to a smaller vector (B, T)."""

    def __init__(self, sentence_dim: int, text_dim: int) -> None:
        super().__init__(nn.Linear(sentence_dim, text_dim), nn.LeakyReLU(0.2))


class Generator(nn.Module):
    """G: noise and sentence to a picture, by transposed convolutions from 4 x 4 up."""

    def __init__(self, config: GANConfig, sentence_dim: int, size: int) -> None:
        super().__init__()
        *rest, width = dcgan_channels(config.gen_channels, size)
        self.text_projection = TextProjection(sentence_dim, config.text_dim)
        self.conv_in = nn.Sequential(
            nn.ConvTranspose2d(config.z_dim + config.text_dim, width, 4, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        layers: list[nn.Module] = []
        for channels in reversed(rest):
            layers += [
                nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            width = channels
        self.upsample = nn.Sequential(*layers)
        self.conv_out = nn.Sequential(
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Tanh()
        )

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        """z (B, Z), sentence h (B, D) -> (B, 3, S, S) in [-1, 1]."""
        x = torch.cat([z, self.text_projection(h)], dim=1)[:, :, None, None]  # (B, Z + T, 1, 1)
        return self.conv_out(self.upsample(self.conv_in(x)))


class Discriminator(nn.Module):
    """D: picture and sentence to a logit; a real picture with its own caption is high. The sentence
    joins at 4 x 4.
    """

    def __init__(self, config: GANConfig, sentence_dim: int, size: int) -> None:
        super().__init__()
        width, *rest = dcgan_channels(config.disc_channels, size)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels in rest:
            layers += [
                nn.Conv2d(width, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
            width = channels
        self.encode_img = nn.Sequential(*layers)
        self.text_projection = TextProjection(sentence_dim, config.text_dim)
        self.cond_head = nn.Sequential(
            nn.Conv2d(width + config.text_dim, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 4),
        )

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, 4, 4)."""
        return self.encode_img(x)

    def cond_logits(self, features: Tensor, h: Tensor) -> Tensor:
        """(B, C, 4, 4), sentence h (B, D) -> logits (B,)."""
        text = self.text_projection(h)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.cond_head(torch.cat([features, text], dim=1)).flatten()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """(B, 3, S, S), sentence h (B, D) -> logits (B,)."""
        return self.cond_logits(self.features(x), h)


class GanIntCls(System):
    """Generator and discriminator, both conditioned on the sentence.

    Args:
        config: Sizes and weights.
        text: Trained text encoder, which stays as it is.
        size: Side S of the pictures, a power of 2 from 8 up.
    """

    def __init__(self, config: GANConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text, self.size = config, text.requires_grad_(False), size
        self.generator = Generator(config, text.sentence_dim, size)
        self.discriminator = Discriminator(config, text.sentence_dim, size)
        for network in (self.generator, self.discriminator):
            network.apply(dcgan_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.step: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """Algorithm 1 and equation 5.

        The symbols are the paper's, but s_r, s_w and s_f are logits: log D = -softplus(-s) and
        log(1 - D) = -softplus(s).
        """
        config, disc = self.config, self.discriminator
        apply_r1 = r1_is_due(config.r1_weight, config.r1_every, self.step)
        self.step += 1

        x = batch.image.detach().requires_grad_(apply_r1)
        h = text.sentence.detach()  # line 3
        h_wrong = h.roll(1, 0)  # line 4: the caption of the row before
        mismatched = is_mismatched(batch.caption, x.device)  # (B,)
        z = noise.randn(config.z_dim)  # line 5
        x_fake = self.generator(z, h)  # line 6
        x_features = disc.features(x)
        s_r = disc.cond_logits(x_features, h)  # line 7: real picture, right text
        s_w = disc.cond_logits(x_features, h_wrong)  # line 8: real picture, wrong text
        s_f = disc(x_fake.detach(), h)  # line 9: generated picture, right text
        terms = {  # line 10
            "real": F.softplus(-s_r).mean(),
            "wrong": 1 / 2 * masked_mean(F.softplus(s_w), mismatched),
            "fake": 1 / 2 * F.softplus(s_f).mean(),
        }
        if apply_r1:
            terms["r1"] = config.r1_every * config.r1_weight / 2 * r1_penalty(s_r, x)
        yield Turn(  # line 11
            "discriminator",
            terms,
            metrics=lambda: gan_metrics(s_r, s_w, s_f, mismatched, real=x, fake=x_fake),
        )

        terms = {"cond": F.softplus(-disc(x_fake, h)).mean()}  # line 12, of the updated D
        if config.interpolation_weight > 0:
            h_mixed = 1 / 2 * h + 1 / 2 * h_wrong  # equation 5, beta = 1 / 2
            s_mixed = disc(self.generator(z, h_mixed), h_mixed)
            terms["interpolated"] = config.interpolation_weight * F.softplus(-s_mixed).mean()
        yield Turn("generator", terms)  # line 13

    def diagnose(self, means: Mapping[str, float]) -> str:
        return diagnose_gan(means)

    def sample(self, captions: list[str], noise: NoiseStreams, truncation: float = 1.0) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: Factor on the noise; below 1, pictures are more typical and differ less.
        """
        z = noise.randn(self.config.z_dim) * truncation
        return self.generator(z, self.text.encode(captions).sentence)
