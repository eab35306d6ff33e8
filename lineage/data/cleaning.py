"""Cleaning: which pictures and captions of a data set training is better without, and why.

LAION's rules, small. Copies come last, when the bad pairs are gone:

    left out     files and rows that the reader of the data set could not use
    size         pictures that are too small in their files, or too long and narrow
    caption      captions of too few or too many words or letters, in another script, or of too many
                 pictures ("image", "no description")
    similarity   pairs whose cosine by a CLIP is low: the caption says something else
    duplicate    pictures with the same pixels as another one of their split, or nearly the same
    leak         pictures that are nearly the same as one of another split, on which a test would
                 measure memory: those of `test` stay before those of `validation`, and these before
                 all others

A caption goes alone; its picture goes with the last one. Of copies the largest picture stays, of
equally large ones the first.

`clean` applies the `Rules` of `cleaning_rules` to a data set: what is kept, and a `Removal` for the
rest, which `cleaning_output` writes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lineage.characters import plain
from lineage.data.cleaning_rules import Rules, why_removed
from lineage.data.contract import CaptionedDataset
from lineage.data.decoding import why_broken
from lineage.data.near import LENGTH, near_duplicates, thumbnail
from lineage.data.pictures import PictureDataset
from lineage.data.tools import read_all
from lineage.errors import UserError

CHUNK = 64
"""Number of pictures whose captions are compared with them at once."""
QUANTILES = {"p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75}
"""Quantiles of the cosines in the summary."""
NEAR = 4.0
"""Largest distance in levels of pictures that are nearly the same."""
PROGRESS_FROM = 2_000
"""Number of pictures above which a progress bar is shown."""

Similarity = Callable[[Tensor, Sequence[tuple[str, ...]]], list[list[float]]]
"""Cosines of pictures (B, 3, S, S) uint8 with each of their captions."""


@dataclass(frozen=True)
class Removal:
    """One picture, or one of its captions, that was removed.

    Attributes:
        id: Id of the picture; its path, of a file that cannot be read.
        rule: Name of a rule of the module's header.
        reason: Why, in words.
        caption: The caption; empty if the picture was removed with all of them.
        split: Split of the picture.
        original: Number of the picture that it is a copy of.
        index: Number of the picture in the data set; None if it is not in it.
    """

    id: str
    rule: str
    reason: str
    caption: str = ""
    split: str = ""
    original: int | None = None
    index: int | None = None


@dataclass
class CleaningResult:
    """The result of `clean`.

    Attributes:
        dataset: Data set that was cleaned.
        rules: The rules.
        count: Number of pictures that were looked through.
        num_captions: Number of their captions.
        captions: Captions of each kept picture, by its number in the data set.
        removals: What was removed, in the order of the rules.
        splits: Split of each picture.
        similarities: Quantiles of the cosines of pictures and captions, if they were computed.
    """

    dataset: CaptionedDataset
    rules: Rules
    count: int
    num_captions: int = 0
    captions: dict[int, tuple[str, ...]] = field(default_factory=dict)
    removals: list[Removal] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    similarities: dict[str, float] = field(default_factory=dict)

    def remove(self, index: int, rule: str, reason: str, original: int | None = None) -> None:
        """Remove a picture with all its captions."""
        del self.captions[index]
        self._add(index, rule, reason, "", original)

    def _add(
        self, index: int, rule: str, reason: str, caption: str, original: int | None = None
    ) -> None:
        self.removals.append(
            Removal(self.id_of(index), rule, reason, caption, self.splits[index], original, index)
        )

    def remove_captions(self, index: int, rule: str, reasons: Sequence[str | None]) -> None:
        """Remove the captions of a picture that have a reason, and the picture if none is left."""
        own = self.captions[index]
        left = tuple(text for text, why in zip(own, reasons, strict=True) if why is None)
        if not left:
            self.remove(index, rule, next(why for why in reasons if why is not None))
            return
        self.captions[index] = left
        for text, why in zip(own, reasons, strict=True):
            if why is not None:
                self._add(index, rule, why, text)

    def id_of(self, index: int) -> str:
        if isinstance(self.dataset, PictureDataset):
            return self.dataset.records[index].id
        return self.dataset[index].id

    def size_of(self, index: int) -> tuple[int, int]:
        """Width and height of a picture in its file, or as it is drawn. Raises as `decode`."""
        if in_files(self.dataset):
            return self.dataset.file_size(index)
        return self.dataset.size, self.dataset.size

    def rank(self, index: int) -> tuple[int, int, int]:
        """Key by which the first of several copies is the one that stays."""
        splits = {"test": 0, "validation": 1, "train": 3}
        try:
            width, height = self.size_of(index)
        except Exception:  # as in `_check_sizes`
            width = height = 0
        return splits.get(self.splits[index], 2), -width * height, index

    def summary(self) -> dict[str, Any]:
        """Numbers for a report: pictures and captions before and after, removals of each rule."""
        pictures = Counter(one.rule for one in self.removals if not one.caption)
        captions = Counter(one.rule for one in self.removals if one.caption)
        return {
            "name": self.dataset.name,
            "rules": asdict(self.rules),
            "pictures": self.count,
            "captions": self.num_captions,
            "kept_pictures": len(self.captions),
            "kept_captions": sum(map(len, self.captions.values())),
            "kept_splits": dict(Counter(self.splits[index] for index in self.captions)),
            "removed_pictures": dict(pictures),
            "removed_captions": dict(captions),
            "similarity": self.similarities,
        }


def clean(
    dataset: CaptionedDataset,
    rules: Rules,
    similarity: Similarity | None = None,
    count: int | None = None,
) -> CleaningResult:
    """Apply the rules to a data set; nothing is written.

    Args:
        dataset: Data set; with the split `all`, leaks can be found.
        rules: What is removed.
        similarity: Cosines of a CLIP, which `min_similarity` and `worst` need.
        count: Largest number of pictures; all if None, the nominal length of an endless data set.

    Raises:
        UserError: A rule needs what the data set does not have, or no picture can be read.
    """
    if rules.need_similarity and similarity is None:
        raise UserError("Similarity needs a run of CLIP, such as pretrained:clip.")
    if not in_files(dataset) and (rules.min_side is not None or rules.max_aspect is not None):
        raise UserError(f"{dataset.name} has no picture files whose size could be a rule.")
    read_all(dataset, count)
    number = len(dataset) if count is None else count
    number = number if dataset.endless else min(number, len(dataset))
    result = CleaningResult(dataset, rules, number)
    pictures = _read(result)
    _list_left_out(result)
    _check_sizes(result)
    _check_captions(result)
    if similarity is not None:
        _check_similarity(result, similarity)
    _check_copies(result, pictures)
    return result


def in_files(dataset: CaptionedDataset) -> TypeGuard[PictureDataset]:
    """Whether each picture of a data set is a file that can be measured and copied."""
    return isinstance(dataset, PictureDataset) and dataset.has_files


# --- the rules ------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """What the search for copies needs of each picture: its thumbnail and a hash of its pixels."""

    thumbnails: NDArray[np.float16]
    hashes: list[bytes]


def _read(result: CleaningResult) -> _Pictures:
    """Read every picture once; all of them are kept so far."""
    rules, dataset = result.rules, result.dataset
    near = rules.leaks or rules.duplicates == "near"
    thumbnails = np.empty((result.count if near else 0, LENGTH), np.float16)
    hashes = []
    for index in progress(range(result.count), "reading"):
        example = dataset[index]
        result.splits.append(str(example.meta.get("split", dataset.split)))
        result.captions[index] = example.captions
        result.num_captions += len(example.captions)
        hashes.append(hashlib.blake2b(example.image.numpy().tobytes(), digest_size=16).digest())
        if near:
            thumbnails[index] = thumbnail(example.image)
    return _Pictures(thumbnails, hashes)


def progress(numbers: Iterable[int], what: str) -> Iterator[int]:
    """The numbers, with a progress bar where there are many."""
    numbers = list(numbers)
    off = len(numbers) < PROGRESS_FROM or None  # None: only on a terminal
    yield from tqdm(numbers, desc=what, unit=" pictures", disable=off, leave=False)


def _list_left_out(result: CleaningResult) -> None:
    """Note what the reader left out; remarks about pictures that stay are no removals."""
    dataset = result.dataset
    records = dataset.records if isinstance(dataset, PictureDataset) else []
    stay = {plain(record.path) for record in records if record.span is None}
    for file in dataset.skipped:
        if file.path not in stay:
            result.removals.append(Removal(file.path, "left out", file.reason))


def _check_sizes(result: CleaningResult) -> None:
    rules = result.rules
    if rules.min_side is None and rules.max_aspect is None:
        return
    for index in progress(list(result.captions), "measuring"):
        try:
            width, height = result.size_of(index)
        except Exception as error:  # Pillow raises errors of many kinds; the file has just changed
            result.remove(index, "left out", why_broken(error, None))
            continue
        shorter, longer = sorted((width, height))
        if rules.min_side is not None and shorter < rules.min_side:
            reason = f"{width} x {height} pixels: a side has fewer than {rules.min_side}"
            result.remove(index, "size", reason)
        elif rules.max_aspect is not None and longer > rules.max_aspect * shorter:
            reason = f"{width} x {height} pixels: longer than {rules.max_aspect:g} to 1"
            result.remove(index, "size", reason)


def _check_captions(result: CleaningResult) -> None:
    counts = Counter(text for own in result.captions.values() for text in set(own))
    for index in list(result.captions):
        reasons = [why_removed(text, result.rules, counts[text]) for text in result.captions[index]]
        if any(reasons):
            result.remove_captions(index, "caption", reasons)


def _check_similarity(result: CleaningResult, similarity: Similarity) -> None:
    indices = list(result.captions)
    rows: list[list[float]] = []
    for first in progress(range(0, len(indices), CHUNK), "comparing with captions"):
        part = indices[first : first + CHUNK]
        images = torch.stack([result.dataset[index].image for index in part])
        rows += similarity(images, [result.captions[index] for index in part])
    every = np.array([cosine for row in rows for cosine in row])
    if not len(every):
        return
    if not np.isfinite(every).all():
        raise UserError("The run of CLIP gives cosines that are no numbers: train it again.")
    result.similarities = {
        name: round(float(np.quantile(every, share)), 4) for name, share in QUANTILES.items()
    }
    reasons = iter(_reasons_of(every, result.rules))
    for index, row in zip(indices, rows, strict=True):
        own = [next(reasons) for _ in row]
        if any(own):
            result.remove_captions(index, "similarity", own)


def _reasons_of(cosines: NDArray[np.float64], rules: Rules) -> list[str | None]:
    """Why each pair is removed; None if it stays. Of equal cosines the first are removed."""
    reasons: list[str | None] = [None] * len(cosines)
    if rules.worst is not None:
        for place in np.argsort(cosines, kind="stable")[: round(rules.worst * len(cosines))]:
            share = f"among the lowest {100 * rules.worst:g} %"
            reasons[place] = f"cosine {cosines[place]:.3f} with its picture, {share}"
    if rules.min_similarity is not None:
        for place in np.flatnonzero(cosines < rules.min_similarity):
            bound = f"below {rules.min_similarity:g}"
            reasons[place] = f"cosine {cosines[place]:.3f} with its picture, {bound}"
    return reasons


def _check_copies(result: CleaningResult, pictures: _Pictures) -> None:
    rules = result.rules
    if rules.duplicates == "exact":
        _remove_exact(result, pictures.hashes)
    within = rules.duplicates == "near"
    if not (within or rules.leaks):
        return
    order = sorted(result.captions, key=result.rank)
    splits = [result.splits[index] for index in order]
    radius = NEAR if rules.near is None else rules.near
    thumbnails = torch.from_numpy(pictures.thumbnails)[order]
    for number, other, distance in near_duplicates(thumbnails, splits, radius, within, rules.leaks):
        index, original = order[number], order[other]
        name = result.id_of(original)
        same = pictures.hashes[index] == pictures.hashes[original]
        reason = f"nearly the same as {name} ({distance:.1f} levels apart)"
        reason = f"the same pixels as {name}" if same else reason
        if splits[number] == splits[other]:
            result.remove(index, "duplicate", reason, original)
        else:
            result.remove(index, "leak", f"{reason}, of {splits[other]}", original)


def _remove_exact(result: CleaningResult, hashes: Sequence[bytes]) -> None:
    """Remove pictures with the same pixels as another one of their split."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for index in result.captions:
        groups.setdefault((result.splits[index], hashes[index]), []).append(index)
    for group in groups.values():
        if len(group) > 1:
            original, *copies = sorted(group, key=result.rank)
            for index in sorted(copies):
                reason = f"the same pixels as {result.id_of(original)}"
                result.remove(index, "duplicate", reason, original)
