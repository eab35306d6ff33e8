"""Near-duplicates: pictures that differ by little, such as a copy that was saved again or resized.

A picture's thumbnail is its mean colours on a grid of 8 x 8. The distance of two pictures is the
root of the mean squared difference of their thumbnails, in levels of 0 to 255. Of a picture that is
halved or saved as a JPEG of middling quality, the copy is 1 to 4 levels away. A perceptual hash of
64 bits, the usual way, takes no colours, so that a red circle would be a copy of a blue one.

A thumbnail does not show fine detail: two lines of text, or a checkerboard and its inverse, may be
0 levels apart. Look at the page of removed pictures before you train on the rest.

All pairs are compared in effect: the distance in the first `COARSE` principal components is never
larger than the whole one, so that few pairs need the latter. Still, time grows with the square of
N, from seconds for 20,000 pictures to a minute for 80,000.

Axes: N pictures, D = 192 numbers of a thumbnail, Q pictures of a block, K pictures to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

GRID = 8
LENGTH = 3 * GRID**2
"""D."""
COARSE = 16
BLOCK = 512
"""Number of pictures that are compared with all earlier ones at once."""
TARGETS = 50_000
"""Number of earlier pictures whose distances are in memory at once."""
PROGRESS_FROM = 20_000
"""Number of pictures above which a progress bar is shown."""


class Copy(NamedTuple):
    """A picture that is near an earlier one: their numbers, and their distance in levels."""

    number: int
    original: int
    distance: float


def thumbnail(image: Tensor) -> Tensor:
    """(3, S, S) uint8 -> (D,) float32; the distance of two is their Euclidean one."""
    means = F.adaptive_avg_pool2d(image.float(), GRID).flatten()
    return means / len(means) ** 0.5


def near_duplicates(
    thumbnails: Tensor, splits: Sequence[str], radius: float, within: bool, across: bool
) -> Iterator[Copy]:
    """Pictures that are near an earlier one; each once, with the nearest such picture.

    A copy is not compared with later pictures, so that a row of pictures that change little by
    little is not one set of copies.

    Args:
        thumbnails: (N, D) of any float type, in the order in which pictures are preferred.
        splits: Split of each picture.
        radius: Largest distance of a copy, in levels.
        within: If true, copies in the same split count.
        across: If true, copies in another split count.
    """
    if not len(thumbnails):
        return
    coarse = _principal_components(thumbnails)
    targets = torch.empty_like(coarse)  # of the originals so far: (K, COARSE), the rest is unused
    originals: dict[int, None] = {}
    with tqdm(
        total=len(coarse),
        desc="comparing",
        unit=" pictures",
        disable=len(coarse) < PROGRESS_FROM or None,
        leave=False,
    ) as bar:
        for first in range(0, len(coarse), BLOCK):
            block = torch.arange(first, min(first + BLOCK, len(coarse)))
            known = torch.tensor([*originals], dtype=torch.int64)
            candidates = torch.cat(
                [
                    _candidates(coarse, block, targets[: len(known)], known, radius),
                    _candidates(coarse, block, coarse[block], block, radius),
                ]
            )
            hits = _within_radius(thumbnails, candidates, radius)
            for number in block.tolist():
                near = [hit for hit in hits.get(number, []) if hit[1] in originals]
                same = [hit for hit in near if splits[hit[1]] == splits[number]]
                others = [hit for hit in near if splits[hit[1]] != splits[number]]
                copied = (others if across else []) or (same if within else [])
                if copied:
                    distance, original = min(copied)
                    yield Copy(number, original, distance)
                elif not any(distance == 0 for distance, _ in same):  # whose copies it shares
                    targets[len(originals)] = coarse[number]
                    originals[number] = None
            bar.update(len(block))


def _principal_components(thumbnails: Tensor) -> Tensor:
    """(N, COARSE) coordinates in the directions in which thumbnails differ most."""
    parts = thumbnails.split(10_000)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(thumbnails)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        centred = part.double() - mean
        covariance += centred.T @ centred
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -COARSE:].float()
    return torch.cat([(part.float() - mean.float()) @ directions for part in parts])


def _candidates(
    coarse: Tensor, block: Tensor, targets: Tensor, numbers: Tensor, radius: float
) -> Tensor:
    """Pairs (P, 2) of a picture of the block and an earlier target that may be near it.

    Args:
        coarse: (N, COARSE).
        block: (Q,) numbers of pictures.
        targets: (K, COARSE).
        numbers: (K,) numbers of the targets.
        radius: Largest distance of a copy.
    """
    rounding = 0.2  # levels: more than `cdist` errs
    pairs = []
    for part, own in zip(targets.split(TARGETS), numbers.split(TARGETS), strict=True):
        row, target = (torch.cdist(coarse[block], part) <= radius + rounding).nonzero().T
        pairs.append(torch.stack([block[row], own[target]], dim=1))
    every = torch.cat(pairs)
    return every[every[:, 1] < every[:, 0]]


def _within_radius(
    thumbnails: Tensor, pairs: Tensor, radius: float
) -> dict[int, list[tuple[float, int]]]:
    """Distance and number of the other for the first of each pair (P, 2) that is near."""
    hits: dict[int, list[tuple[float, int]]] = {}
    for part in pairs.split(100_000):
        one, other = (thumbnails[numbers].float() for numbers in part.T)
        distances = (one - other).norm(dim=1)
        near = distances <= radius
        for distance, (number, earlier) in zip(
            distances[near].tolist(), part[near].tolist(), strict=True
        ):
            hits.setdefault(number, []).append((distance, earlier))
    return hits
