"""From generated pictures to scores, whoever drew them: a run, or another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lineage.evaluation import sections
from lineage.evaluation.judge import Detections
from lineage.evaluation.real import SPREAD_SAMPLES, PromptSet, RealPictures
from lineage.sheets import save_picture, sheet

MAX_FAILURES = 24  # pictures on the sheet of failures
MAX_NEAREST = 12  # pairs on the sheet of pictures nearest to training pictures


class Failure(NamedTuple):
    """A picture (3, S, S) uint8 that does not show its prompt, and what the judge detects."""

    tag: str
    prompt: str
    detected: str
    picture: Tensor


@dataclass
class ScoredRun:
    """One evaluated run.

    Attributes:
        scores: Its part of the JSON.
        failures: Pictures that do not show their prompts.
        nearest: (generated picture, nearest training picture), the nearest pair first.
    """

    scores: dict[str, Any]
    failures: list[Failure]
    nearest: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GeneratedPictures:
    """The pictures that are scored, uint8 on the CPU; a kind that is None is not scored.

    Attributes:
        prompts: (P, 3, S, S) one of each prompt.
        captions: (N, 3, S, S) one of the caption of each real picture.
        samples: (G * K, 3, S, S) K samples of each of G captions.
    """

    prompts: Tensor | None
    captions: Tensor | None
    samples: Tensor | None


def score_pictures(
    run: str,
    system: str,
    pictures: GeneratedPictures,
    real: RealPictures | None,
    prompts: PromptSet | None,
) -> ScoredRun:
    """All sections that pictures alone decide.

    Args:
        run: Name of the run or the folder.
        system: Name of what drew the pictures.
        pictures: The pictures.
        real: Real pictures; None if only the prompts are scored.
        prompts: Prompts and their judge; None if no judge can read the data.
    """
    scores: dict[str, Any] = {"run": run, "system": system}
    failures: list[Failure] = []
    nearest: list[tuple[Tensor, Tensor]] = []
    if prompts and pictures.prompts is not None:
        detections = prompts.judge.detect(pictures.prompts)
        verdicts = prompts.verdicts(detections)
        scores["composition"] = sections.composition(prompts.prompts, verdicts)
        failures = _failures(prompts, detections, verdicts, pictures.prompts)
        scores["failed"] = [
            {"tag": f.tag, "prompt": f.prompt, "detected": f.detected} for f in failures
        ]
    if real and pictures.captions is not None:
        features = real.network.extract(pictures.captions)
        scores["quality"] = sections.quality(real.features, features)
        scores["memorisation"] = sections.memorisation(real.train_features, real.features, features)
        nearest = _nearest(real, pictures.captions, features)
        if real.scorer:
            image, text = real.scorer.image(pictures.captions), real.scorer.text(real.captions)
            scores["text_fit"] = real.text_fit(image, text, real.captions)
    if real and pictures.samples is not None:
        _, real_groups = real.shared_captions()
        spread = real.network.extract(pictures.samples)
        spread = spread.unflatten(0, (-1, SPREAD_SAMPLES))  # (G, K, D)
        scores["diversity"] = sections.diversity(spread, real_groups)
    return ScoredRun(scores, failures, nearest)


def _failures(
    prompts: PromptSet,
    detections: Sequence[Detections],
    verdicts: Sequence[dict[str, bool]],
    pictures: Tensor,
) -> list[Failure]:
    """Pictures that failed, from each task in turn."""
    queues: dict[tuple[str, str], list[Failure]] = {}
    for prompt, one, result, picture in zip(
        prompts.prompts, detections, verdicts, pictures, strict=True
    ):
        if not result["strict"]:
            failure = Failure(prompt.tag, prompt.prompt, str(one), picture)
            queues.setdefault((prompt.split, prompt.tag), []).append(failure)
    return [one for turn in zip_longest(*queues.values()) for one in turn if one is not None]


def _nearest(real: RealPictures, pictures: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The generated pictures nearest to training pictures, with these."""
    distance, indices = real.nearest(features)
    order = distance.argsort(stable=True)[:MAX_NEAREST].tolist()
    return [(pictures[i], real.train[indices[i]].image) for i in order]


def write_sheets(run: ScoredRun, folder: Path, name: str) -> None:
    """Write the sheets of failed pictures and of those nearest to training pictures."""
    if failures := run.failures[:MAX_FAILURES]:
        labels = [f"{one.prompt}: {one.detected}" for one in failures]
        save_picture(
            sheet([one.picture for one in failures], labels), folder / f"{name}_failed.png"
        )
    if run.nearest:
        pairs = [picture for pair in run.nearest for picture in pair]
        labels = ["generated", "nearest in training"] * len(run.nearest)
        save_picture(sheet(pairs, labels), folder / f"{name}_nearest.png")
