"""Cutouts: each against its plain version, and random numbers that belong to one picture."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.clip import cutouts as module
from lineage.clip.cutouts import (
    Crops,
    affine_matrices,
    augment,
    clamp_with_grad,
    colour_matrices,
    crop_sides,
    draw_crops,
    erased,
    homography,
    lanczos,
    latest_cutouts,
    original_cutouts,
    perspective_matrices,
    pooled,
    ramp,
    resample,
    warp,
)
from lineage.nn.noise import NoiseStreams

ALL = ("affine", "perspective", "jitter", "erasing")


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def streams(count: int, seed: int = 0) -> NoiseStreams:
    return NoiseStreams.for_pictures(seed, count, "cpu")


# --- clamping and resampling ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "grad", "kept"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, True),
        (1.5, 1.0, True),  # a step against the gradient leads down, back inside
        (1.5, -1.0, False),
        (-0.5, -1.0, True),
        (-0.5, 1.0, False),
    ],
)
def test_a_gradient_outside_the_bounds_is_kept_if_it_leads_back(
    x: float, grad: float, kept: bool
) -> None:
    value = torch.tensor(x, requires_grad=True)
    clamped = clamp_with_grad(value)
    assert float(clamped.detach()) == min(max(x, 0.0), 1.0)
    clamped.backward(torch.tensor(grad))
    assert value.grad is not None and float(value.grad) == (grad if kept else 0.0)


def test_a_kernel_reaches_two_pixels_of_the_smaller_picture() -> None:
    taps = ramp(0.3, 2)
    assert taps.tolist() == pytest.approx([0.3 * k for k in range(-6, 7)])
    assert len(ramp(0.5, 2)) == 7  # the ends, at -2 and 2, have weight zero
    assert float(lanczos(taps).sum()) == pytest.approx(1)
    x = 0.9
    expected = math.sin(math.pi * x) / (math.pi * x) * math.sin(math.pi * x / 2) / (math.pi * x / 2)
    kernel = lanczos(taps)
    assert float(kernel[9] / kernel[6]) == pytest.approx(expected, rel=1e-5)


def test_only_an_axis_that_shrinks_is_smoothed() -> None:
    """Stripes of one pixel vanish where they shrink, and stay where they grow."""
    stripes = (torch.arange(16) % 2).float().expand(1, 1, 16, 16)  # vary along x
    wide, narrow = resample(stripes, (8, 32)), resample(stripes, (32, 8))
    assert wide.std() > 0.3 and narrow[..., 1:-1].std() < 0.05
    plain = F.interpolate(stripes, (32, 32), mode="bicubic", align_corners=True)
    assert torch.equal(resample(stripes, (32, 32)), plain)


# --- crops ----------------------------------------------------------------------------------------


def naive_original(image: Tensor, crops: Crops, side: int) -> Tensor:
    """One crop after the other."""
    rows = []
    for picture, *numbers in zip(image, crops.side, crops.left, crops.top, strict=True):
        views = [
            resample(picture[None, :, y : y + n, x : x + n], (side, side))[0]
            for n, x, y in zip(*(row.tolist() for row in numbers), strict=True)
        ]
        rows.append(torch.stack(views))
    return clamp_with_grad(torch.stack(rows))


def test_matrix_products_are_crops_and_their_resampling() -> None:
    """Value and gradient, for crops that shrink and that grow, of a picture that is no square."""
    image, noise = pictures(2, 3, 24, 30), streams(2)
    crops = draw_crops(noise, 5, 24, 30, 10)
    sides = torch.tensor([[10, 24, 7, 11, 23], [24, 10, 12, 13, 9]])
    crops = Crops(sides, (crops.left / 30 * (31 - sides)).long(), (0 * crops.top + 24 - sides))
    weight = pictures(2, 5, 3, 10, 10, seed=1) - 0.5
    values, grads = [], []
    for function in (original_cutouts, naive_original):
        x = (4 * image - 1.5).requires_grad_()  # beyond [0, 1], so that clamping matters
        values.append(function(x, crops, 10))
        grads.append(torch.autograd.grad((values[-1] * weight).sum(), x)[0])
    torch.testing.assert_close(*values, atol=2e-6, rtol=0)
    torch.testing.assert_close(*grads, atol=2e-6, rtol=0)


def test_crops_lie_inside_the_picture_and_reach_every_side() -> None:
    crops = draw_crops(streams(4), 500, 20, 26, 8)
    for first, length in ((crops.left, 26), (crops.top, 20)):
        assert first.min() == 0 and (first + crops.side).max() == length
    assert set(crops.side.flatten().tolist()) == set(range(8, 20))  # u < 1: never all of it
    assert crops.side.float().mean() == pytest.approx(13.5, abs=0.3)


def test_a_power_above_one_makes_crops_smaller() -> None:
    u = torch.tensor([0.0, 0.5, 0.999])
    assert crop_sides(u, 32, 40, 8, 1.0).tolist() == [8, 20, 31]
    assert crop_sides(u, 32, 40, 8, 2.0).tolist() == [8, 14, 31]
    assert crop_sides(u, 32, 40, 64, 1.0).tolist() == [32, 32, 32]  # CLIP's input is larger


def test_pooling_is_the_mean_of_average_and_maximum() -> None:
    image = pictures(2, 3, 8, 8)
    cells = image.unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (B, C, 4, 2, 4, 2)
    expected = (cells.mean((3, 5)) + cells.amax((3, 5))) / 2
    torch.testing.assert_close(pooled(image, 4), expected)
    assert pooled(image, 12).shape == (2, 3, 12, 12)


# --- augmentations --------------------------------------------------------------------------------


def test_a_warp_moves_a_pixel_to_where_the_matrix_takes_it() -> None:
    image = torch.zeros(1, 1, 6, 9)
    image[0, 0, 2, 3] = 1  # x = 3, y = 2
    matrix = torch.tensor([[[1.0, 0, 4], [0, 1, -1], [0, 0, 1]]])
    moved = warp(image, matrix, "zeros")
    assert moved[0, 0].nonzero().tolist() == [[1, 7]] and float(moved.max()) == pytest.approx(1)
    assert torch.allclose(warp(image, torch.eye(3)[None], "zeros"), image, atol=1e-6)


def test_beyond_the_border_is_black_or_the_nearest_pixel() -> None:
    image = torch.arange(1.0, 6.0).expand(1, 1, 5, 5)
    matrix = torch.tensor([[[1.0, 0, 2], [0, 1, 0], [0, 0, 1]]])
    assert warp(image, matrix, "zeros")[0, 0, 0].tolist() == pytest.approx([0, 0, 1, 2, 3])
    assert warp(image, matrix, "border")[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 2, 3])


def test_four_points_fix_a_homography() -> None:
    start = torch.tensor([[0.0, 0], [10, 0], [10, 10], [0, 10]]).double()
    end = torch.tensor([[1.0, 2], [9, 0], [8, 7], [2, 10]]).double()
    lifted = torch.cat([start, torch.ones(4, 1)], 1) @ homography(start, end).T
    torch.testing.assert_close(lifted[:, :2] / lifted[:, 2:], end)


def test_random_maps_stay_in_their_bounds() -> None:
    """Half of every number is no change; at most, an edge moves by 35 % of the side."""
    middle = torch.full((1, 5), 0.5).double()
    torch.testing.assert_close(affine_matrices(middle, 12)[0], torch.eye(3).double())
    u = pictures(400, 5).double()
    matrices = affine_matrices(u, 11)
    centre = torch.tensor([5.0, 5, 1]).double()
    shift = (matrices @ centre)[:, :2] - 5
    assert 1.0 < shift.abs().max() <= 1.1
    angle = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]).abs() * 180 / math.pi
    assert 15 < angle.max() <= 20.1  # 15 of the turn, 5 of the shear

    nothing = perspective_matrices(torch.zeros(1, 8).double(), 11)
    torch.testing.assert_close(nothing[0], torch.eye(3).double())
    corner = perspective_matrices(pictures(400, 8).double(), 11) @ torch.tensor([0, 0, 1]).double()
    moved = corner[:, :2] / corner[:, 2:]
    assert moved.min() >= 0 and 3.4 < moved.max() <= 3.5


def test_jitter_keeps_greys_grey_but_for_brightness_and_contrast() -> None:
    middle = torch.full((4,), 0.5)
    identity = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)
    torch.testing.assert_close(colour_matrices(middle), identity)
    colour, one = torch.tensor([0.9, 0.4, 0.1]), torch.ones(1)
    for k, expected in (
        (0, 1.1 * colour),  # brightness
        (1, 1.1 * (colour - 0.5) + 0.5),  # contrast
        (2, 1.1 * (colour - colour.mean()) + colour.mean()),  # saturation
    ):
        most = middle.index_fill(0, torch.tensor(k), 1.0)
        torch.testing.assert_close(colour_matrices(most) @ torch.cat([colour, one]), expected)
    turned = colour_matrices(torch.tensor([0.5, 0.5, 0.5, 1.0])) @ torch.cat([colour, one])
    torch.testing.assert_close(turned.mean(), colour.mean())
    torch.testing.assert_close((turned - turned.mean()).norm(), (colour - colour.mean()).norm())
    cosine = F.cosine_similarity(turned - turned.mean(), colour - colour.mean(), 0)
    assert float(cosine) == pytest.approx(math.cos(0.2 * math.pi), abs=1e-5)  # a tenth of a turn
    assert turned[1] > colour[1]  # red turns to yellow, not to magenta


def test_erased_is_one_rectangle_of_a_tenth_to_four_tenths() -> None:
    masks = erased(pictures(300, 5).double(), 40)
    shares = masks.float().mean((1, 2))
    assert 0.05 < shares.min() < 0.13 and 0.36 < shares.max() < 0.41
    rows, columns = masks.any(2), masks.any(1)
    assert torch.equal(masks, rows[:, :, None] & columns[:, None, :])
    assert (rows.sum(1) > columns.sum(1)).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ALL)
def test_seven_of_ten_cutouts_are_changed(name: str) -> None:
    """By each augmentation; erasing changes all cutouts of a picture or none."""
    before = pictures(60, 8, 3, 10, 10)
    after = augment(before, streams(60), (name,))  # type: ignore[arg-type]
    changed = (after - before).abs().flatten(2).amax(2) > 1e-3  # (B, N)
    assert changed.float().mean() == pytest.approx(0.7, abs=0.12 if name == "erasing" else 0.06)
    if name == "erasing":
        assert torch.equal(changed.all(1), changed.any(1))
        black = (after == 0).all(2)  # (B, N, S, S)
        assert (black == black[:, :1]).all() and not torch.equal(*black[changed.all(1)][:2, 0])
    else:
        assert not torch.equal(changed[0], changed[1])


def test_a_colour_survives_every_warp_but_perspective() -> None:
    """A picture of one colour has no border for an affine map to show."""
    plain = torch.full((3, 4, 3, 8, 8), 0.6)
    assert torch.allclose(augment(plain, streams(3), ("affine",)), plain, atol=1e-5)
    assert augment(plain, streams(3), ("perspective",)).min() < 0.1


def test_views_of_a_picture_depend_on_no_other() -> None:
    image = pictures(3, 3, 16, 16)
    together = latest_cutouts(image, streams(3), 4, 12, ALL)
    assert together.shape == (3, 4, 3, 12, 12)
    alone = latest_cutouts(image[:1], streams(1), 4, 12, ALL)
    torch.testing.assert_close(alone[0], together[0], atol=1e-6, rtol=0)
    same = latest_cutouts(image[:1].expand(2, -1, -1, -1), streams(2), 4, 12, ALL)
    assert (same[0] - same[1]).abs().max() > 0.05


def test_the_noise_of_a_view_is_at_most_a_tenth() -> None:
    flat = torch.full((4, 3, 32, 32), 0.5)
    views = latest_cutouts(flat, streams(4), 50, 32)
    deviations = (views - 0.5).flatten(2).std(2)
    assert 0.09 < deviations.max() < 0.105 and deviations.min() < 0.01
    assert deviations.mean() == pytest.approx(module.NOISE / 2, abs=0.006)


def test_every_view_passes_a_gradient_to_the_picture() -> None:
    image = pictures(2, 3, 16, 16).requires_grad_()
    views = latest_cutouts(image, streams(2), 6, 12, ALL)
    for n in range(6):
        (gradient,) = torch.autograd.grad(views[:, n].sum(), image, retain_graph=True)
        assert (gradient.flatten(1).abs().sum(1) > 1).all()
