"""Splits: their names, and how a data set that has none is divided.

A split by pictures is a function of each picture's id, so that a picture that is added later moves
no other. A split by classes has classes in the test that training never shows ("zero-shot"), as the
papers on birds and flowers do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "heldout": "heldout",
}
"""Names of splits in files, and the name of each in this package."""


def split_name(name: str) -> str:
    """This package's name of a split: `val` -> `validation`; an unknown name is only stripped."""
    return SPLIT_NAMES.get(name.strip().lower(), name.strip())


def seeded_split(name: str) -> str:
    """Split of the picture with this id: a tenth is `test`, a tenth `validation`."""
    share = _fraction(name)
    return "test" if share < 0.1 else "validation" if share < 0.2 else "train"


def class_split(classes: Iterable[str]) -> dict[str, str]:
    """Split of each class: a quarter of them, chosen by their names, is `test`."""
    ordered = sorted(set(classes), key=_fraction)
    number = min((len(ordered) + 3) // 4, len(ordered) - 1)  # one at least is left for training
    return {name: "test" if i < number else "train" for i, name in enumerate(ordered)}


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
