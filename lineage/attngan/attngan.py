"""`attngan`: every region looks at the words it needs (Xu et al. 2018, arXiv:1711.10485).

The problem: a sentence squeezed into one vector forgets which colour belongs to which thing. What
is new: a picture is drawn at several scales, and from the second on each place of the picture
attends to the words and is drawn anew with what it read; and a matching model that was trained
before, DAMSM, tells the generator how well each word is to be seen (lineage/attngan/damsm.py).

    section 3.1, eq. 1   `FirstStage` F_0, `NextStage` F_i, `picture` G_i; `Generator` is all of it
      eq. 2              `WordAttention` F_attn
      eq. 3              the generator's turn in `AttnGAN.losses`
      eq. 4 to 6         `pair_logits`, `discriminator_terms`, `generator_terms` of
                         lineage/nn/conditional_discriminator.py: one discriminator a scale, pictures with their
                         captions and alone
    section 3.2          `matching`, the DAMSM term, weighted by lambda

Where the authors' code differs from the paper, it is followed: gated linear units in the generator;
attention without a scale; wrong pairs beside the two of equation 5; discriminators told the
sentence; the DAMSM term of the largest picture only; a KL term that is a mean; orthogonal weights.

The public code (and DM-GAN's and MirrorGAN's, which copied it) lays out its scores picture after
picture but repeats its word masks row after row, so that in a batch a picture may attend to the
padding of its own caption and not to words that it has. Here a picture has the mask of its own
caption. `official_mask` brings the defect back, for numbers of models trained with it.

Departures: a wrong caption that says the same as the right one does not count; padding has no
share in attention at training either. `AttnGANConfig` has changes of later work as switches, off in
the paper: `loss` hinge, `r1`, `norm` spectral, as in `stackgan`.

What follows attaches here. DM-GAN: a `NextStage` of its own, with a memory in place of
`WordAttention`, given to `Generator` as `next_stage`, and `norm` spectral. MirrorGAN: a `NextStage`
that looks at the sentence too, and a captioner's term added to the generator's turn by overriding
`AttnGAN.drawing_terms`.

Axes: B pictures, L words, D width of words and sentence, C of the condition, Z noise, G channels of
the hidden states, H W places, S side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lineage.attngan.damsm import DAMSM, matching
from lineage.config import at_least, one_of
from lineage.data.contract import Batch
from lineage.errors import UserError
from lineage.nn.blocks import conv3x3, doublings, halvings, up
from lineage.nn.conditional_discriminator import (
    Discriminator,
    discriminator_turn,
    generator_terms,
    kl_term,
)
from lineage.nn.gan import (
    different,
    gan_health,
    gan_remark,
    orthogonal_weights,
    penalty_weight,
    smaller,
)
from lineage.nn.noise import NoiseStreams
from lineage.system import Named, System, Turn
from lineage.text.contract import TextFeatures


@dataclass(frozen=True)
class AttnGANConfig:
    """Sizes under the paper's names in brackets, weights of the losses, and the switches.

    Attributes:
        scales: pictures that are drawn, each twice the side of the one before [BRANCH_NUM].
        noise, condition: Z [Z_DIM] and C [CONDITION_DIM].
        generator: G [GF_DIM].
        discriminator: channels next to the picture [DF_DIM].
        residual: residual blocks of every scale but the first [R_NUM].
        damsm, kl: weight of the DAMSM term [LAMBDA], and of the KL term.
        loss: `log`, as in the paper, or `hinge`.
        r1: weight of the gradient penalty on real pictures; 0 leaves it out.
        r1_every: steps between penalties, each weighted by as many.
        norm: of the discriminators: `batch`, as in the paper, or `spectral`.
        official_mask: mix up the word masks of a batch as the public code does.
    """

    scales: int = 3
    noise: int = 100
    condition: int = 100
    generator: int = 32
    discriminator: int = 64
    residual: int = 2
    damsm: float = 5.0
    kl: float = 1.0
    loss: str = "log"
    r1: float = 0.0
    r1_every: int = 16
    norm: str = "batch"
    official_mask: bool = False

    def __post_init__(self) -> None:
        at_least("model.scales", self.scales, 2)
        for name in ("noise", "condition", "generator", "discriminator", "r1_every"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("residual", "damsm", "kl", "r1"):
            at_least(f"model.{name}", getattr(self, name), 0)
        one_of("model.loss", self.loss, ("log", "hinge"))
        one_of("model.norm", self.norm, ("batch", "spectral"))

    def sides(self, size: int) -> list[int]:
        """The sides of the pictures, of which the largest is `size`."""
        first = size // 2 ** (self.scales - 1)
        if first < 8 or first * 2 ** (self.scales - 1) != size:
            raise UserError(
                f"{self.scales} scales up to {size} pixels would begin at {first}: choose "
                "model.scales and size so that the smallest is 8 or more, by doubling."
            )
        return [first * 2**i for i in range(self.scales)]


# --- section 3.1: blocks ------------------------------------------------------


def glu_up(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the side: nearest neighbours, a convolution, a gate."""
    return up(inputs, 2 * outputs, nn.GLU(dim=1))


class GatedResidual(nn.Module):
    """x + norm(conv(gate(norm(conv(x))))), with nothing after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            nn.GLU(dim=1),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ConditioningAugmentation(nn.Module):
    """F_ca: the Gaussian around a sentence. Unlike StackGAN's, it may have any mean and spread."""

    def __init__(self, sentence: int, condition: int) -> None:
        super().__init__()
        self.fc = nn.Linear(sentence, 4 * condition)

    def forward(self, sentence: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sentence (B, D), eps (B, C) standard normal -> c, mu, log sigma^2, each (B, C)."""
        mu, log_variance = F.glu(self.fc(sentence), dim=1).chunk(2, dim=1)
        return mu + (log_variance / 2).exp() * eps, mu, log_variance


class WordAttention(nn.Module):
    """Equation 2: each place of the picture reads the words it fits.

    Args:
        width: D of the words.
        channels: G of the picture's hidden state.
        official_mask: see the header.
    """

    def __init__(self, width: int, channels: int, official_mask: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(width, channels, bias=False)  # U: words as the picture's places
        self.official_mask = official_mask

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, G, H, W), words (B, L, D), mask (B, L) True where there is a word -> what each
        place read (B, G, H, W), and of which word how much (B, L, H, W), which sums to 1 over L.
        """
        height, width = hidden.shape[2:]
        keys = self.project(words)  # (B, L, G)
        scores = torch.einsum("bghw,blg->bhwl", hidden, keys)
        looked = mask[:, None, None, :]  # (B, 1, 1, L)
        if self.official_mask:
            rows = torch.arange(len(mask) * height * width, device=mask.device) % len(mask)
            looked = rearrange(mask[rows], "(b h w) l -> b h w l", h=height, w=width)
        weights = scores.masked_fill(~looked, -torch.inf).softmax(-1)
        read = torch.einsum("bhwl,blg->bghw", weights, keys)
        return read, rearrange(weights, "b h w l -> b l h w")


# --- section 3.1: the generator -------------------------------------------------


class FirstStage(nn.Module):
    """F_0: noise and condition to the hidden state of the smallest picture, from 4 x 4 up."""

    def __init__(self, config: AttnGANConfig, side: int) -> None:
        super().__init__()
        times = doublings(4, side)
        channels = config.generator * 2**times
        self.fc = nn.Sequential(
            nn.Linear(config.condition + config.noise, 2 * channels * 16, bias=False),
            nn.BatchNorm1d(2 * channels * 16),
            nn.GLU(dim=1),
        )
        self.upsample = nn.Sequential(*starmap(glu_up, pairwise(halvings(channels, times))))

    def forward(self, noise: Tensor, code: Tensor) -> Tensor:
        """noise (B, Z), code (B, C) -> (B, G, s, s)."""
        x = self.fc(torch.cat([code, noise], dim=1)).unflatten(1, (-1, 4, 4))
        return self.upsample(x)


class NextStage(nn.Module):
    """F_i: a hidden state, and what its places read, to one of twice the side."""

    def __init__(self, config: AttnGANConfig, width: int) -> None:
        super().__init__()
        channels = config.generator
        self.attention = WordAttention(width, channels, config.official_mask)
        self.residual = nn.Sequential(
            *(GatedResidual(2 * channels) for _ in range(config.residual))
        )
        self.upsample = glu_up(2 * channels, channels)

    def forward(self, hidden: Tensor, text: TextFeatures, code: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, G, s, s), code (B, C), which is not used here -> (B, G, 2s, 2s), attention (B,
        L, s, s).
        """
        read, weights = self.attention(hidden, text.words, text.mask)
        return self.upsample(self.residual(torch.cat([hidden, read], dim=1))), weights


def picture(channels: int) -> nn.Sequential:
    """G_i: a hidden state to a picture."""
    return nn.Sequential(conv3x3(channels, 3), nn.Tanh())


@dataclass
class Drawn:
    """What the generator gives.

    Attributes:
        images: (B, 3, S, S) in [-1, 1] for each scale, the smallest first.
        attention: (B, L, s, s) for each scale but the first, at the side of the one before.
        mu, log_variance: (B, C) of the Gaussians that the conditions came from.
    """

    images: list[Tensor]
    attention: list[Tensor]
    mu: Tensor
    log_variance: Tensor


class Generator(nn.Module):
    """All scales.

    Args:
        width: D of the text.
        size: S of the largest picture.
        next_stage: what every scale but the first is made of.
    """

    def __init__(
        self,
        config: AttnGANConfig,
        width: int,
        size: int,
        next_stage: type[NextStage] = NextStage,
    ) -> None:
        super().__init__()
        sides = config.sides(size)
        self.ca_net = ConditioningAugmentation(width, config.condition)
        self.first = FirstStage(config, sides[0])
        self.next = nn.ModuleList(next_stage(config, width) for _ in sides[1:])
        self.pictures = nn.ModuleList(picture(config.generator) for _ in sides)

    def forward(self, text: TextFeatures, noise: Tensor, eps: Tensor) -> Drawn:
        """B captions, noise (B, Z), eps (B, C) -> pictures of every scale."""
        code, mu, log_variance = self.ca_net(text.sentence, eps)
        hidden = self.first(noise, code)
        images, attention = [self.pictures[0](hidden)], []
        for stage, head in zip(self.next, self.pictures[1:], strict=True):
            hidden, weights = stage(hidden, text, code)
            images.append(head(hidden))
            attention.append(weights)
        return Drawn(images, attention, mu, log_variance)


# --- the training step ------------------------------------------------------------


class AttnGAN(System):
    """The system on a trained DAMSM, which is left as it is.

    Args:
        size: S of the largest picture.
    """

    def __init__(self, config: AttnGANConfig, damsm: DAMSM, size: int) -> None:
        super().__init__()
        self.config, self.sides = config, config.sides(size)
        self.text, self.matcher = damsm.text.requires_grad_(False), damsm.image
        self.matcher.requires_grad_(False)
        self.matching = damsm.config
        width = self.text.width
        self.generator: Generator = Generator(config, width, size)
        self.discriminators = nn.ModuleList(
            Discriminator(config.discriminator, width, side, alone=True, norm=config.norm)
            for side in self.sides
        )
        for part in (self.generator, self.discriminators):
            part.apply(orthogonal_weights)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def train(self, mode: bool = True) -> AttnGAN:
        """The DAMSM's image encoder stays in evaluation mode."""
        super().train(mode)
        self.matcher.eval()
        return self

    def groups(self) -> dict[str, list[nn.Module]]:
        named: dict[str, list[nn.Module]] = {
            f"discriminator{side}": [look] for side, look in self.looks()
        }
        return {**named, "generator": [self.generator]}

    def looks(self) -> list[tuple[int, Discriminator]]:
        """The side of each scale and its discriminator."""
        return list(zip(self.sides, cast(list[Discriminator], self.discriminators), strict=True))

    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """A turn for each discriminator, then the generator's; the pictures are drawn once."""
        if len(batch) < 2:
            raise UserError("attngan needs a wrong caption in the batch: --set train.batch=2.")
        text = text.detach()
        noise, eps = draws.randn(self.config.noise), draws.randn(self.config.condition)
        drawn: Drawn = self.generator(text, noise, eps)
        mismatched = different(batch.caption, batch.image.device)[1:]  # (B - 1,)
        r1 = penalty_weight(self.config.r1, self.config.r1_every, self.steps)
        self.steps += 1
        for (side, look), fake in zip(self.looks(), drawn.images, strict=True):
            real = smaller(batch.image, side)
            terms, logits = discriminator_turn(
                look, real, fake, text.sentence, mismatched, self.config.loss, r1=r1
            )
            yield f"discriminator{side}", terms
        if self.watched:
            self.facts = gan_health(logits, mismatched, fake, real)  # of the largest pictures
        yield "generator", self.drawing_terms(drawn, batch, text)

    def drawing_terms(self, drawn: Drawn, batch: Batch, text: TextFeatures) -> dict[str, Tensor]:
        """Equation 3: what each discriminator says, the DAMSM's term, and the Gaussians' KL."""
        config = self.config
        terms: dict[str, Tensor] = {}
        for (side, look), fake in zip(self.looks(), drawn.images, strict=True):
            found = generator_terms(look, fake, text.sentence, config.loss)
            terms |= {f"{name}{side}": value for name, value in found.items()}
        if config.damsm > 0:
            regions = self.matcher(drawn.images[-1])
            found = matching(self.matching, text, regions, batch.alike(self.matching.same))
            terms |= {f"damsm_{name}": config.damsm * value for name, value in found.items()}
        if config.kl > 0:
            terms["kl"] = config.kl * kl_term(drawn.mu, drawn.log_variance)
        return terms

    def remark(self, means: dict[str, float]) -> str:
        return gan_remark(means)

    # --- pictures ---------------------------------------------------------------

    def drawn(self, captions: list[str], draws: NoiseStreams, truncation: float = 1.0) -> Drawn:
        """Pictures of every scale, and what their places looked at."""
        text = self.text.encode(captions)
        noise, eps = draws.randn(self.config.noise), draws.randn(self.config.condition)
        return self.generator(text, truncation * noise, truncation * eps)

    def generate(
        self,
        captions: str | Sequence[str],
        *,
        seed: int = 0,
        return_attention: bool = False,
        **knobs: Any,
    ) -> Any:
        """As of every system; with `return_attention` a pair of the pictures and, for each scale
        but the first, what its places looked at: (B, L, s, s), which sums to 1 over the L words.
        What they are, `text.pieces` says.
        """
        if not return_attention:
            return super().generate(captions, seed=seed, **knobs)
        if "scale" in knobs:
            raise UserError("Attention is given for all scales: leave out scale=.")
        knobs = self.typed_knobs(knobs)
        parts = list(self.in_parts(captions, seed, lambda c, d: self.drawn(c, d, **knobs)))
        longest = max(part.attention[0].shape[1] for part in parts)
        attention = []
        for of_scale in zip(*(part.attention for part in parts), strict=True):
            padded = [F.pad(w, (0, 0, 0, 0, 0, longest - w.shape[1])).float() for w in of_scale]
            attention.append(torch.cat(padded))
        return torch.cat([part.images[-1].float() for part in parts]).clamp(-1, 1), attention

    def picture_vectors(self, images: Tensor) -> Tensor:
        return self.matcher(images).whole

    def inside(self, caption: str, *, seed: int = 0) -> list[list[Named]]:
        """The pictures of all scales; then, for each scale but the first, the picture as each word
        lights it: the brighter a place, the more it looked at the word.
        """
        (drawn,) = self.in_parts(caption, seed, self.drawn)
        words, size = self.text.pieces(caption), drawn.images[-1].shape[-2:]
        large = [F.interpolate(i, size, mode="nearest")[0].clamp(-1, 1) for i in drawn.images]
        rows = [[(f"at {side}", image) for side, image in zip(self.sides, large, strict=True)]]
        for side, image, weights in zip(self.sides[1:], large[1:], drawn.attention, strict=True):
            most = weights.amax((2, 3), keepdim=True).clamp(min=1e-12)  # (1, L, 1, 1)
            light = F.interpolate(weights / most, size, mode="nearest")[0]
            lit = [(image + 1) * part - 1 for part in light]
            rows.append([(f"{word} ({side})", i) for word, i in zip(words, lit, strict=False)])
        return rows

    def draw(
        self, captions: list[str], draws: NoiseStreams, truncation: float = 1.0, scale: int = 0
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions.

        Args:
            truncation: factor on all noise; below 1 draws more typical pictures that differ less.
            scale: 1, 2, ... shows that scale's picture instead, enlarged; 0 is the largest.
        """
        if not 0 <= scale <= self.config.scales:
            raise UserError(f"scale={scale} must be from 0 to {self.config.scales}.")
        images = self.drawn(captions, draws, truncation).images
        return F.interpolate(images[scale - 1], images[-1].shape[-2:], mode="nearest")

    def variants(self) -> dict[str, dict[str, Any]]:
        return {f"at {side}": {"scale": k} for k, side in enumerate(self.sides, 1)}
