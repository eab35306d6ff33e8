"""`attngan`: pictures whose regions attend to words (Xu et al. 2018, arXiv:1711.10485).

The problem: one vector for a whole sentence loses which colour belongs to which thing. What is new:
pictures are generated at several scales, and from the second on each position of the picture
attends to the words and is refined with them; and a similarity model of words and regions, DAMSM,
trained before (lineage/attngan/damsm.py), adds a loss of how well words and regions match.

    eq. 1      `Generator`, of `FirstStage` F_0 and `NextStage` F_i
    eq. 2      `WordAttention` F_attn
    eq. 3, 4   `AttnGAN.generator_terms`; L_DAMSM is `damsm_terms`
    eq. 5      the discriminators' turns in `AttnGAN.losses`

With noise z, sentence e-bar, words e, hidden states h_i at positions j, pictures x^_i = G_i(h_i):

    h_0 = F_0(z, F_ca(e-bar)),  h_i = F_i(h_(i-1), F_attn(e, h_(i-1)))                    (eq. 1)
    F_attn: c_j = sum_k beta_jk e'_k,  beta_jk ~ exp(h_j^T e'_k),  e' = U e               (eq. 2)
    L = sum_i L_Gi + lambda L_DAMSM + L_KL, which is as in `stackgan`                     (eq. 3)
    L_Gi = -E log D_i(x^_i) - E log D_i(x^_i, e-bar)                                      (eq. 4)
    L_Di = -(E log D_i(x_i) + E log D_i(x_i, e-bar)) / 2
           - (E log(1 - D_i(x^_i)) + E log(1 - D_i(x^_i, e-bar))
              + E log(1 - D_i(x_i, another e-bar))) / 3                                   (eq. 5)

Where the authors' code differs from the paper, this file follows the code: the weights of equations
4 and 5 (the paper: 1/2 throughout) and the mismatched pairs, as above; gated linear units in the
generator; the DAMSM loss of the largest picture only; L_KL, a mean over C; orthogonal initial
weights.

The public code (and DM-GAN's and MirrorGAN's, which copied it) masks words by the wrong caption:
row r of its scores belongs to picture r // (H W), but has the mask of picture r % B. Here a picture
has the mask of its own caption; `official_mask` restores the defect, for models trained with it.

Departures: a next row with the same caption does not count as mismatched. Changes of later work are
switches, off in the paper: `loss` hinge, `r1_weight`, `norm` spectral, as in `stackgan`.

Extension points: `Generator` takes another `next_stage` (DM-GAN's has a memory, MirrorGAN's also
attends to the sentence); `AttnGAN.generator_terms` can be overridden (MirrorGAN's captioner).

Axes: B pictures, L words, D width of words and of sentence, C of the condition, Z of the noise, G
channels of the hidden states, H W positions, S side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from lineage.attngan.damsm import DAMSM, damsm_terms
from lineage.bounds import DepthFromZero, Dim, Int, NonNegativeFloat, PositiveInt
from lineage.config import configuration
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import conv3x3, halved_channels, num_doublings, upsample_block
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.gan import (
    ADVERSARIAL_LOSSES,
    diagnose_gan,
    downsample,
    gan_metrics,
    is_mismatched,
    masked_mean,
    orthogonal_weights,
    r1_is_due,
    r1_penalty,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import LabelledImage, System, Turn
from lineage.text.contract import TextFeatures


@configuration
class AttnGANConfig:
    """Sizes (the authors' names in brackets), weights of losses, and switches.

    Attributes:
        num_scales: Number of pictures, each twice the side of the one before [BRANCH_NUM].
        z_dim: Width Z of the noise [Z_DIM].
        cond_dim: Width C of the condition [CONDITION_DIM].
        gen_channels: Number of channels G of the hidden states [GF_DIM].
        disc_channels: Number of channels of the discriminators' first layer [DF_DIM].
        num_res_blocks: Number of residual blocks of every scale but the first [R_NUM].
        damsm_weight: Weight of the DAMSM loss [LAMBDA]; 5 for birds.
        kl_weight: Weight of the KL term.
        loss: Adversarial loss: `log`, as in the paper, or `hinge`.
        r1_weight, r1_every: Weight and interval of the R1 penalty, as in `stackgan`.
        norm: Normalisation of the discriminators: `batch`, as in the paper, or `spectral`.
        official_mask: If true, words are masked as in the public code, by the wrong caption.
    """

    num_scales: Annotated[Int, Field(ge=2, le=10)] = 3
    z_dim: Dim = 100
    cond_dim: Dim = 100
    gen_channels: Dim = 32
    disc_channels: Dim = 64
    num_res_blocks: DepthFromZero = 2
    damsm_weight: NonNegativeFloat = 5.0
    kl_weight: NonNegativeFloat = 1.0
    loss: Literal["log", "hinge"] = "log"
    r1_weight: NonNegativeFloat = 0.0
    r1_every: PositiveInt = 16
    norm: Literal["batch", "spectral"] = "batch"
    official_mask: bool = False

    def sides(self, size: int) -> list[int]:
        """Sides of the pictures, the largest of which is `size`."""
        factor = 2 ** (self.num_scales - 1)
        smallest = size // factor
        if smallest < 8 or smallest * factor != size:
            raise UserError(
                f"size={size} must be {factor} times a number of 8 or more, because "
                f"model.num_scales={self.num_scales}: choose another size or number of scales."
            )
        return [smallest * 2**i for i in range(self.num_scales)]


# --- section 3.1: blocks --------------------------------------------------------------------------


class GatedResidualBlock(nn.Module):
    """x + norm(conv(glu(norm(conv(x))))), with no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            nn.GLU(1),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ConditioningAugmentation(nn.Module):
    """F_ca: as StackGAN's, but mu may be negative: a GLU in place of the ReLU."""

    def __init__(self, sentence_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sentence_dim, 4 * cond_dim)

    def forward(self, sentence: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence (B, D), eps (B, C) standard normal -> c, mu, log sigma^2, each (B, C)."""
        mu, logvar = F.glu(self.fc(sentence), dim=1).chunk(2, dim=1)
        return mu + (logvar / 2).exp() * eps, mu, logvar


class WordAttention(nn.Module):
    """F_attn, equation 2: each position of the picture attends to the words.

    Args:
        official_mask: If true, words are masked as in the public code, by the wrong caption.
    """

    def __init__(self, word_dim: int, channels: int, official_mask: bool = False) -> None:
        super().__init__()
        self.project_words = nn.Linear(word_dim, channels, bias=False)  # U
        self.official_mask = official_mask

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, G, H, W), words (B, L, D), mask (B, L) True where there is a word -> contexts
        (B, G, H, W), and attention (B, L, H, W), which sums to 1 over L.
        """
        height, width = hidden.shape[2:]
        projected = self.project_words(words)  # (B, L, G)
        scores = torch.einsum("blg,bghw->blhw", projected, hidden)
        position_mask = mask[:, :, None, None]  # (B, L, 1, 1)
        if self.official_mask:
            rows = torch.arange(len(mask) * height * width, device=mask.device) % len(mask)
            position_mask = rearrange(mask[rows], "(b h w) l -> b l h w", h=height, w=width)
        attention = scores.masked_fill(~position_mask, -torch.inf).softmax(1)  # beta
        return torch.einsum("blhw,blg->bghw", attention, projected), attention


# --- section 3.1: the generator -------------------------------------------------------------------


class FirstStage(nn.Module):
    """F_0: generates the hidden state of the smallest picture from noise and condition."""

    def __init__(self, config: AttnGANConfig, side: int) -> None:
        super().__init__()
        times = num_doublings(4, side)
        channels = config.gen_channels * 2**times
        self.fc = nn.Sequential(
            nn.Linear(config.cond_dim + config.z_dim, 2 * channels * 16, bias=False),
            nn.BatchNorm1d(2 * channels * 16),
            nn.GLU(1),
        )
        widths = pairwise(halved_channels(channels, times))
        self.upsample = nn.Sequential(*(upsample_block(a, 2 * b, nn.GLU(1)) for a, b in widths))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, Z), c (B, C) -> (B, G, s, s)."""
        x = self.fc(torch.cat([c, z], dim=1)).unflatten(1, (-1, 4, 4))
        return self.upsample(x)


class NextStage(nn.Module):
    """F_i: a hidden state and the words that its places attend to, to one of twice the side.

    Args:
        word_dim: Width of the words.
        sentence_dim: Width of the sentence, for stages that attend to it.
    """

    def __init__(self, config: AttnGANConfig, word_dim: int, sentence_dim: int) -> None:
        super().__init__()
        channels = config.gen_channels
        self.attention = WordAttention(word_dim, channels, config.official_mask)
        res_blocks = (GatedResidualBlock(2 * channels) for _ in range(config.num_res_blocks))
        self.residual = nn.Sequential(*res_blocks)
        self.upsample = upsample_block(2 * channels, 2 * channels, nn.GLU(1))

    def forward(self, hidden: Tensor, text: TextFeatures, c: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, G, s, s), c (B, C), unused here -> (B, G, 2s, 2s), attention (B, L, s, s)."""
        context, attention = self.attention(hidden, text.words, text.mask)
        return self.upsample(self.residual(torch.cat([hidden, context], dim=1))), attention


@dataclass
class GeneratorOutput:
    """Pictures of all scales, attention, and the Gaussians of the conditions.

    Attributes:
        images: (B, 3, S, S) in [-1, 1] for each scale, the smallest first.
        attention: (B, L, s, s) for each scale but the first, at the side of the one before.
        mu, logvar: (B, C) mean and log sigma^2.
    """

    images: list[Tensor]
    attention: list[Tensor]
    mu: Tensor
    logvar: Tensor


class Generator(nn.Module):
    """Equation 1: all scales.

    Args:
        word_dim, sentence_dim: Widths of words and sentence.
        size: Side S of the largest picture.
        next_stage: Class of every scale but the first.
    """

    def __init__(
        self,
        config: AttnGANConfig,
        word_dim: int,
        sentence_dim: int,
        size: int,
        next_stage: type[NextStage] = NextStage,
    ) -> None:
        super().__init__()
        sides = config.sides(size)
        self.ca_net = ConditioningAugmentation(sentence_dim, config.cond_dim)
        self.first_stage = FirstStage(config, sides[0])
        stages = (next_stage(config, word_dim, sentence_dim) for _ in sides[1:])
        self.next_stages = nn.ModuleList(stages)
        heads = (nn.Sequential(conv3x3(config.gen_channels, 3), nn.Tanh()) for _ in sides)
        self.image_heads = nn.ModuleList(heads)  # G_i

    def forward(self, text: TextFeatures, z: Tensor, eps: Tensor) -> GeneratorOutput:
        """B captions, z (B, Z), eps (B, C) -> pictures of every scale."""
        c, mu, logvar = self.ca_net(text.sentence, eps)
        hidden = self.first_stage(z, c)
        images, attention = [self.image_heads[0](hidden)], []
        for stage, head in zip(self.next_stages, self.image_heads[1:], strict=True):
            hidden, weights = stage(hidden, text, c)
            images.append(head(hidden))
            attention.append(weights)
        return GeneratorOutput(images, attention, mu, logvar)


# --- the training step ----------------------------------------------------------------------------


class AttnGAN(System):
    """Generator and one discriminator for each scale, on a trained DAMSM, which is frozen.

    Args:
        size: Side S of the largest picture.
    """

    def __init__(self, config: AttnGANConfig, damsm: DAMSM, size: int) -> None:
        super().__init__()
        self.config, self.size, self.sides = config, size, config.sides(size)
        self.text = damsm.text.requires_grad_(False)
        self.image_encoder = damsm.image_encoder.requires_grad_(False)
        self.damsm_config = damsm.config
        dims = self.text.word_dim, self.text.sentence_dim
        self.generator: Generator = Generator(config, *dims, size)
        self.discriminators = nn.ModuleList(
            ConditionalDiscriminator(config.disc_channels, dims[1], side, True, config.norm)
            for side in self.sides
        )
        for network in (self.generator, self.discriminators):
            network.apply(orthogonal_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.step: Tensor

    def train(self, mode: bool = True) -> AttnGAN:
        """The DAMSM's image encoder stays in evaluation mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        pairs = zip(self.sides, self.discriminators, strict=True)
        groups: dict[str, list[nn.Module]] = {f"discriminator{side}": [d] for side, d in pairs}
        return {**groups, "generator": [self.generator]}

    def discs(self) -> list[ConditionalDiscriminator]:
        """The discriminator of each scale, the smallest first."""
        return cast(list[ConditionalDiscriminator], list(self.discriminators))

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """A turn for each discriminator, then the generator's; the loop updates at each `yield`."""
        if len(batch) < 2:
            raise UserError("attngan needs a mismatched caption: --set train.batch_size=2.")
        config, loss = self.config, ADVERSARIAL_LOSSES[self.config.loss]
        apply_r1 = r1_is_due(config.r1_weight, config.r1_every, self.step)
        self.step += 1

        text = text.detach()
        z, eps = noise.randn(config.z_dim), noise.randn(config.cond_dim)
        output: GeneratorOutput = self.generator(text, z, eps)
        mismatched = is_mismatched(batch.caption, batch.image.device)[1:]  # (B - 1,)
        for side, disc, fake in zip(self.sides, self.discs(), output.images, strict=True):
            real = downsample(batch.image, side).detach().requires_grad_(apply_r1)
            real_features, fake_features = disc.features(real), disc.features(fake.detach())
            real_logits = disc.cond_logits(real_features, text.sentence)
            wrong_logits = disc.cond_logits(real_features[:-1], text.sentence[1:])
            fake_logits = disc.cond_logits(fake_features, text.sentence)
            real_uncond, fake_uncond = map(disc.uncond_logits, (real_features, fake_features))
            terms = {  # equation 5
                "real": 1 / 2 * loss.real(real_logits).mean(),
                "real_uncond": 1 / 2 * loss.real(real_uncond).mean(),
                "wrong": 1 / 3 * masked_mean(loss.fake(wrong_logits), mismatched),
                "fake": 1 / 3 * loss.fake(fake_logits).mean(),
                "fake_uncond": 1 / 3 * loss.fake(fake_uncond).mean(),
            }
            if apply_r1:
                terms["r1"] = config.r1_every * config.r1_weight / 2 * r1_penalty(real_logits, real)
            yield Turn(f"discriminator{side}", terms)
        logits = real_logits, wrong_logits, fake_logits  # these and the pictures: the largest scale
        yield Turn(
            "generator",
            self.generator_terms(output, batch, text),
            metrics=lambda: gan_metrics(*logits, mismatched, real=real, fake=fake),
        )

    def generator_terms(
        self, output: GeneratorOutput, batch: Batch, text: TextFeatures
    ) -> dict[str, Tensor]:
        """Equation 3, with the updated discriminators."""
        config, loss = self.config, ADVERSARIAL_LOSSES[self.config.loss]
        terms: dict[str, Tensor] = {}
        for side, disc, fake in zip(self.sides, self.discs(), output.images, strict=True):
            features = disc.features(fake)  # equation 4
            cond_logits = disc.cond_logits(features, text.sentence)
            terms[f"cond{side}"] = loss.generator(cond_logits).mean()
            terms[f"uncond{side}"] = loss.generator(disc.uncond_logits(features)).mean()
        if config.damsm_weight > 0:
            image = self.image_encoder(output.images[-1])
            same = batch.same_pairs(self.damsm_config.same)  # (B, B) True: no negative pair
            for name, term in damsm_terms(self.damsm_config, text, image, same).items():
                terms[f"damsm_{name}"] = config.damsm_weight * term
        if config.kl_weight > 0:  # KL(N(mu, sigma^2) || N(0, I))
            mu, logvar = output.mu, output.logvar
            terms["kl"] = -config.kl_weight / 2 * (1 + logvar - mu**2 - logvar.exp()).mean()
        return terms

    def diagnose(self, means: Mapping[str, float]) -> str:
        return diagnose_gan(means)

    # --- pictures ---------------------------------------------------------------------------------

    def generator_output(
        self, captions: list[str], noise: NoiseStreams, truncation: float = 1.0
    ) -> GeneratorOutput:
        """Pictures of every scale, and their attention."""
        z, eps = noise.randn(self.config.z_dim), noise.randn(self.config.cond_dim)
        return self.generator(self.text.encode(captions), truncation * z, truncation * eps)

    def sample(
        self, captions: list[str], noise: NoiseStreams, truncation: float = 1.0, scale: int = 0
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: Factor on all noise; below 1, pictures are more typical and differ less.
            scale: 1, 2, ... for the picture of that scale, enlarged; 0 for the largest.
        """
        if not 0 <= scale <= self.config.num_scales:
            raise UserError(f"scale={scale} must be from 0 to {self.config.num_scales}.")
        images = self.generator_output(captions, noise, truncation).images
        image = images[scale - 1]  # scale 0 is images[-1], the largest
        return F.interpolate(image, (self.size, self.size), mode="nearest")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Options that show each scale, in sample sheets."""
        return {f"at {side}": {"scale": k} for k, side in enumerate(self.sides, 1)}

    def attention(
        self, captions: str | Sequence[str], *, seed: int = 0, truncation: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The pictures of `generate`, and for each scale but the first the attention (B, L, s, s)
        of its positions to the words, which sums to 1 over the L words of `text.tokens`.
        """
        outputs: list[GeneratorOutput] = []
        for part, noise, options in self.sample_batches(captions, seed, {"truncation": truncation}):
            with self.inference():
                outputs.append(self.generator_output(part, noise, **options))
        longest = max(output.attention[0].shape[1] for output in outputs)
        attention = [
            torch.cat([F.pad(w, (0, 0, 0, 0, 0, longest - w.shape[1])).float() for w in weights])
            for weights in zip(*(output.attention for output in outputs), strict=True)
        ]
        pictures = torch.cat([output.images[-1].float() for output in outputs])
        return pictures.clamp(-1, 1), attention

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """The pictures of all scales; then, for each scale but the first, the picture under the
        attention of each word: the brighter a position, the more it attends to the word.
        """
        with self.inference():
            noise = NoiseStreams.for_pictures(seed, 1, self.device)
            output = self.generator_output([caption], noise)
        size, words = (self.size, self.size), self.text.tokens(caption)
        large = [F.interpolate(i, size, mode="nearest")[0].clamp(-1, 1) for i in output.images]
        rows = [[LabelledImage(f"at {s}", i) for s, i in zip(self.sides, large, strict=True)]]
        for side, image, weights in zip(self.sides[1:], large[1:], output.attention, strict=True):
            max_weight = weights.amax((2, 3), keepdim=True).clamp(min=1e-12)  # (1, L, 1, 1)
            brightness = F.interpolate(weights / max_weight, size, mode="nearest")[0]  # (L, S, S)
            pairs = zip(words, (image + 1) * brightness[:, None] - 1, strict=False)
            rows.append([LabelledImage(f"{word} ({side})", i) for word, i in pairs])
        return rows

    def image_embedding(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> global vectors (B, D), compared with sentences by cosine."""
        return self.image_encoder(images).global_vector
