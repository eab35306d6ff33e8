"""The judge: reads the things in a picture of `shapes`, and decides whether a prompt's scene is
there.

GenEval (Ghosh et al. 2023) reads pictures with a large detector; the world of `shapes` is closed,
so a small network reads it almost without error, and how well it does is measured on real pictures
wherever it judges (`lineage.evaluation.exam`).

    Judge       a convolutional network on a 16 x 16 grid of cells, in the manner of CenterNet (Zhou
                et al. 2019, "Objects as points"): where is the centre of a thing, and which shape,
                colour and radius has it
    read        the things that it sees: cells that more likely than not hold a centre, and more so
                than their neighbours
    verdict     strict: exactly the scene asked for; and in parts: objects, colours, count, relation

A ninth shape, `?`, is for things that are none of the eight: halves, ghosts and crossbreeds of
shapes, of which generated pictures are full. Training shows them (`judge_training`), so that a blob
is not called a circle.

Axes: B pictures, S side, G = 16 cells a side, D = 64 features.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineage.data.contract import to_unit
from lineage.data.shapes_captions import PLACES
from lineage.errors import UserError
from lineage.evaluation.prompts import (
    COLOUR_NAMES,
    GROUNDS,
    RELATION_NAMES,
    SHAPES,
    Prompt,
    Wanted,
)
from lineage.nn.blocks import ResidualBlock
from lineage.training.store import fingerprint, load_tensors

SIDE = 64  # pictures of any size are brought to this one first
CELL = 4  # pixels of it along a cell
ROWS = 64  # pictures are read so many at a time, so that none depends on how many there are
LARGE_RADIUS = 0.23  # between the small and the large sizes of every level
THIRDS = (0.41, 0.59)  # between left, middle and right
UNKNOWN = "?"
KINDS = (*SHAPES, UNKNOWN)


@dataclass(frozen=True)
class Thing:
    """One thing that the judge sees; x, y and radius are shares of the side, y downward."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Reading:
    """All that the judge sees in one picture."""

    things: tuple[Thing, ...]
    background: str

    def __str__(self) -> str:
        """`red circle, blue ?` for a red circle and a blue thing that is no shape."""
        return ", ".join(f"{thing.colour} {thing.shape}" for thing in self.things) or "nothing"


@dataclass
class Maps:
    """What the network says of B pictures, before anything is decided.

    Attributes:
        heat: (B, G, G) logit of a thing's centre in this cell.
        shape: (B, 9, G, G) logits, the last for "none of these".
        colour: (B, 8, G, G) logits.
        place: (B, 3, G, G) the centre's offset from the cell's, in cells, and the radius in cells.
        background: (B, 3) logits.
        features: (B, D) what it has seen, averaged over the picture.
    """

    heat: Tensor
    shape: Tensor
    colour: Tensor
    place: Tensor
    background: Tensor
    features: Tensor


class Judge(nn.Module):
    """The network. `Judge.load()` is the trained one that comes with the package."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(CELL),
            nn.Conv2d(3 * CELL**2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.body = nn.Sequential(*(ResidualBlock(width, 1 + i % 2) for i in range(blocks)))
        self.parts = (1, len(KINDS), len(COLOUR_NAMES), 3)
        first, last = nn.Conv2d(width, width, 1), nn.Conv2d(width, sum(self.parts), 1)
        nn.init.constant_(last.bias[:1], -4.0)  # type: ignore[index]  # most cells hold no centre
        self.head = nn.Sequential(first, nn.ReLU(), last)
        self.ground = nn.Linear(width, len(GROUNDS))

    def forward(self, images: Tensor) -> Maps:
        """(B, 3, 64, 64) in [-1, 1] -> what it sees."""
        x = self.body(self.stem(images))  # (B, D, G, G)
        heat, shape, colour, place = self.head(x).split(self.parts, dim=1)
        features = x.mean((2, 3))
        return Maps(heat[:, 0], shape, colour, place, self.ground(features), features)

    @staticmethod
    @lru_cache(maxsize=1)
    def load() -> Judge:
        """The trained judge.

        Raises:
            UserError: the weights that came with the package are damaged.
        """
        with resources.as_file(resources.files("lineage.evaluation") / "weights") as folder:
            return Judge.from_file(folder / "judge.safetensors")

    @staticmethod
    def from_file(path: Path) -> Judge:
        """A judge from its weights (halves of 16 bits, computed with in 32)."""
        judge = Judge()
        try:
            tensors = load_tensors(path)
            judge.load_state_dict(
                {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
            )
        except RuntimeError as error:
            raise UserError(
                f"{path} does not hold the judge: install the package again."
            ) from error
        return judge.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """A short name for its weights, which stands beside every score."""
        parts = [t.cpu().numpy().tobytes() for t in self.state_dict().values()]
        return fingerprint(b"".join(parts))

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """(B, 3, S, S) uint8, B at least 1 -> what the network says, `ROWS` pictures at a time."""
        parts = []
        for chunk in images.split(ROWS):
            full = chunk[torch.arange(ROWS).clamp(max=len(chunk) - 1)]
            maps = self(resized(to_unit(full), SIDE))
            parts.append({k: v[: len(chunk)] for k, v in vars(maps).items()})
        return Maps(**{k: torch.cat([part[k] for part in parts]) for k in parts[0]})

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, for FID and its kin."""
        return self.maps(images).features

    def read(self, images: Tensor) -> list[Reading]:
        """The things in pictures (B, 3, S, S) uint8, from the surest to the least sure."""
        maps = self.maps(images)
        heat = maps.heat
        highest = F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0]
        found = (heat == highest) & (heat > 0)  # (B, G, G), more likely than not
        readings = []
        for row, background in enumerate(maps.background.argmax(1).tolist()):
            cells = found[row].nonzero()  # (N, 2) y and x
            order = heat[row][found[row]].argsort(descending=True)
            things = tuple(_thing(maps, row, *cells[i].tolist()) for i in order)
            readings.append(Reading(things, GROUNDS[background]))
        return readings


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) float -> (B, 3, side, side), bilinear, antialiased where it shrinks."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _thing(maps: Maps, row: int, y: int, x: int) -> Thing:
    cells = SIDE // CELL
    right, down, radius = maps.place[row, :, y, x].tolist()
    return Thing(
        KINDS[int(maps.shape[row, :, y, x].argmax())],
        COLOUR_NAMES[int(maps.colour[row, :, y, x].argmax())],
        (x + 0.5 + right) / cells,
        (y + 0.5 + down) / cells,
        radius / cells,
    )


# --- the verdict -----------------------------------------------------------

PARTS = ("object", "colour", "count", "relation")


def verdict(reading: Reading, prompt: Prompt) -> dict[str, bool]:
    """Whether a picture shows a prompt's scene.

    Returns:
        `strict`: exactly the things asked for, each as asked, and nothing else. In parts, so that
        progress shows before that: `object`, each shape is there; `colour`, each colour is there,
        on a thing of whatever shape, and no other where the prompt names them all; `count`, there
        are as many things as asked for; `relation`, some things of these shapes stand as asked.
        `colour` and `relation` are left out where the prompt says nothing of them.
    """
    shapes = {thing.shape for thing in reading.things}
    colours = {thing.colour for thing in reading.things}
    named = {w.colour for w in prompt.include}
    result = {"object": all(w.shape in shapes for w in prompt.include)}
    if named != {None}:
        result["colour"] = named - {None} <= colours if None in named else named == colours
    result["count"] = len(reading.things) == prompt.total
    if any(w.position for w in prompt.include):
        result["relation"] = _stands_as_asked(reading, prompt)
    return {"strict": _strict(reading, prompt), **result}


def _strict(reading: Reading, prompt: Prompt) -> bool:
    wanted = Counter({w.shape: 0 for w in prompt.include})
    coloured: Counter[tuple[str, str]] = Counter()
    for w in prompt.include:
        wanted[w.shape] += w.count
        if w.colour:
            coloured[w.shape, w.colour] += w.count
    if Counter(thing.shape for thing in reading.things) != wanted:
        return False
    if coloured - Counter((thing.shape, thing.colour) for thing in reading.things):
        return False
    if prompt.background not in (None, reading.background):
        return False
    for w in prompt.include:
        for thing in _those(reading, w):
            if w.size and (thing.radius > LARGE_RADIUS) != (w.size == "large"):
                return False
            if w.place and place_name(thing.x, thing.y) != w.place:
                return False
    return _stands_as_asked(reading, prompt)


def _those(reading: Reading, wanted: Wanted) -> list[Thing]:
    """The things that an entry may mean: of its shape and, where it names one, its colour."""
    shape, colours = wanted.shape, (wanted.colour,) if wanted.colour else COLOUR_NAMES
    return [t for t in reading.things if t.shape == shape and t.colour in colours]


def _stands_as_asked(reading: Reading, prompt: Prompt) -> bool:
    """Whether, for each relation asked for, there is such a pair of things and all of them stand
    so.
    """
    for wanted in prompt.include:
        if wanted.position:
            name, to = wanted.position
            others = _those(reading, prompt.include[to])
            pairs = [(a, b) for a in _those(reading, wanted) for b in others if a is not b]
            if not pairs or not all(RELATION_NAMES[name] in relations(a, b) for a, b in pairs):
                return False
    return True


def relations(one: Thing, other: Thing) -> set[str]:
    """How one thing stands to another, by GenEval's rule.

    The distance of the centres, less a tenth of both sizes on each axis, as a share of the whole
    distance; what has a component above one half counts, so a diagonal may be two relations.
    """
    distances = (one.x - other.x, one.y - other.y)
    length = math.hypot(*distances)
    if length == 0:
        return set()
    margin = 0.1 * 2 * (one.radius + other.radius)
    right, down = (
        math.copysign(max(abs(distance) - margin, 0.0), distance) / length for distance in distances
    )
    facts = {"left": right < -0.5, "right": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in facts.items() if holds}


def place_name(x: float, y: float) -> str:
    """(x, y) as shares of the side -> the phrase of that ninth of the picture."""
    column, row = (sum(value > border for border in THIRDS) for value in (x, y))
    return PLACES[row][column]
