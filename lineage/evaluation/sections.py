"""The sections of an evaluation: from features and verdicts to scores.

Each function returns one section of the JSON: its scores, each with a bootstrap interval and the
number of pictures it rests on. What cannot be measured has a `reason` instead. The functions are
pure: networks have run before.

Axes: N real, M generated pictures, D features, G captions, K samples of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineage.evaluation import metrics
from lineage.evaluation.intervals import fid_score, kid_score, mean_score, task_mean_score
from lineage.evaluation.judge import PARTS
from lineage.evaluation.prompts import SPLITS, TASKS, Prompt
from lineage.threads import use_free_threads

PRECISION_NEIGHBOURS = 3  # as Kynkaanniemi et al. 2019
DENSITY_NEIGHBOURS = 5  # as Naeem et al. 2020
WRONG_CAPTIONS = 99  # beside the true one, as Xu et al. 2018
ENOUGH = 10  # pictures for each feature; below, FID depends more on their number than on them


def composition(prompts: Sequence[Prompt], verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """GenEval's six tasks: the share of pictures that show what their prompt describes.

    Returns:
        For each split (`test`, `heldout`) that has prompts: `tasks`, the strict share of each;
        `overall`, the mean of the tasks; `parts`, the share of pictures in which that part was
        right, among the prompts that mention it; and `verdicts` of each task, a digit a prompt.
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
            "tasks": {task: mean_score(values) for task, values in strict.items()},
            "overall": task_mean_score(list(strict.values())),
            "parts": {part: mean_score(values) for part, values in parts.items() if values},
            "verdicts": {task: "".join(map(str, map(int, own))) for task, own in strict.items()},
        }
    return result


@use_free_threads()
def stages(
    values: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    verdicts: Sequence[dict[str, bool]],
) -> dict[str, Any]:
    """Scores of each of a system's stages alone.

    Args:
        values: (N,) numbers by name, of unseen real pictures.
        verdicts: Verdicts on the prompts' real pictures after encoding and decoding; empty if no
            judge can read them.
    """
    result: dict[str, Any] = {name: mean_score(numbers) for name, numbers in values.items()}
    if verdicts:
        result["reconstruction"] = composition(prompts, verdicts)
    return result


@use_free_threads()
def quality(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """FID, KID, precision, recall, density and coverage of features (N, D) and (M, D)."""
    count, width = min(len(real), len(fake)), real.shape[1]
    if count <= max(width, DENSITY_NEIGHBOURS):
        few = f"{count} pictures are too few for {width} features"
        return {"reason": f"{few}: the covariance of FID is singular."}
    precision, recall = metrics.precision_recall(real, fake, PRECISION_NEIGHBOURS)
    density, coverage = metrics.density_coverage(real, fake, DENSITY_NEIGHBOURS)
    result: dict[str, Any] = {
        "fid": fid_score(real, fake),
        "kid": kid_score(real, fake),
        "precision": mean_score(precision),
        "recall": mean_score(recall),
        "density": mean_score(density),
        "coverage": mean_score(coverage),
    }
    if count < ENOUGH * width:
        result["warning"] = (
            f"{count} pictures for {width} features: FID is biased upwards; compare it only with "
            "FIDs of as many pictures, or read KID, which is unbiased."
        )
    return result


@use_free_threads()
def diversity(samples: Tensor, real: Tensor | None) -> dict[str, Any]:
    """The spread of several samples of one caption.

    Args:
        samples: (G, K, D) features of K samples of each caption.
        real: (G, K, D) features of K real pictures of each caption, if the data has them.
    """
    spreads = metrics.spread(samples)
    result = {"spread": mean_score(spreads)}
    if real is None:
        result["spread_of_real"] = {
            "value": None,
            "reason": "the data has no caption that several pictures share",
        }
        return result
    real_spreads = metrics.spread(real)
    result["spread_of_real"] = mean_score(real_spreads)
    result["spread_against_real"] = mean_score(spreads / real_spreads.mean().clamp(min=1e-12))
    return result


@use_free_threads()
def memorisation(train: Tensor, unseen: Tensor, fake: Tensor) -> dict[str, Any]:
    """Distances of generated and of unseen real pictures to the nearest training picture.

    Features (T, D), (N, D) and (M, D).
    """
    distances = metrics.nearest_distance(fake, train)
    real_distances = metrics.nearest_distance(unseen, train)
    return {
        "nearer_than_unseen_real": mean_score(metrics.data_copying(distances, real_distances)),
        "distance": mean_score(distances),
        "distance_of_unseen_real": mean_score(real_distances),
    }


def wrong_captions(captions: Sequence[str], seed: int = 0) -> Tensor:
    """The pool of R-precision: (M, K) numbers of captions whose words differ from caption i's.

    K is 99, or the number of other captions if that is smaller.

    Raises:
        ValueError: all captions are the same.
    """
    names = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    if len(names) < 2:
        raise ValueError("all captions are the same")
    number = torch.tensor([names[caption] for caption in captions])
    first = torch.tensor([captions.index(caption) for caption in names])  # where each occurs first
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for own in number.split(1024):
        keys = torch.rand(len(own), len(names), generator=generator)
        keys[torch.arange(len(own)), own] = torch.inf  # the true caption comes last
        pools.append(first[keys.argsort(1)[:, : min(WRONG_CAPTIONS, len(names) - 1)]])
    return torch.cat(pools)


@use_free_threads()
def text_fit(
    image: Tensor, text: Tensor, captions: Sequence[str], kind: str, seed: int = 0
) -> dict[str, Any]:
    """R-precision and, if `kind` is `clip`, CLIP score.

    Embeddings (M, D) of pictures and of their captions.
    """
    try:
        wrong = wrong_captions(captions, seed)
    except ValueError as error:
        return {"reason": str(error)}
    candidates = torch.cat([text[:, None], text[wrong]], 1)  # (M, 1 + K, D)
    result: dict[str, Any] = {"r_precision": mean_score(metrics.r_precision(image, candidates))}
    if kind == "clip":
        result["clip_score"] = mean_score(metrics.clip_score(image, text))
    return {**result, "pool": candidates.shape[1]}
