"""Reads pictures of `shapes:easy` without a network: what stands where, to score short trials.

Every pixel takes the nearest colour of the palette; connected pixels of one colour are a thing; its
shape is the one whose drawing, at the thing's place, covers it best. On real pictures it is right
every time (`real_and_shuffled` below prints that, and what shuffled captions score by chance). It
knows the easy world only.

    python benchmarks/reader.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lineage.data.shapes import LARGE, LEVELS, SMALL, Shapes
from lineage.data.shapes_draw import BACKGROUNDS, COLOURS, SDF

SHAPES = list(SDF)[: LEVELS["easy"].shapes]
NAMES = list(COLOURS)[: LEVELS["easy"].colours]
PALETTE = np.array([BACKGROUNDS["white"], *(COLOURS[name] for name in NAMES)], float)
TOP_AND_BOTTOM = {
    "circle": (-0.95, 0.95),
    "square": (-0.82, 0.82),
    "triangle": (-0.85, 0.8),
    "cross": (-0.95, 0.95),
}
LEAST_AREA = 14 / 32**2  # of the picture
LEAST_OVERLAP = 0.7


@dataclass(frozen=True)
class Thing:
    """One thing found; `shape` is `?` if it covers no shape well. x and y in pixels."""

    shape: str
    colour: str
    x: float
    y: float


def read(image: NDArray[np.uint8]) -> list[Thing]:
    """The things in a picture (3, S, S)."""
    pixels = image.transpose(1, 2, 0).astype(float)  # (S, S, 3)
    nearest = ((pixels[:, :, None] - PALETTE) ** 2).sum(-1).argmin(-1)  # (S, S)
    things = []
    for number, colour in enumerate(NAMES, start=1):
        labels, _ = ndimage.label(nearest == number)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels == label
            if mask.sum() < LEAST_AREA * mask.size:
                continue
            towards = PALETTE[number] - PALETTE[0]
            cover = np.clip((pixels - PALETTE[0]) @ towards / (towards @ towards), 0, 1)
            cover *= ndimage.binary_dilation(mask)
            x, y = ((box[a].start + box[a].stop) / 2 for a in (1, 0))
            things.append(Thing(_shape(cover, x, y), colour, x, y))
    return things


def _shape(cover: NDArray[np.float64], x: float, y: float) -> str:
    """The shape whose drawing around (x, y) has the largest share of its union with `cover` in
    common.
    """
    size = len(cover)
    rows, columns = np.mgrid[0:size, 0:size] + 0.5
    best = (LEAST_OVERLAP, "?")
    for shape in SHAPES:
        top, bottom = TOP_AND_BOTTOM[shape]
        for radius in (SMALL * size, LARGE * size):
            for dx, dy in np.ndindex(3, 3):
                u = (columns - x - (dx - 1) / 2) / radius
                v = (rows - y - (dy - 1) / 2) / radius + (top + bottom) / 2
                drawn = np.clip(0.5 - SDF[shape](u, v) * radius, 0, 1)
                overlap = np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum()
                best = max(best, (overlap, shape))
    return best[1]


def score(image: NDArray[np.uint8], scene: dict[str, Any]) -> dict[str, bool]:
    """Strict:

    exactly the scene's things, and standing as it says. Partial: set of colours, of shapes, the
    count.
    """
    found = read(image)
    wanted = [(thing["shape"], thing["colour"]) for thing in scene["objects"]]
    strict = sorted((t.shape, t.colour) for t in found) == sorted(wanted)
    if strict and scene["relation"]:
        first, second = (next(t for t in found if (t.shape, t.colour) == w) for w in wanted)
        right, down = first.x - second.x, first.y - second.y
        far = {"left": -right, "right": right, "above": -down, "below": down}[scene["relation"]]
        strict = far > len(image[0]) / 16
    return {
        "strict": strict,
        "colour": {t.colour for t in found} == {colour for _, colour in wanted},
        "shape": {t.shape for t in found} == {shape for shape, _ in wanted},
        "count": len(found) == len(wanted),
    }


def scores(images: NDArray[np.uint8], scenes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Shares by kind of scene, and `all`: pictures (N, 3, S, S) and their scenes."""
    rows: dict[str, list[dict[str, bool]]] = {}
    for image, scene in zip(images, scenes, strict=True):
        result = score(image, scene)
        rows.setdefault(scene["kind"], []).append(result)
        rows.setdefault("all", []).append(result)
    return {
        kind: {name: round(float(np.mean([r[name] for r in of])), 3) for name in of[0]}
        | {"n": len(of)}
        for kind, of in sorted(rows.items())
    }


def real_and_shuffled(count: int = 400) -> dict[str, Any]:
    """The ceiling (real pictures with their scenes) and the floor (with the scene of another
    picture).
    """
    examples = [Shapes(split="validation")[i] for i in range(count)]
    images = np.stack([e.image.numpy() for e in examples])
    scenes = [e.meta for e in examples]
    return {"real": scores(images, scenes), "shuffled": scores(images, scenes[1:] + scenes[:1])}


if __name__ == "__main__":
    print(json.dumps(real_and_shuffled(), indent=1))
