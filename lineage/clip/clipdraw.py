"""`clipdraw`: CLIPDraw (Frans, Soros and Witkowski 2021, arXiv:2106.14843).

The problem: optimise the pixels of a picture until CLIP finds it like a caption, and the result is
noise that only CLIP can read. What is new: optimise a *drawing*. Some hundred strokes can hardly
express such noise, so that what raises the cosine must be larger shapes. Nothing is trained, and
the result is a vector file (SVG) that a pen could draw. A drawing is only as good as its CLIP: one
of the size `tiny`, trained for minutes, gives blots of the right colours nearly the cosine of a
real picture; other judges find the colours too, and the shapes seldom.

    section 3    strokes of random place, length and colour           `initial_strokes`
                 picture = render(strokes)                            `rasteriser.render`
                 D views of it, in random perspective and crop        `view_matrices`, `take_views`
                 loss = - sum over views cos(CLIP(view), CLIP(caption))
                   + 0.3 sum over views and negative captions of the same cosine
                                                                      `clipdraw_loss`
                 Adam, with a rate for points, radii and colours each `StrokeOptimiser`
                 the rate of the points falls twice                   `points_lr`

The defaults are those of the authors' notebook. The loss is a sum over views, not a mean; since
Adam divides by the size of the gradient, that matters only beside its epsilon.

Departures. The rasteriser is another one than diffvg, and has no dark fringes (`rasteriser.py`).
Perspective and crop are one map of the plane, which is sampled once and not twice, and their
corners are real numbers, not whole pixels. CLIP gets its own normalisation of pictures; the
notebook leaves it out, the authors' predict.py does not.

A picture's strokes and views come from its own noise stream, the loss is a sum over pictures and
Adam treats each number alone, so that a picture does not depend on its batch. That would still hold
up to rounding only, and Adam, which divides by the size of the gradient, lets rounding errors grow
(to 0.01 after 150 steps at `tiny`). So CLIP takes one picture's views at a time: kernels round
differently for other numbers of rows. All else is computed for the whole batch.

Axes: B pictures, P strokes, M segments of a stroke, V views, F width of CLIP's features, K negative
captions, S side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lineage.bounds import Dim, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Share
from lineage.clip.clip import CLIP
from lineage.clip.guided import CLIPGuided
from lineage.clip.rasteriser import Strokes, render, to_svg
from lineage.config import configuration
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.system import LabelledImage

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)
VIEW_DRAWS = 8 + 2 * CROP_TRIES + 2
"""Number of random numbers of a view: four corners, the crop's tries, its place."""
NUM_FRAMES = 8
"""Number of pictures in a row of the film."""
BATCH_CELLS = 2**24
"""Number of pairs of a stroke and a pixel that one batch of pictures may have."""


@configuration
class CLIPDrawConfig:
    """A drawing and its optimisation; the defaults are the authors'.

    Attributes:
        num_paths: P, number of strokes.
        max_segments: M, largest number of cubic segments of a stroke.
        num_steps: Number of steps.
        num_views: V, number of views of the picture in each step.
        point_spread: Width of the range of a coordinate between a control point and the next, as a
            share of the canvas.
        init_radius: Initial radius of a stroke in pixels, half of its width.
        min_radius, max_radius: Range of the radii in pixels.
        points_lr, radius_lr, color_lr: Learning rates, of points and radii in pixels.
        negative_weight: Weight of a negative caption's cosine.
        distortion: Largest distance that a corner of a view moves inwards, in halves of its side.
        min_crop, max_crop: Range of a crop's share of the area.
    """

    num_paths: PositiveInt = 256
    max_segments: Dim = 3
    num_steps: PositiveInt = 1000
    num_views: Dim = 4
    point_spread: PositiveFloat = 0.1
    init_radius: PositiveFloat = 1.0
    min_radius: PositiveFloat = 1.0
    max_radius: PositiveFloat = 50.0
    points_lr: NonNegativeFloat = 1.0
    radius_lr: NonNegativeFloat = 0.1
    color_lr: NonNegativeFloat = 0.01
    negative_weight: NonNegativeFloat = 0.3
    distortion: Fraction = 0.5
    min_crop: Share = 0.7
    max_crop: Share = 0.9

    def __post_init__(self) -> None:
        for low, high in (("min_radius", "max_radius"), ("min_crop", "max_crop")):
            if getattr(self, low) > getattr(self, high):
                raise UserError(
                    f"model.{low}={getattr(self, low)} must be at most model.{high}="
                    f"{getattr(self, high)}."
                )


# --- the first drawing ----------------------------------------------------------------------------


def initial_strokes(u: Tensor, size: int, config: CLIPDrawConfig) -> Strokes:
    """Strokes that wander at random: each control point is near the one before.

    Args:
        u: (B, P, 1 + 2 + 6 M + 4) uniform numbers, in the authors' order: number of segments, first
            point, each next point, colour and alpha. A stroke of fewer than M segments has draws
            that are not used.
        size: S, side of the canvas.
    """
    count, first, walk, color = u.split([1, 2, u.shape[-1] - 7, 4], dim=-1)
    steps = config.point_spread * (rearrange(walk, "b p (k xy) -> b p k xy", xy=2) - 0.5)
    points = torch.cat([first[..., None, :], steps], dim=2).cumsum(2)  # (B, P, 3 M + 1, 2)
    num_segments = (1 + count[..., 0] * (walk.shape[-1] // 6)).long()
    radius = torch.full_like(count[..., 0], config.init_radius)
    return Strokes(points * size, num_segments, radius, color.clone())


# --- views ----------------------------------------------------------------------------------------


def view_matrices(u: Tensor, config: CLIPDrawConfig) -> Tensor:
    """Projective maps from a view to the picture, both with corners at -1 and 1.

    A random perspective moves the picture's corners inwards; then a crop of random area and aspect
    ratio is enlarged to the whole view. A crop's shape that does not fit is drawn again.

    Args:
        u: (..., VIEW_DRAWS) uniform numbers.

    Returns:
        (..., 3, 3), for columns (x, y, 1).
    """
    corners, tries, place = u.split([8, 2 * CROP_TRIES, 2], dim=-1)
    unmoved = u.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    moved = unmoved * (1 - config.distortion * corners.unflatten(-1, (4, 2)))
    perspective = homography(moved, unmoved.expand_as(moved))

    area, log_ratio = tries.unflatten(-1, (2, CROP_TRIES)).unbind(-2)
    area = config.min_crop + (config.max_crop - config.min_crop) * area
    low, high = u.new_tensor(CROP_RATIO).log()
    ratio = (low + (high - low) * log_ratio).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1)  # width, height
    fits = (sides <= 1).all(-1)
    first = fits.to(torch.uint8).argmax(-1)[..., None, None].expand(*fits.shape[:-1], 1, 2)
    side = torch.where(fits.any(-1)[..., None], sides.gather(-2, first)[..., 0, :], 1.0)
    crop = torch.diag_embed(F.pad(side, (0, 1), value=1.0))
    crop[..., :2, 2] = (1 - side) * (2 * place - 1)
    return perspective @ crop


def homography(start: Tensor, end: Tensor) -> Tensor:
    """The projective map (..., 3, 3) that takes four points (..., 4, 2) to four others."""
    (x, y), (u, v) = start.unbind(-1), end.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=-1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=-1)
    solved = torch.linalg.solve(torch.cat([rows_u, rows_v], -2), torch.cat([u, v], -1))
    return F.pad(solved, (0, 1), value=1.0).unflatten(-1, (3, 3))


def take_views(images: Tensor, matrices: Tensor) -> Tensor:
    """Views of pictures, white where a view leaves its picture.

    Args:
        images: (B, 3, S, S) in [0, 1].
        matrices: (B, V, 3, 3), from a view to its picture.

    Returns:
        (B, V, 3, S, S).
    """
    size, views = images.shape[-1], matrices.shape[1]
    axis = (torch.arange(size, device=images.device) * 2 + 1).to(images.dtype) / size - 1
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    plane = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # (S, S, 3)
    projected = torch.einsum("bvij,hwj->bvhwi", matrices, plane)
    depth = projected[..., 2:].clamp(min=1e-3)  # what is behind lies far outside the picture
    grid = (projected[..., :2] / depth).flatten(0, 1)
    ink = (1 - images).repeat_interleave(views, dim=0)  # zero is white, as the padding
    taken = 1 - F.grid_sample(ink, grid, padding_mode="zeros", align_corners=False)
    return taken.unflatten(0, (-1, views))


# --- the loss and its minimisation ----------------------------------------------------------------


def clipdraw_loss(
    views: Tensor, text: Tensor, negative: Tensor | None = None, negative_weight: float = 0.3
) -> Tensor:
    """Minus the cosine with the caption, plus those with negative captions, summed over views.

    Args:
        views: (B, V, F) features of the views.
        text: (B, F) features of the captions.
        negative: (B, K, F) features of negative captions, or None.
        negative_weight: Weight of each of their cosines.

    Returns:
        (B,).
    """
    loss = -F.cosine_similarity(views, text[:, None], dim=-1).sum(1)
    if negative is not None:
        cosines = F.cosine_similarity(views[:, :, None], negative[:, None], dim=-1)  # (B, V, K)
        loss = loss + negative_weight * cosines.sum((1, 2))
    return loss


def points_lr(step: int, num_steps: int, lr: float = 1.0) -> float:
    """Rate of the points: 0.4 of `lr` from half of the steps, 0.1 from three quarters."""
    if step >= int(num_steps * 0.75):
        return 0.1 * lr
    return 0.4 * lr if step >= int(num_steps * 0.5) else lr


class StrokeOptimiser:
    """Adam on the points, radii and colours of strokes, in place.

    Args:
        strokes: The drawings.
        num_steps: Number of steps of the optimisation.
        config: Rates and ranges.
    """

    def __init__(self, strokes: Strokes, num_steps: int, config: CLIPDrawConfig) -> None:
        self.strokes, self.num_steps, self.config = strokes, num_steps, config
        self.parameters = [
            p.requires_grad_() for p in (strokes.points, strokes.radius, strokes.color)
        ]
        rates = (config.points_lr, config.radius_lr, config.color_lr)
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.parameters, rates, strict=True)]
        self.adam = torch.optim.Adam(groups)

    @torch.no_grad()
    def step(self, number: int, gradients: Sequence[Tensor]) -> None:
        """Take step `number`, from 0, with the gradients of points, radii and colours."""
        self.adam.param_groups[0]["lr"] = points_lr(number, self.num_steps, self.config.points_lr)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        self.strokes.radius.clamp_(self.config.min_radius, self.config.max_radius)
        self.strokes.color.clamp_(0, 1)


# --- the system -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the optimisation.

    Attributes:
        image: (B, 3, S, S) in [0, 1] at the start of the step.
        views: (B, V, 3, S, S) of that picture.
        loss: (B,).
    """

    image: Tensor
    views: Tensor
    loss: Tensor


class CLIPDraw(CLIPGuided):
    """A frozen CLIP, whose gradient draws.

    Args:
        config: Defaults of the drawing and its optimisation.
        clip: Compares views and captions; it is frozen.
        size: S, side of the canvas in pixels.
    """

    def __init__(self, config: CLIPDrawConfig, clip: CLIP, size: int) -> None:
        super().__init__(clip, size)
        self.config = config
        self.sample_batch_size = min(64, max(1, BATCH_CELLS // (config.num_paths * size**2)))

    # --- drawing --------------------------------------------------------------------------------

    def sample(
        self,
        captions: list[str],
        noise: NoiseStreams,
        steps: PositiveInt | None = None,
        num_paths: PositiveInt | None = None,
        num_views: Dim | None = None,
        negative: str = "",
    ) -> Tensor:
        """Pictures (B, 3, S, S) of captions. Options that are None are those of the configuration.

        Args:
            steps: Number of steps.
            num_paths: Number of strokes.
            num_views: Number of views of each step.
            negative: Caption that the drawing should not be like.
        """
        strokes = self.initial_strokes(noise, num_paths)
        for _ in self.optimise(strokes, captions, noise, steps, num_views, negative):
            pass
        return 2 * render(strokes.detach(), self.size, self.size) - 1

    def initial_strokes(self, noise: NoiseStreams, num_paths: int | None = None) -> Strokes:
        """The strokes before the first step."""
        draws = 1 + 2 + 6 * self.config.max_segments + 4
        u = noise.rand(num_paths or self.config.num_paths, draws)
        return initial_strokes(u, self.size, self.config)

    def optimise(
        self,
        strokes: Strokes,
        captions: list[str],
        noise: NoiseStreams,
        steps: int | None = None,
        num_views: int | None = None,
        negative: str = "",
    ) -> Iterator[Step]:
        """The steps of the optimisation, which changes `strokes` in place.

        Args:
            strokes: The drawings, as they are at the start.
            captions, noise, steps, num_views, negative: As for `sample`.
        """
        num_steps, num_views = steps or self.config.num_steps, num_views or self.config.num_views
        text = self.encode_captions(captions)  # (B, F)
        negative_text = None
        if negative:
            negative_text = self.encode_captions([negative]).expand_as(text)[:, None]  # (B, 1, F)
        optimiser = StrokeOptimiser(strokes, num_steps, self.config)
        for number in range(num_steps):
            matrices = view_matrices(noise.rand(num_views, VIEW_DRAWS), self.config)
            with torch.enable_grad():
                image = render(strokes, self.size, self.size)
                views = take_views(image, matrices)
                loss = clipdraw_loss(
                    self.encode_views(views), text, negative_text, self.config.negative_weight
                )
                gradients = torch.autograd.grad(loss.sum(), optimiser.parameters)
            optimiser.step(number, gradients)
            yield Step(image.detach(), views.detach(), loss.detach())

    def encode_views(self, views: Tensor) -> Tensor:
        """Views (B, V, 3, S, S) in [0, 1] -> features (B, V, F); one picture's at a time."""
        return torch.stack([self.clip.encode_image(2 * own - 1).float() for own in views])

    def encode_captions(self, captions: list[str]) -> Tensor:
        """B captions -> features (B, F); one at a time."""
        return torch.cat([self.clip.encode_text([caption]).float() for caption in captions])

    # --- vectors --------------------------------------------------------------------------------

    def strokes(self, captions: str | Sequence[str], *, seed: int = 0, **options: Any) -> Strokes:
        """The strokes of the pictures that `generate` returns for the same arguments."""
        parts = []
        for part, noise, own in self.sample_batches(captions, seed, options):
            with self.inference(), self._threads(len(part), several=False):
                parts.append(self.initial_strokes(noise, own.pop("num_paths", None)))
                for _ in self.optimise(parts[-1], part, noise, **own):
                    pass
        return Strokes.cat(parts).detach()

    def svg(self, captions: str | Sequence[str], *, seed: int = 0, **options: Any) -> list[str]:
        """The pictures that `generate` returns for the same arguments, as the text of SVG files."""
        return to_svg(self.strokes(captions, seed=seed, **options), self.size)

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """A film of the drawing, and a view of each of its pictures with the mean cosine."""
        noise, steps = NoiseStreams.for_pictures(seed, 1, self.device), self.config.num_steps
        frame_steps = {round(k * (steps - 1) / (NUM_FRAMES - 1)) for k in range(NUM_FRAMES)}
        rows: list[list[LabelledImage]] = [[], []]
        with self.inference():
            strokes = self.initial_strokes(noise)
            for number, step in enumerate(self.optimise(strokes, [caption], noise)):
                if number in frame_steps:
                    cosine = -float(step.loss[0]) / step.views.shape[1]
                    rows[0].append(LabelledImage(f"step {number}", 2 * step.image[0] - 1))
                    rows[1].append(LabelledImage(f"cosine {cosine:.2f}", 2 * step.views[0, 0] - 1))
            rows[0].append(
                LabelledImage(f"step {steps}", 2 * render(strokes, self.size, self.size)[0] - 1)
            )
        return rows
