"""`cub:PATH`: Caltech-UCSD Birds 200-2011 (Wah et al. 2011), with ten captions for each picture.

    CUB_200_2011/images.txt               1 001.Black_footed_Albatross/..._0046_18.jpg
    CUB_200_2011/image_class_labels.txt   1 1
    CUB_200_2011/train_test_split.txt     1 0                1 is training, 0 is test
    CUB_200_2011/bounding_boxes.txt       1 60.0 27.0 325.0 304.0     x, y, width, height
    CUB_200_2011/images/001.Black_footed_Albatross/..._0046_18.jpg
    text_c10/001.Black_footed_Albatross/..._0046_18.txt      see `reed`

PATH is `CUB_200_2011` with the captions inside, or a folder that holds both; each may lie deeper.

Splits: where the lists of classes lie beside the captions, those of the papers, by class: 8,855
pictures of 150 classes for training and 2,933 of 50 for the test. Else `train_test_split.txt`:
5,994 and 5,794, with every class in both. `?splits=class` and `?splits=list` choose.

A picture is cropped to its bird: a square of 1.5 times the box's longer side, as StackGAN and
AttnGAN do; theirs is cut off at the picture's edges and then stretched, this one is moved inside or
made smaller. `?crop=centre` takes the picture's middle instead.

The label is the class, from 0. An example's id is `class folder/name`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import TypeVar

from lineage.characters import Names, plain
from lineage.data.contract import Skipped
from lineage.data.decoding import Box
from lineage.data.records import Record, is_picture, with_unique_ids
from lineage.data.reed import SOURCE, caption_files, class_splits, read_captions
from lineage.data.splits import class_split
from lineage.errors import UserError
from lineage.files import read_regular

T = TypeVar("T")

LAYOUT_HINT = "the folder needs CUB_200_2011 with images.txt, and text_c10 with the captions."
OPTIONS = {"splits": ("list", "class"), "crop": ("box",)}
TABLES = ("image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")
MAX_BYTES = 100_000_000
MARGIN = 1.5
"""Side of the crop as a multiple of the box's longer side."""


def resembles(root: Path, files: list[str]) -> bool:
    """Whether the files are those of CUB: its list of pictures beside one of its tables."""
    there = set(files)
    lists = [file for file in files if file.endswith("images.txt")]  # of a million, few are left
    return any(_beside(file) & there for file in lists if basename(file) == "images.txt")


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of `images.txt`; what is left out is added to `skipped`.

    Raises:
        UserError: A table without which nothing can be read is missing.
    """
    there = set(files)
    lists = [file for file in files if basename(file) == "images.txt"]
    if not lists:
        raise UserError(
            f"{plain(root)} is not CUB-200-2011: images.txt, from CUB_200_2011.tgz, is missing."
        )
    base = PurePosixPath(next((f for f in lists if _beside(f) & there), lists[0])).parent
    texts = caption_files(files, skipped)
    if not texts:
        raise UserError(f"This looks like CUB, but text_c10 is missing: put {SOURCE} beside it.")
    table = Tables(root, base, there, skipped)
    names = table.read("images.txt", _name)
    classes = class_splits(root, files, skipped)
    wish = options.get("splits", "class" if classes else "list")
    flags: dict[int, str] = {}
    if wish == "class":
        classes = classes or class_split(name.partition("/")[0] for name in names.values())
    elif wish == "list":
        flags = table.read("train_test_split.txt", _flag)
        if not flags:
            raise UserError(
                "This looks like CUB, but train_test_split.txt, of its archive, is missing; "
                "?splits=class or ?splits=seeded does without."
            )
    labels = table.read("image_class_labels.txt", _label)
    boxes = table.read("bounding_boxes.txt", _box) if options.get("crop", "box") == "box" else {}
    if options.get("crop") == "box" and not boxes:
        raise UserError("crop=box needs bounding_boxes.txt beside images.txt; use crop=centre.")

    records, listed = [], set()
    pictures, keys = Names(files), Names(texts)
    for number, name in names.items():
        path = pictures.find(str(base / "images" / name))
        key = keys.find(str(PurePosixPath(name).with_suffix("")))
        folder = name.partition("/")[0]
        if path in listed:
            skipped.append(Skipped(path, "a second line of images.txt names this picture"))
        elif path not in there:
            skipped.append(Skipped(path, "the picture is missing (images.txt)"))
        elif key not in texts:
            skipped.append(Skipped(path, "a picture without captions: it has no file in text_c10"))
        elif wish == "list" and number not in flags:
            skipped.append(Skipped(path, "train_test_split.txt does not list this picture"))
        elif wish == "class" and folder not in classes:
            skipped.append(Skipped(path, "the class is in no list of classes"))
        elif boxes and number not in boxes:
            skipped.append(Skipped(path, "bounding_boxes.txt does not list this picture"))
        elif isinstance(captions := read_captions(root, texts.pop(key)), Skipped):
            skipped.append(captions)
        else:
            split = classes[folder] if wish == "class" else flags.get(number, "train")
            label = labels.get(number, _label([folder.partition(".")[0]]))
            meta = {"class": plain(folder)}
            box = boxes.get(number)
            records.append(Record(key, path, captions, label, split, meta, box))
        listed.add(path)
    inside = f"{base}/images/".removeprefix("./")
    for file in files:
        if file.startswith(inside) and is_picture(file) and file not in listed:
            skipped.append(Skipped(file, "no line of images.txt names this picture"))
    skipped += [Skipped(file, "captions without a picture") for file in texts.values()]
    return with_unique_ids(records)


def _beside(file: str) -> set[str]:
    """Paths of the tables that lie beside a list of pictures."""
    return {str(PurePosixPath(file).with_name(table)) for table in TABLES}


class Tables:
    """The tables of CUB: fields separated by blanks, of which the first is a picture's number."""

    def __init__(
        self, root: Path, base: PurePosixPath, files: set[str], skipped: list[Skipped]
    ) -> None:
        self.root, self.base, self.files, self.skipped = root, base, files, skipped

    def read(self, name: str, value: Callable[[list[str]], T | None]) -> dict[int, T]:
        """Values of a table by the pictures' numbers; a line without one is reported.

        Args:
            name: Name of the table. If it is missing, there are no values.
            value: Function from the fields after the number to a value, None for other fields.
        """
        file = str(self.base / name)
        values: dict[int, T] = {}
        if file not in self.files:
            return {}
        try:
            text = read_regular(self.root / file, MAX_BYTES).decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            self.skipped.append(Skipped(file, f"the table cannot be read: {error.strerror}"))
            return {}
        for line, row in enumerate(text.split("\n"), start=1):
            number, *fields = row.split() or [""]
            content = value(fields) if re.fullmatch("[0-9]{1,9}", number) else None
            if content is not None:
                values.setdefault(int(number), content)
            elif row.strip():
                self.skipped.append(Skipped(file, f"line {line} is no line of this table"))
        return values


def _name(fields: list[str]) -> str | None:
    """Path of a picture: a folder and a name."""
    parts = PurePosixPath(" ".join(fields)).parts
    return "/".join(parts) if len(parts) > 1 and parts[-1] != ".." else None


def _flag(fields: list[str]) -> str | None:
    return {"0": "test", "1": "train"}.get(" ".join(fields))


def _label(fields: list[str]) -> int | None:
    """Class from 0 of a number from 1."""
    return int(fields[0]) - 1 if re.fullmatch("0{0,9}[1-9][0-9]{0,8}", " ".join(fields)) else None


def _box(fields: list[str]) -> Box | None:
    """Square around a bird (left, top, right, bottom); it may leave the picture."""
    if not all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{0,9})?", field) for field in fields):
        return None
    try:
        x, y, width, height = map(float, fields)
    except ValueError:  # another number of fields
        return None
    half = MARGIN * max(width, height) / 2
    if not half:
        return None
    return x + width / 2 - half, y + height / 2 - half, x + width / 2 + half, y + height / 2 + half
