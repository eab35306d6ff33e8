"""How decoded pictures are judged: equation 7, the perceptual distance and the turn by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.autoencoder import PatchDiscriminator
from lineage.nn.vqgan_losses import LARGEST, adaptive_weight, judged, perceptual_distance


def looking(layers: int = 1) -> PatchDiscriminator:
    """A discriminator to whom pictures differ."""
    torch.manual_seed(2)
    look = PatchDiscriminator(4, layers).eval()
    with torch.no_grad():
        for parameter in look.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return look


def pictures(count: int = 3, side: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, side, side) * 2 - 1, torch.rand(count, 3, side, side) * 2 - 1


# --- equation 7 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "slope", "expected"),
    [
        (3.0, 1.0, 3.0 / 1.0001),
        (1.0, 4.0, 1 / 4.0001),
        (1e-3, 1e-4, 1e-3 / 2e-4),  # where the small number in the denominator is half of it
        (2.0, 0.0, 2e4),
        (0.5, 0.0, 5e3),
        (0.0, 1.0, 0.0),
        (1e6, 1.0, 1e6),
    ],
)
def test_the_weight_of_straight_lines(ratio: float, slope: float, expected: float) -> None:
    """Losses whose gradients in the last kernel are known: `ratio` and `slope` long."""
    last = torch.zeros(4, requires_grad=True)
    towards = torch.tensor([0.5, -0.5, 0.5, 0.5])  # of length one
    found = adaptive_weight(
        (ratio * towards * last).sum(), -(slope * towards.flip(0) * last).sum(), last
    )
    assert found.item() == pytest.approx(min(expected, LARGEST), rel=1e-4)
    assert LARGEST == 1e4


def test_the_weight_does_not_depend_on_what_the_losses_are_worth() -> None:
    """On their slopes in the last kernel alone, whichever way they point."""
    last = torch.randn(5, requires_grad=True)
    near, fooled = last.square().sum(), last.sin().sum()
    found = adaptive_weight(near, fooled, last)
    torch.testing.assert_close(found, adaptive_weight(near + 7, -fooled - 3, last))
    torch.testing.assert_close(3 * found, adaptive_weight(3 * near, fooled, last))


def test_the_weight_is_a_number_and_leaves_the_graph_as_it_is() -> None:
    last = torch.randn(3, 2, 3, 3, requires_grad=True)
    drawn = F.conv2d(torch.randn(1, 2, 5, 5), last)
    near, fooled = drawn.abs().mean(), drawn.tanh().mean()
    found = adaptive_weight(near, fooled, last)
    assert found.shape == () and not found.requires_grad and last.grad is None
    both = [torch.autograd.grad(x, last, retain_graph=True)[0] for x in (near, fooled)]
    (near + found * fooled).backward()
    torch.testing.assert_close(last.grad, both[0] + found * both[1])


# --- the perceptual distance ------------------------------------------------------------------


def seen_by(look: PatchDiscriminator, image: Tensor) -> list[Tensor]:
    """What stands behind each leaky ReLU, layer by layer."""
    found, x = [], image
    for layer in look.main[:-1]:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            found.append(x)
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_the_distance_is_that_of_the_features(layers: int) -> None:
    """A mean of |a - b| at each depth, and of the depths; the picture itself is left out."""
    look, (image, decoded) = looking(layers), pictures(side=24)
    pairs = list(zip(seen_by(look, image), seen_by(look, decoded), strict=True))
    assert len(pairs) == layers + 1
    expected = sum((a - b).abs().sum() / a.numel() for a, b in pairs) / len(pairs)
    torch.testing.assert_close(perceptual_distance(look, [], image, decoded), expected)


def test_the_distance_is_none_to_itself_and_moves_the_decoded_picture_alone() -> None:
    look, (image, decoded) = looking(), pictures()
    assert perceptual_distance(look, [], image, image).item() == 0
    image.requires_grad_(), decoded.requires_grad_()
    perceptual_distance(look, [], image, decoded).backward()
    assert image.grad is None and decoded.grad is not None and decoded.grad.any()


class Counted(nn.Module):
    """Stands in for LPIPS: the largest difference of each row."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        assert one.dtype == other.dtype == torch.float32
        return (one - other).abs().flatten(1).amax(1)


def test_lpips_is_asked_where_it_is_there() -> None:
    """Instead of the features, in full precision, a mean over rows."""
    look, (image, decoded) = looking(), pictures()
    expected = (image - decoded.bfloat16().float()).abs().flatten(1).amax(1).mean()
    found = perceptual_distance(look, [Counted()], image, decoded.bfloat16())  # type: ignore[list-item]
    torch.testing.assert_close(found, expected)


# --- the discriminator's turn -----------------------------------------------------------------


class Brightness(nn.Module):
    """A logit for each quarter of a picture: ten times its mean."""

    def forward(self, image: Tensor) -> Tensor:
        return 10 * F.avg_pool2d(image.mean(1, keepdim=True), image.shape[-1] // 2)


def test_the_turn_by_hand() -> None:
    """Half of each hinge, and how often the sign is right."""
    real = torch.tensor([[0.3, 0.02], [-0.05, 0.0]])
    fake = torch.tensor([[-0.4, -0.01], [0.2, -0.1]])
    image, decoded = (x.repeat_interleave(2, 0).repeat_interleave(2, 1) for x in (real, fake))
    image, decoded = (x.expand(1, 3, 4, 4).clone().requires_grad_() for x in (image, decoded))
    terms, facts = judged(Brightness(), image, decoded)  # type: ignore[arg-type]
    lacking = [max(0.0, 1 - 10 * x) for x in (0.3, 0.02, -0.05, 0.0)]
    left = [max(0.0, 1 + 10 * x) for x in (-0.4, -0.01, 0.2, -0.1)]
    assert set(terms) == {"real", "fake"}
    assert terms["real"].item() == pytest.approx(sum(lacking) / 8, rel=1e-5)
    assert terms["fake"].item() == pytest.approx(sum(left) / 8, rel=1e-5)
    assert {name: value.item() for name, value in facts.items()} == {
        "accuracy_real": 0.5,
        "accuracy_fake": 0.75,
    }
    assert terms["real"].requires_grad and not terms["fake"].requires_grad  # of the decoder


def test_the_turn_moves_the_discriminator() -> None:
    """By either of its terms, and never the decoder."""
    for name in ("real", "fake"):
        look, (image, decoded) = looking(), pictures()
        terms, facts = judged(look, image, decoded.requires_grad_())
        terms[name].backward()
        assert decoded.grad is None
        assert all(p.grad is not None and p.grad.any() for p in look.parameters())
        assert not any(value.requires_grad for value in facts.values())
