"""Real pictures of a data set, and the two rows of scores that they give to every table.

Real pictures with their own captions are the ceiling, real pictures with captions of others the
floor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, fingerprint_of, to_bytes
from lineage.data.shapes import LEVELS, Shapes
from lineage.data.shapes_languages import ENGLISH
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.exam import exam
from lineage.evaluation.features import FeatureNetwork, cached_json, cached_tensors
from lineage.evaluation.judge import Detections, Judge, verdict
from lineage.evaluation.prompts import Prompt, make_prompts, read_prompts, to_lines
from lineage.evaluation.scenes import draw_scenes, scene_spec
from lineage.evaluation.scorer import Scorer
from lineage.training.store import fingerprint

TRAINING_PICTURES = 5000  # most pictures among which the nearest is searched
SPREAD_CAPTIONS, SPREAD_SAMPLES = 16, 4
EXAM_REPEATS = 3
CHUNK = 500  # real pictures loaded at once

Rows = tuple[dict[str, Any], dict[str, Any]]
"""Sections of real pictures: with their own captions, and with captions of others."""


@dataclass
class PromptSet:
    """The prompts of a level, real pictures of them, and the judge.

    Attributes:
        prompts: Prompts; one picture of each is drawn.
        source: Where they come from, for the protocol.
        size: Side of the pictures in pixels.
        seed: Seed of the real pictures.
    """

    judge: Judge
    prompts: list[Prompt]
    source: str
    size: int
    seed: int

    @property
    def fingerprint(self) -> str:
        return fingerprint(to_lines(self.prompts).encode())

    @cached_property
    def pictures(self) -> Tensor:
        """Real pictures of the prompts, (P, 3, S, S) uint8."""
        return self._draw(np.random.default_rng(self.seed))

    def _draw(self, rng: np.random.Generator) -> Tensor:
        specs = [scene_spec(prompt, rng) for prompt in self.prompts]
        level = LEVELS[self.prompts[0].level]
        return torch.from_numpy(draw_scenes(level, specs, self.seed, self.size))

    def verdicts(self, detections: Sequence[Detections]) -> list[dict[str, bool]]:
        """Verdicts on one picture of each prompt."""
        return [verdict(d, p) for d, p in zip(detections, self.prompts, strict=True)]

    def rows(self) -> Rows:
        """The section `composition` of real pictures of each prompt, and of real pictures with
        another prompt of the same task.
        """
        rng = np.random.default_rng(self.seed)
        detections = self.judge.detect(self._draw(rng))
        shuffled = []
        for one, prompt in zip(detections, self.prompts, strict=True):
            rest = [p for p in self.prompts if p.include != prompt.include]
            task = [p for p in rest if (p.tag, p.split) == (prompt.tag, prompt.split)] or rest
            shuffled.append(verdict(one, task[rng.integers(len(task))] if task else prompt))
        real = sections.composition(self.prompts, self.verdicts(detections))
        return real, sections.composition(self.prompts, shuffled)

    def judge_exam(self) -> dict[str, Any]:
        """Result of the judge's `exam` on pictures of this size."""
        inputs = {
            "exam": self.judge.fingerprint(),
            "prompts": self.fingerprint,
            "size": self.size,
            "repeats": EXAM_REPEATS,
        }
        return dict(
            cached_json(inputs, lambda: exam(self.judge, self.prompts, self.size, EXAM_REPEATS))
        )

    def protocol(self) -> dict[str, Any]:
        return {
            "prompts": self.source,
            "prompts_fingerprint": self.fingerprint,
            "level": self.prompts[0].level,
            "pictures_of_each_prompt": 1,
            "size": self.size,
            "judge": self.judge.fingerprint(),
            "strict": "exactly the prompt's objects with their attributes, and nothing else",
            "real": "real pictures of the prompts",
            "shuffled": "real pictures, each with another prompt of its task",
        }


def prompt_set(
    data: CaptionedDataset, prompts: str | Path | None, judge: Judge, seed: int
) -> PromptSet | None:
    """The prompts for a data set; None if it is not `shapes`, the only data that the judge reads.

    Args:
        prompts: File of prompts; None for the package's own, in the languages of the data.

    Raises:
        UserError: the file cannot be read, or holds no prompts of the data's level.
    """
    if not isinstance(data, Shapes):
        if prompts:
            raise UserError(f"--prompts needs the judge of shapes, and {data.name} is other data.")
        return None
    level = data.level_name
    if prompts is None:
        made, source = make_prompts(level, data.languages), "lineage.evaluation.prompts"
        source += "" if data.languages == ENGLISH else f" {','.join(data.languages)}"
        return PromptSet(judge, made, source, data.size, seed)
    fitting = [prompt for prompt in read_prompts(Path(prompts), level) if prompt.level == level]
    if not fitting:
        raise UserError(f"{prompts} holds no prompts of level {level}, the level of {data.name}.")
    return PromptSet(judge, fitting, Path(prompts).name, data.size, seed)


class RealPictures:
    """Unseen real pictures, training pictures, and their features.

    Args:
        data: Split that training does not use.
        train: Training split.
        max_pictures: Largest number of pictures taken from `data`.
        network: Network of the features.
        scorer: Model of the text fit, if any.
        seed: Seed of the shuffled captions.

    Attributes:
        images: (N, 3, S, S) uint8.
        captions: N captions, the first of each picture.
    """

    def __init__(
        self,
        data: CaptionedDataset,
        train: CaptionedDataset,
        max_pictures: int,
        network: FeatureNetwork,
        scorer: Scorer | None,
        seed: int,
    ) -> None:
        self.data, self.train = data, train
        self.network, self.scorer, self.seed = network, scorer, seed
        examples = unseen_examples(data, max_pictures)
        self.images = torch.stack([example.image for example in examples])
        self.captions = [example.captions[0] for example in examples]
        self.train_indices = evenly_spaced(len(train), TRAINING_PICTURES)

    def beside(self, train: CaptionedDataset) -> RealPictures:
        """The same unseen pictures beside another training split of as many pictures, that of a
        run with another seed.
        """
        other = copy.copy(self)
        other.train = train
        other.__dict__.pop("train_features", None)  # cached of the first one
        return other

    @cached_property
    def features(self) -> Tensor:
        """(N, D)."""
        return self._cached(self.data, lambda: self.images, len(self.images))

    @cached_property
    def train_features(self) -> Tensor:
        """(T, D) of training pictures."""

        def load() -> Tensor:
            starts = range(0, len(self.train_indices), CHUNK)
            parts = [self.train_indices[i : i + CHUNK] for i in starts]
            return torch.cat(
                [to_bytes(self.train.batch(part, [0] * len(part), 0).image) for part in parts]
            )

        return self._cached(self.train, load, len(self.train_indices))

    def _cached(self, data: CaptionedDataset, load: Callable[[], Tensor], count: int) -> Tensor:
        """Features of the `count` pictures that `load` returns, computed once."""
        inputs = {
            "features": self.network.name,
            "data": data.name,
            "fingerprint": fingerprint_of(data),
            "split": data.split,
            "seed": getattr(data, "seed", None),
            "size": data.size,
            "pictures": count,
        }
        return cached_tensors(inputs, lambda: {"features": self.network.extract(load())})[
            "features"
        ]

    def nearest(self, features: Tensor) -> tuple[Tensor, list[int]]:
        """(M, D) -> (M,) distance to the nearest training picture, and its index in the split."""
        distance, row = torch.cdist(features, self.train_features).min(1)
        return distance, [self.train_indices[i] for i in row.tolist()]

    def shared_captions(self) -> tuple[list[str], Tensor | None]:
        """Captions for the spread among samples, and features (G, K, D) of real pictures of each.

        These are the captions of `spread_captions`.
        """
        captions, rows = spread_captions(self.captions)
        return captions, None if rows is None else self.features[torch.tensor(rows)]

    def rows(self) -> Rows:
        """The sections `quality` (of training pictures) and `text_fit`."""
        sample = self.train_features[evenly_spaced(len(self.train_features), len(self.images))]
        real: dict[str, Any] = {"quality": sections.quality(self.features, sample)}
        shuffled: dict[str, Any] = {}
        if self.scorer:
            image, text = self.scorer.image(self.images), self.scorer.text(self.captions)
            order = mismatched(self.captions, self.seed)
            captions = [self.captions[i] for i in order]
            real["text_fit"] = self.text_fit(image, text, self.captions)
            shuffled["text_fit"] = self.text_fit(image, text[order], captions)
        return real, shuffled

    def text_fit(self, image: Tensor, text: Tensor, captions: Sequence[str]) -> dict[str, Any]:
        assert self.scorer is not None
        return sections.text_fit(image, text, captions, self.scorer.kind, self.seed)


def spread_captions(captions: Sequence[str]) -> tuple[list[str], list[list[int]] | None]:
    """Captions for the spread among samples, and the rows (G, K) of real pictures of each.

    These are captions that K real pictures share; if there are fewer than two of them, any
    captions, and None.

    Args:
        captions: N captions of real pictures.
    """
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    shared = [c for c in rows if len(rows[c]) >= SPREAD_SAMPLES][:SPREAD_CAPTIONS]
    if len(shared) < 2:
        return list(rows)[:SPREAD_CAPTIONS], None
    return shared, [rows[caption][:SPREAD_SAMPLES] for caption in shared]


def unseen_split(spec: str, size: int, seed: int) -> CaptionedDataset:
    """The split to compare with: validation, else test, else train, as far as there is one."""
    for split in ("validation", "test"):
        try:
            return load_dataset(spec, split, size, seed)
        except UserError:
            continue
    return load_dataset(spec, "train", size, seed)


def unseen_examples(data: CaptionedDataset, at_most: int) -> list[Example]:
    """The real pictures of an evaluation, in their order."""
    return [data[i] for i in evenly_spaced(len(data), at_most)]


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """At most `at_most` of the numbers below `count`, evenly spaced."""
    chosen = min(count, at_most)
    return [i * count // chosen for i in range(chosen)]


def mismatched(captions: Sequence[str], seed: int) -> list[int]:
    """For each caption the index of one with other words, or its own if there is none."""
    order = np.random.default_rng(seed).permutation(len(captions)).tolist()
    position = {index: at for at, index in enumerate(order)}
    result = []
    for index, caption in enumerate(captions):
        rotated = order[position[index] + 1 :] + order[: position[index]]
        result.append(next((other for other in rotated if captions[other] != caption), index))
    return result
