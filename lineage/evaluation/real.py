"""The frame of an evaluation: real pictures of a data set, and all that is known of them.

Every table stands between two rows made here: real pictures with their own captions, the ceiling,
and real pictures with the captions of others, the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, to_bytes
from lineage.data.shapes import LEVELS, Shapes
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.exam import exam
from lineage.evaluation.features import Features, kept_json, kept_tensors
from lineage.evaluation.judge import Judge, Reading, verdict
from lineage.evaluation.prompts import Prompt, make_prompts, read_prompts, to_lines
from lineage.evaluation.scenes import draw, plan
from lineage.evaluation.scorer import Scorer
from lineage.runs import fingerprint_of
from lineage.training.store import fingerprint

TRAINING_PICTURES = 5000  # among which the nearest is looked for, at most
SPREAD_CAPTIONS, SPREAD_SAMPLES = 16, 4
EXAM_REPEATS = 3
_PART = 500  # real pictures loaded at once


@dataclass
class Composition:
    """The prompts of a level and the judge who reads pictures of them.

    Attributes:
        prompts: every one is drawn once.
        source: where they come from.
        size: of the pictures, in pixels.
        seed: of the real pictures.
    """

    judge: Judge
    prompts: list[Prompt]
    source: str
    size: int
    seed: int

    @cached_property
    def pictures(self) -> Tensor:
        """Real pictures of the prompts, (P, 3, S, S) uint8."""
        return self._drawn(np.random.default_rng(self.seed))

    def _drawn(self, chance: np.random.Generator) -> Tensor:
        plans = [plan(prompt, chance) for prompt in self.prompts]
        level = LEVELS[self.prompts[0].level]
        return torch.from_numpy(draw(level, plans, self.seed, self.size))

    @cached_property
    def _verdicts(self) -> tuple[list[dict[str, bool]], list[dict[str, bool]]]:
        """Of real pictures with their own prompts, and with another of the same task."""
        chance = np.random.default_rng(self.seed)
        readings = self.judge.read(self._drawn(chance))
        own = self.verdicts(readings)
        others = []
        for reading, prompt in zip(readings, self.prompts, strict=True):
            rest = [p for p in self.prompts if p.include != prompt.include]
            same = [p for p in rest if (p.tag, p.split) == (prompt.tag, prompt.split)] or rest
            others.append(verdict(reading, same[chance.integers(len(same))] if same else prompt))
        return own, others

    def verdicts(self, readings: Sequence[Reading]) -> list[dict[str, bool]]:
        """What the judge saw in a picture of each prompt, held against it."""
        return [verdict(r, p) for r, p in zip(readings, self.prompts, strict=True)]

    def real(self) -> dict[str, Any]:
        """The ceiling."""
        return sections.composition(self.prompts, self._verdicts[0])

    def shuffled(self) -> dict[str, Any]:
        """The floor."""
        return sections.composition(self.prompts, self._verdicts[1])

    def judge_exam(self) -> dict[str, Any]:
        """How well the judge judges pictures of this size; see `exam`."""
        what = {
            "exam": self.judge.fingerprint(),
            "prompts": fingerprint(to_lines(self.prompts).encode()),
            "size": self.size,
            "repeats": EXAM_REPEATS,
        }
        return dict(
            kept_json(what, lambda: exam(self.judge, self.prompts, self.size, EXAM_REPEATS))
        )

    def protocol(self) -> dict[str, Any]:
        return {
            "prompts": self.source,
            "prompts_fingerprint": fingerprint(to_lines(self.prompts).encode()),
            "level": self.prompts[0].level,
            "pictures_of_each_prompt": 1,
            "size": self.size,
            "judge": self.judge.fingerprint(),
            "strict": "exactly the things asked for, as asked, and nothing else",
            "real": "real pictures of the prompts",
            "shuffled": "real pictures, each with another prompt of its task",
        }


def composition_of(
    data: CaptionedDataset, prompts: str | None, judge: Judge, seed: int
) -> Composition | None:
    """The prompts that fit a data set; None where it is not `shapes`, which alone the judge reads.

    Raises:
        UserError: the file of prompts cannot be read, or holds those of several levels.
    """
    if not isinstance(data, Shapes):
        if prompts:
            raise UserError(f"--prompts needs the judge of shapes, and {data.name} is other data.")
        return None
    level = data.name.partition(":")[2]
    if prompts is None:
        return Composition(
            judge, make_prompts(level), "lineage.evaluation.prompts", data.size, seed
        )
    fitting = [prompt for prompt in read_prompts(Path(prompts), level) if prompt.level == level]
    if not fitting:
        raise UserError(f"{prompts} holds no prompts of level {level}, which {data.name} is of.")
    return Composition(judge, fitting, Path(prompts).name, data.size, seed)


class RealPictures:
    """Real pictures that training does not see, and their features.

    Attributes:
        data: the split they come from.
        images: (N, 3, S, S) uint8.
        captions: N, the first of each.
    """

    def __init__(
        self,
        data: CaptionedDataset,
        train: CaptionedDataset,
        most: int,
        features: Features,
        scorer: Scorer | None,
        seed: int,
    ) -> None:
        self.data, self.train = data, train
        self.network, self.scorer, self.seed = features, scorer, seed
        examples = [self.data[i] for i in spaced(len(self.data), most)]
        self.images = torch.stack([example.image for example in examples])
        self.captions = [example.captions[0] for example in examples]

    @cached_property
    def features(self) -> Tensor:
        """(N, D)."""
        return self._kept(self.data, lambda: self.images, len(self.images))

    @cached_property
    def train_features(self) -> Tensor:
        """(T, D) of training pictures."""
        numbers = spaced(len(self.train), TRAINING_PICTURES)

        def load() -> Tensor:
            return torch.cat(
                [
                    to_bytes(self.train.batch(part, [0] * len(part), 0).image)
                    for part in (numbers[i : i + _PART] for i in range(0, len(numbers), _PART))
                ]
            )

        return self._kept(self.train, load, len(numbers))

    def _kept(self, data: CaptionedDataset, images: Callable[[], Tensor], count: int) -> Tensor:
        """The features of `count` pictures of `data`, computed once."""
        what = {
            "features": self.network.name,
            "data": data.name,
            "fingerprint": fingerprint_of(data),
            "split": data.split,
            "seed": getattr(data, "seed", None),
            "size": data.size,
            "pictures": count,
        }
        return kept_tensors(what, lambda: {"features": self.network(images())})["features"]

    def nearest(self, features: Tensor) -> tuple[Tensor, list[int]]:
        """(M, D) -> (M,) distance to the nearest training picture, and its number in the split."""
        numbers = spaced(len(self.train), TRAINING_PICTURES)
        apart, at = torch.cdist(features, self.train_features).min(1)
        return apart, [numbers[i] for i in at.tolist()]

    def shared_captions(self) -> tuple[list[str], Tensor | None]:
        """Captions for the spread among samples, and features (G, K, D) of real pictures of each.

        Those that K real pictures share; where the data has fewer than two of these, any captions,
        and None.
        """
        rows: dict[str, list[int]] = {}
        for number, caption in enumerate(self.captions):
            rows.setdefault(caption, []).append(number)
        shared = [c for c, of in rows.items() if len(of) >= SPREAD_SAMPLES][:SPREAD_CAPTIONS]
        if len(shared) < 2:
            return list(rows)[:SPREAD_CAPTIONS], None
        return shared, self.features[torch.tensor([rows[c][:SPREAD_SAMPLES] for c in shared])]

    def frame(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sections of real pictures, with their own captions and with those of others."""
        again = self.train_features[spaced(len(self.train_features), len(self.images))]
        real: dict[str, Any] = {"quality": sections.quality(self.features, again)}
        shuffled: dict[str, Any] = {}
        if self.scorer:
            image, text = self.scorer.image(self.images), self.scorer.text(self.captions)
            real["text_fit"] = self.text_fit(image, text, self.captions)
            order = others(self.captions, self.seed)
            shuffled["text_fit"] = self.text_fit(
                image, text[order], [self.captions[i] for i in order]
            )
        return real, shuffled

    def text_fit(self, image: Tensor, text: Tensor, captions: Sequence[str]) -> dict[str, Any]:
        assert self.scorer is not None
        return sections.text_fit(image, text, captions, self.scorer.kind, self.seed)


def unseen_split(spec: str, size: int, seed: int) -> CaptionedDataset:
    """The split to compare with: validation, else test, else train, as far as there is one."""
    for split in ("validation", "test"):
        try:
            return load_dataset(spec, split, size, seed)
        except UserError:
            continue
    return load_dataset(spec, "train", size, seed)


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    chosen = min(count, most)
    return [i * count // chosen for i in range(chosen)] if chosen else []


def others(captions: Sequence[str], seed: int) -> list[int]:
    """For each caption the number of one with other words, or its own where there is none."""
    order = np.random.default_rng(seed).permutation(len(captions)).tolist()
    place = {number: at for at, number in enumerate(order)}
    result = []
    for number, caption in enumerate(captions):
        turned = order[place[number] + 1 :] + order[: place[number]]
        result.append(next((other for other in turned if captions[other] != caption), number))
    return result
