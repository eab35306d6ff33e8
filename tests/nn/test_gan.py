"""What the GANs share: initial weights, losses, penalty, augmentation, health."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.gan import (
    COLLAPSED,
    WON,
    accepted,
    convinced,
    diff_augment,
    different,
    gan_health,
    gan_remark,
    gradient_penalty,
    normal_weights,
    penalty_weight,
    rejected,
    smaller,
    spectral,
)

CPU = torch.device("cpu")


# --- initial weights --------------------------------------------------------------------------


def test_normal_weights_are_those_of_the_authors() -> None:
    """Kernels and matrices from N(0, 0.02), norm scales from N(1, 0.02), biases of both at zero: at
    torch's own, GANs often fail."""
    network = nn.Sequential(
        nn.Conv2d(16, 64, 4),
        nn.ConvTranspose2d(16, 64, 4),
        nn.Linear(100, 200),
        nn.Linear(100, 200, bias=False),
        nn.BatchNorm1d(4000),
        nn.BatchNorm2d(4000),
    ).apply(normal_weights)
    for layer in network:
        scale = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        assert layer.weight.mean().item() == pytest.approx(float(scale), abs=2e-3)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if scale or (isinstance(layer, nn.Linear) and layer.bias is not None):
            assert not layer.bias.any()


def test_spectral_norm_is_at_most_one() -> None:
    """The largest singular value of every kernel, found by the power method as steps go on."""
    network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(200, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(7.0)
    spectral(network)
    for _ in range(40):
        network(torch.randn(2, 3, 8, 8))
    for layer in (network[0], network[3]):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=1e-2)


# --- losses -----------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0])
    log = [-math.log(1 / (1 + math.exp(-s))) for s in (-2.0, 0.0, 3.0)]
    assert accepted(logits, "log").tolist() == pytest.approx(log)
    assert rejected(-logits, "log").tolist() == pytest.approx(log)
    assert convinced(logits).item() == pytest.approx(sum(log) / 3)
    assert accepted(logits, "hinge").tolist() == [3.0, 1.0, 0.0]
    assert rejected(logits, "hinge").tolist() == [0.0, 1.0, 4.0]
    assert convinced(logits, "hinge").item() == pytest.approx(-1 / 3)  # it has no margin


def test_different_is_other_words_in_other_order() -> None:
    """Of each caption and the one of the row before; before the first stands the last."""
    captions = ["a b", "b a", "b a", "B a", "a b"]
    assert different(captions, CPU).tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert different(["alone"], CPU).tolist() == [0.0]


@pytest.mark.parametrize("penalised", [1, 4])
def test_the_penalty_of_a_linear_network_is_the_square_of_its_weights(penalised: int) -> None:
    """d (w x) / d x = w in every row, so the mean is |w|^2 whatever the batch, and its own gradient
    in w is 2 w."""
    weight = torch.randn(3, 4, 4, requires_grad=True)
    image = torch.randn(penalised, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty((image * weight).sum(dim=(1, 2, 3)), image)
    torch.testing.assert_close(penalty, weight.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * weight)


def test_the_penalty_is_a_mean_over_rows() -> None:
    """Of a |x|^2 / 2, whose gradient is a x."""
    a, image = torch.tensor(0.7, requires_grad=True), torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = gradient_penalty(a * image.square().sum(dim=(1, 2, 3)) / 2, image)
    rows = [0.7**2 * row.square().sum().item() for row in image]
    assert penalty.item() == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_smaller_takes_means_of_squares() -> None:
    image = torch.arange(32.0).view(1, 2, 4, 4)
    assert smaller(image, 4) is image
    assert smaller(image, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert smaller(image, 1).flatten().tolist() == [7.5, 23.5]


@pytest.mark.parametrize(("side", "to"), [(32, 16), (64, 8), (24, 8), (24, 6), (256, 64), (9, 3)])
def test_smaller_is_pooling(side: int, to: int) -> None:
    """Whatever the factor: a power of two goes by halves, what is left by pooling."""
    image = torch.rand(2, 3, side, side) * 2 - 1
    torch.testing.assert_close(smaller(image, to), F.avg_pool2d(image, side // to))


# --- augmentation -----------------------------------------------------------------------------


def numbered(batch: int, side: int) -> Tensor:
    """(B, 3, S, S) pictures that hold no number twice, and no zero."""
    return torch.arange(1.0, batch * 3 * side * side + 1).view(batch, 3, side, side)


@pytest.mark.parametrize("side", [4, 8, 16, 24])
def test_every_picture_is_shifted_and_has_a_hole(side: int) -> None:
    """Each pixel is one of the same picture, by one shift for all of it (the edge repeats), or lies
    in the hole, a square of half the side that may stand half outside.

    Over many pictures every shift up to an eighth of the side comes about, and none beyond.
    """
    batch, most = 60 if side < 24 else 200, max(1, side // 8)
    image = numbered(batch, side)
    shown = diff_augment(image)
    assert shown.shape == image.shape and shown.dtype == image.dtype
    place = torch.arange(side)
    shifts = set()
    for real, seen in zip(image, shown, strict=True):
        hole = (seen == 0).all(0)
        assert torch.equal(hole, (seen == 0).any(0))  # all channels or none
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        assert side // 4 <= len(rows) <= side // 2 and side // 4 <= len(columns) <= side // 2
        assert hole.sum() == len(rows) * len(columns)
        fits = [
            (y, x)
            for y in range(-most, most + 1)
            for x in range(-most, most + 1)
            if torch.equal(
                real[:, (place + y).clamp(0, side - 1)][:, :, (place + x).clamp(0, side - 1)]
                * ~hole,
                seen,
            )
        ]
        assert fits
        shifts.add(fits[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(-most, most + 1))


def test_augmentation_comes_from_the_seed_and_differs_by_row() -> None:
    """A step that is repeated after a resume must show the same."""
    image = numbered(1, 16).expand(20, 3, 16, 16)
    torch.manual_seed(3)
    one = diff_augment(image)
    torch.manual_seed(3)
    assert torch.equal(one, diff_augment(image))
    assert not torch.equal(one, diff_augment(image))
    assert len({tuple(row.flatten().tolist()) for row in one}) > 15


def test_augmentation_is_differentiable() -> None:
    """The generator learns through it; a pixel's gradient counts how often it is shown."""

    def augmented(image: Tensor) -> Tensor:
        torch.manual_seed(5)
        return diff_augment(image)

    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(augmented, (image,))
    augmented(image).sum().backward()
    assert image.grad is not None
    assert image.grad.sum() == (augmented(image) != 0).sum()


# --- health -----------------------------------------------------------------------------------


def test_health_by_hand() -> None:
    """Right of four each; of the wrong pairs only those that are wrong indeed; and how far apart
    the pictures are, as a share of how far apart the real ones are."""
    shown = torch.zeros(4, 3, 4, 4)
    shown[:2] = 1.0  # half one colour, half another
    facts = gan_health(
        {
            "real": torch.tensor([2.0, -1.0, 0.5, 3.0]),
            "wrong": torch.tensor([-1.0, -2.0, 4.0]),
            "fake": torch.tensor([-3.0, -0.1, 1.0, 2.0]),
        },
        mismatched=torch.tensor([1.0, 0.0, 1.0]),
        drawn=shown * 0.25 + 0.5,
        shown=shown,
    )
    assert {name: value.item() for name, value in facts.items()} == pytest.approx(
        {"accuracy_real": 0.75, "accuracy_wrong": 0.5, "accuracy_fake": 0.5, "spread": 0.25}
    )
    assert all(value.shape == () for value in facts.values())


def test_health_of_nothing_is_a_number() -> None:
    """No wrong pair among the captions, real pictures all alike: zeros, not a stopped run."""
    facts = gan_health(
        {"real": torch.zeros(2), "wrong": torch.zeros(1), "fake": torch.zeros(2)},
        mismatched=torch.zeros(1),
        drawn=torch.zeros(2, 3, 4, 4),
        shown=torch.ones(2, 3, 4, 4),
    )
    assert [value.item() for value in facts.values()] == [0.0, 0.0, 0.0, 0.0]


def test_remarks_are_made_of_trouble_alone() -> None:
    well = {"accuracy_real": 0.9, "accuracy_wrong": 1.0, "accuracy_fake": 1.0, "spread": 0.8}
    assert gan_remark(well) == "" and gan_remark({}) == ""
    assert gan_remark({**well, "accuracy_real": WON, "spread": COLLAPSED}) == ""  # not beyond
    won = {**well, "accuracy_real": 0.99}
    assert gan_remark(won) == "the discriminator has won: it tells all fakes from real pictures"
    flat = {**well, "spread": 0.29}
    assert gan_remark(flat) == "collapse: the pictures hardly differ"
    assert gan_remark(won | {"spread": 0.1}) == f"{gan_remark(won)}; {gan_remark(flat)}"


def test_a_penalty_of_few_steps_weighs_as_one_of_all() -> None:
    weights = [penalty_weight(0.3, 4, torch.tensor(step)) for step in range(8)]
    assert weights == pytest.approx([0.6, 0, 0, 0, 0.6, 0, 0, 0])
    assert sum(weights) / 8 == pytest.approx(0.3 / 2)
    assert penalty_weight(0.0, 4, torch.empty((), device="meta")) == 0  # not even looked at
