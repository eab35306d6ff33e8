"""What systems receive of a data set, as pictures: `lineage data show SPEC --run RUN`.

Every system gets the same pictures and captions. What it makes of them before the first loss is its
own: a GAN of several stages shrinks them, a prior reads the codes of its codec, a latent diffusion
model the latents of its autoencoder, an adapter a control picture.

    picture | attngan: 8 x 8 | 16 x 16 | 32 x 32 | dalle: codes | decoded | ldm: latents | decoded

Axes: B pictures, 3 channels, S side; h, w sides of a grid of codes or latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import Batch, to_bytes
from lineage.errors import UserError
from lineage.nn.gan import downsample
from lineage.plan import read_config, saved_stages
from lineage.pretrained import run_folder
from lineage.runs import load
from lineage.sheets import rows_sheet
from lineage.system import HasSides, Reconstructs, System

Cell = tuple[str, Tensor]
"""Label, and picture (3, h, w) uint8."""


def inputs_sheet(
    spec: str, runs: Sequence[str | Path], count: int, split: str = "train", seed: int = 0
) -> Image.Image:
    """A row for each picture: itself, and what each run's system receives of it.

    Args:
        spec: Data set; each run gets it at the run's own size.
        runs: Run folders, or `pretrained:KEY`.
        count: Number of pictures.
        split: Split of the data set.
        seed: Seed of an endless data set.
    """
    columns: list[list[Cell]] = []
    for run in runs:
        pictures, *own = input_columns(spec, run, count, split, seed)
        columns += own if columns else [pictures, *own]
    return rows_sheet(list(zip(*columns, strict=True)), side=96)


def input_columns(
    spec: str, run: str | Path, count: int, split: str, seed: int
) -> Iterator[list[Cell]]:
    """Columns of cells: pictures with their captions, then one for each kind of thing that a run's
    system receives.

    Raises:
        UserError: The run is not of a text-to-image system.
    """
    system, folder = load(run), run_folder(run, "run")
    config = read_config(folder)
    if not isinstance(system, System):
        raise UserError(f"{config.key} draws no pictures: name a run of another system.")
    dataset = load_dataset(spec, split, system.size, seed)
    prepare = saved_stages(folder)[-1].prepare
    if prepare is not None:
        dataset = prepare(dataset, system)
    count = count if dataset.endless else min(count, len(dataset))
    step = 1 if dataset.endless else max(1, len(dataset) // count)
    batch = dataset.batch(range(0, count * step, step), [0] * count, config.seed)
    yield from _columns(config.key, system, batch)


@torch.no_grad()
def _columns(key: str, system: System, batch: Batch) -> Iterator[list[Cell]]:
    image = batch.image.to(system.device)
    yield list(zip(batch.caption, to_bytes(image).cpu(), strict=True))
    sides = system.sides if isinstance(system, HasSides) else [] if batch.extra else [system.size]
    for side in sides:
        yield _cells(f"{key}: {side} x {side}", to_bytes(downsample(image, side)))
    for name, values in batch.extra.items():
        shape = " x ".join(map(str, values.shape[1:]))
        yield _cells(f"{key}: {name}, {shape}", as_pictures(values))
    if batch.extra and isinstance(system, Reconstructs):
        yield _cells(f"{key}: decoded", to_bytes(system.reconstruct(image)))


def _cells(label: str, images: Tensor) -> list[Cell]:
    return [(label, image) for image in images.cpu()]


def as_pictures(values: Tensor) -> Tensor:
    """Values of a batch as pictures (B, 3, h, w) uint8.

    Args:
        values: Codes (B, h, w) or (B, h * w), each in a colour of its own; or channels (B, C, h, w)
            of numbers, the first three of them from the batch's least, black, to its largest.
    """
    if not values.is_floating_point():
        side = round(values[0].numel() ** 0.5)
        return colours_of(values if values.dim() == 3 else values.unflatten(1, (side, side)))
    channels = values[:, :3].float()
    channels = channels if channels.shape[1] == 3 else channels[:, :1].expand(-1, 3, -1, -1)
    low, high = channels.amin((0, 2, 3), keepdim=True), channels.amax((0, 2, 3), keepdim=True)
    return ((channels - low) / (high - low).clamp_min(1e-8) * 255).round().to(torch.uint8)


def colours_of(codes: Tensor) -> Tensor:
    """A colour for each code, (B, h, w) -> (B, 3, h, w) uint8; hues of neighbours lie far apart."""
    number = codes.cpu().numpy().astype(np.int64)
    hue = (number * 0.6180339887 % 1 * 255).astype(np.uint8)
    value = (255 - number % 3 * 50).astype(np.uint8)
    hsv = np.stack([hue, np.full_like(hue, 170), value], axis=-1)
    rgb = [np.asarray(Image.fromarray(one, "HSV").convert("RGB")) for one in hsv]
    return torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2)
