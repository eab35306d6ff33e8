"""Trains the judge: `python -m lineage.evaluation.judge_training --out FILE`.

It learns from scenes of every level at sizes from 16 to 64 pixels, each with shapes and colours
drawn freely (nothing is held out from a judge), and half of them blurred, noisy or paler, as
generated pictures are; a third are a little bent. In a third of them one thing is spoilt, and
called `?`: half of it, or patches of it, are missing or of another shape, or two shapes shine
through each other. Some pictures are empty, of any colours.

The weights in the package are those of the default settings (about half an hour on one core).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.data.contract import to_unit
from lineage.data.shapes import LEVELS, Scenes, make_scenes, render
from lineage.evaluation.judge import CELL, KINDS, SIDE, UNKNOWN, Judge, Maps, resized
from lineage.evaluation.prompts import COLOUR_NAMES, SHAPES
from lineage.training.store import save_tensors

SIZES = (16, 16, 20, 24, 32, 32, 48, 64)  # pixels; small ones are harder, so they come more often
CELLS = SIDE // CELL


def scatter(scenes: Scenes, rows: NDArray[np.bool_], chance: np.random.Generator) -> None:
    """Put the things of `rows` anywhere, apart from each other, in place; what overlaps is left
    out.
    """
    count = len(rows)
    radius = chance.uniform(0.12, 0.24, (count, 4))
    centre = chance.uniform(0, 1, (count, 4, 2)) * (1 - 2 * radius[..., None]) + radius[..., None]
    for slot in range(1, 4):
        apart = np.linalg.norm(centre[:, slot, None] - centre[:, :slot], axis=-1)
        touches = (apart < 1.05 * (radius[:, slot, None] + radius[:, :slot])).any(1)
        scenes.count[:] = np.where(rows & touches, np.minimum(scenes.count, slot), scenes.count)
    scenes.radius[:] = np.where(rows[:, None], radius, scenes.radius)
    scenes.centre[:] = np.where(rows[:, None, None], centre, scenes.centre)


def free_scenes(number: int, batch: int, chance: np.random.Generator) -> Scenes:
    """Scenes of a random level with any shapes and colours; some empty, some in free order."""
    level = list(LEVELS.values())[chance.integers(3)]
    scenes = make_scenes(level, 1, "judge", np.arange(number * batch, (number + 1) * batch))
    alike = chance.random((batch, 1)) < 0.3
    for field, names in (("shape", SHAPES), ("colour", COLOUR_NAMES)):
        drawn = chance.integers(len(names), size=(batch, 4))
        setattr(scenes, field, np.where(alike, drawn[:, :1], drawn))
    free = chance.random(batch) < 0.3
    scenes.count[:] = np.where(free, chance.integers(1, 5, batch), scenes.count)
    scatter(scenes, free, chance)
    scenes.radius *= chance.uniform(0.93, 1.07, (batch, 1))
    scenes.count[chance.random(batch) < 0.06] = 0
    return scenes


def field(batch: int, channels: int, cells: int, size: int, chance: np.random.Generator) -> Tensor:
    """(B, channels, S, S) smooth random numbers, about a deviation of 1, `cells` bumps a side."""
    coarse = torch.from_numpy(chance.standard_normal((batch, channels, cells, cells), np.float32))
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)


def spoil(scenes: Scenes, images: Tensor, size: int, chance: np.random.Generator) -> Tensor:
    """Spoil the first thing in about a third of the pictures (B, 3, S, S), in place.

    Returns (B,) True where it did.
    """
    batch = len(images)
    other = copy.deepcopy(scenes)
    other.shape[:, 0] = (other.shape[:, 0] + chance.integers(1, len(SHAPES), batch)) % len(SHAPES)
    other.radius[:, 0] *= np.where(chance.random(batch) < 0.4, 1e-4, 1.0)  # nothing in its stead
    second = to_unit(torch.from_numpy(render(other, size)))
    at = (np.arange(size) + 0.5) / size
    turn = chance.uniform(0, 2 * np.pi, batch)[:, None, None]
    x, y = scenes.centre[:, 0, 0, None, None], scenes.centre[:, 0, 1, None, None]
    side = np.cos(turn) * (at[None, None, :] - x) + np.sin(turn) * (at[None, :, None] - y)
    half = torch.from_numpy(np.clip(side * size + 0.5, 0, 1)).float()  # (B, S, S)
    patches = (field(batch, 1, 6, size, chance)[:, 0] * size / 4 + 0.5).clamp(0, 1)
    mix = torch.where(torch.from_numpy(chance.random((batch, 1, 1)) < 0.5), half, patches)
    ghost = torch.from_numpy((chance.random(batch) < 0.2) & (other.radius[:, 0] > 0.01))
    through = torch.from_numpy(chance.uniform(0.4, 0.6, (batch, 1, 1))).float()
    share = torch.where(ghost[:, None, None], through.expand_as(mix), mix)[:, None]
    mixed = images.lerp(second, share.expand_as(images))
    whole, from_first, from_second = (
        (one - two).abs().sum((1, 2, 3))
        for one, two in ((images, second), (mixed, images), (mixed, second))
    )
    enough = torch.minimum(from_first, from_second) > 0.25 * whole  # it is clearly neither
    wanted = torch.from_numpy((chance.random(batch) < 0.4) & (scenes.count > 0))
    spoilt = wanted & enough & (whole > 0)
    images.copy_(torch.where(spoilt[:, None, None, None], mixed, images))
    return spoilt


def bend(images: Tensor, chance: np.random.Generator) -> Tensor:
    """A third of the pictures drawn by an unsteady hand: shapes stay what they are."""
    batch, size = len(images), images.shape[-1]
    strength = chance.uniform(0, 0.03, (batch, 1, 1, 1)) * (chance.random((batch, 1, 1, 1)) < 0.35)
    shift = field(batch, 2, 7, size, chance) * torch.from_numpy(strength).float()  # of half a side
    straight = F.affine_grid(torch.eye(2, 3).expand(batch, 2, 3), list(images.shape), False)
    bent = straight + shift.permute(0, 2, 3, 1)
    return F.grid_sample(images, bent, "bilinear", "border", align_corners=False)


def blank(scenes: Scenes, images: Tensor, chance: np.random.Generator) -> None:
    """Most pictures without a thing become plain colours, or run from one to another, in place.

    Their ground has no name, which the label -100 says.
    """
    batch, size = len(images), images.shape[-1]
    rows = (scenes.count == 0) & (chance.random(batch) < 0.8)
    ends = torch.from_numpy(chance.uniform(-1, 1, (2, batch, 3, 1, 1))).float()
    turn = torch.from_numpy(chance.uniform(0, 2 * np.pi, (batch, 1, 1))).float()
    at = torch.linspace(-0.5, 0.5, size)
    across = (turn.cos() * at[None, None, :] + turn.sin() * at[None, :, None] + 0.5).clamp(0, 1)
    across = across * torch.from_numpy(chance.random((batch, 1, 1)) < 0.5)  # half are plain
    chosen = torch.from_numpy(rows)
    images[chosen] = ends[0].lerp(ends[1], across[:, None])[chosen]
    scenes.background[rows] = -100


def weather(images: Tensor, chance: np.random.Generator) -> Tensor:
    """Blur, noise and pale or strong colours for half of the pictures, some of each."""
    batch, size = len(images), images.shape[-1]

    def some(share: float) -> Tensor:
        return torch.from_numpy(chance.random(batch) < share)[:, None, None, None]

    kernel = torch.tensor([0.25, 0.5, 0.25])
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate").reshape(batch * 3, 1, size + 2, size + 2)
    soft = F.conv2d(wide, (kernel[:, None] * kernel)[None, None]).reshape(images.shape)
    images = torch.where(some(0.25), soft, images)
    strength = torch.from_numpy(chance.uniform(0.8, 1.1, (batch, 1, 1, 1))).float()
    images = torch.where(some(0.2), images * strength, images)
    tint = torch.from_numpy(chance.normal(0, 0.06, (batch, 3, 1, 1))).float()
    images = torch.where(some(0.25), images + tint, images)
    scale = torch.from_numpy(chance.uniform(0.02, 0.25, (batch, 1, 1, 1))).float()
    noise = torch.from_numpy(chance.standard_normal(images.shape, np.float32)) * scale
    return torch.where(some(0.3), images + noise, images).clamp(-1, 1)


def make_batch(number: int, batch: int, seed: int) -> tuple[Tensor, Scenes, Tensor]:
    """Batch `number`: pictures (B, 3, 64, 64) in [-1, 1], their scenes, (B,) spoilt or not."""
    chance = np.random.default_rng((seed, number))
    scenes = free_scenes(number, batch, chance)
    size = SIZES[chance.integers(len(SIZES))]
    images = to_unit(torch.from_numpy(render(scenes, size)))
    spoilt = spoil(scenes, images, size, chance)
    blank(scenes, images, chance)
    return resized(weather(bend(images, chance), chance), SIDE), scenes, spoilt


def terms(maps: Maps, scenes: Scenes, spoilt: Tensor) -> dict[str, Tensor]:
    """The loss: cross-entropies of heat, shape, colour and ground, and the places' distance.

    The heat's target is 1 in the cell nearest to a centre and falls off around it; the rest is
    asked of every cell within one cell of a centre.
    """
    here = (torch.arange(CELLS) + 0.5)[None, None]
    centre = torch.from_numpy(scenes.centre).float() * CELLS  # (B, 4, 2)
    dx, dy = centre[..., :1] - here, centre[..., 1:] - here  # (B, 4, G) each
    square = dx[:, :, None, :] ** 2 + dy[..., None] ** 2  # (B, 4, G, G)
    used = torch.from_numpy(np.arange(4) < scenes.count[:, None])
    square = square.masked_fill(~used[..., None, None], torch.inf)
    nearest = square.flatten(2).min(2).values[..., None, None].nan_to_num(posinf=0.0)
    target = torch.exp(-(square - nearest) / (2 * 0.6**2)).amax(1)  # (B, G, G)
    things = used.sum().clamp(min=1)
    heat = F.binary_cross_entropy_with_logits(maps.heat, target, reduction="sum") / things

    b, slot, y, x = (square < 1.0).nonzero(as_tuple=True)  # cells that answer for a thing
    shape = torch.from_numpy(scenes.shape)
    unknown = spoilt[:, None] & (torch.arange(4) == 0)
    shape = torch.where(unknown, KINDS.index(UNKNOWN), shape)
    radius = torch.from_numpy(scenes.radius).float() * CELLS
    place = torch.stack([dx[b, slot, x], dy[b, slot, y], radius[b, slot]], 1)
    return {
        "heat": heat,
        "shape": F.cross_entropy(maps.shape[b, :, y, x], shape[b, slot], label_smoothing=0.01),
        "colour": F.cross_entropy(
            maps.colour[b, :, y, x], torch.from_numpy(scenes.colour)[b, slot], label_smoothing=0.01
        ),
        "place": F.l1_loss(maps.place[b, :, y, x], place),
        "ground": 0.3 * F.cross_entropy(maps.background, torch.from_numpy(scenes.background)),
    }


def train(steps: int, batch: int, rate: float, seed: int) -> Judge:
    """A judge trained with AdamW, warm-up and a cosine to zero; its moving average is returned."""
    torch.manual_seed(seed)
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(judge).requires_grad_(False)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="judge", unit="step")
    for number in bar:
        images, scenes, spoilt = make_batch(number, batch, seed)
        with torch.autocast("cpu", torch.bfloat16):
            maps = judge.train()(images)
        loss = terms(Maps(**{k: v.float() for k, v in vars(maps).items()}), scenes, spoilt)
        optimiser.zero_grad(set_to_none=True)
        sum(loss.values(), torch.zeros(())).backward()
        optimiser.step()
        schedule.step()
        follow(average, judge, 0.05 if number < 500 else 0.005)
        if number % 50 == 49:
            bar.set_postfix({name: f"{float(term.detach()):.3f}" for name, term in loss.items()})
    return average.eval()


@torch.no_grad()
def follow(average: Judge, judge: Judge, share: float) -> None:
    """Move every number of `average` by `share` of the way to `judge`, in place."""
    pairs = zip(average.state_dict().values(), judge.state_dict().values(), strict=True)
    for mine, its in pairs:
        if its.is_floating_point():
            mine.lerp_(its, share)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(prog="python -m lineage.evaluation.judge_training")
    parser.add_argument("--out", type=Path, default=Path("judge.safetensors"))
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judge = train(options.steps, options.batch, options.rate, options.seed)
    state = judge.state_dict().items()
    save_tensors(options.out, {k: v.half() if v.is_floating_point() else v for k, v in state})
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
