"""Cutouts: random views of a picture, on which CLIP's gradient is an average (Crowson et al. 2022,
arXiv:2204.08583, "augmentations").

The problem: the gradient of CLIP's score with respect to pixels finds patterns that only CLIP takes
for the caption. What is new: the score is the mean over many random views of the picture, so that
what raises it must survive crops, warps and noise.

    original     N random crops, of sides from CLIP's input to the whole picture, resampled to
                 CLIP's input (K. Crowson's notebook of 2021)    `draw_crops`, `original_cutouts`
    latest       the whole picture, pooled to CLIP's input, N times; what differs is
                 the augmentation (the default of later programs)              `latest_cutouts`
    augmentation affine map, perspective, colour jitter, one erased rectangle       `augment`
    resampling   Lanczos low-pass (a = 2) on the axes that shrink, then bicubic     `resample`
    clamping     clamp whose gradient survives outside where descent leads back inside
                                                                           `clamp_with_grad`

Crop and resampling are linear maps of rows and columns: a cutout is A_y image A_x^T. So all cutouts
of all pictures are two matrix products (`crop_matrices`), equal to `resample` of each crop.

Departures. Affine maps repeat the border, as in the first notebooks with augmentation; a later
program fills with black. Colour jitter is one affine map of a pixel's colour, whose hue turns about
the axis of greys; kornia turns it in HSV. All numbers come from each picture's own stream, all
matrices are computed on the CPU: a batched solve fails on some GPU builds.

Axes: B pictures, N cutouts, M = B N, C channels, H W of the picture, S side of a cutout. Pictures
are in [0, 1]; x runs to the right, y down, pixel centres are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lineage.nn.noise import NoiseStreams

Augmentation = Literal["affine", "perspective", "jitter", "erasing"]
PROBABILITY = 0.7
"""Probability of each augmentation."""
DEGREES, SHIFT, SHEAR = 15.0, 0.1, 5.0
"""Largest angle, share of the side, and angle of the shear of an affine map."""
DISTORTION = 0.7
"""Largest share of half a side by which a corner moves inwards."""
JITTER = 0.1
"""Largest change of brightness, contrast, saturation, and of hue in turns."""
ERASED_AREA, ERASED_RATIO = (0.1, 0.4), (0.3, 1 / 0.3)
"""Bounds of an erased rectangle: its share of the cutout, and its height by its width."""
NOISE = 0.1
"""Largest deviation of the noise on a cutout."""


# --- clamping and resampling ----------------------------------------------------------------------


class _ClampWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        outside = x - x.clamp(*ctx.bounds)  # above: positive; below: negative
        return torch.where(grad * outside >= 0, grad, 0.0), None, None


def clamp_with_grad(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """`x.clamp(low, high)`, whose gradient is kept outside the bounds where a step against it leads
    back inside.
    """
    result: Tensor = _ClampWithGrad.apply(x, low, high)
    return result


def ramp(ratio: float, width: float) -> Tensor:
    """(2 ceil(width / ratio + 1) - 3,) multiples of `ratio` around 0, within -width .. width."""
    reach = math.ceil(width / ratio + 1) - 2
    return (ratio * torch.arange(-reach, reach + 1, dtype=torch.float64)).float()


def lanczos(x: Tensor, a: float = 2.0) -> Tensor:
    """sinc(x) sinc(x / a) within -a .. a, divided by its sum."""
    kernel = torch.where(x.abs() < a, torch.sinc(x) * torch.sinc(x / a), 0.0)
    return kernel / kernel.sum()


def resample(x: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """(M, C, H, W) -> (M, C, *size).

    Args:
        size: New height and width.
        align_corners: If true, the centres of the corner pixels stay where they are.
    """
    for axis in (2, 3):
        old, new = x.shape[axis], size[axis - 2]
        if new < old:
            kernel = lanczos(ramp(new / old, 2)).to(x)
            reach = len(kernel) // 2
            pads = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
            shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
            planes = F.pad(x.flatten(0, 1)[:, None], pads, "reflect")  # (M C, 1, H, W), padded
            x = F.conv2d(planes, kernel.view(shape)).view(x.shape)
    return F.interpolate(x, size, mode="bicubic", align_corners=align_corners)


# --- method `original`: random crops --------------------------------------------------------------


@dataclass(frozen=True)
class Crops:
    """Squares of N cutouts of each picture.

    Attributes:
        side, left, top: (B, N) int64 in pixels, on the CPU.
    """

    side: Tensor
    left: Tensor
    top: Tensor


def crop_sides(u: Tensor, height: int, width: int, cut_size: int, cut_pow: float) -> Tensor:
    """Sides of crops, from uniform numbers in [0, 1): int(u^cut_pow (max - min) + min), int64.

    The largest is the picture's shorter side; the smallest is `cut_size`, if it is not larger.
    """
    largest = min(height, width)
    smallest = min(largest, cut_size)
    return (u**cut_pow * (largest - smallest) + smallest).long()


def draw_crops(
    noise: NoiseStreams, count: int, height: int, width: int, cut_size: int, cut_pow: float = 1.0
) -> Crops:
    """Random squares of `count` cutouts of each picture."""
    u = noise.rand(count, 3).cpu().double()  # double: u * n stays below n
    side = crop_sides(u[..., 0], height, width, cut_size, cut_pow)
    left, top = ((u[..., k] * (n - side + 1)).long() for k, n in ((1, width), (2, height)))
    return Crops(side, left, top)


@lru_cache(maxsize=512)
def resampling_matrix(old: int, new: int) -> Tensor:
    """(new, old) the map of a row of `old` pixels that `resample` makes."""
    eye = torch.eye(old, device="cpu")[None, None]
    return resample(eye, (new, old))[0, 0]


def crop_matrices(first: Tensor, side: Tensor, length: int, cut_size: int) -> Tensor:
    """(B, N) first pixels and sides of crops -> (B, N, S, length), crop and resampling in one."""
    matrices = torch.zeros(*side.shape, cut_size, length, device="cpu")
    flat = matrices.flatten(0, 1)
    for matrix, start, n in zip(
        flat, first.flatten().tolist(), side.flatten().tolist(), strict=True
    ):
        matrix[:, start : start + n] = resampling_matrix(n, cut_size)
    return matrices


def original_cutouts(image: Tensor, crops: Crops, cut_size: int) -> Tensor:
    """Pictures (B, C, H, W) -> crops (B, N, C, S, S), resampled and clamped to [0, 1]."""
    height, width = image.shape[2:]
    rows = crop_matrices(crops.top, crops.side, height, cut_size).to(image)
    columns = crop_matrices(crops.left, crops.side, width, cut_size).to(image)
    strips = torch.einsum("bnsh,bchw->bncsw", rows, image)
    return clamp_with_grad(torch.einsum("bncsw,bntw->bncst", strips, columns))


# --- method `latest`: the whole picture, augmented ------------------------------------------------


def pooled(image: Tensor, cut_size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, S, S), mean of average and maximum of each cell; it also enlarges."""
    average = F.adaptive_avg_pool2d(image, cut_size)
    return (average + F.adaptive_max_pool2d(image, cut_size)) / 2


def latest_cutouts(
    image: Tensor,
    noise: NoiseStreams,
    count: int,
    cut_size: int,
    augmentations: Sequence[Augmentation] = (),
) -> Tensor:
    """Pictures (B, C, H, W) -> `count` augmented and noised views (B, N, C, S, S), not clamped."""
    cutouts = pooled(image, cut_size)[:, None].expand(-1, count, -1, -1, -1)
    cutouts = augment(cutouts, noise, augmentations)
    deviation = NOISE * noise.rand(count, 1, 1, 1)
    return add_noise(cutouts, deviation, noise.randn(*cutouts.shape[1:]))


def add_noise(cutouts: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    """Cutouts with noise of a deviation (..., N, 1, 1, 1) of their own."""
    return cutouts + deviation * noise


def augment(cutouts: Tensor, noise: NoiseStreams, augmentations: Sequence[Augmentation]) -> Tensor:
    """Cutouts (B, N, C, S, S), changed by random augmentations, each with its `PROBABILITY`, in the
    order affine, perspective, jitter, erasing.
    """
    count, side = cutouts.shape[1], cutouts.shape[-1]
    if "affine" in augmentations:
        u = noise.rand(count, 6).cpu().double()
        matrices = _sometimes(u[..., 0], affine_matrices(u[..., 1:], side))
        cutouts = warp(cutouts, matrices, "border")
    if "perspective" in augmentations:
        u = noise.rand(count, 9).cpu().double()
        matrices = _sometimes(u[..., 0], perspective_matrices(u[..., 1:], side))
        cutouts = warp(cutouts, matrices, "zeros")
    if "jitter" in augmentations:
        u = noise.rand(count, 5).cpu().double()
        matrices = _sometimes(u[..., 0], colour_matrices(u[..., 1:])).to(cutouts)  # (B, N, 3, 4)
        linear, constant = matrices[..., :3], matrices[..., 3]
        cutouts = torch.einsum("bnij,bnjhw->bnihw", linear, cutouts) + constant[..., None, None]
    if "erasing" in augmentations:  # one rectangle for all cutouts of a picture
        u = noise.rand(6).cpu().double()
        is_whole = ~erased(u[:, 1:], side) | (u[:, 0] >= PROBABILITY)[:, None, None]  # (B, S, S)
        cutouts = cutouts * is_whole[:, None, None].to(cutouts)
    return cutouts


def _sometimes(u: Tensor, matrices: Tensor) -> Tensor:
    """Matrices (..., n, m) where `u` (...) is below the probability, else the identity."""
    identity = torch.eye(*matrices.shape[-2:]).to(matrices)
    return torch.where((u < PROBABILITY)[..., None, None], matrices, identity)


def warp(images: Tensor, matrices: Tensor, padding: Literal["zeros", "border"]) -> Tensor:
    """Pictures (..., C, H, W), moved: pixel p of a picture goes to `matrix` p.

    Pixel q of the result is interpolated linearly at the place matrix^-1 q.

    Args:
        matrices: (..., 3, 3) in homogeneous pixel coordinates (x, y, 1).
        padding: What lies beyond the picture: black, or its nearest pixel.
    """
    height, width = images.shape[-2:]
    # grid_sample has the corner pixels at -1 and 1
    to_unit = torch.tensor([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]])
    back = to_unit.double() @ torch.linalg.inv(matrices.double().cpu())  # (..., 3, 3)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).double().flatten(1)  # (3, H W)
    place = (back @ pixels).flatten(0, -3)  # (M, 3, H W)
    grid = (place[:, :2] / place[:, 2:]).transpose(1, 2).unflatten(1, (height, width))
    moved = F.grid_sample(
        images.flatten(0, -4), grid.to(images), padding_mode=padding, align_corners=True
    )
    return moved.view(images.shape)


def affine_matrices(u: Tensor, side: int) -> Tensor:
    """Random affine maps about the centre, from uniform numbers: (..., 5) -> (..., 3, 3)."""
    angle, shear_x, shear_y = (
        math.radians(bound) * (2 * u[..., k] - 1) for k, bound in enumerate((DEGREES, SHEAR, SHEAR))
    )
    shift = SHIFT * side * (2 * u[..., 3:] - 1)  # (..., 2)
    cos, sin = angle.cos(), angle.sin()
    turn = _matrix([[cos, sin], [-sin, cos]])
    shear = _matrix([[torch.ones_like(cos), shear_x.tan()], [shear_y.tan(), torch.ones_like(cos)]])
    linear, centre = turn @ shear, torch.full_like(shift, (side - 1) / 2)
    matrices = torch.eye(3).to(u).repeat(*u.shape[:-1], 1, 1)
    matrices[..., :2, :2] = linear
    matrices[..., :2, 2] = centre + shift - (linear @ centre[..., None])[..., 0]
    return matrices


def perspective_matrices(u: Tensor, side: int) -> Tensor:
    """Random maps that move each corner inwards, from uniform numbers: (..., 8) -> (..., 3, 3)."""
    signs = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]).to(u)  # of the way inwards
    corners = (1 - signs) / 2 * (side - 1)  # (4, 2), clockwise from the upper left
    moved = corners + signs * DISTORTION * (side - 1) / 2 * u.unflatten(-1, (4, 2))
    return homography(corners.expand_as(moved), moved)


def homography(start: Tensor, end: Tensor) -> Tensor:
    """The maps (..., 3, 3) of homogeneous coordinates that take four points to four others.

    Args:
        start, end: (..., 4, 2) points (x, y). With h_33 = 1, each pair (x, y) -> (x', y') is two
            linear equations in the other eight entries.
    """
    (x, y), (x2, y2) = start.unbind(-1), end.unbind(-1)  # (..., 4)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    upper = torch.stack([x, y, one, zero, zero, zero, -x * x2, -y * x2], -1)
    lower = torch.stack([zero, zero, zero, x, y, one, -x * y2, -y * y2], -1)
    left, right = torch.cat([upper, lower], -2), torch.cat([x2, y2], -1)  # (..., 8, 8), (..., 8)
    entries = torch.linalg.solve(left, right)
    return torch.cat([entries, one[..., :1]], -1).unflatten(-1, (3, 3))


def colour_matrices(u: Tensor) -> Tensor:
    """Random maps (A | b) of colours, c -> A c + b, from uniform numbers: (..., 4) -> (..., 3, 4).

    A c + b = brightness (contrast (R c - 1/2) + 1/2), where R keeps the mean of a colour, turns the
    rest by the hue and stretches it by the saturation.
    """
    change = JITTER * (2 * u - 1)  # (..., 4)
    brightness, contrast, saturation = (1 + change[..., :3]).unbind(-1)
    hue = 2 * math.pi * change[..., 3]
    mean = torch.full((3, 3), 1 / 3).to(u)  # projection on the axis of greys
    rest = torch.eye(3).to(u) - mean
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(u) / math.sqrt(3)
    cos, sin = hue.cos()[..., None, None], hue.sin()[..., None, None]
    turn = mean + saturation[..., None, None] * (cos * rest + sin * cross)  # Rodrigues' formula
    linear = (brightness * contrast)[..., None, None] * turn
    constant = (brightness * (1 - contrast) / 2)[..., None, None].expand(*u.shape[:-1], 3, 1)
    return torch.cat([linear, constant], -1)


def erased(u: Tensor, side: int) -> Tensor:
    """Random rectangles, from uniform numbers: (B, 5) -> (B, S, S) bool, true inside."""
    area = side**2 * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * u[:, 0])
    tall = u[:, 1] < 0.5  # as often taller than wide as not
    low, high = torch.where(tall, 1.0, ERASED_RATIO[0]), torch.where(tall, ERASED_RATIO[1], 1.0)
    ratio = low + (high - low) * u[:, 2]
    height, width = ((area * r).sqrt().round().clamp(1, side) for r in (ratio, 1 / ratio))
    top, left = ((u[:, k] * (side - n + 1)).floor()[:, None] for k, n in ((3, height), (4, width)))
    at = torch.arange(side)
    rows = (at >= top) & (at < top + height[:, None])  # (B, S)
    columns = (at >= left) & (at < left + width[:, None])
    return rows[:, :, None] & columns[:, None, :]


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """Entries (...) in rows -> (..., n, m)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
