"""AttnGAN's attention, compared with where the objects are.

    python benchmarks/attention.py RUN --out results/attngan/attention.json

The mask of an object is where the picture differs from its background within the object's radius. A
word that names a colour or a shape names the objects of that colour or shape. `lift` is the word's
mean attention on its objects over its mean attention everywhere, so a word without preference has
lift 1; `rivals` is the same on the other objects, where there are any.

    ceiling       upper bound of R-precision (1 of 100) on real pictures, since some captions are
                  true of several: "a red circle and a blue square" also where the circle is left of
                  it; of the captions that are true, a perfect model picks its own by chance
    matching      attention of the DAMSM to regions of real pictures, whose scenes are known
    at 16, ...    attention of the generator at that scale, in pictures of the prompts, with the
                  objects that the judge detects; only pictures that the judge accepts
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lineage
from lineage.attngan.attngan import AttnGAN
from lineage.attngan.damsm import region_contexts
from lineage.data import load_dataset
from lineage.data.contract import to_bytes, to_unit
from lineage.data.shapes import LEVELS, Shapes
from lineage.data.shapes_draw import COLOURS, SDF
from lineage.evaluation.intervals import mean_score
from lineage.evaluation.judge import DetectedObject, Judge, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.evaluation.sections import wrong_captions
from lineage.training.store import write_json

Lift = tuple[float, float | None]
NAMES = {name: shape for shape in SDF for name in (shape, shape + "s", shape + "es")}
NUM_REAL = 500
"""Number of real pictures."""
THRESHOLD = 0.35
"""Difference of an object's pixel from the background, in [0, 2]."""


def object_masks(image: Tensor, objects: Sequence[DetectedObject]) -> Tensor:
    """Picture (3, S, S) in [-1, 1] -> (objects, S, S): 1 where the object is."""
    size = image.shape[-1]
    edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    differs = (image - edge.median(1).values[:, None, None]).abs().amax(0) > THRESHOLD
    at = (torch.arange(size) + 0.5) / size
    discs = [
        (at[None] - one.x) ** 2 + (at[:, None] - one.y) ** 2 < (1.3 * one.radius) ** 2
        for one in objects
    ]
    return torch.stack([differs & disc for disc in discs]).float()


def lifts(
    words: Sequence[str], weights: Tensor, image: Tensor, objects: Sequence[DetectedObject]
) -> Iterable[Lift]:
    """(lift, rivals) of each word that names some of the objects.

    Args:
        weights: Attention (L, s, s) of each word.
    """
    if not objects:
        return
    height, width = weights.shape[1:]
    masks = F.adaptive_avg_pool2d(object_masks(image, objects), (height, width))

    def lift(weight: Tensor, chosen: list[bool]) -> float | None:
        mask = masks[torch.tensor(chosen)].sum(0)
        if mask.sum() == 0:
            return None
        return ((weight * mask).sum() / mask.sum() / weight.mean().clamp(min=1e-12)).item()

    for word, weight in zip(words, weights, strict=False):
        if word not in COLOURS and word not in NAMES:
            continue
        named = [word == one.colour or NAMES.get(word) == one.shape for one in objects]
        own = lift(weight, named)
        if own is not None:
            yield own, lift(weight, [not is_named for is_named in named])


PLAIN = re.compile(
    r"(a|two|three|four) (\w+) (\w+?)(?:e?s)?(?: (and|left of|right of|above|below) a (\w+) (\w+))?"
)


def meaning(caption: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The objects of a plain caption, in no order, and the relation between them."""
    match = PLAIN.fullmatch(caption)
    assert match is not None, caption
    count, colour, shape, relation, colour2, shape2 = match.groups()
    one = (count, colour, shape)
    if relation is None:
        return [one], ()
    other = ("a", colour2, shape2)
    stands = {
        "and": (),
        "left of": (one, "left of", other),
        "right of": (other, "left of", one),
        "above": (one, "above", other),
        "below": (other, "above", one),
    }[relation]
    return sorted([one, other]), tuple(map(str, stands))


def ceiling(captions: list[str]) -> list[float]:
    """Probability that a perfect model picks each caption among 99 others: 1 over the number of
    captions in the pool that are true of its picture.
    """
    meanings = [meaning(caption) for caption in captions]
    chances = []
    for (objects, relation), pool in zip(meanings, wrong_captions(captions).tolist(), strict=True):
        others = [meanings[i] for i in pool]
        true = sum(objects == o and r in ((), relation) for o, r in others)
        chances.append(1 / (1 + true))
    return chances


def lifts_in_real_pictures(system: AttnGAN, data: Shapes) -> list[Lift]:
    """Attention of the DAMSM to the regions of real pictures."""
    numbers = np.arange(NUM_REAL)
    scenes, pairs = data.scenes(numbers), list[Lift]()
    shapes, colours = list(SDF), list(COLOURS)
    gamma1 = system.damsm_config.gamma1
    for i in numbers.tolist():
        example = data[i]
        caption, image = example.captions[0], to_unit(example.image)
        text, features = system.text.encode([caption]), system.image_encoder(image[None])
        _, weights = region_contexts(text.words, text.mask, features.regions, gamma1)
        side = int(weights.shape[-1] ** 0.5)
        objects = [
            DetectedObject(
                shapes[scenes.shape[i, k]],
                colours[scenes.colour[i, k]],
                x=float(scenes.centre[i, k, 0]),
                y=float(scenes.centre[i, k, 1]),
                radius=float(scenes.radius[i, k]),
            )
            for k in range(scenes.count[i])
        ]
        grid = weights[0, 0].unflatten(1, (side, side))
        pairs += lifts(system.text.tokens(caption), grid, image, objects)
    return pairs


def lifts_in_samples(system: AttnGAN, level: str) -> dict[str, list[Lift]]:
    """Attention of the generator, by the side of the picture that was made with it."""
    prompts, judge = make_prompts(level), Judge.load()
    captions = [prompt.prompt for prompt in prompts]
    images, attention = system.attention(captions)
    pairs: dict[str, list[Lift]] = {f"at {side}": [] for side in system.sides[1:]}
    for i, detections in enumerate(judge.detect(to_bytes(images))):
        if not verdict(detections, prompts[i])["strict"]:
            continue
        words = system.text.tokens(captions[i])
        for name, weights in zip(pairs, attention, strict=True):
            pairs[name] += lifts(words, weights[i], images[i], detections.objects)
    return pairs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--level", default="easy", choices=list(LEVELS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    system = cast(AttnGAN, lineage.load(arguments.run, "cpu"))
    data = cast(Shapes, load_dataset(f"shapes:{arguments.level}", "validation", system.sides[-1]))
    rows = {"matching": lifts_in_real_pictures(system, data)}
    rows |= lifts_in_samples(system, arguments.level)
    result = {
        name: {
            "lift": mean_score([own for own, _ in pairs]),
            "rivals": mean_score([other for _, other in pairs if other is not None]),
            "own_above_rivals": mean_score([own > o for own, o in pairs if o is not None]),
        }
        for name, pairs in rows.items()
        if pairs
    }
    captions = [data[i].captions[0] for i in range(1000)]
    result["ceiling"] = {"r_precision": mean_score(ceiling(captions))}
    write_json(arguments.out, {"run": arguments.run.name, **result})
    for name, row in result.items():
        print(name, {key: (score["value"], score["n"]) for key, score in row.items()})


if __name__ == "__main__":
    main()
