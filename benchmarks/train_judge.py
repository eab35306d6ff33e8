"""Train the judge, whose weights come with the package.

    python benchmarks/train_judge.py --out lineage/evaluation/weights/judge.safetensors

The pictures are scenes of every level at sizes from 16 to 64 pixels, with any shapes and colours
(nothing is held out from a judge). Half of them are blurred, noisy or paler, as generated pictures
are; a third are slightly warped. In a third of them one object is corrupted and labelled `?`: a
half or patches of it are missing or of another shape, or it is overlaid with another shape. Some
pictures are empty, of any colours.

The weights in the package are those of the default settings, half an hour on one core.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.data.contract import to_unit
from lineage.data.shapes import LEVELS, Scenes, make_scenes, render
from lineage.evaluation.judge import CELLS, KINDS, SIDE, UNKNOWN, DetectionMaps, Judge, resized
from lineage.evaluation.prompts import COLOUR_NAMES, SHAPES
from lineage.training.store import save_tensors

SIZES = (16, 16, 20, 24, 32, 32, 48, 64)  # pixels; small ones are harder, so they come more often
IGNORE = -100  # the label that a cross-entropy ignores


# --- pictures ---------------------------------------------------------------------------------


def scatter(scenes: Scenes, rows: NDArray[np.bool_], rng: Generator) -> None:
    """Place the objects of `rows` at random, in place; those that would overlap are removed."""
    count = len(rows)
    radius = rng.uniform(0.12, 0.24, (count, 4))
    centre = rng.uniform(0, 1, (count, 4, 2)) * (1 - 2 * radius[..., None]) + radius[..., None]
    for slot in range(1, 4):
        distance = np.linalg.norm(centre[:, slot, None] - centre[:, :slot], axis=-1)
        touches = (distance < 1.05 * (radius[:, slot, None] + radius[:, :slot])).any(1)
        scenes.count[:] = np.where(rows & touches, np.minimum(scenes.count, slot), scenes.count)
    scenes.radius[:] = np.where(rows[:, None], radius, scenes.radius)
    scenes.centre[:] = np.where(rows[:, None, None], centre, scenes.centre)


def random_scenes(number: int, batch_size: int, rng: Generator) -> Scenes:
    """Scenes of a random level with any shapes and colours; some empty, some scattered."""
    level = list(LEVELS.values())[rng.integers(3)]
    rows = np.arange(number * batch_size, (number + 1) * batch_size)
    scenes = make_scenes(level, 1, "judge", rows)
    uniform = rng.random((batch_size, 1)) < 0.3  # all objects have one shape and colour
    for field, names in (("shape", SHAPES), ("colour", COLOUR_NAMES)):
        values = rng.integers(len(names), size=(batch_size, 4))
        setattr(scenes, field, np.where(uniform, values[:, :1], values))
    scattered = rng.random(batch_size) < 0.3
    scenes.count[:] = np.where(scattered, rng.integers(1, 5, batch_size), scenes.count)
    scatter(scenes, scattered, rng)
    scenes.radius *= rng.uniform(0.93, 1.07, (batch_size, 1))
    scenes.count[rng.random(batch_size) < 0.06] = 0
    return scenes


def smooth_noise(batch_size: int, channels: int, cells: int, size: int, rng: Generator) -> Tensor:
    """(B, channels, S, S) smooth noise with a deviation of about 1 and `cells` bumps a side."""
    shape = (batch_size, channels, cells, cells)
    coarse = torch.from_numpy(rng.standard_normal(shape, np.float32))
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)


def corrupt(scenes: Scenes, images: Tensor, size: int, rng: Generator) -> Tensor:
    """Corrupt the first object in about a third of the pictures (B, 3, S, S), in place.

    Returns:
        (B,) True for the corrupted ones.
    """
    count = len(images)
    other = copy.deepcopy(scenes)
    other.shape[:, 0] = (other.shape[:, 0] + rng.integers(1, len(SHAPES), count)) % len(SHAPES)
    other.radius[:, 0] *= np.where(rng.random(count) < 0.4, 1e-4, 1.0)  # nothing instead
    second = to_unit(torch.from_numpy(render(other, size)))
    grid = (np.arange(size) + 0.5) / size
    angle = rng.uniform(0, 2 * np.pi, count)[:, None, None]
    x, y = scenes.centre[:, 0, 0, None, None], scenes.centre[:, 0, 1, None, None]
    side = np.cos(angle) * (grid[None, None, :] - x) + np.sin(angle) * (grid[None, :, None] - y)
    half = torch.from_numpy(np.clip(side * size + 0.5, 0, 1)).float()  # (B, S, S)
    patches = (smooth_noise(count, 1, 6, size, rng)[:, 0] * size / 4 + 0.5).clamp(0, 1)
    weight = torch.where(torch.from_numpy(rng.random((count, 1, 1)) < 0.5), half, patches)
    overlay = torch.from_numpy((rng.random(count) < 0.2) & (other.radius[:, 0] > 0.01))
    opacity = torch.from_numpy(rng.uniform(0.4, 0.6, (count, 1, 1))).float()
    weight = torch.where(overlay[:, None, None], opacity.expand_as(weight), weight)[:, None]
    mixed = images.lerp(second, weight.expand_as(images))
    whole, from_first, from_second = (
        (one - two).abs().sum((1, 2, 3))
        for one, two in ((images, second), (mixed, images), (mixed, second))
    )
    is_neither = torch.minimum(from_first, from_second) > 0.25 * whole
    chosen = torch.from_numpy((rng.random(count) < 0.4) & (scenes.count > 0))
    corrupted = chosen & is_neither & (whole > 0)
    images.copy_(torch.where(corrupted[:, None, None, None], mixed, images))
    return corrupted


def warp(images: Tensor, rng: Generator) -> Tensor:
    """Warp a third of the pictures slightly; shapes stay recognisable."""
    count, size = len(images), images.shape[-1]
    strength = rng.uniform(0, 0.03, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.35)
    shift = smooth_noise(count, 2, 7, size, rng) * torch.from_numpy(strength).float()  # half a side
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), False)
    warped = grid + shift.permute(0, 2, 3, 1)
    return F.grid_sample(images, warped, "bilinear", "border", align_corners=False)


def recolour_empty(scenes: Scenes, images: Tensor, rng: Generator) -> None:
    """Give most pictures without objects a plain colour or a gradient, in place.

    Their background has no name, so its label is ignored.
    """
    count, size = len(images), images.shape[-1]
    rows = (scenes.count == 0) & (rng.random(count) < 0.8)
    ends = torch.from_numpy(rng.uniform(-1, 1, (2, count, 3, 1, 1))).float()
    angle = torch.from_numpy(rng.uniform(0, 2 * np.pi, (count, 1, 1))).float()
    grid = torch.linspace(-0.5, 0.5, size)
    ramp = (angle.cos() * grid[None, None, :] + angle.sin() * grid[None, :, None] + 0.5).clamp(0, 1)
    ramp = ramp * torch.from_numpy(rng.random((count, 1, 1)) < 0.5)  # half are plain
    chosen = torch.from_numpy(rows)
    images[chosen] = ends[0].lerp(ends[1], ramp[:, None])[chosen]
    scenes.background[rows] = IGNORE


def degrade(images: Tensor, rng: Generator) -> Tensor:
    """Blur, noise, a tint, and pale or strong colours, each for some pictures."""
    count, size = len(images), images.shape[-1]

    def some(share: float) -> Tensor:
        return torch.from_numpy(rng.random(count) < share)[:, None, None, None]

    kernel = torch.tensor([0.25, 0.5, 0.25])
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").reshape(count * 3, 1, size + 2, size + 2)
    blurred = F.conv2d(padded, (kernel[:, None] * kernel)[None, None]).reshape(images.shape)
    images = torch.where(some(0.25), blurred, images)
    contrast = torch.from_numpy(rng.uniform(0.8, 1.1, (count, 1, 1, 1))).float()
    images = torch.where(some(0.2), images * contrast, images)
    tint = torch.from_numpy(rng.normal(0, 0.06, (count, 3, 1, 1))).float()
    images = torch.where(some(0.25), images + tint, images)
    sigma = torch.from_numpy(rng.uniform(0.02, 0.25, (count, 1, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32)) * sigma
    return torch.where(some(0.3), images + noise, images).clamp(-1, 1)


def make_batch(number: int, batch_size: int, seed: int) -> tuple[Tensor, Scenes, Tensor]:
    """Batch `number`: pictures (B, 3, 64, 64) in [-1, 1], their scenes, (B,) True if corrupted."""
    rng = np.random.default_rng((seed, number))
    scenes = random_scenes(number, batch_size, rng)
    size = SIZES[rng.integers(len(SIZES))]
    images = to_unit(torch.from_numpy(render(scenes, size)))
    corrupted = corrupt(scenes, images, size, rng)
    recolour_empty(scenes, images, rng)
    return resized(degrade(warp(images, rng), rng), SIDE), scenes, corrupted


# --- training ---------------------------------------------------------------------------------


def losses(maps: DetectionMaps, scenes: Scenes, corrupted: Tensor) -> dict[str, Tensor]:
    """Cross-entropies of heatmap, shape, colour and background, and the L1 distance of geometry.

    The heatmap's target is 1 in the cell nearest to a centre and falls off around it. Shape, colour
    and geometry are predicted in every cell within one cell of a centre.
    """
    grid = (torch.arange(CELLS) + 0.5)[None, None]
    centre = torch.from_numpy(scenes.centre).float() * CELLS  # (B, 4, 2)
    dx, dy = centre[..., :1] - grid, centre[..., 1:] - grid  # (B, 4, G) each
    distance = dx[:, :, None, :] ** 2 + dy[..., None] ** 2  # (B, 4, G, G), squared
    used = torch.from_numpy(np.arange(4) < scenes.count[:, None])
    distance = distance.masked_fill(~used[..., None, None], torch.inf)
    nearest = distance.flatten(2).min(2).values[..., None, None].nan_to_num(posinf=0.0)
    target = torch.exp(-(distance - nearest) / (2 * 0.6**2)).amax(1)  # (B, G, G)
    num_objects = used.sum().clamp(min=1)

    b, slot, y, x = (distance < 1.0).nonzero(as_tuple=True)  # cells near an object's centre
    shape = torch.from_numpy(scenes.shape)
    is_unknown = corrupted[:, None] & (torch.arange(4) == 0)
    shape = torch.where(is_unknown, KINDS.index(UNKNOWN), shape)
    colour = torch.from_numpy(scenes.colour)
    radius = torch.from_numpy(scenes.radius).float() * CELLS
    geometry = torch.stack([dx[b, slot, x], dy[b, slot, y], radius[b, slot]], 1)
    heatmap = F.binary_cross_entropy_with_logits(maps.heatmap, target, reduction="sum")
    return {
        "heatmap": heatmap / num_objects,
        "shape": F.cross_entropy(maps.shape[b, :, y, x], shape[b, slot], label_smoothing=0.01),
        "colour": F.cross_entropy(maps.colour[b, :, y, x], colour[b, slot], label_smoothing=0.01),
        "geometry": F.l1_loss(maps.geometry[b, :, y, x], geometry),
        "background": 0.3 * F.cross_entropy(maps.background, torch.from_numpy(scenes.background)),
    }


def train(steps: int, batch_size: int, lr: float, seed: int) -> Judge:
    """A judge trained with AdamW, warm-up and a cosine to zero; returns its moving average."""
    torch.manual_seed(seed)
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(judge).requires_grad_(False)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="judge", unit="step")
    for step in bar:
        images, scenes, corrupted = make_batch(step, batch_size, seed)
        with torch.autocast("cpu", torch.bfloat16):
            maps = judge.train()(images)
        maps = DetectionMaps(**{name: value.float() for name, value in vars(maps).items()})
        terms = losses(maps, scenes, corrupted)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values(), torch.zeros(())).backward()
        optimizer.step()
        schedule.step()
        ema_update(average, judge, 0.95 if step < 500 else 0.995)
        if step % 50 == 49:
            bar.set_postfix({name: f"{float(term.detach()):.3f}" for name, term in terms.items()})
    return average.eval()


@torch.no_grad()
def ema_update(average: Judge, judge: Judge, decay: float) -> None:
    """Update the moving average of weights and batch statistics, in place."""
    pairs = zip(average.state_dict().values(), judge.state_dict().values(), strict=True)
    for mean, value in pairs:
        if value.is_floating_point():
            mean.lerp_(value, 1 - decay)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judge = train(options.steps, options.batch_size, options.lr, options.seed)
    state = judge.state_dict().items()
    save_tensors(options.out, {k: v.half() if v.is_floating_point() else v for k, v in state})
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
