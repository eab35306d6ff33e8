"""The captions that Reed et al. (2016) collected for CUB and the flowers, ten for each picture.

    text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.txt    a caption a line
    trainvalclasses.txt, testclasses.txt     names of class folders, which the papers split by

AttnGAN's archive has the same texts in `text/`. A character that was lost in them is the
replacement character, mostly twice in a row; it is read as a blank, as AttnGAN does. The archives
also hold the captions as Lua tables (`.t7`, `.h5`) and lists as pickles; neither is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from posixpath import basename

from lineage.characters import plain
from lineage.data.contract import Skipped
from lineage.data.records import clean_captions
from lineage.files import read_regular

FOLDERS = ("text_c10", "text")
SOURCE = "the captions of Reed et al. (2016), https://github.com/reedscot/icml2016"
MAX_BYTES = 1_000_000
"""Largest size of a text file."""
_LISTS = {"trainvalclasses.txt": "train", "testclasses.txt": "test"}


def caption_files(files: Iterable[str], skipped: list[Skipped]) -> dict[str, str]:
    """Path of each text file by `class folder/name of the picture`; others of the same name are
    added to `skipped`.
    """
    texts: dict[str, str] = {}
    for file in files:
        parts = file.split("/")
        if len(parts) >= 3 and parts[-3] in FOLDERS and file.endswith(".txt"):
            key = f"{parts[-2]}/{parts[-1].removesuffix('.txt')}"
            if texts.setdefault(key, file) != file:
                skipped.append(Skipped(file, f"the captions of {texts[key]} are used"))
    return texts


def read_captions(root: Path, file: str) -> tuple[str, ...] | Skipped:
    """The captions in a text file, or why there are none."""
    try:
        raw = read_regular(root / file, MAX_BYTES)
    except OSError as error:
        return Skipped(file, f"the captions cannot be read: {error.strerror}")
    text = raw.decode("utf-8-sig", "replace").replace("\ufffd", " ")
    captions = clean_captions(" ".join(line.split()) for line in text.splitlines())
    return captions or Skipped(file, "the file has no caption; write one on each line")


def class_splits(root: Path, files: Sequence[str], skipped: list[Skipped]) -> dict[str, str]:
    """Split of each class folder: the 150 (82) classes of training, the 50 (20) of the test.

    Empty if the lists are not there.
    """
    splits: dict[str, str] = {}
    for file in files:
        split = _LISTS.get(basename(file))
        if split is None:
            continue
        try:
            text = read_regular(root / file, MAX_BYTES).decode("utf-8-sig", "replace")
        except OSError as error:
            skipped.append(Skipped(file, f"the list of classes cannot be read: {error.strerror}"))
            continue
        for name in text.split():
            if splits.setdefault(name, split) != split:
                skipped.append(Skipped(file, f"{plain(name)} is in {splits[name]} too"))
    return splits if set(splits.values()) == {"train", "test"} else {}
