"""What adversarial training shares: initial weights, losses, penalty, spectral normalisation,
augmentation, health.

Axes: B pictures, S side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WON, COLLAPSED = 0.98, 0.3  # accuracy above which, spread below which training is in trouble


def _weight(layer: nn.Module) -> Tensor:
    """What the optimiser moves: under spectral norm `layer.weight` is only computed from it."""
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


def different(captions: list[str], device: torch.device) -> Tensor:
    """(B,) 1 where a caption and the one of the row before (of the last row, for the first) differ;
    0 where they say the same, so that a picture with the other's caption is no wrong pair.
    """
    before = [captions[-1], *captions[:-1]]
    return torch.tensor([float(a != b) for a, b in zip(captions, before, strict=True)]).to(device)


def accepted(logits: Tensor, loss: str) -> Tensor:
    """(B,) What each logit lacks of "real": -log sigmoid(s), or max(0, 1 - s)."""
    return F.softplus(-logits) if loss == "log" else F.relu(1 - logits)


def rejected(logits: Tensor, loss: str) -> Tensor:
    """(B,) What each logit lacks of "not real": -log(1 - sigmoid(s)), or max(0, 1 + s)."""
    return F.softplus(logits) if loss == "log" else F.relu(1 + logits)


def convinced(fake: Tensor, loss: str = "log") -> Tensor:
    """The generator's loss in the form that does not saturate: what the logits (B,) of its pictures
    lack of "real", a mean.
    """
    return F.softplus(-fake).mean() if loss == "log" else -fake.mean()


def gradient_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): the squared norm of the logits' gradient in the real
    picture, a mean over rows.

    Args:
        logits: (B,), computed from `image` with gradient.
        image: (B, 3, S, S) that requires a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def penalty_weight(weight: float, every: int, step: Tensor) -> float:
    """What the penalty weighs in a step: `every` * `weight` / 2 in steps 0, `every`, 2 `every`, ...
    and 0 in the others, so that the mean over steps is `weight` / 2 (Karras et al. 2020,
    arXiv:1912.04958, section 3.1).
    """
    return every * weight / 2 if weight > 0 and int(step) % every == 0 else 0.0


def spectral(network: nn.Module) -> None:
    """Divide every kernel of `network` by its largest singular value (Miyato et al. 2018)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            spectral_norm(layer)


def diff_augment(image: Tensor) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020): each picture shifted by up to an eighth of
    its side, with a square hole of half of it.

    Its changes of colour are left out: captions name colours. (B, 3, S, S) -> the same shape.
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
    inside = [(at >= c) & (at < c + side // 2) for c in corner]  # rows and columns of the hole
    hole = inside[0][:, :, None] & inside[1][:, None, :]  # (B, S, S)
    return shifted * (~hole)[:, None]


def smaller(image: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) -> (B, 3, side, side), each pixel a mean; S must be a multiple of `side`."""
    while image.shape[-1] % (2 * side) == 0:  # sums of halves: faster on a CPU than pooling
        rows = image[..., ::2, :] + image[..., 1::2, :]
        image = (rows[..., ::2] + rows[..., 1::2]) / 4
    return image if image.shape[-1] == side else F.avg_pool2d(image, image.shape[-1] // side)


@torch.no_grad()
def gan_health(
    logits: Mapping[str, Tensor], mismatched: Tensor, drawn: Tensor, shown: Tensor
) -> dict[str, Tensor]:
    """How the two sides stand, from one step.

    Args:
        logits: of pairs: `real` and `fake` (B,), `wrong` (N,).
        mismatched: (N,) 1 where the pair is wrong indeed.
        drawn, shown: (B, 3, S, S) generated and real pictures.

    Returns:
        Scalars: the discriminator's accuracy on each kind of pair, and `spread`, the deviation of a
        pixel over the generated pictures as a share of that over the real ones.
    """
    right = ((logits["wrong"] < 0) * mismatched).sum() / mismatched.sum().clamp(min=1.0)
    return {
        "accuracy_real": (logits["real"] > 0).float().mean(),
        "accuracy_wrong": right,
        "accuracy_fake": (logits["fake"] < 0).float().mean(),
        "spread": deviation(drawn) / deviation(shown).clamp(min=1e-6),
    }


def deviation(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> the standard deviation over the batch, a mean over 8 x 8 pixels."""
    every = max(1, images.shape[-1] // 8)
    return images[..., ::every, ::every].float().std(0, correction=0).mean()


def gan_remark(means: dict[str, float]) -> str:
    """What the means of `gan_health` over some steps say, in a few words; empty if all is well."""
    remarks = []
    if min(means.get("accuracy_real", 0), means.get("accuracy_fake", 0)) > WON:
        remarks.append("the discriminator has won: it tells all fakes from real pictures")
    if means.get("spread", 1) < COLLAPSED:
        remarks.append("collapse: the pictures hardly differ")
    return "; ".join(remarks)
