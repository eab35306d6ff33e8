"""What cleaning leaves, as a data set on the disk, a page and lines of text; see `cleaning`.

images/, metadata.jsonl    the kept pictures, the bytes of their files; `imagefolder` reads them
removed.jsonl              a line for each `Removal`
cleaning.json              `CleaningResult.summary`
cleaning.html              pictures that were kept, and those of each rule
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader
from torch import Tensor

from lineage.characters import plain
from lineage.data.cleaning import CleaningResult, Removal, in_files, progress
from lineage.data.contract import CaptionedDataset
from lineage.data.tools import file_name, json_line, metadata_row, new_folder, picture_ending
from lineage.errors import UserError
from lineage.sheets import data_url, picture, sheet

T = TypeVar("T")
MAX_SHOWN = 24
"""Number of pictures of each rule on the page."""


def write(result: CleaningResult, folder: str | Path) -> None:
    """Write the files of the module's header.

    Args:
        result: Result of `clean`.
        folder: Folder that does not exist, or is empty.

    Raises:
        UserError: Nothing is kept, a picture's file cannot be read any more, or the folder has
            contents or cannot be written.
    """
    if not result.captions:
        raise UserError(f"No picture of {result.dataset.name} is left: use weaker rules.")
    with new_folder(folder, result.dataset) as partial:
        (partial / "images").mkdir()
        taken: dict[str, int] = {}
        with (partial / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as metadata:
            for index in progress(result.captions, "writing"):
                metadata.write(json_line(_write_picture(result, index, partial, taken)))
        with (partial / "removed.jsonl").open("w", encoding="utf-8", newline="\n") as removed:
            removed.writelines(json_line(_row(result, one)) for one in result.removals)
        summary = json.dumps(result.summary(), indent=1, ensure_ascii=False)
        (partial / "cleaning.json").write_text(summary + "\n", encoding="utf-8")
        (partial / "cleaning.html").write_text(page(result), "utf-8", "backslashreplace")


def _row(result: CleaningResult, removal: Removal) -> dict[str, Any]:
    """A line of removed.jsonl: what a `Removal` says, with ids in place of numbers."""
    row = {"id": removal.id, "split": removal.split, "rule": removal.rule}
    row |= {"reason": removal.reason, "caption": removal.caption}
    if removal.original is not None:
        row["original"] = result.id_of(removal.original)
    return {name: value for name, value in row.items() if value}


def _write_picture(
    result: CleaningResult, index: int, folder: Path, taken: dict[str, int]
) -> dict[str, Any]:
    """Write a picture's file; its row of the metadata."""
    dataset = result.dataset
    example = replace(dataset[index], captions=result.captions[index])
    name = file_name(example.id, taken)
    if not in_files(dataset):
        path = f"images/{name}.png"
        picture(example.image).save(folder / path)
        return metadata_row(example, path, dataset.split)
    try:
        raw = dataset.source(index)
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise UserError(f"{plain(dataset.records[index].path)} has changed: {reason}.") from error
    path = f"images/{name}{picture_ending(raw)}"
    (folder / path).write_bytes(raw)
    row = metadata_row(example, path, dataset.split)
    box = dataset.records[index].box
    return row if box is None else {**row, "crop_box": list(box)}


def page(result: CleaningResult) -> str:
    """What was kept and removed, with pictures, as one HTML page."""
    dataset = result.dataset
    kept = [(dataset[i].image, result.captions[i][0]) for i in _some([*result.captions])]
    sheets = {"kept": _sheet(kept)}
    rules = dict.fromkeys(one.rule for one in result.removals)
    for rule in rules:
        every = [one for one in result.removals if one.rule == rule and one.index is not None]
        if every:
            sheets[rule] = _sheet([cell for one in _some(every) for cell in _cells(dataset, one)])
    files = [one for one in result.removals if one.index is None]
    environment = Environment(loader=PackageLoader("lineage.data", "."), autoescape=True)
    return environment.get_template("cleaning.html").render(
        n=result.summary(), sheets=sheets, rules=rules, files=files, plain=plain
    )


def _some(values: Sequence[T]) -> Sequence[T]:
    """`MAX_SHOWN` of some values, from all parts of them."""
    return values[:: max(1, len(values) // MAX_SHOWN)][:MAX_SHOWN]


def _cells(dataset: CaptionedDataset, removal: Removal) -> Iterator[tuple[Tensor, str]]:
    """Picture and text of a removal on a sheet, and its original beside it."""
    assert removal.index is not None
    example = dataset[removal.index]
    yield example.image, f"{removal.caption or example.captions[0]}: {removal.reason}"
    if removal.original is not None:
        example = dataset[removal.original]
        yield example.image, f"kept: {example.captions[0]} ({example.id})"


def _sheet(cells: Sequence[tuple[Tensor, str]]) -> str:
    return data_url(sheet([image for image, _ in cells], [text for _, text in cells], 6))


def lines(result: CleaningResult) -> list[str]:
    """The summary as lines of text."""
    n = result.summary()
    rows = [f"{n['name']}: {n['pictures']:,} pictures, {n['captions']:,} captions"]
    rules = dict.fromkeys([*n["removed_pictures"], *n["removed_captions"]])
    for rule in rules:
        pictures, captions = (
            n[f"removed_{what}"].get(rule, 0) for what in ("pictures", "captions")
        )
        rows.append(f"  {rule}: {pictures:,} pictures, {captions:,} captions of pictures that stay")
    if not rules:
        rows.append("  nothing is removed")
    if result.rules.leaks and len(set(result.splits)) < 2:
        rows.append("  leaks: there is only one split, so nothing to compare it with")
    if n["similarity"]:
        values = ", ".join(f"{name} {value:.3f}" for name, value in n["similarity"].items())
        rows.append(f"  cosine of caption and picture, percentiles: {values}")
    splits = ", ".join(f"{name} {count:,}" for name, count in n["kept_splits"].items())
    rows.append(f"  kept: {n['kept_pictures']:,} pictures ({splits or 'none'})")
    return [plain(row) for row in rows]
