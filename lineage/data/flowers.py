"""`flowers:PATH`: Oxford-102 flowers (Nilsback & Zisserman 2008), with ten captions a picture.

    jpg/image_06734.jpg                       numbers from 1
    imagelabels.mat                           `labels`: the class of each picture, from 1
    setid.mat                                 `trnid`, `valid`, `tstid`: numbers of the pictures
    text_c10/class_00001/image_06734.txt      see `reed`

Splits: where the lists of classes lie beside the captions, those of the papers, by class: 7,034
pictures of 82 classes for training and 1,155 of 20 for the test. Else `setid.mat`: 1,020 for
training, 1,020 for validation and 6,149 for the test, of every class. `?splits=class` and
`?splits=list` choose.

The label is the class, from 0. An example's id is the picture's name. The two tables are MATLAB's,
which SciPy reads (`pip install 'lineage-t2i[metrics]'`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from posixpath import basename

from lineage.characters import plain
from lineage.data.contract import Skipped
from lineage.data.records import Record, is_picture, with_unique_ids
from lineage.data.reed import SOURCE, caption_files, class_splits, read_captions
from lineage.data.splits import class_split
from lineage.errors import UserError
from lineage.files import read_regular

LAYOUT_HINT = "the folder needs jpg, imagelabels.mat, setid.mat, and text_c10 with the captions."
OPTIONS = {"splits": ("list", "class")}
SETS = {"trnid": "train", "valid": "validation", "tstid": "test"}
HOME = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
MAX_BYTES = 10_000_000
_NAME = re.compile(r"image_([0-9]{1,9})")


def resembles(root: Path, files: list[str]) -> bool:
    """Whether one of the two tables of Oxford-102 is among the files."""
    tables = [file for file in files if file.endswith(".mat")]
    return any(basename(file) in ("imagelabels.mat", "setid.mat") for file in tables)


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of the pictures' numbers; what is left out is added to `skipped`.

    Raises:
        UserError: A file without which nothing can be read is missing or broken, or SciPy is.
    """
    texts: dict[str, str] = {}
    for key, file in caption_files(files, skipped).items():
        if texts.setdefault(key.rpartition("/")[2], file) != file:
            skipped.append(Skipped(file, "the captions in another class folder are used"))
    if not texts:
        raise UserError(
            f"These look like flowers, but text_c10 is missing: put {SOURCE} beside them."
        )
    folders = {name: PurePosixPath(file).parts[-2] for name, file in texts.items()}
    labels = read_mat(root, files, "imagelabels.mat", ("labels",))["labels"]
    classes = class_splits(root, files, skipped)
    wish = options.get("splits", "class" if classes else "list")
    sets = _sets(root, files, skipped) if wish == "list" else {}
    if wish == "class":
        classes = classes or class_split(folders.values())

    records = []
    numbers = {file: _number(file) for file in files if is_picture(file)}
    for path, number in sorted(numbers.items(), key=lambda item: (item[1] or 0, item[0])):
        name = PurePosixPath(path).stem
        if number is None:
            skipped.append(Skipped(path, "the picture has no name such as image_00001.jpg"))
        elif name not in texts:
            skipped.append(Skipped(path, "a picture without captions: it has no file in text_c10"))
        elif not 1 <= number <= len(labels) or not 1 <= labels[number - 1] < 2**31:
            skipped.append(Skipped(path, "imagelabels.mat has no class for this picture"))
        elif wish == "list" and number not in sets:
            skipped.append(Skipped(path, "setid.mat does not list this picture"))
        elif wish == "class" and folders[name] not in classes:
            skipped.append(Skipped(path, "the class is in no list of classes"))
        elif isinstance(captions := read_captions(root, texts.pop(name)), Skipped):
            skipped.append(captions)
        else:
            folder = folders[name]
            split = classes[folder] if wish == "class" else sets.get(number, "train")
            meta = {"class": plain(folder)}
            label = labels[number - 1] - 1
            records.append(Record(name, path, captions, label, split, meta))
    skipped += [Skipped(file, "captions without a picture") for file in texts.values()]
    return with_unique_ids(records)


def _number(path: str) -> int | None:
    """Number in a picture's name; None for another name."""
    name = _NAME.fullmatch(PurePosixPath(path).stem)
    return int(name[1]) if name else None


def _sets(root: Path, files: list[str], skipped: list[Skipped]) -> dict[int, str]:
    """Split of each picture by its number."""
    splits: dict[int, str] = {}
    for name, numbers in read_mat(root, files, "setid.mat", tuple(SETS)).items():
        for number in numbers:
            split = splits.setdefault(number, SETS[name])
            if split != SETS[name]:
                reason = f"picture {number} is in {split} too, and stays there"
                skipped.append(Skipped("setid.mat", reason))
    return splits


def read_mat(
    root: Path, files: list[str], name: str, variables: tuple[str, ...]
) -> dict[str, list[int]]:
    """Whole numbers of each variable in a MATLAB file.

    Raises:
        UserError: The file is missing or broken, lacks a variable, or SciPy is not installed.
    """
    path = next((file for file in files if basename(file) == name), None)
    if path is None:
        raise UserError(f"These look like flowers, but {name} is missing: get it from {HOME}.")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{name} is a table of MATLAB, which needs SciPy: pip install 'lineage-t2i[metrics]'."
        ) from None
    try:
        raw = loadmat(io.BytesIO(read_regular(root / path, MAX_BYTES)), variable_names=variables)
        return {key: [_whole(number) for number in raw[key].ravel()] for key in variables}
    except OSError as error:
        raise UserError(f"{plain(path)} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # of many kinds: SciPy does not check what it reads
        needs = " and ".join(variables)
        raise UserError(
            f"{plain(path)} is no table of MATLAB with {needs}; get it from {HOME}."
        ) from error


def _whole(number: object) -> int:
    """A whole number of a table; raises `ValueError` for another value."""
    value = float(str(number))
    if not value.is_integer():
        raise ValueError(f"{number} is no whole number")
    return int(value)
