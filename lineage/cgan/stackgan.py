"""`stackgan`: text to picture in two stages (Zhang et al. 2017, arXiv:1612.03242).

The problem: a generator that is trained for large pictures at once loses the caption or the detail.
What is new: two stages. The first generates shapes and colours at a low resolution; the second
takes that picture and the caption again, corrects it and adds detail. And conditioning
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
    KL(N(mu, sigma^2) || N(0, I)) = -1/2 sum (1 + log sigma^2 - mu^2 - sigma^2)          (eq. 2)

Where the authors' PyTorch code differs from the paper, this file follows the code. Equations 4 and
6 are in the non-saturating form (Goodfellow et al. 2014). The first linear layer of G_0 has batch
norm and no bias. mu and log sigma^2 pass through a ReLU. The KL term is a mean over C (the paper: a
sum), with lambda = 2 (the paper: 1). The discriminator takes mu, not phi_t. Both stages have the
matching-aware discriminator of section 3.4, whose mismatched caption mu' is the next row's (B - 1
pairs), and that of stage II scores pictures without captions too:

    stage I    L_D = -log D(I, mu) - (log(1 - D(I, mu')) + log(1 - D(G, mu))) / 2
    stage II   L_D = -(log D(I, mu) + log D(I)) / 2
                     - (log(1 - D(I, mu')) + log(1 - D(G, mu)) + log(1 - D(G))) / 3

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

from lineage.bounds import DepthFromZero, Dim, NonNegativeFloat, PositiveInt
from lineage.config import configuration
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
        disc_channels: Number of channels of the discriminator's first layer [DF_DIM].
        num_res_blocks: Number of residual blocks of stage II [R_NUM].
        kl_weight: Weight of the KL term [COEFF.KL].
        loss: Adversarial loss: `log`, as in the paper, or `hinge`.
        r1_weight: Weight gamma of the R1 penalty gamma / 2 |grad D(real)|^2; 0 leaves it out.
        r1_every: Interval of the penalty in steps; it is multiplied by this number (lazy
            regularisation, Karras et al. 2020).
        norm: Normalisation of the discriminator: `batch`, as in the paper, or `spectral`.
        augment: If true, the discriminator takes real and generated pictures after DiffAugment:
            translation and cutout.
        disc_condition: Condition of the discriminator: `mu`, as in the authors' code, or the
            `sentence`, which stays the same throughout training.
    """

    stage1_size: Dim = 64
    z_dim: Dim = 100
    cond_dim: Dim = 128
    gen_channels: Dim = 128
    disc_channels: Dim = 64
    num_res_blocks: DepthFromZero = 4
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
    """G_0: generates a small picture from noise and condition, from 4 x 4 up."""

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
    """G: generates a large picture from stage I's and the condition; it takes no z.

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
        # + 2: the encoder halves the side twice
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
        text: Trained text encoder; it is frozen.
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
        """The discriminator's turn, then the generator's, with the same generated pictures.

        After each `yield` the training loop updates that turn's parameters.
        """
        if len(batch) < 2:
            raise UserError(
                "stackgan needs a mismatched caption in the batch: --set train.batch_size=2."
            )
        config, disc, loss = self.config, self.discriminator, ADVERSARIAL_LOSSES[self.config.loss]
        augment = diff_augment if config.augment else nn.Identity()
        apply_r1 = r1_is_due(config.r1_weight, config.r1_every, self.step)
        self.step += 1

        sentence = text.sentence.detach()
        output = self.generator_output(sentence, noise)
        cond = sentence if config.disc_condition == "sentence" else output.mu.detach()  # (B, C)
        fake = augment(output.image)
        real = downsample(batch.image, self.size).detach().requires_grad_(apply_r1)
        mismatched = is_mismatched(batch.caption, real.device)[1:]  # (B - 1,)

        real_features, fake_features = disc.features(augment(real)), disc.features(fake.detach())
        real_logits = disc.cond_logits(real_features, cond)
        wrong_logits = disc.cond_logits(real_features[:-1], cond[1:])  # the next row's caption
        fake_logits = disc.cond_logits(fake_features, cond)
        if disc.uncond_head is None:  # stage I
            terms = {
                "real": loss.real(real_logits).mean(),
                "wrong": 1 / 2 * masked_mean(loss.fake(wrong_logits), mismatched),
                "fake": 1 / 2 * loss.fake(fake_logits).mean(),
            }
        else:  # stage II
            real_uncond, fake_uncond = map(disc.uncond_logits, (real_features, fake_features))
            terms = {
                "real": 1 / 2 * loss.real(real_logits).mean(),
                "real_uncond": 1 / 2 * loss.real(real_uncond).mean(),
                "wrong": 1 / 3 * masked_mean(loss.fake(wrong_logits), mismatched),
                "fake": 1 / 3 * loss.fake(fake_logits).mean(),
                "fake_uncond": 1 / 3 * loss.fake(fake_uncond).mean(),
            }
        if apply_r1:
            terms["r1"] = config.r1_every * config.r1_weight / 2 * r1_penalty(real_logits, real)
        yield Turn(
            "discriminator",
            terms,
            metrics=lambda: gan_metrics(
                real_logits, wrong_logits, fake_logits, mismatched, real=real, fake=output.image
            ),
        )

        fake_features = disc.features(fake)  # equation 4 or 6, with the updated discriminator
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
        text: Trained text encoder; it is frozen.
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
    """Stage II: large pictures from those of a trained stage I, which is frozen.

    Args:
        stage1: Finished stage I.
        size: Side S of the pictures.
    """

    generator: StageTwoGenerator

    def __init__(self, config: StackGANConfig, stage1: StageOne, size: int) -> None:
        generator = StageTwoGenerator(config, stage1.text.sentence_dim, size)
        super().__init__(config, stage1.text, generator, size, unconditional=True)
        self.sides = [config.stage1_size, size]
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
            interpolate_to: Second caption, between whose sentence and the first is interpolated.
            interpolate_share: Weight of the second caption, 0 to 1.
            noise_share: Position between each picture's noise and other noise, 0 to 1.
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

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        idle = {}
        if options.get("interpolate_share", 0.5) == 0 and options.get("interpolate_to"):
            idle["interpolate_to"] = "interpolate_share=0 is the first caption"
        if "interpolate_share" in options and not options.get("interpolate_to"):
            idle["interpolate_share"] = "there is no interpolate_to"
        if options.get("truncation", 1.0) == 0 and options.get("noise_share"):
            idle["noise_share"] = "truncation=0 is no noise"
        return idle

    def variants(self) -> dict[str, dict[str, Any]]:
        """Options that show each stage, in sample sheets."""
        return {"stage I": {"stage": 1}, "stage II": {}}


def interpolated_noise(noise: NoiseStreams, dims: Sequence[int], share: float) -> list[Tensor]:
    """Standard normal (B, dim) for each of `dims`, interpolated to other noise.

    cos(angle) a + sin(angle) b keeps the variance 1; (1 - share) a + share b would not.
    """
    start = [noise.randn(dim) for dim in dims]
    if not share:
        return start
    angle = share * math.pi / 2
    end = [noise.randn(dim) for dim in dims]
    return [math.cos(angle) * a + math.sin(angle) * b for a, b in zip(start, end, strict=True)]
