"""Cleaning: which pictures and captions of a data set training is better without, and why.

LAION's rules, small. Copies come last, when the bad pairs are gone:

    unreadable   files that no reader can use
    size         pictures that are too small in their files, or too long and narrow
    caption      captions of too few or too many words or letters, in another script, or of too many
                 pictures ("image", "no description")
    similarity   pairs whose cosine by a CLIP is low: the caption says something else
    duplicate    pictures with the same pixels as another one of their split, or nearly the same
    leak         pictures that are nearly the same as one of another split, so that a test would
                 hold what was trained on; those of `test` and `validation` stay

A caption goes alone; its picture goes with the last one. Of copies the largest picture stays, of
equally large ones the first.

`clean` applies the rules to a data set: what is kept, and a `Removal` for the rest, which the
module `cleaned` writes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lineage.data.contract import CaptionedDataset
from lineage.data.near import near_duplicates, thumbnail
from lineage.data.pictures import PictureDataset
from lineage.errors import UserError, nearest

CHUNK = 64
"""Number of pictures whose captions are compared with them at once."""
NEAR = 4.0
"""Largest distance in levels of pictures that are nearly the same."""
PROGRESS_FROM = 2_000
"""Number of pictures above which a progress bar is shown."""
SCRIPTS = (
    *("latin", "cyrillic", "greek", "armenian", "georgian", "hebrew", "arabic", "devanagari"),
    *("bengali", "tamil", "thai", "hangul", "hiragana", "katakana", "cjk"),
)
"""Scripts by the first word of the names that Unicode gives their letters; `cjk` is Chinese."""

Similarity = Callable[[Tensor, Sequence[tuple[str, ...]]], list[list[float]]]
"""Cosines of pictures (B, 3, S, S) uint8 with each of their captions."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is removed. None: the rule is off.

    Attributes:
        min_side: Smallest shorter side of a picture in its file, in pixels.
        max_aspect: Largest ratio of a picture's longer side to its shorter one.
        min_words, max_words: Number of words of a caption; words are separated by blanks.
        min_letters, max_letters: Number of characters of a caption.
        scripts: Names of `SCRIPTS`; at least half of a caption's letters are in one of them.
        max_pictures: Largest number of pictures that may have the same caption.
        min_similarity: Smallest cosine of a caption and its picture.
        worst: Share of the captions that are removed for the lowest cosines.
        duplicates: `exact`: the same pixels; `near`: pixels that differ by little.
        leaks: If true, what is nearly the same as a picture of another split is removed.
        near: Largest distance of pictures that are nearly the same, in levels (see the module
            `near`); None for `NEAR`.
    """

    min_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_letters: int | None = None
    max_letters: int | None = None
    scripts: tuple[str, ...] = ()
    max_pictures: int | None = None
    min_similarity: float | None = None
    worst: float | None = None
    duplicates: Literal["none", "exact", "near"] = "exact"
    leaks: bool = False
    near: float | None = None

    def __post_init__(self) -> None:
        for name in self.scripts:
            if name not in SCRIPTS:
                raise UserError(f"There is no script {name!r}: {nearest(name, SCRIPTS)}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(f"A largest aspect of {self.max_aspect:g} leaves nothing: 1 is square.")
        if self.worst is not None and not 0 <= self.worst < 1:
            raise UserError(f"A share of {self.worst:g} is not between 0 and 1, such as 0.1.")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise UserError(f"A cosine of {self.min_similarity:g} is not between -1 and 1.")
        if self.near is not None and not self.near >= 0:
            raise UserError(f"A distance of {self.near:g} levels is less than 0.")
        if self.near is not None and not (self.leaks or self.duplicates == "near"):
            raise UserError("A distance has no effect: add --duplicates near, or --leaks.")

    @property
    def need_similarity(self) -> bool:
        return self.min_similarity is not None or self.worst is not None


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
class Cleaned:
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
) -> Cleaned:
    """Apply the rules to a data set; nothing is written.

    Args:
        dataset: Data set; with the split `all`, leaks can be found.
        rules: What is removed.
        similarity: Cosines of a CLIP, which `min_similarity` and `worst` need.
        count: Largest number of pictures; all if None, the nominal length of an endless data set.

    Raises:
        UserError: A rule needs what the data set does not have.
    """
    if rules.need_similarity and similarity is None:
        raise UserError("Similarity needs a run of CLIP, such as pretrained:clip.")
    if not in_files(dataset) and (rules.min_side is not None or rules.max_aspect is not None):
        raise UserError(f"{dataset.name} has no picture files whose size could be a rule.")
    if isinstance(dataset, PictureDataset) and dataset.streamed:
        dataset.decode_all()
    number = len(dataset) if count is None else count
    cleaned = Cleaned(dataset, rules, number if dataset.endless else min(number, len(dataset)))
    for file in dataset.skipped:
        cleaned.removals.append(Removal(file.path, "unreadable", file.reason))
    pictures = _read(cleaned)
    _check_sizes(cleaned, pictures.sizes)
    _check_captions(cleaned)
    if similarity is not None:
        _check_similarity(cleaned, similarity)
    _check_copies(cleaned, pictures)
    return cleaned


def in_files(dataset: CaptionedDataset) -> TypeGuard[PictureDataset]:
    """Whether each picture of a data set is a file that can be measured and copied."""
    return isinstance(dataset, PictureDataset) and dataset.has_files


# --- the rules ------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """What the rules need of each picture: its thumbnail, a hash of its pixels, its file's size."""

    thumbnails: Tensor
    hashes: list[bytes]
    sizes: list[tuple[int, int]]


def _read(cleaned: Cleaned) -> _Pictures:
    """Read every picture once; all of them are kept so far."""
    hashes, thumbnails, sizes = [], [], []
    dataset = cleaned.dataset
    for index in progress(range(cleaned.count), "reading"):
        example = dataset[index]
        sizes.append(
            dataset.file_size(index) if in_files(dataset) else (dataset.size, dataset.size)
        )
        cleaned.splits.append(str(example.meta.get("split", cleaned.dataset.split)))
        cleaned.captions[index] = example.captions
        cleaned.num_captions += len(example.captions)
        hashes.append(hashlib.blake2b(example.image.numpy().tobytes(), digest_size=16).digest())
        thumbnails.append(thumbnail(example.image).half())
    return _Pictures(torch.stack(thumbnails), hashes, sizes)


def progress(numbers: Iterable[int], what: str) -> Iterator[int]:
    """The numbers, with a progress bar where there are many."""
    numbers = list(numbers)
    off = len(numbers) < PROGRESS_FROM or None  # None: only on a terminal
    yield from tqdm(numbers, desc=what, unit=" pictures", disable=off, leave=False)


def _check_sizes(cleaned: Cleaned, sizes: Sequence[tuple[int, int]]) -> None:
    rules = cleaned.rules
    for index in list(cleaned.captions):
        width, height = sizes[index]
        shorter, longer = sorted(sizes[index])
        if rules.min_side is not None and shorter < rules.min_side:
            reason = f"{width} x {height} pixels: a side has fewer than {rules.min_side}"
            cleaned.remove(index, "size", reason)
        elif rules.max_aspect is not None and longer > rules.max_aspect * shorter:
            reason = f"{width} x {height} pixels: longer than {rules.max_aspect:g} to 1"
            cleaned.remove(index, "size", reason)


def _check_captions(cleaned: Cleaned) -> None:
    counts = Counter(text for own in cleaned.captions.values() for text in set(own))
    for index in list(cleaned.captions):
        reasons = [
            why_removed(text, cleaned.rules, counts[text]) for text in cleaned.captions[index]
        ]
        if any(reasons):
            cleaned.remove_captions(index, "caption", reasons)


def why_removed(caption: str, rules: Rules, pictures: int = 1) -> str | None:
    """Why a caption is removed; None if it stays.

    Args:
        caption: Caption.
        rules: The rules.
        pictures: Number of pictures that have this caption.
    """
    words, letters = len(caption.split()), len(caption)
    limits = (
        ("word", words, rules.min_words, rules.max_words),
        ("letter", letters, rules.min_letters, rules.max_letters),
    )
    for what, number, least, most in limits:
        if least is not None and number < least:
            return f"{number} {what}{'' if number == 1 else 's'}, fewer than {least}"
        if most is not None and number > most:
            return f"{number} {what}s, more than {most}"
    if rules.scripts and script_share(caption, rules.scripts) < 0.5:
        return f"most letters are not {' or '.join(rules.scripts)}"
    if rules.max_pictures is not None and pictures > rules.max_pictures:
        return f"{pictures:,} pictures have this caption, more than {rules.max_pictures:,}"
    return None


def script_share(caption: str, scripts: Sequence[str]) -> float:
    """Share of a caption's letters that are in one of some scripts; 0 if it has no letter."""
    letters = [letter for letter in caption if letter.isalpha()]
    names = (unicodedata.name(letter, "").partition(" ")[0].lower() for letter in letters)
    return sum(name in scripts for name in names) / max(1, len(letters))


def _check_similarity(cleaned: Cleaned, similarity: Similarity) -> None:
    rules, cosines = cleaned.rules, dict[int, list[float]]()
    indices = list(cleaned.captions)
    for first in progress(range(0, len(indices), CHUNK), "comparing with captions"):
        part = indices[first : first + CHUNK]
        images = torch.stack([cleaned.dataset[index].image for index in part])
        own = similarity(images, [cleaned.captions[index] for index in part])
        cosines.update(zip(part, own, strict=True))
    every = np.array([cosine for own in cosines.values() for cosine in own])
    if not len(every):
        return
    names = {"p1": 0.01, "p5": 0.05, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75}
    cleaned.similarities = {
        name: round(float(np.quantile(every, q)), 4) for name, q in names.items()
    }
    least = -2.0 if rules.min_similarity is None else rules.min_similarity
    if rules.worst is not None:
        least = max(least, float(np.quantile(every, rules.worst)))
    for index in indices:
        reasons = [
            f"cosine {cosine:.3f} with its picture, below {least:.3f}" if cosine < least else None
            for cosine in cosines[index]
        ]
        if any(reasons):
            cleaned.remove_captions(index, "similarity", reasons)


def _check_copies(cleaned: Cleaned, pictures: _Pictures) -> None:
    rules = cleaned.rules
    rank = {"test": 0, "validation": 1, "train": 3}

    def key(index: int) -> tuple[int, int, int]:
        width, height = pictures.sizes[index]
        return rank.get(cleaned.splits[index], 2), -width * height, index

    order = sorted(cleaned.captions, key=key)
    if rules.duplicates == "exact":
        first: dict[tuple[str, bytes], int] = {}
        for index in order:
            original = first.setdefault((cleaned.splits[index], pictures.hashes[index]), index)
            if original != index:
                reason = f"the same pixels as {cleaned.id_of(original)}"
                cleaned.remove(index, "duplicate", reason, original)
    within = rules.duplicates == "near"
    if not (within or rules.leaks):
        return
    order = [index for index in order if index in cleaned.captions]
    splits = [cleaned.splits[index] for index in order]
    radius = NEAR if rules.near is None else rules.near
    copies = near_duplicates(
        pictures.thumbnails[order].float(), splits, radius, within, rules.leaks
    )
    for number, other, distance in copies:
        index, original = order[number], order[other]
        name = cleaned.id_of(original)
        reason = f"nearly the same as {name} ({distance:.1f} levels apart)"
        reason = reason if distance else f"the same as {name}"
        if splits[number] == splits[other]:
            cleaned.remove(index, "duplicate", reason, original)
        else:
            cleaned.remove(index, "leak", f"{reason}, of {splits[other]}", original)
