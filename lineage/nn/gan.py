"""Parts of adversarial training that several systems share: initial weights, the two losses of a
logit, mismatched captions, gradient penalty, spectral normalisation, augmentation, metrics.

Axes: B pictures, S side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# --- initial weights ------------------------------------------------------------------------------


def _weight(layer: nn.Module) -> Tensor:
    """The parameter behind `layer.weight`, which under spectral norm is computed from it."""
    normed = getattr(layer, "parametrizations", None)
    return cast(Tensor, layer.weight if normed is None else normed.weight.original)


def dcgan_weights(layer: nn.Module) -> None:
    """Radford et al. 2016, section 4: kernels from N(0, 0.02), norm scales from N(1, 0.02)."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(_weight(layer), 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def normal_weights(layer: nn.Module) -> None:
    """`dcgan_weights`, and linear layers from N(0, 0.02) with zero biases: StackGAN and after."""
    dcgan_weights(layer)
    if isinstance(layer, nn.Linear):
        nn.init.normal_(_weight(layer), 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def orthogonal_weights(layer: nn.Module) -> None:
    """`dcgan_weights`, with orthogonal kernels and linear layers with zero biases: AttnGAN and
    after.
    """
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(_weight(layer))
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    else:
        dcgan_weights(layer)


def apply_spectral_norm(network: nn.Module) -> None:
    """Divide every kernel of `network` by its largest singular value (Miyato et al. 2018)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            spectral_norm(layer)


# --- losses ---------------------------------------------------------------------------------------


class LogLoss:
    """Losses of logits s, where D = sigmoid(s) (Goodfellow et al. 2014), one number per logit.

    The generator's is the form that does not saturate.
    """

    @staticmethod
    def real(logits: Tensor) -> Tensor:
        return F.softplus(-logits)  # -log D

    @staticmethod
    def fake(logits: Tensor) -> Tensor:
        return F.softplus(logits)  # -log(1 - D)

    @staticmethod
    def generator(logits: Tensor) -> Tensor:
        return F.softplus(-logits)  # -log D


class HingeLoss:
    """Losses of logits s with a margin (Lim and Ye 2017), one number per logit."""

    @staticmethod
    def real(logits: Tensor) -> Tensor:
        return F.relu(1 - logits)

    @staticmethod
    def fake(logits: Tensor) -> Tensor:
        return F.relu(1 + logits)

    @staticmethod
    def generator(logits: Tensor) -> Tensor:
        return -logits


ADVERSARIAL_LOSSES: dict[str, type[LogLoss] | type[HingeLoss]] = {
    "log": LogLoss,
    "hinge": HingeLoss,
}


def is_mismatched(captions: list[str], device: torch.device) -> Tensor:
    """(B,) 1 where a caption differs from that of the row before (for the first row: the last).

    Where it is 0 both captions are equal, so that either fits both pictures.
    """
    previous = [captions[-1], *captions[:-1]]
    differs = [float(a != b) for a, b in zip(captions, previous, strict=True)]
    return torch.tensor(differs).to(device)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (N,) where `mask` (N,) is 1; 0 if it is 1 nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def r1_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): |d logits / d image|^2, a mean over rows.

    Args:
        logits: (B,) logits of real pictures, computed from `image`.
        image: (B, 3, S, S) real pictures that require a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def r1_is_due(weight: float, every: int, step: Tensor) -> bool:
    """Whether step 0, 1, ... has a gradient penalty: every `every`-th has.

    The penalty is then multiplied by `every`, so that its mean over steps has the weight `weight`
    (lazy regularisation: Karras et al. 2020, arXiv:1912.04958, section 3.1).
    """
    return weight > 0 and int(step) % every == 0


# --- pictures -------------------------------------------------------------------------------------


def diff_augment(image: Tensor) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020): a shift by up to an eighth of the side, and a
    square hole of half the side.

    Its changes of colour are left out, because captions name colours. (B, 3, S, S) -> the same
    shape.
    """
    batch, _, side, _ = image.shape
    most = max(1, side // 8)
    shift = torch.randint(-most, most + 1, (2, batch, 1), device=image.device)
    corner = torch.randint(-(side // 4), side - side // 4 + 1, (2, batch, 1), device=image.device)
    at = torch.arange(side, device=image.device)[None]  # (1, S)
    rows, columns = at + shift[0] + most, at + shift[1] + most  # (B, S) in the padded picture
    padded = F.pad(image, (most,) * 4, mode="replicate").permute(0, 2, 3, 1)  # (B, S', S', 3)
    number = torch.arange(batch, device=image.device)[:, None, None]
    shifted = padded[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    in_rows, in_columns = [(at >= c) & (at < c + side // 2) for c in corner]  # (B, S) of the hole
    hole = in_rows[:, :, None] & in_columns[:, None, :]  # (B, S, S)
    return shifted * (~hole)[:, None]


def downsample(image: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) -> (B, 3, side, side), each pixel a mean; S must be a multiple of `side`."""
    while image.shape[-1] % (2 * side) == 0:  # sums of halves: faster on a CPU than pooling
        rows = image[..., ::2, :] + image[..., 1::2, :]
        image = (rows[..., ::2] + rows[..., 1::2]) / 4
    return image if image.shape[-1] == side else F.avg_pool2d(image, image.shape[-1] // side)


# --- metrics --------------------------------------------------------------------------------------

WON = 0.98
"""Accuracy of the discriminator from which on the generator learns nothing."""

COLLAPSED = 0.3
"""Spread below which the generator draws one picture."""


@torch.no_grad()
def gan_metrics(
    real_logits: Tensor,
    wrong_logits: Tensor,
    fake_logits: Tensor,
    mismatched: Tensor,
    *,
    real: Tensor,
    fake: Tensor,
) -> dict[str, Tensor]:
    """Balance of the two networks in one step.

    Args:
        real_logits, fake_logits: (B,) logits of real and generated pictures with their captions.
        wrong_logits: (N,) logits of real pictures with other captions.
        mismatched: (N,) 1 where the other caption differs.
        real, fake: (B, 3, S, S) pictures.

    Returns:
        Scalars: the discriminator's accuracy on each kind of pair, and `spread`, the deviation over
        the generated pictures as a share of that over the real ones.
    """
    return {
        "accuracy_real": (real_logits > 0).float().mean(),
        "accuracy_wrong": masked_mean((wrong_logits < 0).float(), mismatched),
        "accuracy_fake": (fake_logits < 0).float().mean(),
        "spread": _deviation(fake) / _deviation(real).clamp(min=1e-6),
    }


def _deviation(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> standard deviation over the batch, a mean over 8 x 8 pixels."""
    every = max(1, images.shape[-1] // 8)
    return images[..., ::every, ::every].float().std(0, correction=0).mean()


def diagnose_gan(means: Mapping[str, float]) -> str:
    """A few words on the means of `gan_metrics` over some steps; empty if all is well."""
    faults = []
    if min(means.get("accuracy_real", 0), means.get("accuracy_fake", 0)) > WON:
        faults.append("the discriminator has won: it separates all fakes from real pictures")
    if means.get("spread", 1) < COLLAPSED:
        faults.append("collapse: the pictures hardly differ")
    return "; ".join(faults)
