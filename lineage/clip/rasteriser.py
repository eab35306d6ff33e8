"""A differentiable rasteriser of Bezier strokes (after Li et al. 2020, diffvg, ACM TOG 39(6)).

The problem: a drawing is a list of strokes, and a pixel is either on a stroke or not. That test has
no gradient, so that a loss of the picture cannot move a stroke. What diffvg found: the *average*
of the test over a pixel's area is a smooth function of the stroke, and can be differentiated.

    B(t) = sum_k b_k(t) P_k              a cubic segment, t in [0, 1]      `bezier`, `bernstein`
    B'(t)                                its tangent                       `bezier_tangent`
    d(q) = min_t |B(t) - q|              distance of a point, exact        `nearest_t`, `distance`
    hit(q) = d(q) < r                    r is `stroke_width` of diffvg     `hits`
    coverage = mean of hit over a pixel  on an N x N grid, no gradient     `coverage`
    coverage ~ clamp(r - d + 1/2, 0, 1)  at the pixel's centre             `soft_coverage`
    c_p over c_(p-1) ... over white      for P strokes, of which the last  `over`, `image_exact`,
                                         is in front                       `image_diffvg`

Distance. The derivative of |B(t) - q|^2 has degree five, so that there are at most three local
minima inside (0, 1). It is computed on a grid of t; wherever it changes from negative to positive,
Newton steps that may not leave their interval find the minimum; the ends are candidates too. A pair
of minimum and maximum within one interval of the grid is missed.

Gradient. At the minimum, dd/dt = 0. So d depends on the control points as if t were a constant (the
envelope theorem), and no gradient flows through the search.

Two renderers. diffvg counts 2 x 2 jittered samples and finds the gradient of their mean by sampling
the stroke's boundary. This file optimises another renderer, `soft_coverage`: the distance of the
pixel's centre alone decides, with a ramp of one pixel across the boundary. For a straight boundary
parallel to the pixels that is the exact area, and for one at 45 degrees it is off by up to 0.05. On
random strokes of radius 0.5 to 4, pixels of the boundary differ from `coverage` by 0.03 in the
mean, and single ones, where a stroke ends or bends sharply, by up to 0.3.

Two ways to average. Each sub-sample of a pixel gets a colour: that of the strokes over each other,
from back to front. `image_exact` puts that over white and averages. diffvg divides the colour by
its alpha, then averages colour and alpha *separately*, with colour 0 where nothing is hit; CLIPDraw
puts the averages over white (`image_diffvg`). A half-covered pixel of an opaque colour c becomes
0.25 c + 0.5 and not 0.5 c + 0.5, so that all strokes have dark fringes. The system follows the
exact one, since a viewer shows the SVG file so; `image_diffvg` is there to be compared.

Pixel (y, x) is the square from (x, y) to (x + 1, y + 1); y counts downwards. Points are x, then y.
Axes: B pictures, P strokes, M segments of a stroke, H W pixels, K intervals of t, N sub-samples of
a pixel's side, C curves, Q points of the plane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

INTERVALS, NEWTON_STEPS = 64, 24  # exact to 1e-12 in float64
FAST_INTERVALS, FAST_NEWTON_STEPS = 8, 4  # in float32, for drawing: 1e-3 of a pixel

# --- curves ---------------------------------------------------------------------------------------


def bernstein(t: Tensor) -> Tensor:
    """Weights b_0 ... b_3 of the control points, (...) -> (..., 4)."""
    s = 1 - t
    return torch.stack([s**3, 3 * s**2 * t, 3 * s * t**2, t**3], dim=-1)


def bezier(points: Tensor, t: Tensor) -> Tensor:
    """B(t): control points (..., 4, 2) and parameters (...), which broadcast -> (..., 2)."""
    return (bernstein(t)[..., None] * points).sum(-2)


def bezier_tangent(points: Tensor, t: Tensor) -> Tensor:
    """B'(t): control points (..., 4, 2) and parameters (...), which broadcast -> (..., 2)."""
    s, edges = 1 - t, points.diff(dim=-2)  # (..., 3, 2)
    weights = torch.stack([3 * s**2, 6 * s * t, 3 * t**2], dim=-1)
    return (weights[..., None] * edges).sum(-2)


@torch.no_grad()
def nearest_t(
    points: Tensor,
    curve: Tensor,
    query: Tensor,
    intervals: int = INTERVALS,
    newton_steps: int = NEWTON_STEPS,
) -> Tensor:
    """Parameter of the point of a curve that is nearest to a query, for N pairs.

    Args:
        points: Control points of all curves (C, 4, 2).
        curve: Number of the curve of each pair (N,).
        query: Point of each pair (N, 2).
        intervals: K, number of intervals in which minima are sought.
        newton_steps: Number of steps from there.

    Returns:
        t, (N,) in [0, 1].
    """
    grid = torch.linspace(0, 1, intervals + 1, dtype=points.dtype, device=points.device)
    on_curve, tangent = (f(points[:, None], grid) for f in (bezier, bezier_tangent))
    table = torch.cat([(on_curve * tangent).sum(-1), -tangent[..., 0], -tangent[..., 1]], dim=1)
    own, along_x, along_y = table.index_select(0, curve).chunk(3, dim=1)  # (N, K + 1) each
    slope = own + along_x * query[:, :1] + along_y * query[:, 1:]  # of |B - q|^2 / 2
    pair, interval = ((slope[:, :-1] < 0) & (slope[:, 1:] >= 0)).nonzero(as_tuple=True)

    low, high = grid[interval], grid[interval + 1]
    below, above = slope[pair, interval], slope[pair, interval + 1]
    t = low + (high - low) * below / (below - above)  # the secant's zero
    c0, c1, c2, c3 = _powers(points).index_select(0, curve[pair]).unbind(1)  # B = sum_k c_k t^k
    c0 = c0 - query[pair]
    for _ in range(newton_steps):
        u = t[:, None]
        to_curve, first = ((c3 * u + c2) * u + c1) * u + c0, (3 * c3 * u + 2 * c2) * u + c1
        gradient = (to_curve * first).sum(1)
        curvature = (first.square() + to_curve * (6 * c3 * u + 2 * c2)).sum(1)
        is_low = gradient < 0
        low, high = torch.where(is_low, t, low), torch.where(is_low, high, t)
        newton = t - gradient / curvature
        is_inside = (newton >= low) & (newton <= high)  # False for NaN too
        t = torch.where(is_inside, newton, (low + high) / 2)

    squared = [(end - query).square().sum(1) for end in points[curve][:, [0, 3]].unbind(1)]
    nearest = (squared[1] < squared[0]).to(points.dtype)  # the nearer end
    least = torch.minimum(*squared)
    u = t[:, None]
    inside = (((c3 * u + c2) * u + c1) * u + c0).square().sum(1)
    is_next = F.pad(pair[1:] == pair[:-1], (1, 0))  # the second or third minimum of its pair
    is_third = is_next & F.pad(pair[2:] == pair[:-2], (2, 0))[: len(pair)]
    for of_one in (~is_next, is_next & ~is_third, is_third):  # at most one minimum of each pair
        own_pair, own_inside, own_t = pair[of_one], inside[of_one], t[of_one]
        is_less = own_inside < least[own_pair]
        least[own_pair[is_less]] = own_inside[is_less]
        nearest[own_pair[is_less]] = own_t[is_less]
    return nearest


def _powers(points: Tensor) -> Tensor:
    """Control points (..., 4, 2) -> coefficients of 1, t, t^2, t^3, (..., 4, 2)."""
    rows = [[1, 0, 0, 0], [-3, 3, 0, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]
    return points.new_tensor(rows) @ points


def distance(points: Tensor, query: Tensor) -> Tensor:
    """Distance of points (Q, 2) to curves (C, 4, 2), with gradient, -> (C, Q).

    At a point of the curve itself the gradient is zero, one of its subgradients.
    """
    (c, q), device = (len(points), len(query)), points.device
    curve = torch.arange(c, device=device).repeat_interleave(q)
    t = nearest_t(points, curve, query.repeat(c, 1)).reshape(c, q)
    return torch.linalg.vector_norm(bezier(points[:, None], t) - query, dim=-1)


# --- strokes --------------------------------------------------------------------------------------


@dataclass
class Strokes:
    """Drawings of P strokes each; stroke 0 is at the back.

    Attributes:
        points: (B, P, 3 M + 1, 2) control points in pixels; two segments share their common end.
        num_segments: (B, P) int64, number of the segments that are drawn, 1 to M.
        radius: (B, P) half of the width of the line, in pixels: `stroke_width` of diffvg.
        color: (B, P, 4) red, green, blue and alpha in [0, 1], not premultiplied.
    """

    points: Tensor
    num_segments: Tensor
    radius: Tensor
    color: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All fields."""
        return self.points, self.num_segments, self.radius, self.color

    def detach(self) -> Strokes:
        """The same strokes, through which no gradient flows."""
        return Strokes(*(tensor.detach() for tensor in self.tensors()))

    @property
    def is_drawn(self) -> Tensor:
        """(B, P, M) True for segments that are drawn."""
        numbers = torch.arange((self.points.shape[2] - 1) // 3, device=self.points.device)
        return numbers < self.num_segments[..., None]

    @staticmethod
    def cat(parts: list[Strokes]) -> Strokes:
        """Drawings of several batches, one after the other."""
        columns = zip(*(part.tensors() for part in parts), strict=True)
        return Strokes(*(torch.cat(column) for column in columns))


def segments(points: Tensor) -> Tensor:
    """(..., 3 M + 1, 2) -> the control points of each segment, (..., M, 4, 2)."""
    return rearrange(points.unfold(-2, 4, 3), "... m xy k -> ... m k xy")


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(H, W, 2) x, then y."""
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def path_distance(points: Tensor, query: Tensor) -> Tensor:
    """Distance of points (Q, 2) to a stroke of control points (3 M + 1, 2), exact -> (Q,)."""
    return distance(segments(points), query).amin(0)


def soft_coverage(strokes: Strokes, height: int, width: int) -> Tensor:
    """clamp(r - d + 1/2, 0, 1) at the centre of each pixel, with gradient -> (B, P, H, W).

    The distance is only computed near a segment: the curve lies in the box of its control points,
    and the coverage is zero, and so is its gradient, farther than r + 1/2 from that.
    """
    (batch_size, num_paths), like = strokes.radius.shape, strokes.points
    curves = segments(strokes.points)  # (B, P, M, 4, 2)
    number, query, cell = _near_pairs(curves, strokes, height, width)  # (N,), (N, 2), (N,)
    flat = rearrange(curves, "b p m k xy -> (b p m) (k xy)")
    t = nearest_t(
        flat.detach().unflatten(1, (4, 2)), number, query, FAST_INTERVALS, FAST_NEWTON_STEPS
    )
    # An embedding, since its gradient is summed in order, whatever the number of threads.
    own_points = F.embedding(number, flat).unflatten(1, (4, 2))
    own_radius = F.embedding(number // curves.shape[2], strokes.radius.reshape(-1, 1))[:, 0]
    d = torch.linalg.vector_norm(bezier(own_points, t) - query, dim=-1)
    ramp = (own_radius - d + 0.5).clamp(0, 1)
    dense = like.new_zeros(batch_size * num_paths * height * width)
    dense = dense.scatter_reduce(0, cell, ramp, "amax")  # the nearest segment of each stroke
    return dense.view(batch_size, num_paths, height, width)


@torch.no_grad()
def _near_pairs(
    curves: Tensor, strokes: Strokes, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a segment and a pixel that it may touch: the number of the segment (N,), the pixel's
    centre (N, 2), and its place in (B, P, H, W), flat (N,).
    """
    margin = strokes.radius[..., None, None] + 0.5
    least, most = curves.amin(3) - margin, curves.amax(3) + margin  # (B, P, M, 2)
    centres = pixel_centres(height, width, curves)
    x, y = centres[0, :, 0], centres[:, 0, 1]
    in_x = (x >= least[..., :1]) & (x <= most[..., :1]) & strokes.is_drawn[..., None]
    in_y = (y >= least[..., 1:]) & (y <= most[..., 1:])
    is_near = in_y[..., :, None] & in_x[..., None, :]  # (B, P, M, H, W)
    number, pixel = is_near.flatten(0, 2).flatten(1).nonzero(as_tuple=True)
    cell = number // curves.shape[2] * (height * width) + pixel
    return number, centres.flatten(0, 1)[pixel], cell


def over(coverage: Tensor, color: Tensor) -> Tensor:
    """Strokes over each other, from back to front, over white; with gradient.

    Where two boundaries cross one pixel, their coverages count as independent.

    Args:
        coverage: (B, P, H, W).
        color: (B, P, 4), not premultiplied.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    alpha = coverage * color[..., 3, None, None]  # (B, P, H, W)
    image = torch.ones_like(alpha[:, :1]).expand(-1, 3, -1, -1)
    colors = color[..., :3, None, None]
    for a, own in zip(alpha[:, :, None].unbind(1), colors.unbind(1), strict=True):
        image = image + a * (own - image)
    return image


def render(strokes: Strokes, height: int, width: int) -> Tensor:
    """The picture that is optimised, (B, 3, H, W) in [0, 1], with gradient."""
    return over(soft_coverage(strokes, height, width), strokes.color)


# --- sub-samples: no gradient, and exact ----------------------------------------------------------


@torch.no_grad()
def hits(points: Tensor, radius: Tensor, height: int, width: int, samples: int = 64) -> Tensor:
    """Whether each sub-sample of each pixel is on one stroke, d < r.

    No point of a square is farther from its centre than half a diagonal, so that one distance
    decides for the whole square unless it is that near to the radius; the other squares are divided
    until they are one sub-sample.

    Args:
        points: Control points (3 M + 1, 2).
        radius: A number.
        samples: N, number of sub-samples on a side of a pixel, at (k + 1/2) / N.

    Returns:
        (H N, W N) bool.
    """
    y, x = (torch.arange(n, device=points.device) for n in (height, width))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1) * samples
    is_hit = torch.zeros(height * samples, width * samples, dtype=torch.bool, device=points.device)
    for side, factor in _divisions(samples):
        centre = (corner.to(points.dtype) + side / 2) / samples
        d = path_distance(points, centre)
        reach = (d - radius).abs() <= (side / 2) * 2**0.5 / samples * 1.001
        if side == 1:
            hits = corner[d < radius]
            is_hit[hits[:, 1], hits[:, 0]] = True
            break
        for left, top in corner[~reach & (d < radius)].tolist():
            is_hit[top : top + side, left : left + side] = True
        steps = torch.arange(factor, device=points.device) * (side // factor)
        inner = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
        corner = (corner[reach][:, None] + inner).flatten(0, 1)
    return is_hit


def _divisions(samples: int) -> list[tuple[int, int]]:
    """Sides of the squares in sub-samples, and into how many their sides are divided next."""
    sides, side = [], samples
    while side > 1:
        factor = next(f for f in range(2, side + 1) if side % f == 0)
        sides.append((side, factor))
        side //= factor
    return [*sides, (1, 1)]


def coverage(is_hit: Tensor, samples: int) -> Tensor:
    """(..., H N, W N) hits -> the share of each pixel, (..., H, W)."""
    n = {"n": samples, "k": samples}
    return reduce(is_hit.double(), "... (h n) (w k) -> ... h w", "mean", **n)


def _over_samples(is_hit: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
    """Hits (P, Y, X) and colours (P, 4) -> premultiplied colour (3, Y, X) and alpha (Y, X)."""
    premultiplied = color.new_zeros(3, *is_hit.shape[1:])
    alpha = color.new_zeros(is_hit.shape[1:])
    for own_hit, own in zip(is_hit, color, strict=True):
        if not own_hit.any():
            continue
        a = own_hit * own[3]
        premultiplied = (1 - a) * premultiplied + a * own[:3, None, None]
        alpha = (1 - a) * alpha + a
    return premultiplied, alpha


def image_exact(is_hit: Tensor, color: Tensor, samples: int) -> Tensor:
    """Mean over each pixel of its sub-samples over white.

    Args:
        is_hit: (P, H N, W N) bool.
        color: (P, 4), not premultiplied.
        samples: N.

    Returns:
        (3, H, W) in [0, 1].
    """
    return _pixel_means(is_hit, color, samples, lambda rgb, alpha: rgb + (1 - alpha))


def rgba_diffvg(is_hit: Tensor, color: Tensor, samples: int) -> Tensor:
    """(4, H, W): means of the colour, divided by its alpha, and of alpha, as diffvg takes them;
    arguments as of `image_exact`.
    """

    def straight(rgb: Tensor, alpha: Tensor) -> Tensor:
        return torch.cat([torch.where(alpha > 0, rgb / alpha, 0.0), alpha[None]])

    return _pixel_means(is_hit, color, samples, straight)


def image_diffvg(rgba: Tensor) -> Tensor:
    """(4, H, W) of `rgba_diffvg` over white, as CLIPDraw composes it -> (3, H, W)."""
    return rgba[3:] * rgba[:3] + (1 - rgba[3:])


def _pixel_means(
    is_hit: Tensor, color: Tensor, samples: int, value: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean over each pixel of `value`(premultiplied colour, alpha), one row of pixels at a time."""
    rows = [
        reduce(value(*_over_samples(row, color)), "c n (w k) -> c w", "mean", k=samples)
        for row in is_hit.split(samples, dim=1)
    ]
    return torch.stack(rows, dim=1)


# --- vector files ---------------------------------------------------------------------------------


def to_svg(strokes: Strokes, size: int) -> list[str]:
    """Drawings on a canvas of `size` x `size` pixels as the text of SVG files.

    The width of a line in SVG is twice the radius. Ends and joins are round, since a pixel is on a
    stroke when it is near enough, whatever the direction.
    """
    drawings = []
    for points, num_segments, radius, color in zip(
        *(tensor.detach().cpu() for tensor in strokes.tensors()), strict=True
    ):
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="512" height="512" '
            f'viewBox="0 0 {size} {size}">',
            '<rect width="100%" height="100%" fill="white"/>',
            '<g fill="none" stroke-linecap="round" stroke-linejoin="round">',
        ]
        for own, count, r, rgba in zip(
            points.tolist(), num_segments.tolist(), radius.tolist(), color.tolist(), strict=True
        ):
            start, *rest = [f"{x:.3f} {y:.3f}" for x, y in own[: 3 * count + 1]]
            red, green, blue = (round(255 * value) for value in rgba[:3])
            lines.append(
                f'<path d="M {start} C {", ".join(rest)}" stroke="rgb({red}, {green}, {blue})" '
                f'stroke-opacity="{rgba[3]:.4f}" stroke-width="{2 * r:.3f}"/>'
            )
        drawings.append("\n".join([*lines, "</g>", "</svg>", ""]))
    return drawings
