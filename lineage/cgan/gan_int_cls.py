"""`gan_int_cls`: the first GAN that drew from captions (Reed et al. 2016, arXiv:1605.05396).

The problem: a discriminator that only asks "is this picture real?" teaches a generator to draw
well, not to draw what the caption says. What is new: a third kind of pair. Beside (real picture,
its caption) and (fake picture, its caption) the discriminator sees (real picture, another caption)
and must reject it, so that it learns to read. And the text of two captions, mixed, is a caption
nobody wrote, on which the generator can be trained as well.

    figure 2             `Generator`, `Discriminator`: a DCGAN (Radford et al. 2016) that is told
                         the sentence
    algorithm 1, line 8  s_r = D(x, h)          real picture, right caption
    line 9               s_w = D(x, h_wrong)    real picture, wrong caption
    line 10, 11          s_f = D(G(z, h), h)    fake picture, right caption
    line 12              L_D = log s_r + (log(1 - s_w) + log(1 - s_f)) / 2: `discriminator_terms`
    line 14              L_G = log s_f: `generator_terms`
    equation 5           text interpolation: L_G also at beta h1 + (1 - beta) h2, beta = 1/2

Losses are on logits: -log sigmoid(s) = softplus(-s), and every term is a mean over its pairs.

The sentence comes from an encoder that was trained beforehand (`joint_embedding.py`) and is left as
it is.

Departures: a wrong caption that says the same as the right one, which happens where captions are
short, does not count; and `r1`, off in the paper, is the gradient penalty on real pictures of
Mescheder et al. (2018), taken every `r1_every` steps.

Axes: B pictures, D width of the sentence, Z noise, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.config import at_least
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.gan import (
    dcgan_weights,
    different,
    gan_health,
    gan_remark,
    gradient_penalty,
    penalty_weight,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@dataclass(frozen=True)
class GANConfig:
    """Sizes of the pair and weights of its losses.

    Attributes:
        noise: Z.
        text: width that the sentence is projected to.
        generator, discriminator: channels next to the picture; they double as the side halves, to 8
            times.
        interpolation: weight of the generator's loss on mixed captions; 0 leaves them out.
        r1: weight of the gradient penalty; 0 leaves it out.
        r1_every: steps between penalties, each weighted by as many.
    """

    noise: int = 100
    text: int = 128
    generator: int = 64
    discriminator: int = 64
    interpolation: float = 1.0
    r1: float = 0.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        for name in ("noise", "text", "generator", "discriminator", "r1_every"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("interpolation", "r1"):
            at_least(f"model.{name}", getattr(self, name), 0)


def widths(channels: int, size: int) -> list[int]:
    """Channels at sides `size` / 2 down to 4: doubling, at most 8 times `channels`."""
    levels = (size // 4).bit_length() - 1
    if size != 4 * 2**levels or levels < 1:
        raise UserError(
            f"gan_int_cls draws pictures of 8, 16, 32, 64, ... pixels a side, not size={size}."
        )
    return [channels * min(8, 2**level) for level in range(levels)]


class TextProjection(nn.Sequential):
    """Sentence to a smaller vector: linear, leaky ReLU (section 4.1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.LeakyReLU(0.2))


class Generator(nn.Module):
    """Noise and sentence to a picture, by transposed convolutions from 4 x 4 up."""

    def __init__(self, config: GANConfig, sentence: int, size: int) -> None:
        super().__init__()
        *rest, deepest = widths(config.generator, size)
        self.text = TextProjection(sentence, config.text)
        self.start = nn.Sequential(
            nn.ConvTranspose2d(config.noise + config.text, deepest, 4, bias=False),
            nn.BatchNorm2d(deepest),
            nn.ReLU(),
        )
        layers: list[nn.Module] = []
        for channels in reversed(rest):
            layers += [
                nn.ConvTranspose2d(deepest, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            deepest = channels
        self.grow = nn.Sequential(*layers)
        self.paint = nn.Sequential(
            nn.ConvTranspose2d(deepest, 3, 4, stride=2, padding=1), nn.Tanh()
        )

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        """noise (B, Z), sentence (B, D) -> (B, 3, S, S) in [-1, 1]."""
        seed = torch.cat([noise, self.text(sentence)], dim=1)[:, :, None, None]  # (B, Z + T, 1, 1)
        return self.paint(self.grow(self.start(seed)))


class Discriminator(nn.Module):
    """Picture and sentence to a logit: real and fitting is high. The sentence joins at 4 x 4."""

    def __init__(self, config: GANConfig, sentence: int, size: int) -> None:
        super().__init__()
        first, *rest = widths(config.discriminator, size)
        layers: list[nn.Module] = [nn.Conv2d(3, first, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels in rest:
            layers += [
                nn.Conv2d(first, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2),
            ]
            first = channels
        self.look = nn.Sequential(*layers)
        self.text = TextProjection(sentence, config.text)
        self.judge = nn.Sequential(
            nn.Conv2d(first + config.text, first, 1, bias=False),
            nn.BatchNorm2d(first),
            nn.LeakyReLU(0.2),
            nn.Conv2d(first, 1, 4),
        )

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, 4, 4), without a look at the caption."""
        return self.look(image)

    def score(self, features: Tensor, sentence: Tensor) -> Tensor:
        """(B, C, 4, 4), (B, D) -> logits (B,)."""
        text = self.text(sentence)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.judge(torch.cat([features, text], dim=1)).flatten()

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """(B, 3, S, S), (B, D) -> logits (B,)."""
        return self.score(self.features(image), sentence)


def discriminator_terms(
    real: Tensor, wrong: Tensor, fake: Tensor, mismatched: Tensor
) -> dict[str, Tensor]:
    """Line 12, from the logits (B,) of the three kinds of pair.

    `mismatched` (B,) is 0 where the wrong caption is right.
    """
    rejected = F.softplus(wrong) * mismatched
    return {
        "real": F.softplus(-real).mean(),
        "wrong": 0.5 * rejected.sum() / mismatched.sum().clamp(min=1.0),
        "fake": 0.5 * F.softplus(fake).mean(),
    }


def generator_terms(fake: Tensor) -> Tensor:
    """Line 14, in the form that does not saturate: logits (B,) -> -log sigmoid, a mean."""
    return F.softplus(-fake).mean()


class GanIntCls(System):
    """Generator and discriminator, both told the sentence.

    Args:
        config: sizes and weights.
        text: trained encoder of the captions; left as it is.
        size: S, side of the pictures in pixels, a power of 2 from 8 up.
    """

    def __init__(self, config: GANConfig, text: TextEncoder, size: int) -> None:
        super().__init__()
        self.config, self.text, self.size = config, text.requires_grad_(False), size
        self.generator = Generator(config, text.width, size)
        self.discriminator = Discriminator(config, text.width, size)
        for part in (self.generator, self.discriminator):
            part.apply(dcgan_weights)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """Algorithm 1.

        The fake picture is computed once; the generator's turn sees the updated discriminator.
        """
        real, right = batch.image, text.sentence.detach()
        wrong = right.roll(1, 0)  # (B, D) the caption of the row before
        mismatched = different(batch.caption, real.device)  # (B,)
        noise = draws.randn(self.config.noise)  # (B, Z)
        fake = self.generator(noise, right)

        r1 = penalty_weight(self.config.r1, self.config.r1_every, self.steps)
        self.steps += 1
        if r1 > 0:
            real = real.detach().requires_grad_()
        seen = self.discriminator.features(real)
        real_logits = self.discriminator.score(seen, right)
        wrong_logits = self.discriminator.score(seen, wrong)
        fake_logits = self.discriminator(fake.detach(), right)
        terms = discriminator_terms(real_logits, wrong_logits, fake_logits, mismatched)
        if r1 > 0:
            terms["r1"] = r1 * gradient_penalty(real_logits, real)
        if self.watched:
            logits = {"real": real_logits, "wrong": wrong_logits, "fake": fake_logits}
            self.facts = gan_health(logits, mismatched, drawn=fake, shown=real)
        yield "discriminator", terms

        terms = {"right": generator_terms(self.discriminator(fake, right))}
        if self.config.interpolation > 0:
            mixed = 0.5 * right + 0.5 * wrong  # equation 5, beta = 1/2
            between = self.generator(noise, mixed)
            terms["between"] = self.config.interpolation * generator_terms(
                self.discriminator(between, mixed)
            )
        yield "generator", terms

    def remark(self, means: dict[str, float]) -> str:
        return gan_remark(means)

    def draw(self, captions: list[str], draws: NoiseStreams, truncation: float = 1.0) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: factor on the noise; below 1 draws more typical pictures that differ less.
        """
        noise = draws.randn(self.config.noise) * truncation
        return self.generator(noise, self.text.encode(captions).sentence)
