"""Parts that the GANs share: initial weights, losses, penalty, augmentation, metrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.nn.gan import (
    COLLAPSED,
    WON,
    HingeLoss,
    LogLoss,
    apply_spectral_norm,
    diagnose_gan,
    diff_augment,
    downsample,
    gan_metrics,
    is_mismatched,
    masked_mean,
    normal_weights,
    r1_is_due,
    r1_penalty,
)

CPU = torch.device("cpu")


# --- initial weights --------------------------------------------------------------------------


def test_normal_weights_are_those_of_the_authors() -> None:
    """Kernels and matrices from N(0, 0.02), norm scales from N(1, 0.02), zero biases of both: with
    torch's default weights GANs often fail."""
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
    """The largest singular value of every kernel, by the power method over some steps."""
    network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(200, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(7.0)
    apply_spectral_norm(network)
    for _ in range(40):
        network(torch.randn(2, 3, 8, 8))
    for layer in (network[0], network[3]):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=1e-2)


# --- losses -----------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0])
    log = [-math.log(1 / (1 + math.exp(-s))) for s in (-2.0, 0.0, 3.0)]
    assert LogLoss.real(logits).tolist() == pytest.approx(log)
    assert LogLoss.fake(-logits).tolist() == pytest.approx(log)
    assert LogLoss.generator(logits).tolist() == pytest.approx(log)
    assert HingeLoss.real(logits).tolist() == [3.0, 1.0, 0.0]
    assert HingeLoss.fake(logits).tolist() == [0.0, 1.0, 4.0]
    assert HingeLoss.generator(logits).tolist() == [2.0, 0.0, -3.0]  # without a margin


def test_large_logits_give_finite_losses() -> None:
    """log(sigmoid(-200)) is minus infinity; softplus(200) is 200."""
    logits = torch.tensor([200.0, -200.0])
    assert LogLoss.real(logits).tolist() == [0.0, 200.0]
    assert LogLoss.fake(logits).tolist() == [200.0, 0.0]


def test_mismatched_captions_differ_from_the_row_before() -> None:
    """In words or their order; before the first row is the last."""
    captions = ["a b", "b a", "b a", "B a", "a b"]
    assert is_mismatched(captions, CPU).tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert is_mismatched(["single"], CPU).tolist() == [0.0]


def test_a_masked_mean_is_over_the_rows_of_the_mask() -> None:
    """Without any it is zero, not NaN."""
    values = torch.tensor([1.0, 20.0, 3.0])
    assert masked_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 2
    assert masked_mean(values, torch.zeros(3)) == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_the_penalty_of_a_linear_network_is_the_square_of_its_weights(batch: int) -> None:
    """d (w x) / d x = w in every row, so the mean is |w|^2 for any batch, and its own gradient with
    respect to w is 2 w."""
    weight = torch.randn(3, 4, 4, requires_grad=True)
    image = torch.randn(batch, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((image * weight).sum(dim=(1, 2, 3)), image)
    torch.testing.assert_close(penalty, weight.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * weight)


def test_the_penalty_is_a_mean_over_rows() -> None:
    """For a |x|^2 / 2, whose gradient is a x."""
    a, image = torch.tensor(0.7, requires_grad=True), torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty(a * image.square().sum(dim=(1, 2, 3)) / 2, image)
    rows = [0.7**2 * row.square().sum().item() for row in image]
    assert penalty.item() == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_a_penalty_every_few_steps_has_the_mean_weight_of_one_in_all() -> None:
    due = [r1_is_due(0.3, 4, torch.tensor(step)) for step in range(8)]
    assert due == [True, False, False, False, True, False, False, False]
    assert not r1_is_due(0.0, 4, torch.empty((), device="meta"))  # the step is not read


def test_downsampling_takes_means_of_squares() -> None:
    image = torch.arange(32.0).view(1, 2, 4, 4)
    assert downsample(image, 4) is image
    assert downsample(image, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert downsample(image, 1).flatten().tolist() == [7.5, 23.5]


@pytest.mark.parametrize(("side", "to"), [(32, 16), (64, 8), (24, 8), (24, 6), (256, 64), (9, 3)])
def test_downsampling_is_pooling(side: int, to: int) -> None:
    """For every factor: powers of two by halves, the rest by pooling."""
    image = torch.rand(2, 3, side, side) * 2 - 1
    torch.testing.assert_close(downsample(image, to), F.avg_pool2d(image, side // to))


# --- augmentation -----------------------------------------------------------------------------


def numbered(batch: int, side: int) -> Tensor:
    """(B, 3, S, S) pictures in which no number is twice, and none is zero."""
    return torch.arange(1.0, batch * 3 * side * side + 1).view(batch, 3, side, side)


@pytest.mark.parametrize("side", [4, 8, 16, 24])
def test_every_picture_is_shifted_and_has_a_hole(side: int) -> None:
    """Each pixel is one of the same picture, by one shift for all of it (the edge repeats), or is
    in the hole, a square of half the side that may be half outside.

    Over many pictures every shift up to an eighth of the side occurs, and none beyond.
    """
    batch, most = 60 if side < 24 else 200, max(1, side // 8)
    image = numbered(batch, side)
    augmented = diff_augment(image)
    assert augmented.shape == image.shape and augmented.dtype == image.dtype
    place = torch.arange(side)
    shifts = set()
    for real, changed in zip(image, augmented, strict=True):
        hole = (changed == 0).all(0)
        assert torch.equal(hole, (changed == 0).any(0))  # all channels or none
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
                changed,
            )
        ]
        assert fits
        shifts.add(fits[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(-most, most + 1))


def test_augmentation_comes_from_the_seed_and_differs_by_row() -> None:
    """A step that is repeated after a resume must augment in the same way."""
    image = numbered(1, 16).expand(20, 3, 16, 16)
    torch.manual_seed(3)
    one = diff_augment(image)
    torch.manual_seed(3)
    assert torch.equal(one, diff_augment(image))
    assert not torch.equal(one, diff_augment(image))
    assert len({tuple(row.flatten().tolist()) for row in one}) > 15


def test_augmentation_is_differentiable() -> None:
    """The generator learns through it; a pixel's gradient counts its copies."""

    def augmented(image: Tensor) -> Tensor:
        torch.manual_seed(5)
        return diff_augment(image)

    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(augmented, (image,))
    augmented(image).sum().backward()
    assert image.grad is not None
    assert image.grad.sum() == (augmented(image) != 0).sum()


# --- metrics ----------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    """Accuracies, of mismatched pairs only those with another caption; and the spread of the
    generated pictures as a share of that of the real ones."""
    real = torch.zeros(4, 3, 4, 4)
    real[:2] = 1.0  # half one colour, half another
    metrics = gan_metrics(
        torch.tensor([2.0, -1.0, 0.5, 3.0]),
        torch.tensor([-1.0, -2.0, 4.0]),
        torch.tensor([-3.0, -0.1, 1.0, 2.0]),
        torch.tensor([1.0, 0.0, 1.0]),
        real=real,
        fake=real * 0.25 + 0.5,
    )
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy_real": 0.75, "accuracy_wrong": 0.5, "accuracy_fake": 0.5, "spread": 0.25}
    )
    assert all(value.shape == () for value in metrics.values())


def test_metrics_of_nothing_are_numbers() -> None:
    """No mismatched caption and equal real pictures: zeros, not a stopped run."""
    metrics = gan_metrics(
        torch.zeros(2),
        torch.zeros(1),
        torch.zeros(2),
        torch.zeros(1),
        real=torch.ones(2, 3, 4, 4),
        fake=torch.zeros(2, 3, 4, 4),
    )
    assert [value.item() for value in metrics.values()] == [0.0, 0.0, 0.0, 0.0]


def test_a_diagnosis_names_trouble_alone() -> None:
    well = {"accuracy_real": 0.9, "accuracy_wrong": 1.0, "accuracy_fake": 1.0, "spread": 0.8}
    assert diagnose_gan(well) == "" and diagnose_gan({}) == ""
    assert diagnose_gan({**well, "accuracy_real": WON, "spread": COLLAPSED}) == ""  # not beyond
    won = {**well, "accuracy_real": 0.99}
    sentence = "the discriminator has won: it separates all fakes from real pictures"
    assert diagnose_gan(won) == sentence
    collapsed = {**well, "spread": 0.29}
    assert diagnose_gan(collapsed) == "collapse: the pictures hardly differ"
    assert diagnose_gan(won | {"spread": 0.1}) == f"{sentence}; {diagnose_gan(collapsed)}"
