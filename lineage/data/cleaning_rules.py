"""Rules of cleaning: their settings, and what they say of one caption. `cleaning` applies them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lineage.errors import UserError, nearest

SCRIPTS = (
    *("latin", "cyrillic", "greek", "armenian", "georgian", "hebrew", "arabic", "devanagari"),
    *("bengali", "tamil", "thai", "hangul", "hiragana", "katakana", "cjk"),
)
"""Scripts by the first word of the names that Unicode gives their letters; `cjk` is Chinese."""


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
        for least, most, what in (
            (self.min_words, self.max_words, "words"),
            (self.min_letters, self.max_letters, "letters"),
        ):
            if least is not None and most is not None and least > most:
                raise UserError(f"No caption has at least {least} and at most {most} {what}.")
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
