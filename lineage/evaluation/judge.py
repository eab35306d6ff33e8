"""The judge: detects the objects in a picture of `shapes`, and decides whether they are the scene
of a prompt.

GenEval (Ghosh et al. 2023) uses a large object detector. The world of `shapes` is closed, so a
small network detects its objects almost without error; `lineage.evaluation.exam` measures how well,
on real pictures, wherever it is used.

    Judge       a convolutional network on a 16 x 16 grid of cells, after CenterNet (Zhou et al.
                2019, "Objects as points"): a heatmap of object centres, and the shape, colour and
                radius of the object in each cell
    detect      the objects: cells whose centre is more likely than not, and a maximum of the
                heatmap among their neighbours
    verdict     strict: exactly the scene of the prompt; and in parts: objects, colours, count,
                relation

A ninth shape, `?`, is for objects that are none of the eight: halves, overlays and mixtures of
shapes, of which generated pictures are full. Training (`benchmarks/train_judge.py`) shows them, so
that a blob is not called a circle.

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
    ObjectSpec,
    Prompt,
)
from lineage.nn.blocks import ResidualBlock
from lineage.threads import tuned
from lineage.training.store import fingerprint, load_tensors

SIDE = 64  # pictures of any size are resized to this one
CELL = 4  # pixels along a cell
CELLS = SIDE // CELL
ROWS = 64  # pictures in one pass, always as many, so that no result depends on their number
LARGE_RADIUS = 0.23  # between the small and the large sizes of every level
THIRDS = (0.41, 0.59)  # between left, middle and right
UNKNOWN = "?"
KINDS = (*SHAPES, UNKNOWN)


@dataclass(frozen=True)
class DetectedObject:
    """One object; x, y and radius are shares of the side, y points downward."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Detections:
    """All objects in one picture, and the colour of its background."""

    objects: tuple[DetectedObject, ...]
    background: str

    def __str__(self) -> str:
        """`red circle, blue ?` for a red circle and a blue object of no known shape."""
        return ", ".join(f"{o.colour} {o.shape}" for o in self.objects) or "nothing"


@dataclass
class DetectionMaps:
    """Outputs of the network for B pictures.

    Attributes:
        heatmap: (B, G, G) logit of an object's centre in this cell.
        shape: (B, 9, G, G) logits, the last for "none of these".
        colour: (B, 8, G, G) logits.
        geometry: (B, 3, G, G) offset of the centre from the cell's centre, and radius, in cells.
        background: (B, 3) logits.
        features: (B, D) features, averaged over the picture.
    """

    heatmap: Tensor
    shape: Tensor
    colour: Tensor
    geometry: Tensor
    background: Tensor
    features: Tensor


class Judge(nn.Module):
    """The network. `Judge.load()` is the trained one that comes with the package."""

    def __init__(self, width: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(CELL),
            nn.Conv2d(3 * CELL**2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.body = nn.Sequential(*(ResidualBlock(width, 1 + i % 2) for i in range(num_blocks)))
        self.head_channels = (1, len(KINDS), len(COLOUR_NAMES), 3)
        first, last = nn.Conv2d(width, width, 1), nn.Conv2d(width, sum(self.head_channels), 1)
        nn.init.constant_(last.bias[:1], -4.0)  # type: ignore[index]  # most cells hold no centre
        self.head = nn.Sequential(first, nn.ReLU(), last)
        self.ground = nn.Linear(width, len(GROUNDS))

    def forward(self, images: Tensor) -> DetectionMaps:
        """Pictures (B, 3, 64, 64) in [-1, 1] -> maps."""
        x = self.body(self.stem(images))  # (B, D, G, G)
        heatmap, shape, colour, geometry = self.head(x).split(self.head_channels, dim=1)
        features = x.mean((2, 3))
        background = self.ground(features)
        return DetectionMaps(heatmap[:, 0], shape, colour, geometry, background, features)

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
        """A judge from a file of weights; it computes in float32."""
        judge = Judge()
        try:
            judge.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise UserError(
                f"{path} does not hold the judge: install the package again."
            ) from error
        return judge.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """A short hash of the weights, which is stated with every score."""
        parts = [t.cpu().numpy().tobytes() for t in self.state_dict().values()]
        return fingerprint(b"".join(parts))

    @torch.no_grad()
    def detection_maps(self, images: Tensor) -> DetectionMaps:
        """Maps of uint8 pictures (B, 3, S, S), B at least 1, computed in chunks of `ROWS`."""
        parts = []
        for chunk in images.split(ROWS):
            full = chunk[torch.arange(ROWS).clamp(max=len(chunk) - 1)]
            with tuned("judge"):
                maps = self(resized(to_unit(full), SIDE))
            parts.append({k: v[: len(chunk)] for k, v in vars(maps).items()})
        return DetectionMaps(**{k: torch.cat([part[k] for part in parts]) for k in parts[0]})

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) float32 of uint8 pictures (B, 3, S, S), for FID and similar metrics."""
        return self.detection_maps(images).features

    def detect(self, images: Tensor) -> list[Detections]:
        """Objects in uint8 pictures (B, 3, S, S), the most certain first."""
        maps = self.detection_maps(images)
        maxima = F.max_pool2d(maps.heatmap[:, None], 3, stride=1, padding=1)[:, 0]
        is_centre = (maps.heatmap == maxima) & (maps.heatmap > 0)  # (B, G, G), more likely than not
        detections = []
        for row, background in enumerate(maps.background.argmax(1).tolist()):
            cells = is_centre[row].nonzero()  # (N, 2) y and x
            order = maps.heatmap[row][is_centre[row]].argsort(descending=True)
            objects = tuple(_object_in_cell(maps, row, *cells[i].tolist()) for i in order)
            detections.append(Detections(objects, GROUNDS[background]))
        return detections


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) float -> (B, 3, side, side), bilinear, antialiased if it shrinks."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _object_in_cell(maps: DetectionMaps, row: int, y: int, x: int) -> DetectedObject:
    right, down, radius = maps.geometry[row, :, y, x].tolist()
    return DetectedObject(
        KINDS[int(maps.shape[row, :, y, x].argmax())],
        COLOUR_NAMES[int(maps.colour[row, :, y, x].argmax())],
        (x + 0.5 + right) / CELLS,
        (y + 0.5 + down) / CELLS,
        radius / CELLS,
    )


# --- the verdict ------------------------------------------------------------------------------

PARTS = ("object", "colour", "count", "relation")


def verdict(detections: Detections, prompt: Prompt) -> dict[str, bool]:
    """Whether a picture shows a prompt's scene.

    Returns:
        `strict`: exactly the prompt's objects with their attributes, and nothing else. The parts
        show progress before that. `object`: each shape is there. `colour`: each colour is there, on
        an object of any shape, and no other colour if the prompt names them all. `count`: the
        number of objects is right. `relation`: objects of these shapes have the right relation.
        `colour` and `relation` are left out if the prompt does not mention them.
    """
    shapes = {o.shape for o in detections.objects}
    colours = {o.colour for o in detections.objects}
    named = {entry.colour for entry in prompt.include}
    result = {"object": all(entry.shape in shapes for entry in prompt.include)}
    if named != {None}:
        result["colour"] = named - {None} <= colours if None in named else named == colours
    result["count"] = len(detections.objects) == prompt.num_objects
    if any(entry.position for entry in prompt.include):
        result["relation"] = _relations_hold(detections, prompt)
    return {"strict": _strict(detections, prompt), **result}


def _strict(detections: Detections, prompt: Prompt) -> bool:
    shapes: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for entry in prompt.include:
        shapes[entry.shape] += entry.count
        if entry.colour:
            pairs[entry.shape, entry.colour] += entry.count
    if Counter(o.shape for o in detections.objects) != shapes:
        return False
    if pairs - Counter((o.shape, o.colour) for o in detections.objects):
        return False
    if prompt.background not in (None, detections.background):
        return False
    for entry in prompt.include:
        for o in _candidates(detections, entry):
            if entry.size and (o.radius > LARGE_RADIUS) != (entry.size == "large"):
                return False
            if entry.place and place_name(o.x, o.y) != entry.place:
                return False
    return _relations_hold(detections, prompt)


def _candidates(detections: Detections, entry: ObjectSpec) -> list[DetectedObject]:
    """Objects that an entry may refer to: those of its shape and, if it names one, its colour."""
    return [
        o for o in detections.objects if o.shape == entry.shape and entry.colour in (None, o.colour)
    ]


def _relations_hold(detections: Detections, prompt: Prompt) -> bool:
    """Whether, for each relation of the prompt, such a pair exists and all such pairs have it."""
    for entry in prompt.include:
        if entry.position:
            name, to = entry.position
            others = _candidates(detections, prompt.include[to])
            pairs = [(a, b) for a in _candidates(detections, entry) for b in others if a is not b]
            if not pairs or not all(RELATION_NAMES[name] in relations(a, b) for a, b in pairs):
                return False
    return True


def relations(one: DetectedObject, other: DetectedObject) -> set[str]:
    """Relations of one object to another, by GenEval's rule.

    The distance of the centres on each axis, less a tenth of both sizes, as a share of the whole
    distance: a component above one half counts, so a diagonal may be two relations.
    """
    distances = (one.x - other.x, one.y - other.y)
    length = math.hypot(*distances)
    if length == 0:
        return set()
    margin = 0.1 * 2 * (one.radius + other.radius)
    right, down = (
        math.copysign(max(abs(distance) - margin, 0.0), distance) / length for distance in distances
    )
    holds = {"left": right < -0.5, "right": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name in holds if holds[name]}


def place_name(x: float, y: float) -> str:
    """The phrase for the ninth of the picture that contains (x, y), shares of the side."""
    column, row = (sum(value > border for border in THIRDS) for value in (x, y))
    return PLACES[row][column]
