"""The sections of an evaluation: from pictures, features and readings to numbers.

Each function gives one section of the JSON: its numbers, each with a bootstrap interval and how
many pictures it rests on, and its `protocol`, which says how they came about. What cannot be
measured is told as `reason` instead. Pure functions of what networks said.

Axes: N real, M generated pictures, D features, G captions, K samples of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineage.evaluation import metrics
from lineage.evaluation.intervals import (
    of_frechet_distance,
    of_kernel_distance,
    of_mean,
    of_tasks,
)
from lineage.evaluation.judge import PARTS
from lineage.evaluation.prompts import SPLITS, TASKS, Prompt

PRECISION_NEIGHBOURS = 3  # as Kynkaanniemi et al. 2019
DENSITY_NEIGHBOURS = 5  # as Naeem et al. 2020
WRONG_CAPTIONS = 99  # beside the true one, as Xu et al. 2018
ENOUGH = 10  # pictures for each feature, below which FID says more of their number than of them


def composition(prompts: Sequence[Prompt], verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """GenEval's six tasks: the share of pictures that show what was asked for.

    Returns:
        for each split (`test`, `heldout`) that has prompts: `tasks`, the strict share of each;
        `overall`, the mean of the tasks; and `parts`, the share of pictures in which that part was
        right, among the prompts that ask for it.
    """
    result: dict[str, Any] = {}
    for split in SPLITS:
        rows = [(p, v) for p, v in zip(prompts, verdicts, strict=True) if p.split == split]
        if not rows:
            continue
        strict = {
            task: values
            for task in dict.fromkeys([*TASKS, *(p.tag for p, _ in rows)])
            if (values := [v["strict"] for p, v in rows if p.tag == task])
        }
        parts = {part: [v[part] for _, v in rows if part in v] for part in PARTS}
        result[split] = {
            "tasks": {task: of_mean(values) for task, values in strict.items()},
            "overall": of_tasks(list(strict.values())),
            "parts": {part: of_mean(values) for part, values in parts.items() if values},
        }
    return result


def stages(
    values: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    verdicts: Sequence[dict[str, bool]],
) -> dict[str, Any]:
    """What each of a system's stages does, apart from the others.

    Args:
        values: (N,) numbers by name, of unseen real pictures.
        verdicts: of the prompts' real pictures as the codec gives them back; empty if there is no
            judge for them.
    """
    result: dict[str, Any] = {name: of_mean(of) for name, of in values.items()}
    if verdicts:
        result["reconstruction"] = composition(prompts, verdicts)
    return result


def quality(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """FID, KID, precision, recall, density and coverage of features (N, D) and (M, D)."""
    fewest, width = min(len(real), len(fake)), real.shape[1]
    if fewest <= max(width, DENSITY_NEIGHBOURS):
        few = f"{fewest} pictures are too few for {width} features"
        return {"reason": f"{few}: the covariance of FID is singular."}
    precise, recalled = metrics.inside_balls(real, fake, PRECISION_NEIGHBOURS)
    dense, covered = metrics.ball_counts(real, fake, DENSITY_NEIGHBOURS)
    result: dict[str, Any] = {
        "fid": of_frechet_distance(real, fake),
        "kid": of_kernel_distance(real, fake),
        "precision": of_mean(precise),
        "recall": of_mean(recalled),
        "density": of_mean(dense),
        "coverage": of_mean(covered),
    }
    if fewest < ENOUGH * width:
        result["warning"] = (
            f"{fewest} pictures for {width} features: FID is biased upwards; compare it only with "
            "FIDs of as many pictures, or read KID, which is not."
        )
    return result


def diversity(samples: Tensor, real: Tensor | None) -> dict[str, Any]:
    """The spread of several samples of one caption.

    Args:
        samples: (G, K, D) features of K samples of each caption.
        real: (G, K, D) of K real pictures with that caption, if the data has them.
    """
    spreads = metrics.spread(samples)
    result = {"spread": of_mean(spreads)}
    if real is None:
        result["spread_of_real"] = {
            "value": None,
            "reason": "the data has no caption that several pictures share",
        }
        return result
    of_real = metrics.spread(real)
    result["spread_of_real"] = of_mean(of_real)
    result["spread_against_real"] = of_mean(spreads / of_real.mean().clamp(min=1e-12))
    return result


def memorisation(train: Tensor, unseen: Tensor, fake: Tensor) -> dict[str, Any]:
    """How near generated pictures lie to training pictures, against unseen real ones (N, D)."""
    distances = metrics.nearest_distance(fake, train)
    of_real = metrics.nearest_distance(unseen, train)
    return {
        "nearer_than_unseen_real": of_mean(metrics.nearer(distances, of_real)),
        "distance": of_mean(distances),
        "distance_of_unseen_real": of_mean(of_real),
    }


def wrong_captions(captions: Sequence[str], seed: int = 0) -> Tensor:
    """The pool of R-precision: (M, K) numbers of captions whose words differ from caption i's.

    K is 99, or as many as the caption with the fewest others has.

    Raises:
        ValueError: all captions are the same.
    """
    names = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    if len(names) < 2:
        raise ValueError("all captions are the same")
    number = torch.tensor([names[caption] for caption in captions])
    first = torch.tensor([captions.index(caption) for caption in names])  # where each stands first
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for own in number.split(1024):
        keys = torch.rand(len(own), len(names), generator=generator)
        keys[torch.arange(len(own)), own] = torch.inf  # a caption is not its own rival
        pools.append(first[keys.argsort(1)[:, : min(WRONG_CAPTIONS, len(names) - 1)]])
    return torch.cat(pools)


def text_fit(
    image: Tensor, text: Tensor, captions: Sequence[str], kind: str, seed: int = 0
) -> dict[str, Any]:
    """R-precision and CLIP score of embeddings (M, D) of pictures and of their captions."""
    try:
        wrong = wrong_captions(captions, seed)
    except ValueError as error:
        return {"reason": str(error)}
    candidates = torch.cat([text[:, None], text[wrong]], 1)  # (M, 1 + K, D)
    found = metrics.found_first(image, candidates)
    result: dict[str, Any] = {"r_precision": of_mean(found)}
    if kind == "clip":
        result["clip_score"] = of_mean(metrics.clip_scores(image, text))
    return {**result, "pool": candidates.shape[1]}
