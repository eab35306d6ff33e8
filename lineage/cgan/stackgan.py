"""`stackgan`: a sketch, then a picture (Zhang et al. 2017, arXiv:1612.03242).

The problem: a generator that is asked for a large picture at once loses either the caption or the
detail. What is new: two stages, of which the first draws the rough shapes and colours small, and
the second, given that drawing and the caption again, draws it large and mends it; and conditioning
augmentation, which draws the condition from a Gaussian around the sentence, so that few captions
cover the space between them.

    section 3.2, eq. 2   `ConditioningAugmentation`, `kl_term`: c = mu + sigma eps, KL to N(0, I)
    section 3.3          `StageOneGenerator`: noise and c to a small picture
      eq. 3, 4           `Discriminator`, `discriminator_terms`, `generator_terms`: lineage/nn/conditional_discriminator.py, since they outlived the system
    section 3.4          `StageTwoGenerator`: picture, down to 16 x 16, joined by c, residual
      eq. 5, 6           blocks, up; the same functions
    `StageOne`, `StageTwo`   the two training steps

Where the authors' PyTorch code differs from the paper, it is followed: no bias and batch norm after
the first linear layer; ReLU over mu and log sigma^2; a KL term that is a mean and weighs 2; mu, not
c, for the discriminator; wrong pairs are pictures with the next row's caption, B - 1 of them;
stage II's discriminator also judges pictures without captions.

Losses are on logits: -log sigmoid(s) = softplus(-s), and every term is a mean over its pairs.

Departures: a wrong caption that says the same as the right one does not count; stage I is kept in
evaluation mode while stage II is trained. `StackGANConfig` has the changes of later work as
switches, all off in the paper: `loss` hinge (Lim and Ye 2017), `r1` (Mescheder et al. 2018), `norm`
spectral (Miyato et al. 2018), `augment` (Zhao et al. 2020, translation and cutout), `reads`
sentence (Xu et al. 2018).

Axes: B pictures, D width of the sentence, C of the condition, Z noise, S side, s stage I's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from lineage.config import at_least, one_of
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import ResidualBlock, conv3x3, doublings, down, halvings, up
from lineage.nn.conditional_discriminator import (
    Discriminator,
    as_it_is,
    discriminator_turn,
    generator_terms,
    kl_term,
)
from lineage.nn.gan import (
    diff_augment,
    different,
    gan_health,
    gan_remark,
    normal_weights,
    penalty_weight,
    smaller,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@dataclass(frozen=True)
class StackGANConfig:
    """Sizes under the paper's names in brackets, weights of the losses, and the switches.

    Attributes:
        start: side of stage I's pictures.
        noise, condition: Z [Z_DIM] and C [CONDITION_DIM].
        generator: stage I starts with 8 times as many channels [GF_DIM].
        discriminator: channels next to the picture [DF_DIM].
        residual, kl: residual blocks of stage II [R_NUM]; weight of the KL term [COEFF.KL].
        loss: `log`, as in the paper, or `hinge`.
        r1: weight of the gradient penalty on real pictures; 0 leaves it out.
        r1_every: steps between penalties, each weighted by as many.
        norm: of the discriminator: `batch`, as in the paper, or `spectral`.
        augment: show the discriminator real and fake pictures shifted and with holes.
        reads: what the discriminator is told of the caption: `mu`, as the authors' code, or the
            `sentence` itself, which does not change under its eyes.
    """

    start: int = 64
    noise: int = 100
    condition: int = 128
    generator: int = 128
    discriminator: int = 64
    residual: int = 4
    kl: float = 2.0
    loss: str = "log"
    r1: float = 0.0
    r1_every: int = 16
    norm: str = "batch"
    augment: bool = False
    reads: str = "mu"

    def __post_init__(self) -> None:
        for name in ("noise", "condition", "generator", "discriminator", "r1_every"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("residual", "kl", "r1"):
            at_least(f"model.{name}", getattr(self, name), 0)
        one_of("model.loss", self.loss, ("log", "hinge"))
        one_of("model.norm", self.norm, ("batch", "spectral"))
        one_of("model.reads", self.reads, ("mu", "sentence"))
        doublings(4, self.start)

    def look(self, sentence: int, side: int, alone: bool) -> Discriminator:
        """A discriminator of pictures of that `side`, told of sentences (B, `sentence`)."""
        told = sentence if self.reads == "sentence" else self.condition
        return Discriminator(self.discriminator, told, side, alone, self.norm)


# --- section 3.2: conditioning augmentation --------------------------------


class ConditioningAugmentation(nn.Module):
    """The Gaussian around a sentence from which the condition is drawn."""

    def __init__(self, sentence: int, condition: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sentence, 2 * condition)

    def forward(self, sentence: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence (B, D), eps (B, C) standard normal -> c, mu, log sigma^2, each (B, C)."""
        mu, log_variance = F.relu(self.fc(sentence)).chunk(2, dim=1)
        return mu + (log_variance / 2).exp() * eps, mu, log_variance


@dataclass
class Drawn:
    """Pictures (B, 3, S, S) in [-1, 1] and the Gaussians (B, C) their conditions came from."""

    image: Tensor
    mu: Tensor
    log_variance: Tensor


# --- section 3.3: stage I ---------------------------------------------------


class StageOneGenerator(nn.Module):
    """Noise and condition to a small picture, from 4 x 4 up."""

    def __init__(self, config: StackGANConfig, sentence: int) -> None:
        super().__init__()
        self.config = config
        channels = 8 * config.generator
        self.ca_net = ConditioningAugmentation(sentence, config.condition)
        self.fc = nn.Sequential(
            nn.Linear(config.noise + config.condition, channels * 16, bias=False),
            nn.BatchNorm1d(channels * 16),
            nn.ReLU(),
        )
        widths = halvings(channels, doublings(4, config.start))
        self.upsample = nn.Sequential(*(up(a, b, nn.ReLU()) for a, b in pairwise(widths)))
        self.img = nn.Sequential(conv3x3(widths[-1], 3), nn.Tanh())

    def forward(self, sentence: Tensor, noise: Tensor, eps: Tensor) -> Drawn:
        """sentence (B, D), noise (B, Z), eps (B, C) -> pictures (B, 3, s, s)."""
        code, mu, log_variance = self.ca_net(sentence, eps)
        x = self.fc(torch.cat([noise, code], dim=1)).unflatten(1, (-1, 4, 4))  # (B, 8 G, 4, 4)
        return Drawn(self.img(self.upsample(x)), mu, log_variance)


# --- section 3.4: stage II --------------------------------------------------


class StageTwoGenerator(nn.Module):
    """A small picture and a condition of its own to a large picture; there is no noise but that.

    Args:
        size: S, side of the pictures it draws.
    """

    def __init__(self, config: StackGANConfig, sentence: int, size: int) -> None:
        super().__init__()
        width = config.generator
        self.ca_net = ConditioningAugmentation(sentence, config.condition)
        self.encoder = nn.Sequential(
            conv3x3(3, width),
            nn.ReLU(),
            *down(width, 2 * width),
            *down(2 * width, 4 * width),
        )  # to a quarter of the side
        channels = 4 * width
        self.hr_joint = nn.Sequential(
            conv3x3(channels + config.condition, channels), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.residual = nn.Sequential(*(ResidualBlock(channels) for _ in range(config.residual)))
        widths = halvings(channels, doublings(config.start, size) + 2)
        self.upsample = nn.Sequential(*(up(a, b, nn.ReLU()) for a, b in pairwise(widths)))
        self.img = nn.Sequential(conv3x3(widths[-1], 3), nn.Tanh())

    def forward(self, small: Tensor, sentence: Tensor, eps: Tensor) -> Drawn:
        """small (B, 3, s, s), sentence (B, D), eps (B, C) -> pictures (B, 3, S, S)."""
        encoded = self.encoder(small)  # (B, 4 G, s / 4, s / 4)
        code, mu, log_variance = self.ca_net(sentence, eps)
        height, width = encoded.shape[2:]
        everywhere = repeat(code, "b c -> b c h w", h=height, w=width)
        x = self.residual(self.hr_joint(torch.cat([encoded, everywhere], dim=1)))
        return Drawn(self.img(self.upsample(x)), mu, log_variance)


# --- the two training steps ----------------------------------------------------


class StackGANStage(System):
    """A step of either stage; `generator` and `discriminator` are those that it trains."""

    generator: nn.Module
    discriminator: Discriminator

    def __init__(self, config: StackGANConfig, text: TextEncoder) -> None:
        super().__init__()
        self.config, self.text = config, text
        self.text.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    @abstractmethod
    def fake(self, sentence: Tensor, draws: NoiseStreams) -> Drawn:
        """Pictures as the stage that is trained draws them."""

    @abstractmethod
    def real(self, batch: Batch) -> Tensor:
        """Real pictures at the side of the stage that is trained."""

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """The fake picture is drawn once; the generator's turn sees the updated discriminator."""
        config, look = self.config, self.discriminator
        if len(batch) < 2:
            raise UserError("stackgan needs a wrong caption in the batch: --set train.batch=2.")
        sentence = text.sentence.detach()
        drawn = self.fake(sentence, draws)
        condition = sentence if config.reads == "sentence" else drawn.mu.detach()
        real = self.real(batch)
        mismatched = different(batch.caption, real.device)[1:]  # (B - 1,)
        r1 = penalty_weight(config.r1, config.r1_every, self.steps)
        self.steps += 1
        shown = diff_augment if config.augment else as_it_is
        fake = shown(drawn.image)
        terms, logits = discriminator_turn(
            look, real, fake, condition, mismatched, config.loss, r1=r1, shown=shown
        )
        if self.watched:
            self.facts = gan_health(logits, mismatched, drawn.image, real)
        yield "discriminator", terms

        terms = generator_terms(look, fake, condition, config.loss)
        if config.kl > 0:
            terms["kl"] = config.kl * kl_term(drawn.mu, drawn.log_variance)
        yield "generator", terms

    def remark(self, means: dict[str, float]) -> str:
        return gan_remark(means)


class StageOne(StackGANStage):
    """Stage I: small pictures. `text` is trained beforehand and left as it is."""

    def __init__(self, config: StackGANConfig, text: TextEncoder) -> None:
        super().__init__(config, text)
        self.generator: StageOneGenerator = StageOneGenerator(config, text.width)
        self.discriminator = config.look(text.width, config.start, alone=False)
        for part in (self.generator, self.discriminator):
            part.apply(normal_weights)

    def real(self, batch: Batch) -> Tensor:
        return smaller(batch.image, self.config.start)

    def fake(self, sentence: Tensor, draws: NoiseStreams) -> Drawn:
        noise, eps = draws.randn(self.config.noise), draws.randn(self.config.condition)
        return self.generator(sentence, noise, eps)

    def draw(self, captions: list[str], draws: NoiseStreams) -> Tensor:
        """Small pictures (B, 3, s, s) of captions."""
        return self.fake(self.text.encode(captions).sentence, draws).image


class StageTwo(StackGANStage):
    """Stage II on a trained stage I, which is left as it is: large pictures.

    Args:
        first: the finished stage I.
        size: S, side of the pictures.
    """

    def __init__(self, config: StackGANConfig, first: StageOne, size: int) -> None:
        super().__init__(config, first.text)
        self.first = first.generator.requires_grad_(False)
        self.generator: StageTwoGenerator = StageTwoGenerator(config, first.text.width, size)
        self.discriminator = config.look(first.text.width, size, alone=True)
        for part in (self.generator, self.discriminator):
            part.apply(normal_weights)

    def train(self, mode: bool = True) -> StageTwo:
        """Stage I stays in evaluation mode: its batch statistics are finished too."""
        super().train(mode)
        self.first.eval()
        return self

    def real(self, batch: Batch) -> Tensor:
        return batch.image

    def fake(self, sentence: Tensor, draws: NoiseStreams) -> Drawn:
        return self._drawn(sentence, draws)[1]

    def _drawn(
        self, sentence: Tensor, draws: NoiseStreams, truncation: float = 1.0, share: float = 0.0
    ) -> tuple[Tensor, Drawn]:
        """Stage I's pictures (B, 3, s, s), and stage II's from them. Noise is drawn twice."""
        widths = (self.config.noise, self.config.condition, self.config.condition)
        noise, eps, own = (truncation * part for part in draws.turned(widths, share))
        with torch.no_grad():
            small = self.first(sentence, noise, eps).image
        return small, self.generator(small, sentence, own)

    def draw(
        self,
        captions: list[str],
        draws: NoiseStreams,
        truncation: float = 1.0,
        towards: str = "",
        share: float = 0.5,
        noise_share: float = 0.0,
        stage: int = 2,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: factor on all noise; below 1 draws more typical pictures that differ less.
            towards: another caption, to go towards by `share` of the way.
            noise_share: how far to go from the noise of each picture towards another, 0 to 1.
            stage: 1 shows stage I's pictures instead, enlarged, from the same noise.
        """
        if stage not in (1, 2):
            raise UserError(f"stage={stage} is neither 1 nor 2.")
        sentence = self.text.encode(captions).sentence
        if towards:
            sentence = sentence.lerp(self.text.encode([towards]).sentence, share)
        small, drawn = self._drawn(sentence, draws, truncation, noise_share)
        if stage == 1:
            return F.interpolate(small, drawn.image.shape[-2:], mode="nearest")
        return drawn.image

    def variants(self) -> dict[str, dict[str, Any]]:
        return {"stage I": {"stage": 1}, "stage II": {}}
