"""The exam: how well the judge judges, on real pictures of every prompt and on near misses.

For each prompt of a level there is one real picture of its scene, which the judge should accept,
and for each attribute that the prompt names one near miss, which it should reject.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from lineage.data.shapes import LEVELS
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import Prompt
from lineage.evaluation.scenes import attributes, draw_scenes, near_miss, scene_spec

CHUNK = 1024  # pictures in memory at once


def exam(
    judge: Judge, prompts: list[Prompt], size: int, repeats: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Examine the judge on `prompts`, all of one level, at pictures of `size` pixels.

    Args:
        repeats: Number of pictures of each prompt, and of each of its near misses.

    Returns:
        `accepted`: for each task, the share of real pictures that are accepted; `near_misses`: the
        share of near misses that are; `near_misses_by_attribute`; and the number of pictures of
        both kinds.
    """
    level = LEVELS[prompts[0].level]
    rng = np.random.default_rng((seed, size))
    repeated = [prompt for _ in range(repeats) for prompt in prompts]
    rows = [(n, prompt, "", scene_spec(prompt, rng)) for n, prompt in enumerate(repeated)]
    for n, prompt, _, spec in list(rows):
        for attribute in attributes(prompt):
            rows.append((n, prompt, attribute, near_miss(prompt, spec, attribute, rng)))
    accepted, near, by_attribute = defaultdict(list), defaultdict(list), defaultdict(list)
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        pictures = draw_scenes(
            level, [spec for *_, spec in part], seed, size, [n for n, *_ in part]
        )
        detections = judge.detect(torch.from_numpy(pictures))
        for (_, prompt, attribute, _), one in zip(part, detections, strict=True):
            strict = verdict(one, prompt)["strict"]
            if attribute:
                near[prompt.tag].append(strict)
                by_attribute[attribute].append(strict)
            else:
                accepted[prompt.tag].append(strict)
    return {
        "accepted": _shares(accepted),
        "near_misses": _shares(near),
        "near_misses_by_attribute": _shares(by_attribute),
        "pictures": sum(map(len, accepted.values())),
        "near_miss_pictures": sum(map(len, near.values())),
    }


def _shares(verdicts: dict[str, list[bool]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in verdicts.items()}
