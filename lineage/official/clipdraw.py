"""CLIPDraw (Frans et al. 2021): kvfrans/clipdraw, and closed forms of what diffvg renders."""

from __future__ import annotations

import re
from functools import cached_property

import torch
from torch import Tensor

from lineage.clip.clipdraw import (
    CLIPDrawConfig,
    StrokeOptimiser,
    clipdraw_loss,
    initial_strokes,
    points_lr,
)
from lineage.clip.rasteriser import (
    Strokes,
    bezier,
    bezier_tangent,
    coverage,
    distance,
    hits,
    image_diffvg,
    image_exact,
    path_distance,
    pixel_centres,
    rgba_diffvg,
)
from lineage.official.verify import Verifier, output

SAMPLES, CANVAS, NUM_STEPS = 64, 224, 1000
"""Numbers that a file states in its sentences, unless it does not."""


class CLIPDrawOutputs(Verifier):
    """Curves, scenes, first strokes, losses and updates."""

    name = "clipdraw"
    source = ("kvfrans/clipdraw",)

    def _stated(self, tensor: str, pattern: str, default: int) -> int:
        """A number in the file's sentence about a tensor."""
        match = re.search(pattern, str(self.reference.sentences.get(tensor, "")))
        return int(match[1]) if match else default

    # --- curves ---------------------------------------------------------------------------------

    @output("curve/(at_t|tangent)")
    def curve(self, which: str) -> Tensor:
        function = bezier if which == "at_t" else bezier_tangent
        return function(self.inputs["curve/points"][:, None], self.inputs["curve/t"])

    @output("curve/distance")
    def curve_distance(self) -> Tensor:
        return distance(self.inputs["curve/points"], self.inputs["curve/query"])

    # --- scenes ---------------------------------------------------------------------------------

    def _paths(self, scene: str) -> list[Tensor]:
        """Control points (3 n + 1, 2) of each stroke."""
        count = len(self.inputs[f"{scene}/stroke_width"])
        return [self.inputs[f"{scene}/points{i}"] for i in range(count)]

    @output(r"(scene\d+)/distance")
    def scene_distance(self, scene: str) -> Tensor:
        height, width = self.outputs[f"{scene}/distance"].shape[1:]
        paths = self._paths(scene)
        centres = pixel_centres(height, width, paths[0]).flatten(0, 1)
        return torch.stack([path_distance(p, centres).view(height, width) for p in paths])

    @cached_property
    def _hits(self) -> dict[str, tuple[int, Tensor]]:
        """N and the sub-samples that each stroke hits, (P, H N, W N), by scene."""
        return {}

    @cached_property
    def _rgba(self) -> dict[str, Tensor]:
        """(4, H, W) as diffvg averages it, by scene."""
        return {}

    def _scene(self, scene: str, height: int, width: int) -> tuple[Tensor, Tensor, int]:
        """Hits (P, H N, W N), colours (P, 4) and N."""
        color = self.inputs[f"{scene}/stroke_color"]
        if scene not in self._hits:
            samples = self._stated(f"output/{scene}/coverage", r"(\d+) x \1 grid", SAMPLES)
            radii = self.inputs[f"{scene}/stroke_width"]
            pairs = zip(self._paths(scene), radii, strict=True)
            is_hit = torch.stack([hits(p, r, height, width, samples) for p, r in pairs])
            self._hits[scene] = samples, is_hit
        samples, is_hit = self._hits[scene]
        return is_hit, color, samples

    @output(r"(scene\d+)/coverage")
    def scene_coverage(self, scene: str) -> Tensor:
        is_hit, _, samples = self._scene(scene, *self.outputs[f"{scene}/coverage"].shape[1:])
        return coverage(is_hit, samples)

    @output(r"(scene\d+)/(image_exact|rgba_diffvg|image_clipdraw)")
    def scene_image(self, scene: str, which: str) -> Tensor:
        drawing = self._scene(scene, *self.outputs[f"{scene}/{which}"].shape[:2])
        if which == "image_exact":
            return image_exact(*drawing).permute(1, 2, 0)
        if scene not in self._rgba:
            self._rgba[scene] = rgba_diffvg(*drawing)
        rgba = self._rgba[scene]
        image = rgba if which == "rgba_diffvg" else image_diffvg(rgba)
        return image.permute(1, 2, 0)

    # --- the first drawing ------------------------------------------------------------------------

    @cached_property
    def first(self) -> Strokes:
        """Strokes of the file's draws, of which each stroke has as many as it needs."""
        draws = self.inputs["init/draws"].tolist()
        paths: list[tuple[int, list[float], list[float]]] = []
        while draws:
            count = int(draws[0])
            end = 3 + 6 * count
            paths.append((count, draws[1:end], draws[end : end + 4]))
            draws = draws[end + 4 :]
        most = max(count for count, _, _ in paths)
        rows = [
            [(count - 0.5) / most, *xy, *[0.5] * (2 + 6 * most - len(xy)), *color]
            for count, xy, color in paths
        ]
        size = self._stated("output/init/points", r"(\d+) x \1 canvas", CANVAS)
        u = torch.tensor([rows], dtype=torch.float64)
        return initial_strokes(u, size, CLIPDrawConfig(num_paths=len(rows), max_segments=most))

    @output("init/num_segments")
    def num_segments(self) -> Tensor:
        return self.first.num_segments[0]

    @output("init/points")
    def points(self) -> Tensor:
        pairs = zip(self.first.points[0], self.first.num_segments[0].tolist(), strict=True)
        return torch.cat([own[: 3 * count + 1] for own, count in pairs])

    @output("init/stroke_color")
    def color(self) -> Tensor:
        return self.first.color[0]

    # --- loss and updates -------------------------------------------------------------------------

    @output("loss/(plain|with_negative)(_grad|)", grad=True)
    def loss(self, which: str, grad: str) -> Tensor:
        views = self.inputs["loss/image_features"][None].requires_grad_()
        text = self.inputs["loss/text_features"]
        negative = text[None, 1:] if which == "with_negative" else None
        loss = clipdraw_loss(views, text[:1], negative)
        return torch.autograd.grad(loss.sum(), views)[0][0] if grad else loss

    @cached_property
    def updates(self) -> dict[str, Tensor]:
        """Values after each step, by name."""
        names = ("points", "width", "color")
        points, width, color = (self.inputs[f"opt/{name}"].clone()[None] for name in names)
        gradients = [self.inputs[f"opt/grad_{name}"] for name in names]
        num_steps = self._stated("output/opt/points", r"num_iter (\d+)", len(gradients[0]))
        counts = torch.full(width.shape, (points.shape[2] - 1) // 3)
        strokes = Strokes(points, counts, width, color)
        optimiser = StrokeOptimiser(strokes, num_steps, CLIPDrawConfig())
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        for number, step in enumerate(zip(*gradients, strict=True)):
            optimiser.step(number, [gradient[None] for gradient in step])
            for name, value in zip(names, optimiser.parameters, strict=True):
                values[name].append(value.detach()[0].clone())
        return {name: torch.stack(steps) for name, steps in values.items()}

    @output("opt/(points|width|color)")
    def update(self, which: str) -> Tensor:
        return self.updates[which]

    @output("schedule/points_lr")
    def schedule(self) -> Tensor:
        num_steps = self._stated("input/schedule/t", r"iteration of (\d+)", NUM_STEPS)
        rates = [points_lr(step, num_steps) for step in self.inputs["schedule/t"].tolist()]
        return torch.tensor(rates, dtype=torch.float64)
