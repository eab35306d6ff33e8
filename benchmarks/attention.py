"""Do words look at their things? AttnGAN's attention, held against where the things are.

    python benchmarks/attention.py RUN --out results/attngan/attention.json

A thing's mask is where the picture differs from its background within the thing's radius. A word
that names a colour or a shape names the things of that colour or shape. `lift` is the word's mean
attention on its things over its mean attention everywhere, so 1 is what a word without preference
gets; `rivals` is the same on the other things, where there are any.

    ceiling       of R-precision (1 of 100) on real pictures, since some captions are true of
                  several: "a red circle and a blue square" also where the circle is left of it;
                  of the captions that are true, a perfect model finds its own by chance
    matching      the DAMSM's attention to regions of real pictures, whose scenes are known
    at 16, ...    the generator's attention while it draws that scale, of pictures of the prompts,
                  with the things where the judge sees them; only pictures that the judge accepts
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
from lineage.evaluation.intervals import of_mean
from lineage.evaluation.judge import Judge, Thing, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.evaluation.sections import wrong_captions
from lineage.training.store import write_json

Lift = tuple[float, float | None]
NAMES = {name: shape for shape in SDF for name in (shape, shape + "s", shape + "es")}
REAL = 500  # pictures
DIFFERS = 0.35  # of a pixel from the background, in [0, 2]


def masks(image: Tensor, things: Sequence[Thing]) -> Tensor:
    """(3, S, S) in [-1, 1] -> (things, S, S): 1 where the thing is."""
    size = image.shape[-1]
    edge = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    differs = (image - edge.median(1).values[:, None, None]).abs().amax(0) > DIFFERS
    at = (torch.arange(size) + 0.5) / size
    found = [
        (at[None] - thing.x) ** 2 + (at[:, None] - thing.y) ** 2 < (1.3 * thing.radius) ** 2
        for thing in things
    ]
    return torch.stack([differs & disc for disc in found]).float()


def lifts(
    words: Sequence[str], weights: Tensor, image: Tensor, things: Sequence[Thing]
) -> Iterable[Lift]:
    """(lift, rivals) of each word that names some of the things.

    Args:
        weights: (L, s, s) attention of each word.
    """
    if not things:
        return
    there = F.adaptive_avg_pool2d(masks(image, things), weights.shape[1:])  # (things, s, s)

    def lift(weight: Tensor, chosen: list[bool]) -> float | None:
        mask = there[torch.tensor(chosen)].sum(0)
        if mask.sum() == 0:
            return None
        return ((weight * mask).sum() / mask.sum() / weight.mean().clamp(min=1e-12)).item()

    for word, weight in zip(words, weights, strict=False):
        if word not in COLOURS and word not in NAMES:
            continue
        own = [word == thing.colour or NAMES.get(word) == thing.shape for thing in things]
        found = lift(weight, own)
        if found is not None:
            yield found, lift(weight, [not named for named in own])


PLAIN = re.compile(
    r"(a|two|three|four) (\w+) (\w+?)(?:e?s)?(?: (and|left of|right of|above|below) a (\w+) (\w+))?"
)


def meaning(caption: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The things of a plain caption, in no order, and what is said of how they stand."""
    found = PLAIN.fullmatch(caption)
    assert found is not None, caption
    count, colour, shape, relation, colour2, shape2 = found.groups()
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
    """For each caption, how likely a perfect model finds it among 99 others: one over the number of
    captions in the pool that are true of its picture.
    """
    meant = [meaning(caption) for caption in captions]
    chances = []
    for (things, stands), pool in zip(meant, wrong_captions(captions).tolist(), strict=True):
        others = [meant[i] for i in pool]
        true = sum(things == t and s in ((), stands) for t, s in others)
        chances.append(1 / (1 + true))
    return chances


def of_real_pictures(system: AttnGAN, data: Shapes) -> list[Lift]:
    """The DAMSM's attention to the regions of real pictures."""
    numbers = np.arange(REAL)
    scenes, found = data.scenes(numbers), []
    shapes, colours = list(SDF), list(COLOURS)
    for i in numbers.tolist():
        example = data[i]
        caption, image = example.captions[0], to_unit(example.image)
        text, regions = system.text.encode([caption]), system.matcher(image[None])
        _, weights = region_contexts(text.words, text.mask, regions.local, system.matching.gamma1)
        side = int(weights.shape[-1] ** 0.5)
        things = [
            Thing(
                shapes[scenes.shape[i, k]],
                colours[scenes.colour[i, k]],
                *map(float, scenes.centre[i, k]),
                float(scenes.radius[i, k]),
            )
            for k in range(scenes.count[i])
        ]
        grid = weights[0, 0].unflatten(1, (side, side))
        found += lifts(system.text.pieces(caption), grid, image, things)
    return found


def of_drawn_pictures(system: AttnGAN, level: str) -> dict[str, list[Lift]]:
    """The generator's attention, by the side of the picture that was drawn with it."""
    prompts, judge = make_prompts(level), Judge.load()
    captions = [prompt.prompt for prompt in prompts]
    images, attention = system.generate(captions, return_attention=True)
    found: dict[str, list[Lift]] = {f"at {side}": [] for side in system.sides[1:]}
    for i, reading in enumerate(judge.read(to_bytes(images))):
        if not verdict(reading, prompts[i])["strict"]:
            continue
        words = system.text.pieces(captions[i])
        for name, weights in zip(found, attention, strict=True):
            found[name] += lifts(words, weights[i], images[i], reading.things)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--level", default="easy", choices=list(LEVELS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    system = cast(AttnGAN, lineage.load(options.run, "cpu"))
    data = cast(Shapes, load_dataset(f"shapes:{options.level}", "validation", system.sides[-1]))
    rows = {"matching": of_real_pictures(system, data)}
    rows |= of_drawn_pictures(system, options.level)
    result = {
        name: {
            "lift": of_mean([own for own, _ in pairs]),
            "rivals": of_mean([other for _, other in pairs if other is not None]),
            "own_above_rivals": of_mean([own > o for own, o in pairs if o is not None]),
        }
        for name, pairs in rows.items()
        if pairs
    }
    captions = [data[i].captions[0] for i in range(1000)]
    result["ceiling"] = {"r_precision": of_mean(ceiling(captions))}
    write_json(options.out, {"run": options.run.name, **result})
    for name, row in result.items():
        print(name, {key: (score["value"], score["n"]) for key, score in row.items()})


if __name__ == "__main__":
    main()
