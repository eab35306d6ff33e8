"""The data contract: what every captioned data set provides and what a training step receives.

A data set is a sequence of `Example`s; a loader reads it through `batch`, its fast path. Tokens,
image pyramids and mismatched pairs are made by the families that need them.

Pictures are squares of the data set's size. A data set whose pictures have other shapes too has
`parts`, each of one shape (`bucket_shapes`), and a batch of training is of one part.

Axes: B pictures of a batch, 3 channels, H and W pixels (H == W == `size`, but in `parts`).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lineage.characters import plain


@dataclass(frozen=True)
class Example:
    """One captioned picture.

    Attributes:
        id: Name that is unique within the data set, and the same in every run and on every machine.
        image: (3, H, W) uint8 in 0..255.
        captions: One caption or more; evaluation uses the first.
        label: Class index, or None if the data has no classes.
        meta: Further information about the picture, such as the scene that it shows.
    """

    id: str
    image: Tensor
    captions: tuple[str, ...]
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Batch:
    """What a training step receives.

    Attributes:
        image: (B, 3, H, W) float32 in [-1, 1].
        caption: B captions; each visit of a picture draws one of its captions.
        label: (B,) int64, or None where the data has no classes.
        id: B example ids.
        extra: What a wrapper of the data set adds, (B, ...) by name: `codes`, `latents`, ...
    """

    image: Tensor
    caption: list[str]
    label: Tensor | None
    id: list[str]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.caption)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        label = None if self.label is None else change(self.label)
        extra = {name: change(value) for name, value in self.extra.items()}
        return Batch(change(self.image), self.caption, label, self.id, extra)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU does not block."""
        return self.map_tensors(Tensor.pin_memory)

    def split(self, rows: int) -> list[Batch]:
        """The same pictures in batches of `rows`, in order."""
        parts = []
        for first in range(0, len(self), rows):
            some = slice(first, first + rows)
            part = self.map_tensors(lambda tensor, some=some: tensor[some])  # type: ignore[misc]
            part.caption, part.id = self.caption[some], self.id[some]
            parts.append(part)
        return parts

    def same_pairs(self, same: str) -> Tensor:
        """(B, B) True where two rows have the same caption, word by word, or, if `same` is `class`
        and not `caption`, the same label.
        """
        names = {caption: number for number, caption in enumerate(dict.fromkeys(self.caption))}
        number = torch.tensor([names[caption] for caption in self.caption]).to(self.image.device)
        pairs = number[:, None] == number[None, :]
        if same == "class" and self.label is not None:
            pairs |= self.label[:, None] == self.label[None, :]
        return pairs


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and the reason, in words that say how to repair it.

    Both are as a terminal can show them: control characters and bytes that are not UTF-8 are
    escaped.
    """

    path: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("path", "reason"):
            object.__setattr__(self, name, plain(getattr(self, name)))


def to_unit(image: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return image.to(torch.float32).div_(127.5).sub_(1.0)


def to_bytes(image: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 0..255 with rounding, any shape. The inverse of `to_unit`."""
    return image.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def bucket_shapes(size: int) -> list[tuple[int, int]]:
    """Heights and widths that pictures have beside the square: about as many pixels, and never
    more (SDXL: Podell et al. 2023, arXiv:2307.01952, section 2.3), from 4 : 1 to 1 : 4.

    Their sides are multiples of an eighth of `size` and of at least 16 pixels, or of a quarter of
    it where that is less, so that networks can halve them.
    """
    step = max(size // 8, min(size // 4, 16))
    heights = range(-(-size // (2 * step)) * step, size, step)
    tall = [(size * size // short // step * step, short) for short in heights]
    tall = [(long, short) for long, short in tall if long > short]
    return [*tall, (size, size), *((short, long) for long, short in reversed(tall))]


def nearest_shape(aspect: float, size: int) -> tuple[int, int]:
    """The one of `bucket_shapes` that is most like pictures of this width divided by height."""
    return min(bucket_shapes(size), key=lambda shape: abs(math.log(shape[1] / shape[0] / aspect)))


def caption_number(seed: int, epoch: int, example_id: str, count: int) -> int:
    """Index of this visit's caption, below `count`: a function of (seed, epoch, id) alone."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{example_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


class CaptionedDataset(ABC):
    """A sequence of `Example`s of one split at one size.

    Attributes:
        name: Spec that loads the data set again, e.g. `shapes:easy` or `folder:my/pictures`.
        split: Name of the split: `train`, `validation`, `test`, or another that the data has.
        size: Side of the square pictures in pixels.
        skipped: Files that were left out, each with its reason.
        endless: If true, every index from 0 up is a new example, and `len` is a nominal epoch.
        varies: If true, the visits of a picture in `batch` show different parts of it.
    """

    name: str
    split: str
    size: int
    skipped: list[Skipped]
    endless: bool = False
    varies: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the pictures in `batch`."""
        return self.size, self.size

    @property
    def parts(self) -> list[CaptionedDataset]:
        """Data sets of one shape each, which together hold every example once."""
        return [self]

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        """The examples at `indices` as one batch.

        Args:
            indices: Index of each row's example.
            epochs: Number of each row's visit, which decides its caption.
            seed: Seed of the choice of captions.
        """
        examples = [self[i] for i in indices]
        captions = [
            e.captions[caption_number(seed, epoch, e.id, len(e.captions))]
            for e, epoch in zip(examples, epochs, strict=True)
        ]
        labels = [e.label for e in examples]
        label = None if any(x is None for x in labels) else torch.tensor(labels, dtype=torch.int64)
        return Batch(
            to_unit(torch.stack([e.image for e in examples])),
            captions,
            label,
            [e.id for e in examples],
        )

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        """Every caption of the first `limit` examples, to build a vocabulary from."""
        for i in range(min(limit, len(self))):
            yield from self[i].captions

    def showcase(self, count: int) -> list[Example]:
        """`count` examples that show the breadth of the data, for sheets and reports."""
        step = max(1, len(self) // count)
        return [self[i] for i in range(0, len(self), step)][:count]


def fingerprint_of(dataset: CaptionedDataset) -> str:
    """Identity of a run's data: the hash of user files, or the name of an endless world."""
    return dataset.fingerprint() if hasattr(dataset, "fingerprint") else dataset.name
