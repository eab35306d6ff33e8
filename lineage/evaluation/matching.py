"""Scores of a model that compares pictures with captions, such as a CLIP, on unseen pictures.

    r_precision        share of pictures whose caption comes first among 100 (Xu et al. 2018)
    limit              the share that a model would reach which knows what is true and no more:
                       several captions of the 100 may be true of a picture (`shapes` only). One
                       that knows when captions leave something out may get further
    text_to_image      share of captions whose own picture is among the first 1, 5 and 10 of all
    image_to_text      the same for pictures and captions; equal captions count as one
    words_of_place     share of pictures that fit their caption better than the same caption with
                       its words of place exchanged ("left of", "right of")
    near_misses        share of prompts that fit their picture better than one that misses them in
                       one attribute (`shapes` only)

Axes: N pairs, P width of the joint space, K captions of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineage.data.contract import CaptionedDataset, Example
from lineage.data.shapes import LEVELS, Shapes
from lineage.data.shapes_captions import OPPOSITE
from lineage.evaluation import metrics, sections
from lineage.evaluation.intervals import mean_score
from lineage.evaluation.prompts import Prompt
from lineage.evaluation.real import PromptSet
from lineage.evaluation.scenes import attributes, draw_scenes, near_miss, scene_spec
from lineage.evaluation.scorer import Scorer
from lineage.text.opposites import opposite

RANKS = (1, 5, 10)


def matching(
    scorer: Scorer,
    data: CaptionedDataset,
    prompts: PromptSet | None = None,
    max_pictures: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The section `matching` of an evaluation; see the head of this module.

    Args:
        scorer: The model.
        data: Unseen pictures.
        prompts: Prompts of `shapes`, for near misses.
        max_pictures: Largest number of pictures.
        seed: Seed of the captions' pools and of near misses.
    """
    examples = [data[i] for i in range(min(max_pictures, len(data)))]
    captions = [example.captions[0] for example in examples]
    image = scorer.image(torch.stack([example.image for example in examples]))  # (N, P)
    text = scorer.text(captions)
    result: dict[str, Any] = {}
    if len(set(captions)) > 1:
        pools = sections.wrong_captions(captions, seed)  # (N, K)
        candidates = torch.cat([text[:, None], text[pools]], 1)
        result["r_precision"] = mean_score(metrics.r_precision(image, candidates))
        if isinstance(data, Shapes):
            result["limit"] = mean_score(best_possible(examples, pools))
    result |= recalls(image, text, captions)
    if places := words_of_place(scorer, image, text, captions):
        result["words_of_place"] = places
    if prompts is not None:
        result["near_misses"] = near_misses(scorer, prompts.prompts, data.size, seed)
    return result


def recalls(image: Tensor, text: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """Recall at 1, 5 and 10 of captions for pictures, and of pictures for captions.

    A caption's rank is the number of other captions that fit the picture better; a picture's, of
    pictures with other captions.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    number = torch.tensor([numbers[caption] for caption in captions])
    first = torch.tensor([captions.index(caption) for caption in numbers])
    cosines = image @ text.T  # (N, N)
    own = cosines.diagonal()
    other = number[:, None] != number  # (N, N)
    of_captions = ((cosines[:, first] > own[:, None]) & other[:, first]).sum(1)
    best = torch.full((len(numbers),), -torch.inf).scatter_reduce(0, number, own, "amax")
    of_pictures = ((cosines > best[number]) & other).sum(0)
    return {
        name: {str(k): mean_score((rank < k).double()) for k in RANKS}
        for name, rank in (("image_to_text", of_captions), ("text_to_image", of_pictures))
    }


def words_of_place(
    scorer: Scorer, image: Tensor, text: Tensor, captions: Sequence[str]
) -> dict[str, Any]:
    """Accuracy against captions with opposite words of place, over all and by the first of them."""
    false = {row: f for row, caption in enumerate(captions) if (f := opposite(caption))}
    if not false:
        return {}
    rows = torch.tensor(list(false))
    wrong = (image[rows] * scorer.text(list(false.values()))).sum(1)
    right = ((image[rows] * text[rows]).sum(1) > wrong).double()
    names = [_changed_word(captions[row], caption) for row, caption in false.items()]
    by_word = {
        name: mean_score([r for r, own in zip(right.tolist(), names, strict=True) if own == name])
        for name in dict.fromkeys(sorted(names))
    }
    return {"all": mean_score(right), **by_word}


def _changed_word(caption: str, other: str) -> str:
    """The first word in which two captions differ."""
    pairs = zip(caption.split(), other.split(), strict=True)
    return next(one for one, two in pairs if one != two)


def near_misses(scorer: Scorer, prompts: list[Prompt], size: int, seed: int) -> dict[str, Any]:
    """For each attribute, the share of prompts that fit their scene better than its near miss."""
    level, rng = LEVELS[prompts[0].level], np.random.default_rng((seed, size))
    rows, specs, missed = [], [], []
    for prompt in prompts:
        spec = scene_spec(prompt, rng)
        for attribute in attributes(prompt):
            rows.append((prompt.prompt, attribute))
            specs.append(spec)
            missed.append(near_miss(prompt, spec, attribute, rng))
    text = scorer.text([prompt for prompt, _ in rows])
    right, wrong = (
        (scorer.image(torch.from_numpy(draw_scenes(level, some, seed, size))) * text).sum(1)
        for some in (specs, missed)
    )
    better = (right > wrong).double().tolist()
    names = [attribute for _, attribute in rows]
    return {
        name: mean_score([b for b, own in zip(better, names, strict=True) if own == name])
        for name in dict.fromkeys(names)
    }


def best_possible(examples: Sequence[Example], pools: Tensor) -> Tensor:
    """Chance (N,) of finding each picture's own caption by truth alone: 1 over the number of
    captions in its pool that are true of it, its own among them.

    A plain caption is true of a scene with exactly its objects, if it names no relation or theirs.
    """
    scenes = [_scene(example) for example in examples]
    chances = []
    for (objects, relation), pool in zip(scenes, pools.tolist(), strict=True):
        count = sum(scenes[i][0] == objects and scenes[i][1] in (None, relation) for i in pool)
        chances.append(1 / (1 + count))
    return torch.tensor(chances, dtype=torch.float64)


def _scene(example: Example) -> tuple[tuple[str, ...], str | None]:
    """Objects of a scene and the relation of the first in alphabetical order to the other."""
    objects = [f"{one['colour']} {one['shape']}" for one in example.meta["objects"]]
    relation = example.meta["relation"]
    if relation is not None and objects != sorted(objects):
        relation = OPPOSITE[relation]
    return tuple(sorted(objects)), relation
