"""What studies of composition share: prompts of the evaluation, verdicts on a system's pictures,
and tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lineage.data import load_dataset
from lineage.data.contract import to_bytes
from lineage.evaluation import sections
from lineage.evaluation.judge import Judge
from lineage.evaluation.prompts import Prompt
from lineage.evaluation.real import PromptSet, prompt_set
from lineage.files import write_bytes
from lineage.sheets import picture, save_picture
from lineage.system import System


def prompts_of(data: str, size: int, every: int = 1) -> PromptSet:
    """The prompts of a data set, such as `shapes:easy:en`, or one in `every` of them."""
    prompts = prompt_set(load_dataset(data, "validation", size), None, Judge.load(), seed=0)
    assert prompts is not None, f"{data} is not shapes"
    return replace(prompts, prompts=prompts.prompts[::every])


def verdicts(system: System, prompts: PromptSet, seed: int = 0) -> list[dict[str, bool]]:
    """Verdicts on one picture of each prompt."""
    pictures = to_bytes(system.generate(captions_of(prompts.prompts), seed=seed)).cpu()
    return prompts.verdicts(prompts.judge.detect(pictures))


def composition(system: System, prompts: PromptSet) -> dict[str, Any]:
    """Scores of one picture of each prompt."""
    return sections.composition(prompts.prompts, verdicts(system, prompts))


def write_pictures(folder: Path, pictures: Sequence[Tensor], captions: Sequence[str]) -> None:
    """Captioned pictures, (3, S, S) uint8 each, as an image folder."""
    lines = []
    for number, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
        name = f"{number:03d}.png"
        save_picture(picture(image), folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    write_bytes(folder / "metadata.jsonl", "".join(lines).encode())


def captions_of(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.prompt for prompt in prompts]


def cell(score: dict[str, Any], sign: str = "") -> str:
    """A score with its interval; with `sign="+"`, of a difference."""
    low, high = score["interval"]
    return f"{score['value']:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [" | ".join(map(str, row)) for row in (head, *rows)]
    return [f"| {lines[0]} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines[1:])]
