"""The rasteriser against brute force: dense samples of curves, and loops over sub-samples."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from lineage.clip import rasteriser
from lineage.clip.rasteriser import (
    Strokes,
    bezier,
    bezier_tangent,
    coverage,
    distance,
    hits,
    image_diffvg,
    image_exact,
    nearest_t,
    over,
    path_distance,
    pixel_centres,
    render,
    rgba_diffvg,
    segments,
    soft_coverage,
    to_svg,
)

SIZE, SAMPLES = 20, 6

ARCH = [[2.0, 2.0], [3.0, 30.0], [17.0, 30.0], [18.0, 2.0]]
LOOP = [[2.0, 10.0], [40.0, 12.0], [-20.0, 12.0], [18.0, 10.0]]
LINE = [[3.0, 3.0], [7.0, 7.0], [12.0, 12.0], [16.0, 16.0]]
POINT = [[9.0, 8.0]] * 4
CUSP = [[2.0, 2.0], [18.0, 18.0], [2.0, 18.0], [18.0, 2.0]]
CURVES = torch.tensor([ARCH, LOOP, LINE, POINT, CUSP], dtype=torch.float64)


def random_points(segment_count: int, spread: float = 8.0) -> Tensor:
    """(3 n + 1, 2) float64 control points near the canvas."""
    steps = spread * (torch.rand(3 * segment_count, 2, dtype=torch.float64) - 0.5)
    start = SIZE * (0.2 + 0.6 * torch.rand(1, 2, dtype=torch.float64))
    return torch.cat([start, steps]).cumsum(0)


def random_strokes(counts: list[list[int]], spread: float = 8.0) -> Strokes:
    """(B, P) strokes of the given numbers of segments, float64."""
    most = max(max(row) for row in counts)
    points = torch.stack(
        [torch.stack([random_points(most, spread) for _ in row]) for row in counts]
    )
    shape = points.shape[:2]
    radius = 0.7 + 2 * torch.rand(shape, dtype=torch.float64)
    color = torch.rand(*shape, 4, dtype=torch.float64)
    return Strokes(points, torch.tensor(counts), radius, color)


def brute_distance(points: Tensor, query: Tensor, count: int = 20_001) -> Tensor:
    """(C, Q) distance to the nearest of many points of each curve."""
    t = torch.linspace(0, 1, count, dtype=points.dtype)
    return torch.stack([torch.cdist(query, bezier(own, t)).amin(1) for own in points])


def de_casteljau(points: list[list[float]], t: float) -> list[float]:
    """B(t) by repeated interpolation."""
    while len(points) > 1:
        points = [
            [(1 - t) * a + t * b for a, b in zip(p, q, strict=True)]
            for p, q in zip(points, points[1:], strict=False)
        ]
    return points[0]


# --- curves ---------------------------------------------------------------------------------------


def test_bezier_is_de_casteljau() -> None:
    for t in (0.0, 0.3, 1.0):
        expected = torch.tensor([de_casteljau(c, t) for c in CURVES.tolist()]).double()
        ours = bezier(CURVES, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_the_tangent_is_the_derivative() -> None:
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-6
    slope = (bezier(CURVES[:, None], t + h) - bezier(CURVES[:, None], t - h)) / (2 * h)
    torch.testing.assert_close(bezier_tangent(CURVES[:, None], t), slope, atol=1e-7, rtol=0)


def test_distance_is_that_of_brute_force() -> None:
    """An arch and a loop have several local minima, a line and a point have none to solve for."""
    query = SIZE * torch.rand(200, 2, dtype=torch.float64)
    curves = torch.cat([CURVES, torch.stack([random_points(1, 20) for _ in range(10)])])
    ours, brute = distance(curves, query), brute_distance(curves, query)
    assert (ours <= brute + 1e-12).all()  # samples are never nearer than the minimum
    assert (brute - ours).max() < 5e-3  # two samples are less than 0.01 apart


def test_distance_is_exact_to_1e_8() -> None:
    """The slope along the curve vanishes at a nearest point inside, up to rounding."""
    query = SIZE * torch.rand(100, 2, dtype=torch.float64)
    curve = torch.arange(len(CURVES)).repeat_interleave(len(query))
    t = nearest_t(CURVES, curve, query.repeat(len(CURVES), 1))
    points = CURVES[curve]
    to_curve = bezier(points, t) - query.repeat(len(CURVES), 1)
    slope = (to_curve * bezier_tangent(points, t)).sum(1)
    inside = (t > 0) & (t < 1)
    assert inside.sum() > 150
    assert slope[inside].abs().max() < 1e-9


def test_every_local_minimum_is_tried() -> None:
    """Near each arm of an arch, the nearest point is on that arm."""
    left, right = torch.tensor([[3.5, 12.0], [16.5, 12.0]], dtype=torch.float64)
    arch = CURVES[:1]
    for query, low, high in ((left, 0.0, 0.5), (right, 0.5, 1.0)):
        t = nearest_t(arch, torch.tensor([0]), query[None])
        assert low < float(t) < high
    query = torch.tensor([[10.0, 10.3]], dtype=torch.float64)  # three minima of the loop
    torch.testing.assert_close(
        distance(CURVES[1:2], query), brute_distance(CURVES[1:2], query), atol=1e-4, rtol=0
    )


def test_a_third_minimum_is_tried() -> None:
    """A curve that runs there, back and there again has a minimum on each run."""
    zigzag = torch.tensor([[[0.0, 0], [60, 10], [-40, 10], [20, 20]]], dtype=torch.float64)
    found = set()
    for y in (4.0, 10.0, 16.0):
        query = torch.tensor([[10.0, y]], dtype=torch.float64)
        t = float(nearest_t(zigzag, torch.tensor([0]), query))
        found.add(0 if t < 1 / 3 else 1 if t < 2 / 3 else 2)
        brute = brute_distance(zigzag, query)
        torch.testing.assert_close(distance(zigzag, query), brute, atol=1e-3, rtol=0)
    assert found == {0, 1, 2}


def test_gradient_of_the_distance() -> None:
    """The parameter of the nearest point is a constant of the derivative, and still moves."""
    points = torch.stack([random_points(1, 20) for _ in range(3)]).requires_grad_()
    query = (SIZE * torch.rand(5, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(distance, (points, query))


def test_gradient_on_the_curve_itself_is_a_number() -> None:
    points = CURVES[2:3].clone().requires_grad_()
    d = distance(points, torch.tensor([[3.0, 3.0], [16.0, 16.0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(d.sum(), points)
    assert d.max() == 0 and grad.isfinite().all()


# --- sub-samples ----------------------------------------------------------------------------------


def brute_hits(points: Tensor, radius: float, height: int, width: int) -> Tensor:
    """One distance for every sub-sample."""
    y, x = (torch.arange(n * SAMPLES).double() for n in (height, width))
    grid = torch.stack(torch.meshgrid((x + 0.5), (y + 0.5), indexing="xy"), -1) / SAMPLES
    d = path_distance(points, grid.flatten(0, 1))
    return (d < radius).view(height * SAMPLES, width * SAMPLES)


@pytest.mark.parametrize("radius", [0.05, 1.0, 4.0])
def test_hits_are_those_of_every_sample(radius: float) -> None:
    """Also on a canvas that is no square, where x and y could be exchanged."""
    for _ in range(3):
        points = random_points(2, 16)
        ours = hits(points, torch.tensor(radius), 12, SIZE, SAMPLES)
        assert torch.equal(ours, brute_hits(points, radius, 12, SIZE))


def test_the_radius_is_half_of_the_width() -> None:
    """A horizontal stroke of radius 1.5 covers three rows; row index is y."""
    points = torch.tensor([[-9.0, 7.5], [5, 7.5], [15, 7.5], [40, 7.5]], dtype=torch.float64)
    radius = torch.tensor(1.5, dtype=torch.float64)
    covered = coverage(hits(points, radius, SIZE, SIZE, 8), 8)
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    expected[6:9] = 1
    assert torch.equal(covered, expected)


def test_images_are_averages_of_composed_samples() -> None:
    """Against loops: both renderers differ in what they average."""
    strokes = random_strokes([[2, 1, 1]])
    pairs = zip(strokes.points[0], strokes.num_segments[0].tolist(), strict=True)
    radius, color = strokes.radius[0], strokes.color[0]
    is_hit = torch.stack(
        [hits(p[: 3 * n + 1], r, SIZE, SIZE, 3) for (p, n), r in zip(pairs, radius, strict=True)]
    )
    exact, diffvg = torch.zeros(3, SIZE, SIZE).double(), torch.zeros(4, SIZE, SIZE).double()
    for y in range(3 * SIZE):
        for x in range(3 * SIZE):
            white, rgb, alpha = torch.ones(3).double(), torch.zeros(3).double(), 0.0
            for hit, (r, g, b, a) in zip(is_hit[:, y, x].tolist(), color.tolist(), strict=True):
                if hit:
                    own = torch.tensor([r, g, b]).double()
                    white = a * own + (1 - a) * white
                    rgb, alpha = a * own + (1 - a) * rgb, a + (1 - a) * alpha
            exact[:, y // 3, x // 3] += white / 9
            if alpha:
                diffvg[:, y // 3, x // 3] += torch.cat([rgb / alpha, torch.tensor([alpha])]) / 9
    torch.testing.assert_close(image_exact(is_hit, color, 3), exact)
    torch.testing.assert_close(rgba_diffvg(is_hit, color, 3), diffvg)


def test_a_half_covered_pixel_is_darker_in_diffvg() -> None:
    is_hit = torch.tensor([[[True, False], [True, False]]])
    color = torch.tensor([[0.8, 0.4, 0.0, 1.0]])
    assert image_exact(is_hit, color, 2).flatten().tolist() == pytest.approx([0.9, 0.7, 0.5])
    dark = image_diffvg(rgba_diffvg(is_hit, color, 2)).flatten().tolist()
    assert dark == pytest.approx([0.25 * c + 0.5 for c in (0.8, 0.4, 0.0)])


# --- the renderer that is optimised ---------------------------------------------------------------


def plain_coverage(strokes: Strokes, height: int, width: int) -> Tensor:
    """`soft_coverage` without boxes: the exact distance of every pixel to every segment."""
    centres = pixel_centres(height, width, strokes.points).flatten(0, 1)
    rows = []
    for points, counts, radii in zip(
        strokes.points, strokes.num_segments.tolist(), strokes.radius, strict=True
    ):
        for own, count, r in zip(points, counts, radii, strict=True):
            d = distance(segments(own[: 3 * count + 1]), centres).amin(0)
            rows.append((r - d + 0.5).clamp(0, 1).view(height, width))
    return torch.stack(rows).unflatten(0, strokes.radius.shape)


def test_soft_coverage_is_the_ramp_of_the_distance() -> None:
    """Values and gradients are those of the plain way, on a canvas that is no square."""
    strokes = random_strokes([[1, 3, 2], [2, 2, 1]])
    variables = [strokes.points.requires_grad_(), strokes.radius.requires_grad_()]
    weights = torch.rand(2, 3, 14, SIZE, dtype=torch.float64)
    ours, plain = (f(strokes, 14, SIZE) for f in (soft_coverage, plain_coverage))
    assert plain.amax((2, 3)).min() == 1 and plain.amin((2, 3)).max() == 0
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad((c * weights).sum(), variables) for c in (ours, plain)]
    for own, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_single_precision_finds_the_distance_too() -> None:
    strokes = random_strokes([[3] * 8] * 4, spread=14)
    single = Strokes(*(t.float() if t.is_floating_point() else t for t in strokes.tensors()))
    ours, plain = soft_coverage(single, SIZE, SIZE), plain_coverage(strokes, SIZE, SIZE)
    torch.testing.assert_close(ours.double(), plain, atol=1e-3, rtol=0)


def test_soft_coverage_is_near_the_covered_area() -> None:
    """Another renderer, so the tolerance is loose: see the header of the module."""
    strokes = random_strokes([[2] * 12], spread=6)
    strokes.radius.clamp_(min=1)
    soft = soft_coverage(strokes, SIZE, SIZE)[0]
    pairs = zip(strokes.points[0], strokes.radius[0], strict=True)
    hard = torch.stack([coverage(hits(p, r, SIZE, SIZE, 8), 8) for p, r in pairs])
    boundary = (hard > 0) & (hard < 1)
    error = (soft - hard).abs()
    assert error.max() < 0.35
    assert error[boundary].mean() < 0.05
    assert error[~boundary].mean() < 2e-3


def test_segments_that_are_not_drawn_have_no_effect() -> None:
    strokes = random_strokes([[1, 3]])
    strokes.points.requires_grad_()
    (grad,) = torch.autograd.grad(soft_coverage(strokes, SIZE, SIZE).sum(), strokes.points)
    assert not grad[0, 0, 4:].any() and grad[0, 1, 4:].any()
    moved = strokes.points.detach().clone()
    moved[0, 0, 4:] += 5
    other = Strokes(moved, strokes.num_segments, strokes.radius, strokes.color)
    assert torch.equal(soft_coverage(other, SIZE, SIZE), soft_coverage(strokes, SIZE, SIZE))


def test_over_draws_the_last_stroke_in_front() -> None:
    covered = torch.rand(2, 3, 4, 4)
    color = torch.rand(2, 3, 4)
    expected = torch.ones(2, 3, 4, 4)
    for b in range(2):
        for p in range(3):
            a = covered[b, p] * color[b, p, 3]
            expected[b] = a * color[b, p, :3, None, None] + (1 - a) * expected[b]
    torch.testing.assert_close(over(covered, color), expected)
    opaque = torch.tensor([[[1.0, 0, 0, 1], [0, 0, 1, 1]]])
    assert over(torch.ones(1, 2, 1, 1), opaque).flatten().tolist() == [0, 0, 1]


def test_render_is_differentiable_in_all_that_a_stroke_has() -> None:
    strokes = random_strokes([[2, 2]])
    weights = torch.rand(3, SIZE, SIZE, dtype=torch.float64)

    def loss(points: Tensor, radius: Tensor, color: Tensor) -> Tensor:
        drawn = Strokes(points, strokes.num_segments, radius, color)
        return (render(drawn, SIZE, SIZE) * weights).sum()

    variables = [v.requires_grad_() for v in (strokes.points, strokes.radius, strokes.color)]
    assert torch.autograd.gradcheck(loss, variables, eps=1e-7, atol=1e-3, rtol=1e-3)


def test_the_picture_follows_the_exact_average() -> None:
    """It has no dark fringes: nearer to `image_exact` than to what diffvg would show."""
    strokes = random_strokes([[1, 2, 2]])
    strokes.color[..., 3] = 1
    pairs = zip(strokes.points[0], strokes.num_segments[0].tolist(), strict=True)
    is_hit = torch.stack(
        [
            hits(p[: 3 * n + 1], r, SIZE, SIZE, 8)
            for (p, n), r in zip(pairs, strokes.radius[0], strict=True)
        ]
    )
    ours, color = render(strokes, SIZE, SIZE)[0], strokes.color[0]
    exact = (ours - image_exact(is_hit, color, 8)).abs().mean()
    fringed = (ours - image_diffvg(rgba_diffvg(is_hit, color, 8))).abs().mean()
    assert exact < 5e-3 and fringed > 3 * exact


def test_far_strokes_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stroke outside the canvas, or a pixel outside its box, has no distance computed."""
    strokes = random_strokes([[1, 1]], spread=2)
    strokes.points[0, 0] += 1000
    pairs: list[int] = []
    original = nearest_t

    def counted(points: Tensor, curve: Tensor, *rest: object) -> Tensor:
        pairs.append(len(curve))
        assert (curve == 1).all()
        return original(points, curve, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(rasteriser, "nearest_t", counted)
    soft_coverage(strokes, SIZE, SIZE)
    assert 0 < pairs[0] < SIZE**2 / 2


# --- vector files ---------------------------------------------------------------------------------


def test_svg_has_each_stroke_with_twice_its_radius() -> None:
    strokes = random_strokes([[1, 3], [2, 2]])
    texts = to_svg(strokes, SIZE)
    assert len(texts) == 2
    root = ElementTree.fromstring(texts[0])
    assert root.attrib["viewBox"] == f"0 0 {SIZE} {SIZE}"
    group = root[1]
    assert group.attrib["stroke-linecap"] == group.attrib["stroke-linejoin"] == "round"
    assert group.attrib["fill"] == "none"
    assert len(group) == 2
    for number, (path, count) in enumerate(zip(group, (1, 3), strict=True)):
        width = float(path.attrib["stroke-width"])
        assert width == pytest.approx(2 * float(strokes.radius[0, number]), abs=1e-3)
        place = path.attrib["d"].replace("M", "").replace("C", "").replace(",", "").split()
        points = torch.tensor([float(v) for v in place]).view(-1, 2)
        assert len(points) == 3 * count + 1
        expected = strokes.points[0, number, : 3 * count + 1].float()
        torch.testing.assert_close(points, expected, atol=1e-3, rtol=0)
        alpha = float(path.attrib["stroke-opacity"])
        assert alpha == pytest.approx(float(strokes.color[0, number, 3]), abs=1e-4)
        red = int(path.attrib["stroke"].removeprefix("rgb(").split(",")[0])
        assert math.isclose(red, 255 * float(strokes.color[0, number, 0]), abs_tol=0.51)
