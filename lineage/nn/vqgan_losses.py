"""How a decoded picture looks: what VQGAN (Esser et al. 2021, arXiv:2012.09841, section 3.1) and
latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix G) ask of their autoencoders.

    equation 5      `judged`: the discriminator's loss, a hinge in the authors' code
    equation 7      `adaptive_weight`: the adversary gets the weight at which its gradient in the
                    decoder's last layer is as long as the reconstruction's

The perceptual distance is LPIPS where the user has its networks; else the mean distance of what the
discriminator sees in both pictures (feature matching, Larsen et al. 2016, arXiv:1512.09300), which
needs no network from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.nn.autoencoder import PatchDiscriminator
from lineage.nn.gan import accepted, rejected
from lineage.nn.perceptual import LPIPS

LARGEST = 1e4  # that the adaptive weight becomes


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of squared errors of pixels in [-1, 1], whose peak is 2."""
    return 10 * (4 / error.clamp(min=1e-10)).log10()


def adaptive_weight(reconstruction: Tensor, adversary: Tensor, last: Tensor) -> Tensor:
    """Equation 7: |d reconstruction / d last| / (|d adversary / d last| + 0.0001), at most 10,000.

    Args:
        last: the decoder's last kernel.
    """
    lengths = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversary)
    ]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=LARGEST).detach()


def perceptual_distance(
    look: PatchDiscriminator, lpips: Sequence[LPIPS], image: Tensor, decoded: Tensor
) -> Tensor:
    """How far apart two pictures (B, 3, S, S) look, a mean over rows.

    Args:
        lpips: none, or one.
    """
    if lpips:
        return lpips[0].to(image.device)(image, decoded.float()).mean()
    with torch.no_grad():
        real = look.features(image)
    pairs = zip(real, look.features(decoded), strict=True)
    return torch.stack([F.l1_loss(b.float(), a.float()) for a, b in pairs]).mean()


def judged(
    look: PatchDiscriminator, image: Tensor, decoded: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The discriminator's turn: loss terms, and how often it is right."""
    real, fake = look(image).float(), look(decoded.detach()).float()
    facts = {
        "accuracy_real": (real > 0).float().mean(),
        "accuracy_fake": (fake < 0).float().mean(),
    }
    terms = {"real": accepted(real, "hinge"), "fake": rejected(fake, "hinge")}
    return {name: 0.5 * each.mean() for name, each in terms.items()}, facts
