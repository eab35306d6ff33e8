"""`lineage sample --prompts`: a picture of each line of a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lineage.data.contract import to_bytes
from lineage.errors import UserError
from lineage.evaluation.prompt_files import PromptFile, PromptLine
from lineage.files import check_output
from lineage.sheets import check_picture, picture, save_picture
from lineage.system import System

T = TypeVar("T")


def draw_prompts(
    system: System, file: PromptFile, options: Mapping[str, Any], *, seed: int, out: Path
) -> None:
    """Write the picture of each line of a file of prompts, as `lineage evaluate` draws it.

    Args:
        system: System that draws.
        file: File of prompts.
        options: Options of `generate`.
        seed: Seed of lines without one; such a line has its place in the file as index.
        out: Folder of the pictures.
    """
    numbered: dict[int, list[tuple[int, PromptLine]]] = {}
    for place, line in enumerate(file.lines):
        index = place if line.index is None else line.index
        numbered.setdefault(seed if line.seed is None else line.seed, []).append((index, line))
    bar = tqdm(total=len(file.lines), desc="drawing", unit=" pictures", leave=False, disable=None)
    with bar:
        for own_seed, lines in numbered.items():
            for first, part in consecutive(lines):
                images = system.generate(
                    [line.prompt for line in part],
                    seed=own_seed,
                    first=first,
                    progress=bar.update,
                    **options,
                )
                for line, image in zip(part, to_bytes(images).cpu(), strict=True):
                    save_picture(picture(image), out / line.file_name)


def consecutive(numbered: Sequence[tuple[int, T]]) -> list[tuple[int, list[T]]]:
    """Numbered items as lists of consecutive numbers, each with its first number."""
    parts: list[tuple[int, list[T]]] = []
    for number, item in sorted(numbered, key=lambda pair: pair[0]):
        if parts and number == parts[-1][0] + len(parts[-1][1]):
            parts[-1][1].append(item)
        else:
            parts.append((number, [item]))
    return parts


def check_free(file: PromptFile, out: Path) -> None:
    """Raise `UserError` if pictures of a file of prompts cannot be written to a folder, or one is
    there.
    """
    check_output(out, folder=True)
    for line in file.lines:
        path = out / line.file_name
        if path.exists():
            raise UserError(f"{path} exists: choose another --out, or delete that picture.")
    for path in {Path(line.file_name).suffix: out / line.file_name for line in file.lines}.values():
        check_picture(path)
