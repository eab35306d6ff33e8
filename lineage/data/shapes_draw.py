"""Rendering of shapes with signed distance functions, vectorised over a batch.

A signed distance function returns the distance of a point to the outline of a shape: negative
inside, positive outside. With distances in pixels, `clip(0.5 - distance, 0, 1)` is the share of a
pixel that the shape covers; this is the anti-aliasing. Each object is painted only in a window
around it.

Axes: M objects, P points along a window's side; B pictures, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.95)


def square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.82)


def triangle(x: Array, y: Array) -> Array:
    """Equilateral, apex up (y grows downward): the largest distance to one of its three edges."""
    slant = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * (y + np.float32(0.85))
    return np.maximum(slant, y - np.float32(0.8))


def cross(x: Array, y: Array) -> Array:
    """A plus sign: the union of two bars, whose distance is the smaller of theirs."""
    ax, ay = np.abs(x), np.abs(y)
    longer, shorter = np.maximum(ax, ay), np.minimum(ax, ay)
    return np.maximum(longer - np.float32(0.95), shorter - np.float32(0.33))


def diamond(x: Array, y: Array) -> Array:
    return (np.abs(x) * np.float32(1.25) + np.abs(y) - np.float32(1.0)) * np.float32(0.6247)


def ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.70)) - np.float32(0.25)


def star(x: Array, y: Array) -> Array:
    """Five points: fold the plane to a tenth of a turn, then compute the distance to one edge."""
    angle = np.arctan2(np.abs(x), -y)
    tenth = np.float32(np.pi / 5)
    folded = np.abs(np.mod(angle + tenth, 2 * tenth) - tenth)
    radius = np.sqrt(x * x + y * y)
    px, py = radius * np.cos(folded), radius * np.sin(folded)
    inner = 0.45  # radius of the inner corners
    ax, ay = inner * np.cos(np.pi / 5) - 1.0, inner * np.sin(np.pi / 5)  # edge from (1, 0)
    length = np.hypot(ax, ay)
    return (py * np.float32(-ax / length)) + (px - np.float32(1.0)) * np.float32(ay / length)


def heart(x: Array, y: Array) -> Array:
    """A square that stands on a corner, with a disc on each of its two upper edges."""
    ax, up = np.abs(x), np.float32(-0.08) - y
    half = np.float32(0.78)  # half a diagonal of the square
    corner = (ax + np.abs(up) - half) * np.float32(0.7071068)
    disc = np.hypot(ax - half / 2, up - half / 2) - half * np.float32(0.7071068)
    return np.minimum(corner, disc)


SDF: dict[str, Callable[[Array, Array], Array]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
    "star": star,
    "ring": ring,
    "diamond": diamond,
    "heart": heart,
}
"""Signed distance of each shape at unit radius; x grows to the right, y downward."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (245, 200, 30),
    "purple": (140, 60, 190),
    "orange": (245, 130, 30),
    "pink": (245, 140, 190),
    "brown": (120, 75, 40),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 242),
    "black": (22, 22, 26),
    "grey": (140, 140, 145),
}

TEXTURES = ("plain", "striped", "checkered", "dotted", "shaded")


def backgrounds(
    colour: NDArray[np.int64], texture: NDArray[np.int64], phase: NDArray[np.float64], size: int
) -> Array:
    """Backgrounds (B, 3, S, S) float32 in 0..255.

    A texture changes all channels by the same amount, at most 26 of 255, so that the name of the
    colour stays true.

    Args:
        colour: (B,) indices into `BACKGROUNDS`.
        texture: (B,) indices into `TEXTURES`.
        phase: (B, 2) shifts of the texture in [0, 1).
        size: S.
    """
    palette = np.array(list(BACKGROUNDS.values()), np.float32)
    canvas = np.empty((len(colour), 3, size, size), np.float32)
    canvas[:] = palette[colour][:, :, None, None]
    if not texture.any():
        return canvas
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    for number, name in enumerate(TEXTURES):
        rows = np.nonzero(texture == number)[0]
        if name == "plain" or not len(rows):
            continue
        u = at[None, None, :] + phase[rows, 0].astype(np.float32)[:, None, None]  # (b, 1, S)
        v = at[None, :, None] + phase[rows, 1].astype(np.float32)[:, None, None]  # (b, S, 1)
        if name == "striped":
            wave = np.sin(2 * np.pi * 4 * (u + v))
        elif name == "checkered":
            wave = np.sign(np.sin(2 * np.pi * 2 * u) * np.sin(2 * np.pi * 2 * v))
        elif name == "dotted":
            wave = 2 * (np.cos(2 * np.pi * 5 * u) * np.cos(2 * np.pi * 5 * v) > 0.55) - 1.0
        else:
            wave = (2 * (u - np.floor(u)) - 1) * np.ones_like(v)
        canvas[rows] += (13.0 * wave.astype(np.float32))[:, None]
    light = canvas.max(axis=(1, 2, 3), keepdims=True)  # keep every channel inside 0..255
    canvas -= np.maximum(light - 255.0, 0.0)
    canvas -= np.minimum(canvas.min(axis=(1, 2, 3), keepdims=True), 0.0)
    return canvas


def coverage(shape_names: list[str], shape: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Signed distances (M, P, P) of M objects at unit radius.

    Args:
        shape_names: Names of the shapes.
        shape: (M,) indices into `shape_names`.
        x, y: Points, which broadcast to (M, P, P).
    """
    distance = np.empty(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for number in np.unique(shape):
        rows = np.nonzero(shape == number)[0]
        distance[rows] = SDF[shape_names[number]](x[rows], y[rows])
    return distance


def paint(
    canvas: Array,
    picture: NDArray[np.int64],
    shape: NDArray[np.int64],
    rgb: Array,
    centre: NDArray[np.float64],
    radius: NDArray[np.float64],
    shape_names: list[str],
) -> None:
    """Paint M objects on `canvas` (B, 3, S + 2 pad, S + 2 pad), in place.

    Args:
        canvas: Pictures with a border of `pad` pixels, which is cut off later.
        picture: (M,) row of the canvas for each object; all rows are different.
        shape: (M,) indices into `shape_names`.
        rgb: (M, 3) colours in 0..255.
        centre: (M, 2) x and y in pixels of the canvas.
        radius: (M,) radius in pixels.
        shape_names: Names of the shapes.
    """
    window = int(np.ceil(2 * radius.max())) + 2
    corner = np.floor(centre - window / 2 + 0.5).astype(np.int64)  # (M, 2) first column and row
    steps = np.arange(window)
    columns, rows = corner[:, :1] + steps, corner[:, 1:] + steps  # (M, P) each
    x = ((columns + 0.5 - centre[:, :1]) / radius[:, None]).astype(np.float32)[:, None, :]
    y = ((rows + 0.5 - centre[:, 1:]) / radius[:, None]).astype(np.float32)[:, :, None]
    distance = coverage(shape_names, shape, x, y)  # (M, P, P)
    distance *= radius.astype(np.float32)[:, None, None]
    alpha = np.clip(np.float32(0.5) - distance, 0, 1)[:, None]  # (M, 1, P, P)
    _, channels, height, width = canvas.shape
    plane = np.arange(channels) * (height * width)
    inside = rows[:, :, None] * width + columns[:, None, :]  # (M, P, P) within a plane
    first = picture * (channels * height * width)
    where = (first[:, None] + plane)[:, :, None, None] + inside[:, None]  # (M, 3, P, P)
    flat = canvas.reshape(-1)  # one index into the flat canvas is faster than four
    under = flat.take(where)
    under += alpha * (rgb[:, :, None, None] - under)
    flat[where] = under
