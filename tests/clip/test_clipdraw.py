"""CLIPDraw: first strokes, views, loss, updates, and the system on a CLIP of a few steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.cli import drawing
from lineage.clip.clipdraw import (
    CROP_TRIES,
    VIEW_DRAWS,
    CLIPDraw,
    CLIPDrawConfig,
    StrokeOptimiser,
    clipdraw_loss,
    homography,
    initial_strokes,
    points_lr,
    take_views,
    view_matrices,
)
from lineage.clip.rasteriser import Strokes, render
from lineage.data.contract import CaptionedDataset
from lineage.errors import UserError
from lineage.nn.noise import NoiseStreams
from lineage.plan import build
from lineage.recipes.clipdraw import PRESETS, stages
from lineage.system import DrawsVectors, Visualises
from lineage.text.tokenizer import WordTokenizer

CONFIG = CLIPDrawConfig(num_paths=5, max_segments=3, num_steps=4, num_views=2)
CAPTIONS = ["a red circle", "a blue square above a green triangle", "", "a zorp circle"]
SIZE = 16

# --- the first drawing ----------------------------------------------------------------------------


def test_each_point_hangs_on_the_one_before() -> None:
    u = torch.rand(2, 5, 1 + 2 + 6 * 3 + 4)
    strokes = initial_strokes(u, 224, CONFIG)
    assert strokes.points.shape == (2, 5, 10, 2) and strokes.color.shape == (2, 5, 4)
    for b in range(2):
        for p in range(5):
            row = u[b, p].tolist()
            assert strokes.num_segments[b, p] == 1 + int(3 * row[0])
            x, y = row[1:3]
            for k in range(10):
                ours = strokes.points[b, p, k].tolist()
                assert ours == pytest.approx([224 * x, 224 * y], abs=1e-3)
                if k < 9:
                    x, y = x + 0.1 * (row[3 + 2 * k] - 0.5), y + 0.1 * (row[4 + 2 * k] - 0.5)
            assert strokes.color[b, p].tolist() == pytest.approx(row[-4:])
    assert (strokes.radius == 1).all()


def test_one_two_and_three_segments_are_equally_likely() -> None:
    u = torch.rand(1, 3000, 25)
    counts = initial_strokes(u, 10, CONFIG).num_segments.flatten().bincount(minlength=4)
    assert counts[0] == 0 and len(counts) == 4
    assert (counts[1:] - 1000).abs().max() < 120


# --- views ----------------------------------------------------------------------------------------


def apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Projective map (3, 3) of points (N, 2)."""
    mapped = F.pad(points, (0, 1), value=1.0) @ matrix.T
    return mapped[:, :2] / mapped[:, 2:]


def test_a_homography_takes_four_points_to_four_others() -> None:
    start = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).double()
    end = start + 0.5 * torch.rand(6, 4, 2, dtype=torch.float64)
    for matrix, own in zip(homography(start.expand_as(end), end), end, strict=True):
        torch.testing.assert_close(apply(matrix, start), own)


def test_without_perspective_a_view_is_a_crop() -> None:
    """Area, aspect ratio and place are those of RandomResizedCrop, and never leave the picture."""
    config = replace(CONFIG, distortion=0.0)
    matrices = view_matrices(torch.rand(4000, VIEW_DRAWS, dtype=torch.float64), config)
    width, height = matrices[:, 0, 0], matrices[:, 1, 1]
    x, y = matrices[:, 0, 2], matrices[:, 1, 2]
    assert ((width * height >= 0.7 - 1e-9) & (width * height <= 0.9 + 1e-9)).all()
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert ratio.min() < 0.77 and ratio.max() > 1.3
    for place, side in ((x, width), (y, height)):
        assert (side <= 1).all() and (place.abs() + side <= 1 + 1e-9).all()
        free = place / (1 - side)
        assert free.min() < -0.95 and free.max() > 0.95 and free.mean().abs() < 0.05


def test_a_crop_that_never_fits_is_the_whole_picture() -> None:
    u = torch.rand(VIEW_DRAWS, dtype=torch.float64)
    u[8 : 8 + CROP_TRIES] = 1.0  # the largest area
    u[8 + CROP_TRIES : 8 + 2 * CROP_TRIES] = 0.0  # and the tallest
    matrix = view_matrices(u, replace(CONFIG, distortion=0.0))
    torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64))


def test_perspective_moves_corners_inwards_by_up_to_half() -> None:
    config = replace(CONFIG, min_crop=0.999, max_crop=0.999)
    u = torch.rand(200, VIEW_DRAWS, dtype=torch.float64)
    u[:, 8 + CROP_TRIES : 8 + 2 * CROP_TRIES] = 0.5  # square crops
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]).double()
    for matrix in view_matrices(u, config):
        seen = apply(matrix.inverse(), corners)  # where the picture's corners are in the view
        inwards = 1 - seen * corners
        assert inwards.min() > -0.01 and inwards.max() < 0.51


def test_a_view_shows_what_its_map_says_on_white() -> None:
    """x is the column and y the row; outside of the picture is white, and black stays black."""
    image = torch.rand(1, 3, SIZE, SIZE)
    eye = torch.eye(3)
    shift = eye.clone()
    shift[0, 2] = 2 * 3 / SIZE  # by three columns
    views = take_views(image, torch.stack([eye, shift])[None])
    torch.testing.assert_close(views[0, 0], image[0])
    torch.testing.assert_close(views[0, 1, :, :, :-3], image[0, :, :, 3:])
    assert (views[0, 1, :, :, -3:] == 1).all()
    behind = eye.clone()
    behind[2, 2] = -1.0
    assert (take_views(image, behind[None, None]) > 0.999).all()


def test_views_pass_the_gradient_on() -> None:
    image = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    matrices = view_matrices(torch.rand(2, 3, VIEW_DRAWS, dtype=torch.float64), CONFIG)
    views = take_views(image, matrices)
    (grad,) = torch.autograd.grad(views.sum(), image)
    assert views.shape == (2, 3, 3, 6, 6) and grad.abs().sum() > 1


# --- loss and updates -----------------------------------------------------------------------------


def test_the_loss_is_a_sum_over_views() -> None:
    views, text, negative = torch.randn(2, 4, 6), torch.randn(2, 6), torch.randn(2, 2, 6)
    plain = clipdraw_loss(views, text)
    both = clipdraw_loss(views, text, negative, 0.3)
    for b in range(2):
        expected = -sum(float(F.cosine_similarity(v, text[b], dim=0)) for v in views[b])
        assert float(plain[b]) == pytest.approx(expected, abs=1e-5)
        for one in negative[b]:
            expected += 0.3 * sum(float(F.cosine_similarity(v, one, dim=0)) for v in views[b])
        assert float(both[b]) == pytest.approx(expected, abs=1e-5)


def test_the_rate_of_the_points_falls_twice() -> None:
    assert [points_lr(step, 1000) for step in (0, 499, 500, 749, 750, 999)] == [
        *(1, 1, 0.4, 0.4, 0.1, 0.1)
    ]
    assert [points_lr(step, 7, 2.0) for step in range(7)] == [2, 2, 2, 0.8, 0.8, 0.2, 0.2]


def test_each_kind_of_number_has_its_rate_and_range() -> None:
    """The first step of Adam is the rate times the sign of the gradient."""
    strokes = initial_strokes(torch.rand(1, 4, 25), 16, CONFIG)
    strokes.color[0, 0] = 0.995
    before = [t.clone() for t in (strokes.points, strokes.radius, strokes.color)]
    optimiser = StrokeOptimiser(strokes, 10, CONFIG)
    signs = [torch.where(torch.rand_like(t) < 0.5, -1.0, 1.0) for t in before]
    signs[2][0, 0] = -1.0
    optimiser.step(0, [s.clone() for s in signs])
    points, radius, color = (t.detach() for t in optimiser.parameters)
    torch.testing.assert_close(points, before[0] - signs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(radius, (before[1] - 0.1 * signs[1]).clamp(min=1))
    torch.testing.assert_close(color, (before[2] - 0.01 * signs[2]).clamp(0, 1))
    assert (color[0, 0] == 1).all()


# --- the system -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system(shapes: CaptionedDataset, tokenizer: WordTokenizer) -> CLIPDraw:
    """Preset smoke, whose CLIP has learnt for a few steps."""
    torch.manual_seed(1)
    first, last = stages(PRESETS["smoke"], tokenizer)
    first.construct()
    trainer = first.trainer(shapes)
    for number in range(12):
        trainer.advance(trainer.loader.at(number))
    built = last.construct()
    assert isinstance(built, CLIPDraw) and built.clip is first.system
    return built.eval()


class ColourCLIP(nn.Module):
    """A CLIP that compares the mean colour of each quarter of a picture with a colour's name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1) * self.weight

    def encode_text(self, captions: list[str]) -> Tensor:
        names = [
            [2 * (word in caption) - 1.0 for word in ("red", "green", "blue")]
            for caption in captions
        ]
        return torch.tensor(names).repeat_interleave(4, dim=1)


@pytest.fixture(scope="module")
def colours() -> CLIPDraw:
    config = replace(CONFIG, num_paths=16, num_steps=60, point_spread=0.5)
    return CLIPDraw(config, ColourCLIP(), SIZE).eval()  # type: ignore[arg-type]


def test_a_drawing_becomes_what_its_caption_says(colours: CLIPDraw) -> None:
    """Each row its own, whatever the others are."""
    captions = ["red", "blue", "green and blue"]
    mean = colours.generate(captions).mean((2, 3))
    start = colours.generate(captions, steps=1).mean((2, 3))
    target = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, 1]])
    before, after = (F.cosine_similarity(m, target) for m in (start, mean))
    assert before.max() < 0.6 and after.min() > 0.8, (before, after)


def test_a_negative_caption_lowers_its_cosine(colours: CLIPDraw) -> None:
    """Less of blue is left of purple."""
    plain, empty, other = (
        colours.generate("red and blue", **options).mean((0, 2, 3))
        for options in ({}, {"negative": ""}, {"negative": "blue"})
    )
    assert torch.equal(plain, empty)
    assert other[2] - other[0] < plain[2] - plain[0] - 0.05


def test_a_picture_does_not_depend_on_its_batch(system: CLIPDraw) -> None:
    """Strokes, views and captions of the other rows must not leak into a row; nor may their number
    change its rounding, which Adam would let grow."""
    together = system.generate(CAPTIONS, seed=5, steps=30)
    for i in range(len(CAPTIONS)):
        others = ["a green circle"] * i + [CAPTIONS[i]]
        alone = system.generate(others, seed=5, steps=30)[i]
        torch.testing.assert_close(alone, together[i], atol=1e-6, rtol=0)
    assert torch.equal(together, system.generate(CAPTIONS, seed=5, steps=30))


def test_pictures_have_strokes_of_their_own(system: CLIPDraw) -> None:
    strokes = system.strokes(["a red circle"] * 2, seed=3)
    assert strokes.points.shape == (2, 4, 7, 2)
    assert not torch.equal(strokes.points[0], strokes.points[1])
    other = system.strokes("a red circle", seed=4)
    assert not torch.equal(strokes.points[0], other.points[0])


def test_strokes_are_those_of_the_picture(
    system: CLIPDraw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SVG file shows what `generate` returns, also where there are several batches."""
    options: dict[str, Any] = {"steps": 3, "num_paths": 6, "num_views": 1, "negative": "a cross"}
    monkeypatch.setattr(system, "sample_batch_size", 3)
    strokes = system.strokes(CAPTIONS, seed=2, **options)
    assert not strokes.points.requires_grad
    drawn = 2 * render(strokes, SIZE, SIZE) - 1
    picture = system.generate(CAPTIONS, seed=2, **options)
    torch.testing.assert_close(drawn, picture, atol=1e-5, rtol=0)
    texts = system.svg(CAPTIONS, seed=2, **options)
    assert len(texts) == len(CAPTIONS)
    assert len(ElementTree.fromstring(texts[0])[1]) == 6


def test_options_reach_the_optimisation(system: CLIPDraw) -> None:
    noise = NoiseStreams.for_pictures(0, 1, "cpu")
    strokes = system.initial_strokes(noise, 7)
    assert strokes.points.shape[1] == 7
    with system.inference():
        seen = list(system.optimise(strokes, ["a red circle"], noise, 3, 5))
    assert len(seen) == 3 and seen[0].views.shape == (1, 5, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="steps=0"):
        system.generate("a red circle", steps=0)
    with pytest.raises(UserError, match=r"model\.min_radius=3"):
        CLIPDrawConfig(min_radius=3.0, max_radius=2.0)


def test_drawing_trains_nothing(system: CLIPDraw) -> None:
    before = {name: value.clone() for name, value in system.state_dict().items()}
    system.generate("a red circle")
    assert all(torch.equal(before[name], value) for name, value in system.state_dict().items())
    assert not any(p.requires_grad for p in system.parameters())
    assert system.groups() == {}
    assert not any(name.startswith("text.") for name in system.state_dict())  # CLIP holds it


def test_the_film_begins_with_the_first_strokes(system: CLIPDraw) -> None:
    assert isinstance(system, Visualises) and isinstance(system, DrawsVectors)
    film, views = system.visualise("a red circle", seed=3)
    assert [image.label for image in film] == ["step 0", "step 1", "step 2", "step 3", "step 4"]
    assert len(views) == 4 and views[0].label.startswith("cosine ")
    first = render(system.initial_strokes(NoiseStreams.for_pictures(3, 1, "cpu")), SIZE, SIZE)
    torch.testing.assert_close(film[0].image, 2 * first[0] - 1)
    torch.testing.assert_close(film[-1].image, system.generate("a red circle", seed=3)[0])
    assert all(float(i.min()) >= -1 and float(i.max()) <= 1.001 for i in views[0][1:])


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_builds(name: str, tokenizer: WordTokenizer) -> None:
    with torch.device("meta"):
        system = build(stages(PRESETS[name], tokenizer))
    assert isinstance(system, CLIPDraw)
    assert 1 <= system.sample_batch_size <= 64
    assert system.sample_batch_size == (1 if name == "paper" else system.sample_batch_size)


# --- the command line -----------------------------------------------------------------------------


def test_only_a_system_of_strokes_writes_svg(system: CLIPDraw, tmp_path: Any) -> None:
    assert drawing.draws_vectors(system, tmp_path / "x.svg") is system

    class Pixels:
        """Anything without `svg`."""

    with pytest.raises(UserError, match="Pixels draws pixels"):
        drawing.draws_vectors(Pixels(), tmp_path / "x.svg")  # type: ignore[arg-type]


def test_sample_writes_svg_files(sample: Any) -> None:
    """One file for one drawing; a sheet of vectors there is not."""
    answer = sample("clipdraw", "a red circle", "--set", "steps=2", "--out", "one.svg")
    assert (answer.code, answer.out) == (0, "one.svg\n")
    root = ElementTree.parse("one.svg").getroot()
    assert root.tag.endswith("svg") and len(root[1]) == 4
    answer = sample("clipdraw", "a", "b", "--set", "steps=2", "--single", "--out", "two.svg")
    assert answer.out.split() == ["two_000.svg", "two_001.svg"]
    for flags, words in (
        (["a", "b"], "--single"),
        (["a", "--best-of", 2], "--best-of"),
        (["a", "--visualise"], "picture file"),
    ):
        answer = sample("clipdraw", *flags, "--out", "no.svg")
        assert answer.code == 2 and words in answer.errors


def test_pixels_are_not_written_as_svg(sample: Any) -> None:
    answer = sample("retrieval", "a red circle", "--out", "x.svg")
    assert answer.code == 2 and "draws pixels" in answer.errors and "x.png" in answer.errors


def test_padding_of_strokes_is_not_drawn(system: CLIPDraw) -> None:
    """Control points beyond a stroke's own segments get no gradient, so that they stay in place."""
    noise = NoiseStreams.for_pictures(0, 1, "cpu")
    strokes = system.initial_strokes(noise, 8)
    assert isinstance(strokes, Strokes)
    start = strokes.points.clone()
    with system.inference():
        for _ in system.optimise(strokes, ["a red circle"], noise, 4):
            pass
    is_short = strokes.num_segments[0] == 1
    assert is_short.any() and (~is_short).any()
    moved = (strokes.points.detach() - start).abs()[0]
    assert not moved[is_short][:, 4:].any() and moved[~is_short][:, 4:].any()
