"""Files of prompts, from which any program can draw what `lineage evaluate` scores.

`lineage prompts` writes them, one JSON line for each picture:

    {"file_name": "prompts/0000.png", "prompt": "a cross", "kind": "prompt",
     "seed": 0, "index": 0, "data": "shapes:easy", "data_seed": 0, "size": 32,
     "tag": "single_object", "include": [...], "level": "easy", "split": "test"}

    file_name   name of the picture in the folder of pictures
    kind        `prompt`, for composition: the line is one of GenEval's, too (see `prompts`);
                `caption` of a real picture, for quality, memorisation and text fit;
                `sample`, one of several of a caption, for diversity
    seed, index a run's picture for this line is number `index` of `System.generate` under `seed`
    data, data_seed, size   data set of the real pictures, its seed, and the pictures' side in
                pixels, as `load_dataset` takes them

A file of GenEval's lines alone is read, too: line i has the picture `prompts/000i.png`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lineage.bounds import NUM_SEEDS
from lineage.characters import same_name
from lineage.data.contract import CaptionedDataset
from lineage.data.records import is_picture
from lineage.errors import UserError
from lineage.evaluation.judge import Judge
from lineage.evaluation.prompts import KINDS, read_lines
from lineage.evaluation.real import (
    SPREAD_SAMPLES,
    prompt_set,
    spread_captions,
    unseen_examples,
    unseen_split,
)
from lineage.files import check_output, write_bytes
from lineage.plan import read_config

SIZE = 32  # pixels, where neither a file nor a run says another


@dataclass(frozen=True)
class PromptLine:
    """One picture to draw.

    Attributes:
        file_name: Path of the picture in its folder, with forward slashes.
        prompt: Text to draw.
        kind: One of `KINDS`.
        seed, index: The picture's number `index` under `seed`; None if the file does not say.
        level: Level of `shapes` of a prompt; None if the file does not say.
    """

    file_name: str
    prompt: str
    kind: str
    seed: int | None
    index: int | None
    level: str | None


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: Its path.
        lines: One for each picture.
        data, data_seed, size: Data of the real pictures; None where the file does not say.
    """

    path: Path
    lines: list[PromptLine]
    data: str | None
    data_seed: int | None
    size: int | None

    def of_kind(self, kind: str) -> list[PromptLine]:
        """The lines of a kind, in order."""
        return [line for line in self.lines if line.kind == kind]

    def prompts_of(self, level: str) -> list[PromptLine]:
        """The prompts of a level of `shapes`, in order."""
        return [line for line in self.of_kind(KINDS[0]) if line.level in (level, None)]

    def spec(self) -> str:
        """Data set of the pictures: the one that the file names, or its prompts' level of `shapes`.

        Raises:
            UserError: its prompts are of several levels.
        """
        if self.data is not None:
            return self.data
        levels = list(dict.fromkeys(line.level or "easy" for line in self.lines))
        if len(levels) > 1:
            raise UserError(
                f"{self.path} holds prompts of the levels {', '.join(levels)}: add --data "
                f"shapes:{levels[0]} for one of them."
            )
        return f"shapes:{levels[0]}"

    def check_fits(self, data: CaptionedDataset, captions: Sequence[str], seed: int) -> None:
        """Check that an evaluation draws the lines of this file.

        Args:
            data: Data set of the real pictures.
            captions: Captions of the real pictures, as many as the file has; any if it has none.
            seed: Seed of the evaluation.

        Raises:
            UserError: they are those of other data, or of another seed.
        """
        for kind, texts in zip(KINDS[1:], (captions, repeated_captions(captions)), strict=True):
            lines = self.of_kind(kind)
            if lines and [line.prompt for line in lines] != list(texts):
                seeded = f" with seed {data.seed}" if hasattr(data, "seed") else ""
                other = "" if self.data in (None, data.name) else f", but of {self.data}"
                raise UserError(
                    f"The lines of kind {kind} in {self.path} are not those of {data.name}{seeded}"
                    f"{other}: write the file again with `lineage prompts`, with --data or --run."
                )
        for line in self.lines:
            if line.seed is not None and line.seed != kind_seed(seed, line.kind):
                wanted = (line.seed - KINDS.index(line.kind)) % NUM_SEEDS
                raise UserError(
                    f"{self.path} holds the prompts of seed {wanted}, not {seed}: add --seed "
                    f"{wanted}."
                )


def kind_seed(seed: int, kind: str) -> int:
    """Seed of the pictures of a kind; the first seed follows the last."""
    return (seed + KINDS.index(kind)) % NUM_SEEDS


def repeated_captions(captions: Sequence[str]) -> list[str]:
    """The captions of `spread_captions`, each as often as it is drawn."""
    return [caption for caption in spread_captions(captions)[0] for _ in range(SPREAD_SAMPLES)]


# --- writing --------------------------------------------------------------------------------------


def write_prompts(
    out: Path,
    *,
    data: str | None = None,
    run: Path | None = None,
    count: int = 1000,
    size: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write all that an evaluation draws as a file of prompts; returns the number of lines by kind.

    Args:
        out: File to write.
        data: Data set of the real pictures; that of `run` or `shapes` if None.
        run: Run whose data, size and seed the evaluation has; None for none.
        count: Largest number of real pictures, `EvalConfig.pictures` of the evaluation.
        size: Side of the real pictures in pixels, without a run.
        seed: Seed of the evaluation.

    Raises:
        UserError: the file cannot be written, or the run or the data cannot be read.
    """
    check_output(out)
    data_seed = 0
    if run is not None:
        if size is not None:
            raise UserError(f"--size {size} has no effect beside --run: leave it out.")
        config = read_config(run)
        data, size, data_seed = data or config.data, config.size, config.seed
    unseen = unseen_split(data or "shapes", size or SIZE, data_seed)
    judged = prompt_set(unseen, None, Judge.load(), seed)
    prompts = judged.prompts if judged else []
    captions = [example.captions[0] for example in unseen_examples(unseen, count)]
    source = {"data": unseen.name, "data_seed": data_seed, "size": unseen.size}
    scenes = [prompt.to_json() for prompt in prompts]
    texts = {
        "prompt": [prompt.prompt for prompt in prompts],
        "caption": captions,
        "sample": repeated_captions(captions),
    }
    lines = []
    for kind, of_kind in texts.items():
        for index, text in enumerate(of_kind):
            line: dict[str, Any] = {"file_name": _name(kind, index), "prompt": text, "kind": kind}
            line |= {"seed": kind_seed(seed, kind), "index": index, **source}
            lines.append(line | (scenes[index] if kind == "prompt" else {}))
    write_bytes(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {kind: len(of_kind) for kind, of_kind in texts.items()}


def _name(kind: str, index: int) -> str:
    """File name of picture `index` of a kind."""
    if kind == "sample":
        return f"samples/{index // SPREAD_SAMPLES:04d}_{index % SPREAD_SAMPLES}.png"
    return f"{kind}s/{index:04d}.png"


# --- reading --------------------------------------------------------------------------------------


def read_prompt_file(path: Path) -> PromptFile:
    """A file of `lineage prompts`, or of GenEval's lines.

    Raises:
        UserError: the file is missing or empty, a line is none, or two lines contradict each other.
    """
    numbers = itertools.count()
    parsed = read_lines(path, lambda line: (_line_from_json(line, numbers), _source(line)))
    if not parsed:
        raise UserError(f"{path} holds no prompts.")
    lines = [line for line, _ in parsed]
    sources = list(dict.fromkeys(source for _, source in parsed))
    if len(sources) > 1:
        one, other = (f"{data} at {size} pixels, seed {seed}" for data, seed, size in sources[:2])
        raise UserError(f"{path} mixes lines of {one}, and of {other}: keep those of one.")
    keys: set[str] = set()
    for line in lines:
        if (key := picture_key(line.file_name)) in keys:
            raise UserError(f"{path} has two lines with the file name {line.file_name}: keep one.")
        keys.add(key)
    return PromptFile(path, lines, *sources[0])


def picture_key(file_name: str) -> str:
    """Path of a picture, without a suffix of pictures, by which its file is found."""
    path = PurePosixPath(file_name)
    return same_name(str(path.with_suffix("") if is_picture(file_name) else path))


def _line_from_json(line: Any, numbers: Iterator[int]) -> PromptLine:
    """One line, checked; its scene is checked where it is judged."""
    if not isinstance(line, dict):
        raise ValueError("it is no JSON object")
    kind = line.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ValueError(f"its kind is {kind!r}, none of {', '.join(KINDS)}")
    if not isinstance(line["prompt"], str):
        raise ValueError(f"its prompt is {line['prompt']!r}, not text")
    level = line.get("level")
    if level is not None and not isinstance(level, str):
        raise ValueError(f"its level is {level!r}, not text")
    number = next(numbers)
    return PromptLine(
        _checked_name(line.get("file_name", _name(kind, number))),
        line["prompt"],
        kind,
        _whole(line, "seed"),
        _whole(line, "index"),
        level,
    )


def _source(line: dict[str, Any]) -> tuple[str | None, int | None, int | None]:
    """Data set, its seed, and size of the pictures of a line."""
    data = line.get("data")
    if data is not None and not isinstance(data, str):
        raise ValueError(f"its data is {data!r}, not text")
    return data, _whole(line, "data_seed"), _whole(line, "size")


def _whole(line: dict[str, Any], name: str) -> int | None:
    """A whole number from 0 to the last seed, or None."""
    value = line.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < NUM_SEEDS):
        raise ValueError(f"its {name} is {value!r}, not a whole number from 0")
    return value


def _checked_name(name: Any) -> str:
    """A file name that stays inside of its folder on every system."""
    if not isinstance(name, str) or not PurePosixPath(name).name or "\0" in name:
        raise ValueError(f"its file_name is {name!r}, not the name of a file")
    windows = PureWindowsPath(name)
    if name.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"its file_name {name!r} leads out of the folder of pictures")
    return name
