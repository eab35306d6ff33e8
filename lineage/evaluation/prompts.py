"""The prompts of GenEval's six tasks, in its line format (Ghosh et al. 2023).

    {"tag": "position", "include": [{"class": "square", "count": 1},
     {"class": "circle", "count": 1, "position": ["left of", 0]}],
     "prompt": "a circle left of a square", "level": "easy", "split": "test"}

`include` lists the objects of the scene; `position` is a relation and the number of the entry it
relates to. Beside GenEval's keys an entry may have a `size` (small, large) and a `place` ("in the
top left"), and a line a `background`. `level` is the level of `shapes`; `split` says whether
training shows such scenes (`test`) or never does (`heldout`). Departure: GenEval allows further
objects beside those of the prompt, except in counting, where `exclude` forbids them; here the
strict verdict allows none (see `judge`), and `exclude` is written where GenEval writes it.

    single_object   a circle            | held out: an unseen pair, by size or place
    two_object      a circle and a star | both with colours, one of them an unseen pair
    counting        two red squares     | of an unseen pair
    colors          a red circle        | an unseen pair
    position        a circle left of a square | standing as training never shows
    color_attr      a red circle and a blue square | one of them an unseen pair

Prompts are English, or in the languages of `shapes` that the data has: the scenes, and so what the
judge accepts, are the same. `python -m lineage.evaluation.prompts` prints all lines, which
data/prompts/shapes.jsonl holds; `python -m lineage.evaluation.prompts zh` prints Chinese ones.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lineage.characters import decoded
from lineage.data.shapes import LEVELS, Level, heldout_pair, heldout_relation
from lineage.data.shapes_captions import PLACES, CaptionPlan, Form, Frame, Thing
from lineage.data.shapes_draw import BACKGROUNDS, COLOURS, SDF
from lineage.data.shapes_languages import ENGLISH, GRAMMARS, languages_of
from lineage.errors import UserError, nearest
from lineage.files import read_regular

T = TypeVar("T")

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("test", "heldout")
KINDS = ("prompt", "caption", "sample")
"""Kinds of lines in a file of `lineage prompts` (see `prompt_files`); GenEval's are all prompts."""
MAX_BYTES = 100_000_000  # of a file of prompts
MAX_PROMPTS = {"test": 60, "heldout": 30}  # of a task

SHAPES, COLOUR_NAMES, GROUNDS = tuple(SDF), tuple(COLOURS), tuple(BACKGROUNDS)
PLACE_NAMES = tuple(place for row in PLACES for place in row)
SIZES = ("small", "large")
RELATION_NAMES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
"""GenEval's names of the relations -> ours."""


@dataclass(frozen=True)
class ObjectSpec:
    """One entry of `include`: `count` objects of a shape, with further attributes."""

    shape: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None
    size: str | None = None
    place: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry, in GenEval's format."""
        attributes = {
            "color": self.colour,
            "position": list(self.position) if self.position else None,
            "size": self.size,
            "place": self.place,
        }
        named = {name: value for name, value in attributes.items() if value}
        return {"class": self.shape, "count": self.count, **named}


@dataclass(frozen=True)
class Prompt:
    """One line: a caption and the scene that it describes."""

    tag: str
    prompt: str
    include: tuple[ObjectSpec, ...]
    level: str
    split: str
    background: str | None = None

    @property
    def num_objects(self) -> int:
        """Number of objects in the scene."""
        return sum(spec.count for spec in self.include)

    def to_json(self) -> dict[str, Any]:
        """The line, in GenEval's format."""
        line: dict[str, Any] = {"tag": self.tag, "include": [o.to_json() for o in self.include]}
        if self.tag == "counting":
            line["exclude"] = [{"class": o.shape, "count": o.count + 1} for o in self.include]
        if self.background:
            line["background"] = self.background
        return {**line, "prompt": self.prompt, "level": self.level, "split": self.split}


# --- making prompts ---------------------------------------------------------------------------


def make_prompts(level_name: str, languages: tuple[str, ...] = ENGLISH) -> list[Prompt]:
    """The prompts of a level: every task, in distribution and held out; always the same.

    Prompt i describes the same scene in every language; of several, it is in language i.
    """
    level = LEVELS[level_name]
    chosen: list[tuple[str, str, Candidate]] = []
    for (tag, candidates), split in product(_CANDIDATES.items(), SPLITS):
        ranked = sorted(candidates(level, split == "heldout"), key=partial(_order, tag))
        chosen += [(tag, split, one) for one in ranked[: MAX_PROMPTS[split]]]
    return [
        Prompt(
            tag,
            GRAMMARS[languages[number % len(languages)]](one.plan),
            one.include,
            level_name,
            split,
            one.plan.background or None,
        )
        for number, (tag, split, one) in enumerate(chosen)
    ]


class Candidate(NamedTuple):
    """A prompt that may be chosen.

    Attributes:
        rank: Plain wordings have the lowest.
        plan: Plan of the caption.
        include: Objects of the scene.
    """

    rank: int
    plan: CaptionPlan
    include: tuple[ObjectSpec, ...]


def _order(tag: str, one: Candidate) -> tuple[int, bytes]:
    """Plain wordings first; among them a random order that is the same everywhere."""
    text = f"{tag}/{GRAMMARS['en'](one.plan)}"
    return one.rank, hashlib.blake2b(text.encode()).digest()


def _framed(rank: int, plan: CaptionPlan, include: tuple[ObjectSpec, ...]) -> Iterator[Candidate]:
    """A caption alone, and in the frames that training captions have."""
    frames: tuple[Frame, ...] = ("", "picture", "drawing", "there is")
    for number, frame in enumerate(frames):
        yield Candidate(rank + (number > 0), plan._replace(frame=frame), include)


def _pairs(level: Level, unseen: bool) -> list[tuple[str, str]]:
    """The pairs (shape, colour) that training shows, or those that it never shows."""
    return [
        (SHAPES[s], COLOUR_NAMES[c])
        for s, c in product(range(level.shapes), range(level.colours))
        if bool(heldout_pair(level, np.array(s), np.array(c))) == unseen
    ]


def _single(level: Level, unseen: bool) -> Iterator[Candidate]:
    if unseen:
        for (shape, colour), size in product(_pairs(level, True), SIZES):
            plan = CaptionPlan((Thing(shape, colour, size=size),))
            yield from _framed(0, plan, (ObjectSpec(shape, 1, colour, size=size),))
        for (shape, colour), place in product(_pairs(level, True), PLACE_NAMES):
            plan = CaptionPlan((Thing(shape, colour),), place=place)
            yield Candidate(0, plan, (ObjectSpec(shape, 1, colour, place=place),))
    else:
        for shape in SHAPES[: level.shapes]:
            yield from _framed(0, CaptionPlan((Thing(shape),)), (ObjectSpec(shape),))
        for shape, place in product(SHAPES[: level.shapes], PLACE_NAMES):
            plan = CaptionPlan((Thing(shape),), place=place)
            yield Candidate(2, plan, (ObjectSpec(shape, place=place),))


def _two(level: Level, unseen: bool) -> Iterator[Candidate]:
    names = SHAPES[: level.shapes]
    if unseen:  # training captions name the colours of both or of neither
        for (shape, colour), (other, other_colour) in product(
            _pairs(level, True), _pairs(level, False)
        ):
            if shape != other and colour != other_colour:
                one = ObjectSpec(shape, 1, colour), ObjectSpec(other, 1, other_colour)
                for include in (one, one[::-1]):
                    yield from _framed(0, _joined("next to", include), include)
    else:
        for (first, second), joint in product(permutations(names, 2), ("and", "next to")):
            include = (ObjectSpec(first), ObjectSpec(second))
            yield from _framed(0, _joined(joint, include), include)


def _joined(joint: str, include: tuple[ObjectSpec, ...]) -> CaptionPlan:
    """Single objects, with their colours, in this order."""
    return CaptionPlan(tuple(Thing(o.shape, o.colour or "") for o in include), joint)


def _counting(level: Level, unseen: bool) -> Iterator[Candidate]:
    pairs: list[tuple[str, str | None]] = [*_pairs(level, unseen)]
    if not unseen:
        pairs = [*((shape, None) for shape in SHAPES[: level.shapes]), *pairs]
    forms: tuple[Form, ...] = ("plain", "digits")
    for (shape, colour), count in product(pairs, (2, 3, 4)):
        for rank, form in enumerate(forms):
            plan = CaptionPlan((Thing(shape, colour or "", count, form=form),))
            yield from _framed(rank, plan, (ObjectSpec(shape, count, colour),))


def _colours(level: Level, unseen: bool) -> Iterator[Candidate]:
    forms: tuple[Form, ...] = ("plain", "that is", "one")
    for shape, colour in _pairs(level, unseen):
        include = (ObjectSpec(shape, 1, colour),)
        for rank, form in enumerate(forms):
            plan = CaptionPlan((Thing(shape, colour, form=form),))
            yield from _framed(rank, plan, include)
            for ground in GROUNDS[: level.backgrounds]:
                yield Candidate(rank + 1, plan._replace(background=ground), include)


def _position(level: Level, unseen: bool) -> Iterator[Candidate]:
    for (a, b), (name, ours) in product(
        permutations(range(level.shapes), 2), RELATION_NAMES.items()
    ):
        first, second = (a, b) if ours in ("left", "above") else (b, a)
        left, above = heldout_relation(level, np.array(first), np.array(second))
        if bool(left if ours in ("left", "right") else above) != unseen:
            continue
        include = (ObjectSpec(SHAPES[b]), ObjectSpec(SHAPES[a], position=(name, 0)))
        things = (Thing(SHAPES[a]), Thing(SHAPES[b]))
        for rank, second_wording in enumerate((False, True)):
            yield from _framed(rank, CaptionPlan(things, ours, second_wording), include)


def _attribution(level: Level, unseen: bool) -> Iterator[Candidate]:
    for (shape, colour), (other, other_colour) in product(
        _pairs(level, unseen), _pairs(level, False)
    ):
        if shape != other and colour != other_colour:
            include = (ObjectSpec(shape, 1, colour), ObjectSpec(other, 1, other_colour))
            yield from _framed(0, _joined("and", include), include)
            if unseen:  # otherwise the loop produces this order as well
                yield from _framed(0, _joined("and", include[::-1]), include[::-1])


_CANDIDATES = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colours,
    "position": _position,
    "color_attr": _attribution,
}


def to_lines(prompts: Iterable[Prompt], ensure_ascii: bool = True) -> str:
    """The file that holds `prompts`; if `ensure_ascii`, other characters are escaped."""
    return "".join(
        json.dumps(prompt.to_json(), ensure_ascii=ensure_ascii) + "\n" for prompt in prompts
    )


# --- reading prompts --------------------------------------------------------------------------


def read_prompts(path: Path, level: str = "hard") -> list[Prompt]:
    """Prompts from a file of such lines; a line without a level is of `level`. In a file of
    `lineage prompts`, captions and samples are left out.

    Raises:
        UserError: the file is missing, or a line describes what its level does not have; the
            sentence names the line.
    """
    prompts = [one for one in read_lines(path, lambda line: _prompt(line, level)) if one]
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def _prompt(line: Any, level: str) -> Prompt | None:
    """The prompt of one line; None for a line of another kind."""
    if isinstance(line, dict) and _one_of(line.get("kind", KINDS[0]), KINDS) != KINDS[0]:
        return None
    return _prompt_from_json(line, level)


def read_lines(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """Result of `parse` for each line of a file of JSON lines; empty lines are left out.

    Raises:
        UserError: the file is missing, or `parse` raises an error; the sentence names the line.
    """
    parsed = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                parsed.append(parse(json.loads(line)))
            except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
                reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
                reason = reason.rstrip(".") or type(error).__name__
                raise UserError(f"{path}, line {number}, is not a prompt: {reason}.") from error
    return parsed


def _lines(path: Path) -> list[str]:
    """Lines of a text file; other separators than line feeds are part of a line, as in JSON."""
    raw = b""
    try:
        raw = read_regular(path, MAX_BYTES)
        return decoded(raw).split("\n")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {number}, is not UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be read as a file of prompts: {reason}.") from error


_DRAWING_KEYS = ("file_name", "kind", "seed", "index", "data", "data_seed", "size")
"""What `lineage prompts` adds to a line; see `prompt_files`."""
_LINE_KEYS = ("tag", "include", "exclude", "prompt", "level", "split", "background", *_DRAWING_KEYS)
_ENTRY_KEYS = ("class", "count", "color", "position", "size", "place")


def _prompt_from_json(line: Any, default_level: str) -> Prompt:
    """One line, checked."""
    if not isinstance(line, dict) or not isinstance(line["include"], list):
        raise ValueError("it is no JSON object with a list `include`")
    _check_keys(line, _LINE_KEYS)
    level_name = _one_of(line.get("level", default_level), tuple(LEVELS))
    level = LEVELS[level_name]
    include = tuple(
        _object_from_json(entry, n, line["include"], level)
        for n, entry in enumerate(line["include"])
    )
    for name in ("tag", "prompt"):
        if not isinstance(line[name], str) or not line[name]:
            raise ValueError(f"its {name} is {line[name]!r}, not text")
    prompt = Prompt(
        line["tag"],
        line["prompt"],
        include,
        level_name,
        _one_of(line.get("split", "test"), SPLITS),
        _one_of(line.get("background"), (None, *GROUNDS[: level.backgrounds])),
    )
    if not 1 <= prompt.num_objects <= 4:
        raise ValueError(f"it has {prompt.num_objects} objects, not 1 to 4")
    if any(o.size or o.place for o in include) and prompt.num_objects > 1:
        raise ValueError("only a single object can have a size or a place")
    if include[0].size and include[0].place:
        raise ValueError("an object can have a size or a place, not both")
    if any(o.position for o in include) and (prompt.num_objects != 2 or len(include) != 2):
        raise ValueError("a position needs exactly two objects")
    return prompt


def _object_from_json(entry: Any, number: int, entries: list[Any], level: Level) -> ObjectSpec:
    """One entry of `include`, checked against what its level has."""
    _check_keys(entry, _ENTRY_KEYS)
    count = entry.get("count", 1)
    if type(count) is not int or count < 1:
        raise ValueError(f"its count is {count!r}, not 1 or more")
    position = entry.get("position")
    if position is not None:
        relation, to = position
        if type(to) is not int or not 0 <= to < len(entries) or to == number:
            raise ValueError(f"its position {position!r} points to no other entry")
        position = (_one_of(relation, tuple(RELATION_NAMES)), to)
    return ObjectSpec(
        _one_of(entry["class"], SHAPES[: level.shapes]),
        count,
        _one_of(entry.get("color"), (None, *COLOUR_NAMES[: level.colours])),
        position,
        _one_of(entry.get("size"), (None, *SIZES)),
        _one_of(entry.get("place"), (None, *PLACE_NAMES)),
    )


def _check_keys(entry: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise ValueError(f"it has an unknown key {key!r}: {nearest(key, keys)}")


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(str(a) for a in allowed if a)}")
    return value


if __name__ == "__main__":
    names = languages_of(sys.argv[1]) if sys.argv[1:] else ENGLISH
    lines = (to_lines(make_prompts(level, names), ensure_ascii=False) for level in LEVELS)
    sys.stdout.buffer.write("".join(lines).encode())
