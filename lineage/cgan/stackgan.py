"""`stackgan`: text to picture in two stages (Zhang et al. 2017, arXiv:1612.03242).

The problem: a generator that is trained for large pictures at once loses the caption or the detail.
What is new: two stages, of which the first draws shapes and colours at a low resolution, and the
second takes that picture and the caption again, corrects it and adds detail; and conditioning
augmentation, which samples the condition from a Gaussian around the sentence, so that few captions
cover the space between them.

    section 3.2, eq. 2   `ConditioningAugmentation`; the KL term in `StackGANStage.losses`
    section 3.3          `StageOneGenerator` G_0
      eq. 3, 4           `StackGANStage.losses` of `StageOne`
    section 3.4          `StageTwoGenerator` G
      eq. 5, 6           `StackGANStage.losses` of `StageTwo`

With sentence phi_t, condition c = mu(phi_t) + sigma(phi_t) eps, pictures I_0 and I, and the losses
to be minimised:

    L_D0 = -E log D_0(I_0, phi_t) - E log(1 - D_0(G_0(z, c_0), phi_t))                   (eq. 3)
    L_G0 = -E log D_0(G_0(z, c_0), phi_t) + lambda KL(N(mu_0, Sigma_0) || N(0, I))       (eq. 4)
    L_D, L_G: the same of I and G(G_0(z, c_0), c)                                    (eq. 5, 6)

Where the authors' PyTorch code differs from the paper, this file follows the code. The first linear
layer has batch norm and no bias. mu and log sigma^2 pass a ReLU. The KL term is a mean with the
weight 2. The discriminator takes mu, not c. It also rejects real pictures with the next row's
caption (B - 1 pairs), and in stage II it scores pictures without captions too; 1 / 2 and 1 / 3 are
the weights of these terms.

Departures: a next row with the same caption does not count as mismatched; stage I is in evaluation
mode while stage II is trained. `StackGANConfig` has changes of later work as switches, all off in
the paper: `loss` hinge (Lim and Ye 2017), `r1_weight` (Mescheder et al. 2018), `norm` spectral
(Miyato et al. 2018), `augment` (Zhao et al. 2020, translation and cutout), `disc_condition`
sentence (Xu et al. 2018).

Axes: B pictures, D width of the sentence, C of the condition, Z of the noise, G generator channels,
S side, s side of stage I.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from lineage.config import NonNegativeFloat, NonNegativeInt, PositiveInt, configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import (
    ResidualBlock,
    conv3x3,
    downsample_layers,
    halved_channels,
    num_doublings,
    upsample_block,
)
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.gan import (
    ADVERSARIAL_LOSSES,
    diagnose_gan,
    diff_augment,
    downsample,
    gan_metrics,
    is_mismatched,
    masked_mean,
    normal_weights,
    r1_is_due,
    r1_penalty,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures


@configuration
class StackGANConfig:
    """Sizes (the authors' names in brackets), weights of losses, and switches.

    Attributes:
        stage1_size: Side of stage I's pictures.
        z_dim: Width Z of the noise [Z_DIM].
        cond_dim: Width C of the condition [CONDITION_DIM].
        gen_channels: Number of generator channels [GF_DIM]; stage I has 8 times as many at 4 x 4.
        disc_channels: Number of discriminator channels next to the picture [DF_DIM].
        num_res_blocks: Number of residual blocks of stage II [R_NUM].
        kl_weight: Weight of the KL term [COEFF.KL].
        loss: Adversarial loss: `log`, as in the paper, or `hinge`.
        r1_weight: Weight of the gradient penalty on real pictures; 0 leaves it out.
        r1_every: Number of steps between penalties, each weighted by as many.
        norm: Normalisation of the discriminator: `batch`, as in the paper, or `spectral`.
        augment: If true, the discriminator takes real and generated pictures shifted and with
            holes.
        disc_condition: Condition of the discriminator: `mu`, as in the authors' code, or the
            `sentence`, which stays the same throughout training.
    """

    stage1_size: PositiveInt = 64
    z_dim: PositiveInt = 100
    cond_dim: PositiveInt = 128
    gen_channels: PositiveInt = 128
    disc_channels: PositiveInt = 64
    num_res_blocks: NonNegativeInt = 4
    kl_weight: NonNegativeFloat = 2.0
    loss: Literal["log", "hinge"] = "log"
    r1_weight: NonNegativeFloat = 0.0
    r1_every: PositiveInt = 16
    norm: Literal["batch", "spectral"] = "batch"
    augment: bool = False
    disc_condition: Literal["mu", "sentence"] = "mu"


# --- section 3.2: conditioning augmentation -------------------------------------------------------


class ConditioningAugmentation(nn.Module):
    """Samples the condition from a Gaussian around the sentence: c = mu + sigma eps."""

    def __init__(self, sentence_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sentence_dim, 2 * cond_dim)

    def forward(self, sentence: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence (B, D), eps (B, C) standard normal -> c, mu, log sigma^2, each (B, C)."""
        mu, logvar = F.relu(self.fc(sentence)).chunk(2, dim=1)
        return mu + (logvar / 2).exp() * eps, mu, logvar


@dataclass
class GeneratorOutput:
    """Pictures and the Gaussians of their conditions.

    Attributes:
        image: (B, 3, S, S) in [-1, 1].
        mu, logvar: (B, C) mean and log sigma^2.
    """

    image: Tensor
    mu: Tensor
    logvar: Tensor


# --- section 3.3: stage I -------------------------------------------------------------------------


class StageOneGenerator(nn.Module):
    """G_0: noise and condition to a small picture, from 4 x 4 up."""

    def __init__(self, config: StackGANConfig, sentence_dim: int) -> None:
        super().__init__()
        channels = 8 * config.gen_channels
        self.ca_net = ConditioningAugmentation(sentence_dim, config.cond_dim)
        self.fc = nn.Sequential(
            nn.Linear(config.z_dim + config.cond_dim, channels * 16, bias=False),
            nn.BatchNorm1d(channels * 16),
            nn.ReLU(),
        )
        widths = halved_channels(channels, num_doublings(4, config.stage1_size))
        blocks = (upsample_block(a, b, nn.ReLU()) for a, b in pairwise(widths))
        self.upsample = nn.Sequential(*blocks)
        self.img = nn.Sequential(conv3x3(widths[-1], 3), nn.Tanh())

    def forward(self, sentence: Tensor, z: Tensor, eps: Tensor) -> GeneratorOutput:
        """sentence (B, D), z (B, Z), eps (B, C) -> pictures (B, 3, s, s)."""
        c, mu, logvar = self.ca_net(sentence, eps)
        x = self.fc(torch.cat([z, c], dim=1)).unflatten(1, (-1, 4, 4))  # (B, 8 G, 4, 4)
        return GeneratorOutput(self.img(self.upsample(x)), mu, logvar)


# --- section 3.4: stage II ------------------------------------------------------------------------


class StageTwoGenerator(nn.Module):
    """G: a small picture and a condition to a large picture; its only noise is the condition's.

    Args:
        size: Side S of the large picture.
    """

    def __init__(self, config: StackGANConfig, sentence_dim: int, size: int) -> None:
        super().__init__()
        width = config.gen_channels
        channels = 4 * width
        self.ca_net = ConditioningAugmentation(sentence_dim, config.cond_dim)
        self.encoder = nn.Sequential(
            conv3x3(3, width),
            nn.ReLU(),
            *downsample_layers(width, 2 * width),
            *downsample_layers(2 * width, channels),
        )
        self.hr_joint = nn.Sequential(
            conv3x3(channels + config.cond_dim, channels), nn.BatchNorm2d(channels), nn.ReLU()
        )
        res_blocks = (ResidualBlock(channels) for _ in range(config.num_res_blocks))
        self.residual = nn.Sequential(*res_blocks)
        widths = halved_channels(channels, num_doublings(config.stage1_size, size) + 2)
        blocks = (upsample_block(a, b, nn.ReLU()) for a, b in pairwise(widths))
        self.upsample = nn.Sequential(*blocks)
        self.img = nn.Sequential(conv3x3(widths[-1], 3), nn.Tanh())

    def forward(self, small: Tensor, sentence: Tensor, eps: Tensor) -> GeneratorOutput:
        """small (B, 3, s, s), sentence (B, D), eps (B, C) -> pictures (B, 3, S, S)."""
        features = self.encoder(small)  # (B, 4 G, s / 4, s / 4)
        c, mu, logvar = self.ca_net(sentence, eps)
        height, width = features.shape[2:]
        c = repeat(c, "b c -> b c h w", h=height, w=width)
        x = self.residual(self.hr_joint(torch.cat([features, c], dim=1)))
        return GeneratorOutput(self.img(self.upsample(x)), mu, logvar)


# --- the training step ----------------------------------------------------------------------------


class StackGANStage(System):
    """Generator and discriminator of one stage, and their training step.

    Args:
        text: Trained text encoder, which stays as it is.
        generator: Generator that is trained.
        size: Side of the pictures of this stage.
        unconditional: If true, the discriminator also scores pictures without captions.
    """

    def __init__(
        self,
        config: StackGANConfig,
        text: TextEncoder,
        generator: nn.Module,
        size: int,
        *,
        unconditional: bool,
    ) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.text = text.requires_grad_(False)
        self.generator = generator
        from_sentence = config.disc_condition == "sentence"
        self.discriminator = ConditionalDiscriminator(
            config.disc_channels,
            text.sentence_dim if from_sentence else config.cond_dim,
            size,
            unconditional,
            config.norm,
        )
        for network in (self.generator, self.discriminator):
            network.apply(normal_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.step: Tensor

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"discriminator": [self.discriminator], "generator": [self.generator]}

    @abstractmethod
    def generator_output(self, sentence: Tensor, noise: NoiseStreams) -> GeneratorOutput:
        """Pictures (B, 3, `size`, `size`) of sentences (B, D)."""

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """The discriminator's turn, then the generator's; both take the same generated pictures."""
        if len(batch) < 2:
            raise UserError(
                "stackgan needs a mismatched caption in the batch: --set train.batch_size=2."
            )
        config, disc, loss = self.config, self.discriminator, ADVERSARIAL_LOSSES[self.config.loss]
        augment = diff_augment if config.augment else nn.Identity()
        penalise = r1_is_due(config.r1_weight, config.r1_every, self.step)
        self.step += 1

        sentence = text.sentence.detach()
        output = self.generator_output(sentence, noise)
        cond = sentence if config.disc_condition == "sentence" else output.mu.detach()  # (B, C)
        fake = augment(output.image)
        real = downsample(batch.image, self.size).detach().requires_grad_(penalise)
        mismatched = is_mismatched(batch.caption, real.device)[1:]  # (B - 1,)

        real_features, fake_features = disc.features(augment(real)), disc.features(fake.detach())
        real_logits = disc.cond_logits(real_features, cond)
        wrong_logits = disc.cond_logits(real_features[:-1], cond[1:])  # the next row's caption
        fake_logits = disc.cond_logits(fake_features, cond)
        if disc.uncond_head is None:  # equation 3
            terms = {
                "real": loss.real(real_logits).mean(),
                "wrong": 1 / 2 * masked_mean(loss.fake(wrong_logits), mismatched),
                "fake": 1 / 2 * loss.fake(fake_logits).mean(),
            }
        else:  # equation 5
            real_uncond, fake_uncond = map(disc.uncond_logits, (real_features, fake_features))
            terms = {
                "real": 1 / 2 * loss.real(real_logits).mean(),
                "real_uncond": 1 / 2 * loss.real(real_uncond).mean(),
                "wrong": 1 / 3 * masked_mean(loss.fake(wrong_logits), mismatched),
                "fake": 1 / 3 * loss.fake(fake_logits).mean(),
                "fake_uncond": 1 / 3 * loss.fake(fake_uncond).mean(),
            }
        if penalise:
            terms["r1"] = config.r1_every * config.r1_weight / 2 * r1_penalty(real_logits, real)
        yield Turn(
            "discriminator",
            terms,
            metrics=lambda: gan_metrics(
                real_logits, wrong_logits, fake_logits, mismatched, real=real, fake=output.image
            ),
        )

        fake_features = disc.features(fake)  # equation 4 or 6, of the updated discriminator
        terms = {"cond": loss.generator(disc.cond_logits(fake_features, cond)).mean()}
        if disc.uncond_head is not None:
            terms["uncond"] = loss.generator(disc.uncond_logits(fake_features)).mean()
        if config.kl_weight > 0:  # KL(N(mu, sigma^2) || N(0, I)), equation 2
            mu, logvar = output.mu, output.logvar
            terms["kl"] = -config.kl_weight / 2 * (1 + logvar - mu**2 - logvar.exp()).mean()
        yield Turn("generator", terms)

    def diagnose(self, means: Mapping[str, float]) -> str:
        return diagnose_gan(means)


class StageOne(StackGANStage):
    """Stage I: small pictures.

    Args:
        text: Trained text encoder, which stays as it is.
    """

    generator: StageOneGenerator

    def __init__(self, config: StackGANConfig, text: TextEncoder) -> None:
        generator = StageOneGenerator(config, text.sentence_dim)
        super().__init__(config, text, generator, config.stage1_size, unconditional=False)

    def generator_output(self, sentence: Tensor, noise: NoiseStreams) -> GeneratorOutput:
        z, eps = noise.randn(self.config.z_dim), noise.randn(self.config.cond_dim)
        output: GeneratorOutput = self.generator(sentence, z, eps)
        return output

    def sample(self, captions: list[str], noise: NoiseStreams) -> Tensor:
        """Small pictures (B, 3, s, s) of captions."""
        return self.generator_output(self.text.encode(captions).sentence, noise).image


class StageTwo(StackGANStage):
    """Stage II: large pictures from those of a trained stage I, which stays as it is.

    Args:
        stage1: Finished stage I.
        size: Side S of the pictures.
    """

    generator: StageTwoGenerator

    def __init__(self, config: StackGANConfig, stage1: StageOne, size: int) -> None:
        generator = StageTwoGenerator(config, stage1.text.sentence_dim, size)
        super().__init__(config, stage1.text, generator, size, unconditional=True)
        self.stage1 = stage1.generator.requires_grad_(False)

    def train(self, mode: bool = True) -> StageTwo:
        """Stage I stays in evaluation mode, so that its batch statistics stay too."""
        super().train(mode)
        self.stage1.eval()
        return self

    @torch.no_grad()
    def stage1_image(self, sentence: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        """Stage I's pictures (B, 3, s, s)."""
        image: Tensor = self.stage1(sentence, z, eps).image
        return image

    def generator_output(self, sentence: Tensor, noise: NoiseStreams) -> GeneratorOutput:
        z, eps = noise.randn(self.config.z_dim), noise.randn(self.config.cond_dim)
        eps2 = noise.randn(self.config.cond_dim)
        small = self.stage1_image(sentence, z, eps)
        output: GeneratorOutput = self.generator(small, sentence, eps2)
        return output

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        truncation: float = 1.0,
        interpolate_to: str = "",
        interpolate_share: float = 0.5,
        noise_share: float = 0.0,
        stage: int = 2,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: Factor on all noise; below 1, pictures are more typical and differ less.
            interpolate_to: Another caption, towards which the sentence is moved.
            interpolate_share: Share of the way to `interpolate_to`.
            noise_share: Share of the way from each picture's noise to other noise, 0 to 1.
            stage: 1 for stage I's pictures of the same noise, enlarged; 2 for stage II's.
        """
        if stage not in (1, 2):
            raise UserError(f"stage={stage} must be 1 or 2.")
        sentence = self.text.encode(captions).sentence
        if interpolate_to:
            sentence = sentence.lerp(self.text.encode([interpolate_to]).sentence, interpolate_share)
        dims = self.config.z_dim, self.config.cond_dim, self.config.cond_dim
        z, eps, eps2 = (truncation * x for x in interpolated_noise(noise, dims, noise_share))
        small = self.stage1_image(sentence, z, eps)
        if stage == 1:
            return F.interpolate(small, (self.size, self.size), mode="nearest")
        image: Tensor = self.generator(small, sentence, eps2).image
        return image

    def variants(self) -> dict[str, dict[str, Any]]:
        return {"stage I": {"stage": 1}, "stage II": {}}


def interpolated_noise(noise: NoiseStreams, dims: Sequence[int], share: float) -> list[Tensor]:
    """Standard normal (B, dim) for each of `dims`, moved by `share` of the way to other noise.

    The way is a quarter of a circle, on which the variance stays 1; on a straight line it shrinks.
    """
    start = [noise.randn(dim) for dim in dims]
    if not share:
        return start
    angle = share * math.pi / 2
    end = [noise.randn(dim) for dim in dims]
    return [math.cos(angle) * a + math.sin(angle) * b for a, b in zip(start, end, strict=True)]
