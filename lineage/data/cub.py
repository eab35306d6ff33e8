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

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from lineage.characters import plain
from lineage.data.contract import Skipped
from lineage.data.pictures import Box, Record
from lineage.data.reed import SOURCE, caption_files, class_splits, read_captions
from lineage.data.splits import class_split
from lineage.errors import UserError
from lineage.files import read_regular

LAYOUT_HINT = "the folder needs CUB_200_2011 with images.txt, and text_c10 with the captions."
OPTIONS = {"splits": ("list", "class"), "crop": ("box",)}
TABLES = ("image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")
MAX_BYTES = 100_000_000
MARGIN = 1.5
"""Side of the crop as a multiple of the box's longer side."""


def resembles(root: Path, files: list[str]) -> bool:
    """Whether the files are those of CUB: its list of pictures beside one of its tables."""
    lists = [file for file in files if PurePosixPath(file).name == "images.txt"]
    beside = {str(PurePosixPath(file).with_name(table)) for file in lists for table in TABLES}
    return not beside.isdisjoint(files)


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of `images.txt`; what is left out is added to `skipped`.

    Raises:
        UserError: A table without which nothing can be read is missing.
    """
    there, texts = set(files), caption_files(files)
    lists = [file for file in files if PurePosixPath(file).name == "images.txt"]
    if not lists:
        raise UserError(
            f"{plain(root)} is not CUB-200-2011: images.txt, from CUB_200_2011.tgz, is missing."
        )
    if not texts:
        raise UserError(f"This looks like CUB, but text_c10 is missing: put {SOURCE} beside it.")
    base = PurePosixPath(lists[0]).parent
    table = Tables(root, base, there, skipped)
    classes = class_splits(root, files, skipped)
    by_class = options.get("splits") == "class" or ("splits" not in options and bool(classes))
    flags = {} if by_class else dict(table.rows("train_test_split.txt", 1))
    if not by_class and "splits" not in options and not flags:
        raise UserError("This looks like CUB, but train_test_split.txt, from its archive, is gone.")
    labels = dict(table.rows("image_class_labels.txt", 1))
    boxes = dict(table.rows("bounding_boxes.txt", 4)) if options.get("crop", "box") == "box" else {}
    if "crop" in options and options["crop"] == "box" and not boxes:
        raise UserError("crop=box needs bounding_boxes.txt beside images.txt; take crop=centre.")
    names = [(number, fields[0]) for number, fields in table.rows("images.txt", 1)]
    if by_class:
        classes = classes or class_split(PurePosixPath(name).parts[0] for _, name in names)

    records, used = [], set()
    for number, name in names:
        path, key = str(base / "images" / name), str(PurePosixPath(name).with_suffix(""))
        if path not in there:
            skipped.append(Skipped(path, f"the picture is missing ({lists[0]})"))
            continue
        used.add(path)
        if key not in texts:
            skipped.append(Skipped(path, "a picture without captions: it has no file in text_c10"))
            continue
        captions = read_captions(root, texts.pop(key))
        if isinstance(captions, Skipped):
            skipped.append(captions)
            continue
        folder = PurePosixPath(name).parts[0]
        split = "train" if flags.get(number, ("1",))[0] == "1" else "test"
        records.append(
            Record(
                id=plain(key),
                path=path,
                captions=captions,
                label=_label(labels.get(number), folder),
                split=classes.get(folder, "train") if by_class else split,
                meta={"class": plain(folder)},
                box=_box(boxes.get(number)),
            )
        )
    skipped += [Skipped(file, "captions without a picture") for file in texts.values()]
    return records


class Tables:
    """The tables of CUB: fields separated by blanks, of which the first is a picture's number."""

    def __init__(
        self, root: Path, base: PurePosixPath, files: set[str], skipped: list[Skipped]
    ) -> None:
        self.root, self.base, self.files, self.skipped = root, base, files, skipped

    def rows(self, name: str, count: int) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Number and `count` further fields of each line; a line without them is reported."""
        file = str(self.base / name)
        if file not in self.files:
            return
        try:
            text = read_regular(self.root / file, MAX_BYTES).decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            self.skipped.append(Skipped(file, f"the table cannot be read: {error.strerror}"))
            return
        for line, row in enumerate(text.splitlines(), start=1):
            parts = row.strip().split(maxsplit=1) if count == 1 else row.split()
            if not parts:
                continue
            number, *fields = parts
            if number.isdecimal() and len(number) < 19 and len(fields) == count:
                yield int(number), tuple(fields)
            else:
                self.skipped.append(Skipped(file, f"line {line} is not a number and {count} more"))


def _label(fields: tuple[str, ...] | None, folder: str) -> int | None:
    """Class from 0: of the table, or of the folder's number (`001.Black_footed_Albatross`)."""
    number = fields[0] if fields else folder.partition(".")[0]
    return int(number) - 1 if number.isdecimal() and len(number) < 19 else None


def _box(fields: tuple[str, ...] | None) -> Box | None:
    """Square around a bird (left, top, right, bottom); it may leave the picture."""
    if fields is None:
        return None
    try:
        x, y, width, height = map(float, fields)
    except ValueError:
        return None
    half = MARGIN * max(width, height) / 2
    if not 0 < half < 1e6:
        return None
    return x + width / 2 - half, y + height / 2 - half, x + width / 2 + half, y + height / 2 + half
