"""The exam: how well the judge judges, on real pictures of every prompt and on near misses.

For each prompt of a level, one real picture that shows what it asks for, which the judge should
accept, and one near miss for each attribute that the prompt names, which it should not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from lineage.data.shapes import LEVELS
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import Prompt
from lineage.evaluation.scenes import attributes, draw, missed, plan


def exam(
    judge: Judge, prompts: list[Prompt], size: int, repeats: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Sit the judge's exam on `prompts`, all of one level, at pictures of `size` pixels.

    Args:
        repeats: pictures of each prompt, and of each of its near misses.

    Returns:
        `accepted`: of each task, the share of real pictures judged right; `near_misses`: of each
        task, the share accepted though one attribute is wrong; `near_misses_by_attribute`; and how
        many of each there were.
    """
    level = LEVELS[prompts[0].level]
    chance = np.random.default_rng((seed, size))
    every = [prompt for _ in range(repeats) for prompt in prompts]
    rows = [(number, prompt, "", plan(prompt, chance)) for number, prompt in enumerate(every)]
    for number, prompt, _, right in list(rows):
        for wrong in attributes(prompt):
            rows.append((number, prompt, wrong, missed(prompt, right, wrong, chance)))
    accepted, near, by_attribute = defaultdict(list), defaultdict(list), defaultdict(list)
    for first in range(0, len(rows), 1024):
        part = rows[first : first + 1024]
        pictures = draw(level, [p for *_, p in part], seed, size, [number for number, *_ in part])
        images = torch.from_numpy(pictures)
        for (_, prompt, wrong, _), reading in zip(part, judge.read(images), strict=True):
            strict = verdict(reading, prompt)["strict"]
            if wrong:
                near[prompt.tag].append(strict)
                by_attribute[wrong].append(strict)
            else:
                accepted[prompt.tag].append(strict)
    share = lambda table: {name: float(np.mean(values)) for name, values in table.items()}  # noqa: E731
    return {
        "accepted": share(accepted),
        "near_misses": share(near),
        "near_misses_by_attribute": share(by_attribute),
        "pictures": sum(map(len, accepted.values())),
        "near_miss_pictures": sum(map(len, near.values())),
    }
