"""The losses of an autoencoder that is trained to look right: VQGAN (Esser et al. 2021,
arXiv:2012.09841, section 3.1) and latent diffusion (Rombach et al. 2022, arXiv:2112.10752,
appendix G).

    L_rec             |x - x^| plus LPIPS(x, x^)                    `perceptual_distance`
    equation 5        L_GAN, a hinge loss in the authors' code      `hinge_disc_loss`
    equations 6, 7    L_rec + lambda L_GAN, with
                      lambda = |grad L_rec| / (|grad L_GAN| + delta) `adaptive_disc_weight`
                      and gradients in the decoder's last kernel

Departure: users who have no files of LPIPS get another perceptual distance, the mean difference of
the discriminator's features (feature matching, Larsen et al. 2016, arXiv:1512.09300).

Axes: B pictures, S side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.nn.autoencoder import PatchDiscriminator
from lineage.nn.perceptual import LPIPS

DELTA = 1e-4
"""Constant in the denominator of equation 7."""
MAX_WEIGHT = 1e4
"""Bound of the adaptive weight, as in the authors' code."""


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, from the squared error of pixels in [-1, 1]."""
    return 10 * (4 / mse.clamp(min=1e-10)).log10()  # the peak is 2


def adaptive_disc_weight(nll_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Equation 7: |grad nll_loss| / (|grad generator_loss| + delta), without gradient.

    Args:
        nll_loss: Reconstruction loss of the decoder.
        generator_loss: Adversarial loss of the decoder.
        last_layer: Kernel of the decoder's last convolution, in which the gradients are taken.
    """
    nll_norm, generator_norm = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (nll_loss, generator_loss)
    )
    return (nll_norm / (generator_norm + DELTA)).clamp(max=MAX_WEIGHT).detach()


def perceptual_distance(
    disc: PatchDiscriminator, lpips: LPIPS | None, image: Tensor, decoded: Tensor
) -> Tensor:
    """Perceptual distance of two batches of pictures (B, 3, S, S), a mean over rows.

    Args:
        disc: Discriminator, whose features are compared if there is no LPIPS.
        lpips: The distance of LPIPS, or None.
        image: Pictures, which get no gradient.
        decoded: Their reconstructions.
    """
    if lpips is not None:
        return lpips(image, decoded.float()).mean()
    with torch.no_grad():
        real = disc.features(image)
    pairs = zip(real, disc.features(decoded), strict=True)
    return torch.stack([F.l1_loss(fake.float(), real.float()) for real, fake in pairs]).mean()


def hinge_disc_loss(
    disc: PatchDiscriminator, image: Tensor, decoded: Tensor
) -> tuple[dict[str, Tensor], Callable[[], dict[str, Tensor]]]:
    """The discriminator's loss: 1/2 mean max(0, 1 - D(x)) + 1/2 mean max(0, 1 + D(x^)).

    Returns:
        Both terms, and a function that returns the share of patches that D classifies correctly.
    """
    real, fake = disc(image).float(), disc(decoded.detach()).float()

    def metrics() -> dict[str, Tensor]:
        return {
            "accuracy_real": (real > 0).float().mean(),
            "accuracy_fake": (fake < 0).float().mean(),
        }

    terms = {"real": 0.5 * F.relu(1 - real).mean(), "fake": 0.5 * F.relu(1 + fake).mean()}
    return terms, metrics
