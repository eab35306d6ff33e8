"""`folder:PATH`: pictures, each with a text file of the same name beside it.

    dogs/rex.jpg      a picture (.png .jpg .jpeg .bmp .webp .gif)
    dogs/rex.txt      its captions in UTF-8, one on each line that is not blank

Folders may be nested. An example's id is its path without the suffix, `dogs/rex`, so that equal
names in different folders do not collide. All examples belong to the split `train`. Hidden files
and files of other kinds are ignored.

Left out and reported: a picture without a text, a text without a picture, a text that is empty or
not UTF-8, a picture that cannot be decoded, and a second picture with the same id (`rex.png` beside
`rex.jpg`).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from lineage.data.contract import Skipped
from lineage.data.pictures import (
    PictureDataset,
    Record,
    clean_captions,
    is_picture,
    list_files,
    open_root,
)

LAYOUT_HINT = (
    "put a text file of the same name beside each picture (cat.png and cat.txt, one caption a "
    "line), or a metadata.jsonl into the folder."
)


def load(path: str, split: str = "train", size: int = 32) -> PictureDataset:
    """Read a folder of pictures and texts.

    Raises:
        UserError: The folder or the split does not exist, or nothing in it can be loaded.
    """
    root = open_root(path)
    skipped: list[Skipped] = []
    records = read(root, skipped)
    return PictureDataset(f"folder:{path}", root, records, split, size, skipped, LAYOUT_HINT)


def read(root: Path, skipped: list[Skipped]) -> list[Record]:
    """Records of a folder, sorted by id; files that are left out are added to `skipped`."""
    files = list_files(root, skipped)
    pictures = _by_key([f for f in files if is_picture(f)], "picture", skipped)
    texts = _by_key([f for f in files if f.lower().endswith(".txt")], "text", skipped)
    for key in sorted(texts.keys() - pictures.keys()):
        skipped.append(Skipped(texts[key], "a text without a picture of the same name"))
    records = []
    for key, picture in sorted(pictures.items()):
        if key not in texts:
            name = PurePosixPath(key).name
            skipped.append(Skipped(picture, f"a picture without captions: {name}.txt is missing"))
            continue
        captions = _captions(root, texts[key], skipped)
        if captions:
            records.append(Record(key, picture, captions))
    return records


def _by_key(paths: list[str], what: str, skipped: list[Skipped]) -> dict[str, str]:
    """Paths by their path without suffix: the first of each; the others are reported."""
    by_key: dict[str, str] = {}
    for path in paths:
        key = str(PurePosixPath(path).with_suffix(""))
        if key in by_key:
            name = PurePosixPath(by_key[key]).name
            skipped.append(Skipped(path, f"a second {what} of the same name; {name} is used"))
        else:
            by_key[key] = path
    return by_key


def _captions(root: Path, path: str, skipped: list[Skipped]) -> tuple[str, ...]:
    """Captions in a text file; if it has none, the reason is added to `skipped`."""
    try:
        text = (root / path).read_text(encoding="utf-8-sig")  # any line ending arrives as \n
    except UnicodeDecodeError as error:
        reason = f"the captions are not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        skipped.append(Skipped(path, reason))
        return ()
    except OSError as error:
        skipped.append(Skipped(path, f"the captions cannot be read: {error.strerror}"))
        return ()
    captions = clean_captions(text.split("\n"))
    if not captions:
        skipped.append(Skipped(path, "the file has no caption; write one on each line"))
    return captions
