"""Pictures that another program drew for our prompts: a folder of files -> tensors.

Which file belongs to which line of a file of prompts (see `prompt_files`), by the first of these
rules that applies:

    pictures.json    a file of the folder: {"file name": "prompt"}, or a list of
                     {"file_name": ..., "prompt": ...}; several pictures of one prompt are taken in
                     its order
    file names       those of the lines, with any suffix of a picture
    order            the order of the files' names (2.png before 10.png), if there are as many files
                     as lines
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lineage.bounds import is_number
from lineage.characters import decoded, plain, same_name
from lineage.data.contract import Skipped
from lineage.data.decoding import decode, shown_size, why_broken
from lineage.data.records import is_picture, list_files
from lineage.errors import UserError
from lineage.evaluation.prompt_files import PromptFile, PromptLine, picture_key
from lineage.evaluation.prompts import KINDS
from lineage.evaluation.scoring import GeneratedPictures
from lineage.files import expanded, read_regular

LIST = "pictures.json"
MAX_LIST = 100_000_000  # bytes of that file
SHOWN_SIZES = 3  # sizes of pictures that a sentence names


@dataclass(frozen=True)
class OutsidePictures:
    """The pictures of a folder.

    Attributes:
        folder: The folder.
        pictures: Its pictures, at the size of the data.
        protocol: How they were read, for the document.
        warnings: What a reader of the scores must know.
    """

    folder: Path
    pictures: GeneratedPictures
    protocol: dict[str, Any]
    warnings: list[str]

    @property
    def name(self) -> str:
        """Name of the folder, which stands for the program that drew the pictures."""
        return Path(os.path.abspath(self.folder)).name or "pictures"


def split_pictures(pictures: Any) -> tuple[dict[str, Any], list[Path]]:
    """Number of pictures, as a field of `EvalConfig`, and folders of pictures.

    Args:
        pictures: None, a number, a folder, or a list of these; text that is written as a number is
            one.

    Raises:
        UserError: there are two numbers, or a number beside a folder.
    """
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    folders = [one for one in listed if _is_folder(one)]
    counts = [one for one in listed if not _is_folder(one) and one is not None]
    if len(counts) > 1:
        raise UserError(f"--pictures has two numbers, {counts[0]} and {counts[1]}: leave one out.")
    if counts and folders:
        raise UserError(
            f"--pictures {counts[0]} has no effect beside the folder {folders[0]}, because the "
            "file of prompts says how many there are: leave it out (a folder of that name is "
            f"./{counts[0]})."
        )
    paths = [expanded(one, "--pictures") for one in folders]
    return ({"pictures": counts[0]} if counts else {}), paths


def _is_folder(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and not is_number(value))


# --- which file belongs to which line -------------------------------------------------------------


@dataclass(frozen=True)
class Assignment:
    """A file of the folder for each line.

    Attributes:
        files: Paths below the folder, one for each line.
        rule: How they were found, for the protocol.
        unused: Pictures that belong to no line.
    """

    files: list[str]
    rule: str
    unused: list[str]


def assign(folder: Path, lines: Sequence[PromptLine], source: Path) -> Assignment:
    """The file of each line.

    Args:
        folder: Folder of pictures.
        lines: Lines of the file of prompts.
        source: That file, for sentences.

    Raises:
        UserError: the folder does not exist, or a line has no file, or several.
    """
    if not os.path.exists(folder):
        raise UserError(
            f"There is no folder {folder}: --pictures takes a number of pictures to draw, or a "
            "folder of pictures."
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: --pictures takes a folder of pictures.")
    skipped: list[Skipped] = []
    every = list_files(folder, skipped)
    if skipped:
        raise UserError(f"{folder}/{skipped[0].path}: {skipped[0].reason}.")
    files = [name for name in every if is_picture(name)]
    if not files:
        raise UserError(f"{folder} holds no pictures: draw those of {source} into it.")
    by_key: dict[str, list[str]] = {}
    for name in files:
        by_key.setdefault(picture_key(name), []).append(name)
    if LIST in every:
        found, rule = _by_list(folder, files, lines, source), f"by {LIST}"
    elif any(picture_key(line.file_name) in by_key for line in lines):
        found, rule = _by_name(folder, by_key, lines, source), "by file names"
    elif len(files) == len(lines):
        found, rule = sorted(files, key=_natural), "by the order of file names"
    else:
        raise UserError(
            f"The {len(files):,} pictures of {folder} have none of the names in {source}, such as "
            f"{lines[0].file_name}, and are not as many as its {len(lines):,} lines: name them so, "
            f"or add a {LIST}."
        )
    return Assignment(found, rule, sorted(set(files) - set(found)))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Key of the order in which 2.png stands before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _missing(folder: Path, missing: Sequence[PromptLine], count: int, source: Path) -> UserError:
    """The error for lines without a picture, of `count` lines."""
    first = missing[0]
    return UserError(
        f"{folder} lacks {len(missing):,} of the {count:,} pictures of {source}, the first is "
        f"{first.file_name} ({first.prompt!r:.80}): draw them, or leave out all lines of a kind."
    )


def _by_name(
    folder: Path, by_key: dict[str, list[str]], lines: Sequence[PromptLine], source: Path
) -> list[str]:
    """The files that have the lines' names."""
    found = {line: by_key.get(picture_key(line.file_name), []) for line in lines}
    if missing := [line for line in lines if not found[line]]:
        raise _missing(folder, missing, len(lines), source)
    for line, names in found.items():
        if len(names) > 1:
            raise UserError(
                f"{folder} holds {names[0]} and {names[1]}, two pictures for {line.file_name} "
                f"({line.prompt!r:.80}): keep one."
            )
    return [found[line][0] for line in lines]


def _by_list(
    folder: Path, files: Sequence[str], lines: Sequence[PromptLine], source: Path
) -> list[str]:
    """The files that `pictures.json` lists for the lines' prompts."""
    path = folder / LIST
    known = {same_name(name): name for name in files}
    of_prompt: dict[str, list[str]] = {line.prompt: [] for line in lines}
    listed: set[str] = set()
    for name, prompt in _read_list(path):
        file = known.get(same_name(name))
        if file is None:
            raise UserError(f"{path} names {name}, which is no picture of {folder}: correct it.")
        if file in listed:
            raise UserError(f"{path} names {name} twice: keep one prompt of it.")
        if prompt not in of_prompt:
            raise UserError(
                f"{path} names the prompt {prompt!r:.80}, which {source} does not have: draw the "
                "prompts of that file."
            )
        listed.add(file)
        of_prompt[prompt].append(file)
    waiting: dict[str, list[PromptLine]] = {}
    for line in lines:
        waiting.setdefault(line.prompt, []).append(line)
    for prompt, own in waiting.items():
        if len(of_prompt[prompt]) > len(own):
            raise UserError(
                f"{path} names {len(of_prompt[prompt])} pictures of {prompt!r:.80}, of which "
                f"{source} has {len(own)}: keep as many."
            )
    found: dict[PromptLine, str | None] = {}
    for prompt, own in waiting.items():
        by_key = {picture_key(listed_file): listed_file for listed_file in of_prompt[prompt]}
        named = {n: by_key[k] for n in own if (k := picture_key(n.file_name)) in by_key}
        others = iter([other for other in of_prompt[prompt] if other not in named.values()])
        found |= {line: named.get(line) or next(others, None) for line in own}
    if missing := [line for line in lines if found[line] is None]:
        raise _missing(folder, missing, len(lines), source)
    return [chosen for line in lines if (chosen := found[line])]


def _read_list(path: Path) -> list[tuple[str, str]]:
    """(file name, prompt) of each picture in a `pictures.json`."""
    try:
        content = json.loads(decoded(read_regular(path, MAX_LIST)))
        if isinstance(content, dict):
            pairs = list(content.items())
        else:
            pairs = [(entry["file_name"], entry["prompt"]) for entry in content]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError, RecursionError):
        pairs = [("", None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UserError(
            f'{path} should be {{"file name": "prompt"}}, or a list of {{"file_name": ..., '
            '"prompt": ...}.'
        )
    return pairs


# --- their pixels ---------------------------------------------------------------------------------


def read_folder(folder: Path, file: PromptFile, level: str | None, size: int) -> OutsidePictures:
    """The pictures of a folder.

    Args:
        folder: Folder of pictures.
        file: File of their prompts.
        level: Level of `shapes` whose prompts are judged; None for other data.
        size: S, side of the result in pixels.

    Raises:
        UserError: as `assign`, or a file is no picture that can be read.
    """
    of_kinds = {kind: file.of_kind(kind) for kind in KINDS}
    if level is not None:
        of_kinds[KINDS[0]] = file.prompts_of(level)
    lines = [line for of_kind in of_kinds.values() for line in of_kind]
    assignment = assign(folder, lines, file.path)
    images, sizes = _read(folder, assignment.files, size)
    parts = images.split([len(of_kind) for of_kind in of_kinds.values()])
    pictures = GeneratedPictures(*(part if len(part) else None for part in parts))
    protocol = {
        "prompts": file.path.name,
        "assigned": assignment.rule,
        "pictures": {kind: len(part) for kind, part in zip(KINDS, parts, strict=True)},
    }
    warnings = []
    if resized := _resized(sizes, size):
        protocol["resized"] = resized
        warnings.append(f"The pictures of {folder} were resized {resized} to {size} x {size}.")
    if "order" in assignment.rule:
        first, last = ((assignment.files[n], lines[n].prompt) for n in (0, -1))
        warnings.append(
            f"The pictures of {folder} were taken in the order of their names, from {first[0]} "
            f"({first[1]!r:.80}) to {last[0]} ({last[1]!r:.80})."
        )
    if unused := assignment.unused:
        warnings.append(
            f"{len(unused):,} of the pictures of {folder} were left out, because {file.path.name} "
            f"has no line for them; the first is {unused[0]}."
        )
    if not (of_kinds["caption"] and of_kinds["sample"]):
        warnings.append(
            f"{file.path.name} lacks captions or samples, so {folder} has fewer scores: `lineage "
            "prompts` writes them all."
        )
    return OutsidePictures(folder, pictures, protocol, warnings)


def _read(folder: Path, files: Sequence[str], size: int) -> tuple[Tensor, Counter[tuple[int, int]]]:
    """Pictures (N, 3, S, S) uint8, and how many files have which width and height."""
    images = np.empty((len(files), 3, size, size), np.uint8)
    sizes: Counter[tuple[int, int]] = Counter()
    bar = tqdm(files, f"reading {plain(folder.name)}", unit=" pictures", leave=False, disable=None)
    for number, name in enumerate(bar):
        path = folder / name
        try:
            sizes[shown_size(path)] += 1
            images[number] = decode(path, size)
        except Exception as error:  # Pillow raises a dozen kinds for files that are broken
            raise UserError(f"{path}: {why_broken(error, path)}.") from error
    return torch.from_numpy(images), sizes


def _resized(sizes: Counter[tuple[int, int]], size: int) -> str:
    """From which sizes pictures were resized, the most frequent first; empty if none was."""
    others = [shape for shape, _ in sizes.most_common() if shape != (size, size)]
    if not others:
        return ""
    shown = [f"{width} x {height}" for width, height in others[:SHOWN_SIZES]]
    shown += ["others"] if len(others) > SHOWN_SIZES else []
    cropped = ", the centred square of each" if any(w != h for w, h in others) else ""
    return f"from {' and '.join(shown)}{cropped}"
