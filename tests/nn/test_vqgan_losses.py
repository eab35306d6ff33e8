"""Losses of VQGAN's autoencoder: equation 7, perceptual distance and hinge loss by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.autoencoder import PatchDiscriminator
from lineage.nn.vqgan_losses import (
    MAX_WEIGHT,
    adaptive_disc_weight,
    hinge_disc_loss,
    perceptual_distance,
)


def discriminator(layers: int = 1) -> PatchDiscriminator:
    """A discriminator with weights large enough to tell pictures apart."""
    torch.manual_seed(2)
    disc = PatchDiscriminator(4, layers).eval()
    with torch.no_grad():
        for parameter in disc.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return disc


def pictures(count: int = 3, side: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, side, side) * 2 - 1, torch.rand(count, 3, side, side) * 2 - 1


# --- equation 7 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nll_norm", "generator_norm", "expected"),
    [
        (3.0, 1.0, 3.0 / 1.0001),
        (1.0, 4.0, 1 / 4.0001),
        (1e-3, 1e-4, 1e-3 / 2e-4),  # delta is half of the denominator
        (2.0, 0.0, 2e4),
        (0.5, 0.0, 5e3),
        (0.0, 1.0, 0.0),
        (1e6, 1.0, 1e6),
    ],
)
def test_adaptive_weight_of_linear_losses(
    nll_norm: float, generator_norm: float, expected: float
) -> None:
    """Linear losses, whose gradients in the last kernel have known lengths."""
    kernel = torch.zeros(4, requires_grad=True)
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5])  # of length one
    weight = adaptive_disc_weight(
        (nll_norm * direction * kernel).sum(),
        -(generator_norm * direction.flip(0) * kernel).sum(),
        kernel,
    )
    assert weight.item() == pytest.approx(min(expected, MAX_WEIGHT), rel=1e-4)
    assert MAX_WEIGHT == 1e4


def test_adaptive_weight_depends_on_the_lengths_of_the_gradients_alone() -> None:
    """Neither on the values of the losses nor on the directions of their gradients."""
    kernel = torch.randn(5, requires_grad=True)
    nll_loss, generator_loss = kernel.square().sum(), kernel.sin().sum()
    weight = adaptive_disc_weight(nll_loss, generator_loss, kernel)
    other = adaptive_disc_weight(nll_loss + 7, -generator_loss - 3, kernel)
    torch.testing.assert_close(weight, other)
    torch.testing.assert_close(
        3 * weight, adaptive_disc_weight(3 * nll_loss, generator_loss, kernel)
    )


def test_adaptive_weight_of_losses_in_half_precision() -> None:
    kernel = torch.ones(2, requires_grad=True)
    weight = adaptive_disc_weight(1e3 * kernel.sum(), kernel.sum().to(torch.bfloat16), kernel)
    assert weight.item() == pytest.approx(1e3, rel=1e-3) and weight.dtype == torch.float32


def test_adaptive_weight_is_a_constant_and_keeps_the_graph() -> None:
    kernel = torch.randn(3, 2, 3, 3, requires_grad=True)
    decoded = F.conv2d(torch.randn(1, 2, 5, 5), kernel)
    nll_loss, generator_loss = decoded.abs().mean(), decoded.tanh().mean()
    weight = adaptive_disc_weight(nll_loss, generator_loss, kernel)
    assert weight.shape == () and not weight.requires_grad and kernel.grad is None
    gradients = [
        torch.autograd.grad(loss, kernel, retain_graph=True)[0]
        for loss in (nll_loss, generator_loss)
    ]
    (nll_loss + weight * generator_loss).backward()
    torch.testing.assert_close(kernel.grad, gradients[0] + weight * gradients[1])


# --- the perceptual distance ------------------------------------------------------------------


def features_of(disc: PatchDiscriminator, image: Tensor) -> list[Tensor]:
    """The output of each leaky ReLU."""
    features, x = [], image
    for layer in disc.main[:-1]:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            features.append(x)
    return features


@pytest.mark.parametrize("layers", [1, 2])
def test_feature_distance_by_hand(layers: int) -> None:
    """A mean of |a - b| at each depth, and of the depths; the picture itself is left out."""
    disc, (image, decoded) = discriminator(layers), pictures(side=24)
    pairs = list(zip(features_of(disc, image), features_of(disc, decoded), strict=True))
    assert len(pairs) == layers + 1
    expected = sum((a - b).abs().sum() / a.numel() for a, b in pairs) / len(pairs)
    torch.testing.assert_close(perceptual_distance(disc, None, image, decoded), expected)


def test_feature_distance_to_itself_is_zero_and_only_the_reconstruction_has_a_gradient() -> None:
    disc, (image, decoded) = discriminator(), pictures()
    assert perceptual_distance(disc, None, image, image).item() == 0
    image.requires_grad_(), decoded.requires_grad_()
    perceptual_distance(disc, None, image, decoded).backward()
    assert image.grad is None and decoded.grad is not None and decoded.grad.any()


class MaxDifference(nn.Module):
    """In place of LPIPS: the largest difference of each row."""

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        assert image.dtype == other.dtype == torch.float32
        return (image - other).abs().flatten(1).amax(1)


def test_lpips_replaces_the_feature_distance() -> None:
    """In full precision, a mean over rows."""
    disc, (image, decoded) = discriminator(), pictures()
    expected = (image - decoded.bfloat16().float()).abs().flatten(1).amax(1).mean()
    lpips: Any = MaxDifference()
    distance = perceptual_distance(disc, lpips, image, decoded.bfloat16())
    torch.testing.assert_close(distance, expected)


# --- the discriminator's loss -----------------------------------------------------------------


class Brightness(nn.Module):
    """A logit for each quarter of a picture: ten times its mean."""

    def forward(self, image: Tensor) -> Tensor:
        return 10 * F.avg_pool2d(image.mean(1, keepdim=True), image.shape[-1] // 2)


def test_hinge_loss_by_hand() -> None:
    """Half of each hinge, and how often the sign is right."""
    real = torch.tensor([[0.3, 0.02], [-0.05, 0.0]])
    fake = torch.tensor([[-0.4, -0.01], [0.2, -0.1]])
    image, decoded = (x.repeat_interleave(2, 0).repeat_interleave(2, 1) for x in (real, fake))
    image, decoded = (x.expand(1, 3, 4, 4).clone().requires_grad_() for x in (image, decoded))
    disc: Any = Brightness()
    terms, metrics = hinge_disc_loss(disc, image, decoded)
    real_hinges = [max(0.0, 1 - 10 * x) for x in (0.3, 0.02, -0.05, 0.0)]
    fake_hinges = [max(0.0, 1 + 10 * x) for x in (-0.4, -0.01, 0.2, -0.1)]
    assert set(terms) == {"real", "fake"}
    assert terms["real"].item() == pytest.approx(sum(real_hinges) / 8, rel=1e-5)
    assert terms["fake"].item() == pytest.approx(sum(fake_hinges) / 8, rel=1e-5)
    assert {name: value.item() for name, value in metrics().items()} == {
        "accuracy_real": 0.5,
        "accuracy_fake": 0.75,
    }
    assert terms["real"].requires_grad and not terms["fake"].requires_grad  # of the decoder


@pytest.mark.parametrize("term", ["real", "fake"])
def test_hinge_loss_has_a_gradient_in_the_discriminator_alone(term: str) -> None:
    disc, (image, decoded) = discriminator(), pictures()
    terms, metrics = hinge_disc_loss(disc, image, decoded.requires_grad_())
    terms[term].backward()
    assert decoded.grad is None
    assert all(p.grad is not None and p.grad.any() for p in disc.parameters())
    assert not any(value.requires_grad for value in metrics().values())
