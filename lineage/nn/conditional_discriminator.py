"""The matching-aware discriminator of StackGAN and of all that follow it, its loss, and the KL term
of conditioning augmentation (Zhang et al. 2017, arXiv:1612.03242).

A pair of picture and caption is real only if the picture is a photograph and the caption is its
own. `Discriminator` looks at the picture until 4 x 4 places are left, and only then joins what it
is told of the caption; so the pictures are looked at once for all captions they are held against.

Axes: B pictures, C what is told of a caption, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from einops import repeat
from torch import Tensor, nn

from lineage.nn.blocks import conv3x3, doublings
from lineage.nn.gan import accepted, convinced, gradient_penalty, rejected, spectral


class Discriminator(nn.Module):
    """Picture and caption to a logit; real and fitting is high.

    Args:
        channels: next to the picture; they double as the side halves, and eight times as many
            look at the 4 x 4 places.
        told: C, width of what is told of the caption.
        side: of the pictures.
        alone: also judge pictures without their captions.
        norm: `batch`, or `spectral` in its place.
    """

    def __init__(
        self, channels: int, told: int, side: int, alone: bool, norm: str = "batch"
    ) -> None:
        super().__init__()
        batch, most = norm == "batch", 8 * channels

        def normed(layer: nn.Conv2d) -> list[nn.Module]:
            norm = nn.BatchNorm2d(layer.out_channels)
            return [layer, norm, nn.LeakyReLU(0.2)] if batch else [layer, nn.LeakyReLU(0.2)]

        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
        ]
        for _ in range(doublings(4, side) - 1):
            layers += normed(nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False))
            channels *= 2
        while channels > most:
            layers += normed(conv3x3(channels, channels // 2))
            channels //= 2
        self.encode_img = nn.Sequential(*layers)
        self.joint = nn.Sequential(
            *normed(conv3x3(channels + told, channels)), nn.Conv2d(channels, 1, 4, stride=4)
        )
        self.alone = nn.Conv2d(channels, 1, 4, stride=4) if alone else None
        if not batch:
            spectral(self)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C', 4, 4), without a look at the caption."""
        return self.encode_img(image)

    def score(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C', 4, 4), (B, C) -> logits (B,)."""
        everywhere = repeat(condition, "b c -> b c 4 4")
        return self.joint(torch.cat([features, everywhere], dim=1)).flatten()

    def score_alone(self, features: Tensor) -> Tensor:
        """(B, C', 4, 4) -> logits (B,) of the pictures, whatever their captions."""
        assert self.alone is not None
        return self.alone(features).flatten()


def pair_logits(look: Discriminator, real: Tensor, fake: Tensor, told: Tensor) -> dict[str, Tensor]:
    """Logits of the pairs that a discriminator learns from.

    Args:
        real, fake: (B, 3, S, S) pictures.
        told: (B, C) of the captions.

    Returns:
        `real` (B,), `wrong` (B - 1,), which are real pictures with the next row's caption, `fake`
        (B,), and `real_alone`, `fake_alone` (B,) if it judges pictures alone.
    """
    seen, seen_fake = look.features(real), look.features(fake)
    logits = {
        "real": look.score(seen, told),
        "wrong": look.score(seen[:-1], told[1:]),
        "fake": look.score(seen_fake, told),
    }
    if look.alone is not None:
        logits["real_alone"] = look.score_alone(seen)
        logits["fake_alone"] = look.score_alone(seen_fake)
    return logits


EQUATION_3 = {"real": 1.0, "wrong": 1 / 2, "fake": 1 / 2}
EQUATION_5 = {
    "real": 1 / 2,
    "real_alone": 1 / 2,
    "wrong": 1 / 3,
    "fake": 1 / 3,
    "fake_alone": 1 / 3,
}
"""Weights of the discriminator's terms without and with judgements of pictures alone."""


def discriminator_terms(
    logits: Mapping[str, Tensor], mismatched: Tensor | None = None, loss: str = "log"
) -> dict[str, Tensor]:
    """Equation 3, or 5 if there are logits of pictures without their captions.

    Args:
        logits: `real` and `fake` (B,), `wrong` (B - 1,); with `alone` also `real_alone` and
            `fake_alone`.
        mismatched: (B - 1,) 0 where a wrong caption is right after all; None if none is.
    """
    weights = EQUATION_5 if "real_alone" in logits else EQUATION_3
    terms = {}
    for name, weight in weights.items():
        each = (accepted if name.startswith("real") else rejected)(logits[name], loss)
        if name == "wrong" and mismatched is not None:
            mean = (each * mismatched).sum() / mismatched.sum().clamp(min=1.0)
        else:
            mean = each.mean()
        terms[name] = weight * mean
    return terms


def as_it_is(image: Tensor) -> Tensor:
    """`image`, not augmented."""
    return image


def discriminator_turn(
    look: Discriminator,
    real: Tensor,
    fake: Tensor,
    told: Tensor,
    mismatched: Tensor,
    loss: str = "log",
    r1: float = 0.0,
    shown: Callable[[Tensor], Tensor] = as_it_is,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A discriminator's turn: its terms, and the logits of its pairs for `gan_health`.

    Args:
        real, told: as of `pair_logits`.
        fake: as the discriminator is to see them; no gradient reaches them.
        mismatched, loss: as of `discriminator_terms`.
        r1: weight of the gradient penalty, at the real pictures as they are; 0 leaves it out.
        shown: how the discriminator is to see the real pictures.
    """
    if r1 > 0:
        real = real.detach().requires_grad_()
    logits = pair_logits(look, shown(real), fake.detach(), told)
    terms = discriminator_terms(logits, mismatched, loss)
    if r1 > 0:
        terms["r1"] = r1 * gradient_penalty(logits["real"], real)
    return terms, logits


def generator_terms(
    look: Discriminator, fake: Tensor, told: Tensor, loss: str = "log"
) -> dict[str, Tensor]:
    """Equation 4 or 6 without its KL term: `right`, and `alone` if it judges pictures alone."""
    seen = look.features(fake)
    terms = {"right": convinced(look.score(seen, told), loss)}
    if look.alone is not None:
        terms["alone"] = convinced(look.score_alone(seen), loss)
    return terms


def kl_term(mu: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of equation 2, a mean over rows and dimensions."""
    return -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).mean()
