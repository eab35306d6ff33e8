"""`coco:PATH`: COCO captions (Chen et al. 2015), at least five for each picture.

    annotations/captions_train2017.json    and captions_val2017.json; or 2014
    train2017/000000057870.jpg             2014: train2014/COCO_train2014_000000057870.jpg

Each JSON file has `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`), in any
order. A picture is looked for in the folder of its set, then by its name anywhere: some projects
put all pictures into one folder.

`train` is `train`, `val` is `validation`. A folder with both 2014 and 2017, which divide the same
pictures in two ways, needs `?year=2014` (the papers before 2019) or `?year=2017`.

An example's id is the picture's name; its label is None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import Any

from lineage.characters import Names, decoded, plain
from lineage.data.contract import Skipped
from lineage.data.records import Record, clean_captions, is_picture, with_unique_ids
from lineage.data.splits import split_name
from lineage.errors import UserError
from lineage.files import read_regular

LAYOUT_HINT = (
    "the folder needs annotations/captions_train2017.json and train2017 with the pictures "
    "(https://cocodataset.org), or those of val or 2014."
)
OPTIONS = {"splits": ("list",), "year": ("2014", "2017")}
MAX_BYTES = 1_000_000_000
_ANNOTATIONS = re.compile(r"captions_(train|val)(20[0-9]{2})\.json")


def resembles(root: Path, files: list[str]) -> bool:
    """Whether annotations of COCO's captions are among the files."""
    return any(_ANNOTATIONS.fullmatch(basename(f)) for f in files if f.endswith(".json"))


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of the annotations' `images`; what is left out is added to `skipped`.

    Raises:
        UserError: There are no annotations, or those of more than one year.
    """
    names = {file: _ANNOTATIONS.fullmatch(basename(file)) for file in files}
    sets = {file: (name[1], name[2]) for file, name in names.items() if name}
    if year := options.get("year"):
        sets = {file: name for file, name in sets.items() if name[1] == year}
    if not sets:
        other = next((f for f in files if basename(f).startswith("instances_")), None)
        hint = f"{plain(other)} holds objects, no captions; " if other else ""
        raise UserError(
            f"{plain(root)} is not COCO{f' of {year}' if year else ''}: {hint}{LAYOUT_HINT}"
        )
    years = sorted({year for _, year in sets.values()})
    if len(years) > 1:
        raise UserError(
            f"{plain(root)} holds COCO of {' and '.join(years)}, which divide the same pictures in "
            f"two ways: write coco:PATH?year={years[-1]}."
        )
    by_name: dict[str, str] = {}
    for file in files:
        if is_picture(file):
            by_name.setdefault(basename(file), file)
    records: list[Record] = []
    there, bases, taken = Names(files), Names(by_name), set[str]()
    for file, (part, year) in sets.items():
        document = _document(root, file, skipped)
        captions = _captions(document)
        for image in _items(document, "images"):
            number, name = image.get("id"), image.get("file_name")
            if not isinstance(name, str) or not isinstance(number, int):
                skipped.append(Skipped(file, "an entry of images has no id or no file_name"))
                continue
            path = _path(file, f"{part}{year}", name, there) or by_name.get(
                bases.find(basename(name))
            )
            texts = captions.pop(number, [])
            if path is None:
                skipped.append(Skipped(name, f"the picture is missing ({file})"))
            elif not (own := clean_captions(" ".join(text.split()) for text in texts)):
                skipped.append(Skipped(path, f"the picture has no caption ({file})"))
            elif path in taken:
                skipped.append(Skipped(path, f"a second entry names this picture ({file})"))
            else:
                taken.add(path)
                stem = PurePosixPath(name).stem
                records.append(Record(stem, path, own, None, split_name(part)))
        if captions:
            reason = "captions of pictures that images does not list"
            skipped.append(Skipped(file, f"{reason}: {len(captions):,}"))
    return with_unique_ids(records)


def _path(annotations: str, part: str, name: str, files: Names) -> str | None:
    """Path of a picture in the folder of its set, beside `annotations` or in `images`."""
    parent = PurePosixPath(annotations).parent
    base = parent.parent if parent.name == "annotations" else parent
    folders = (base / part, base / "images" / part, base / "images", base)
    options = [files.find(str(folder / name)) for folder in folders]
    return next((path for path in options if path in files), None)


def _document(root: Path, file: str, skipped: list[Skipped]) -> dict[str, Any]:
    """The object in a file of annotations; what is wrong with it is added to `skipped`."""
    try:
        document = json.loads(decoded(read_regular(root / file, MAX_BYTES)))
    except OSError as error:
        skipped.append(Skipped(file, f"the captions cannot be read: {error.strerror}"))
        return {}
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deep
        skipped.append(Skipped(file, f"the captions are not valid JSON ({plain(error)[:120]})"))
        return {}
    if not isinstance(document, dict):
        skipped.append(Skipped(file, "the captions are not an object with images and annotations"))
        return {}
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list):
            skipped.append(Skipped(file, f"it has no list {key!r}; copy it again"))
    return document


def _items(document: dict[str, Any], key: str) -> Sequence[dict[str, Any]]:
    """The objects in a list of the document."""
    items = document.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _captions(document: dict[str, Any]) -> dict[int, list[str]]:
    """Captions of each picture by its number, in the order of their own numbers.

    The files are in no order, and evaluation uses the first caption.
    """
    annotations = [
        (item["image_id"], item.get("id", 0), item["caption"])
        for item in _items(document, "annotations")
        if isinstance(item.get("image_id"), int) and isinstance(item.get("caption"), str)
        if isinstance(item.get("id", 0), int)
    ]
    captions: dict[int, list[str]] = {}
    for image_id, _, caption in sorted(annotations, key=lambda row: row[:2]):
        captions.setdefault(image_id, []).append(caption)
    return captions
