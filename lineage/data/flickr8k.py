"""`flickr8k:PATH`: Flickr8k (Hodosh et al. 2013), five captions for each of 8,091 pictures.

The original form:
    Flicker8k_Dataset/1000268201_693b08cb0e.jpg     so spelt; also one folder deeper
    Flickr8k.token.txt             1000268201_693b08cb0e.jpg#0<TAB>A child in a pink dress ...
    Flickr_8k.trainImages.txt      names, one a line; also devImages and testImages
The form of Kaggle:
    Images/1000268201_693b08cb0e.jpg
    captions.txt                   image,caption     a table with a head

Pictures are found by their names, in any folder. Where both forms lie below PATH, the original is
read. Splits are those of the lists, which may lie beside either form; a picture in no list is left
out (92 of the real set are). Without lists a tenth is `validation` and a tenth `test`, by name.

An example's id is the picture's name without the suffix; its label is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from posixpath import basename

from lineage.characters import decoded, plain, same_name
from lineage.data.contract import Skipped
from lineage.data.records import Record, clean_captions, is_picture, with_unique_ids
from lineage.data.splits import seeded_split
from lineage.data.tables import read_table
from lineage.errors import UserError
from lineage.files import read_regular

LAYOUT_HINT = "the folder needs Flickr8k.token.txt or captions.txt, and the pictures."
OPTIONS = {"splits": ("list",)}
TOKENS, TABLE = "Flickr8k.token.txt", "captions.txt"
HEAD = ("image", "caption")
LISTS = {
    "Flickr_8k.trainImages.txt": "train",
    "Flickr_8k.devImages.txt": "validation",
    "Flickr_8k.testImages.txt": "test",
}
MAX_BYTES = 100_000_000


def resembles(root: Path, files: list[str]) -> bool:
    """Whether the original table, or one of its lists, is among the files; or Kaggle's form."""
    names = {basename(file) for file in files if file.endswith((TOKENS, *LISTS))}
    if names & {TOKENS, *LISTS}:
        return True
    return any(_is_kaggle(file, files) for file in files)


def _is_kaggle(file: str, files: list[str]) -> bool:
    """Whether a file is `captions.txt` beside a folder `Images`."""
    if not file.endswith(TABLE) or basename(file) != TABLE:
        return False
    images = str(PurePosixPath(file).with_name("Images")) + "/"
    return any(other.startswith(images) for other in files)


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of the captions; what is left out is added to `skipped`.

    Raises:
        UserError: There is no table of captions, or the lists are asked for and are missing.
    """
    table = next((f for f in files if basename(f) == TOKENS), None)
    original = table is not None
    table = table or next((f for f in files if basename(f) == TABLE), None)
    if table is None:
        raise UserError(
            f"This looks like Flickr8k, but its captions are missing: {TOKENS}, of "
            f"Flickr8k_text.zip, or {TABLE}, of Kaggle."
        )
    splits = {} if options.get("splits") == "seeded" else _splits(root, files, skipped)
    if options.get("splits") == "list" and not splits:
        raise UserError(f"{plain(root)} has no {', '.join(LISTS)}; leave out splits=list.")
    captions: dict[str, list[str]] = {}
    rows = _tokens(root, table, skipped) if original else _table(root, table, skipped)
    for name, caption in rows:
        captions.setdefault(same_name(name), []).append(caption)
    pictures: dict[str, str] = {}
    for file in files:
        if is_picture(file):
            pictures.setdefault(same_name(basename(file)), file)
    records = []
    for name, texts in captions.items():
        path = pictures.get(name)
        if path is None:
            skipped.append(Skipped(name, f"the picture is missing (captions in {table})"))
        elif not (own := clean_captions(texts)):
            skipped.append(Skipped(path, f"the picture has no caption ({table})"))
        elif splits and name not in splits:
            skipped.append(Skipped(path, "the picture is in none of the lists of splits"))
        else:
            stem = PurePosixPath(name).stem
            records.append(Record(stem, path, own, None, splits.get(name) or seeded_split(stem)))
    others = [file for name, file in pictures.items() if name not in captions]
    skipped += [Skipped(file, f"no line of {table} names this picture") for file in others]
    return with_unique_ids(records)


def _splits(root: Path, files: list[str], skipped: list[Skipped]) -> dict[str, str]:
    """Split of each picture that a list names."""
    splits: dict[str, str] = {}
    for file in files:
        if split := LISTS.get(basename(file)):
            for _, name in _lines(root, file, skipped):
                if splits.setdefault(same_name(name), split) != split:
                    reason = f"it is in {splits[same_name(name)]} too, and stays there ({file})"
                    skipped.append(Skipped(name, reason))
    return splits


def _tokens(root: Path, file: str, skipped: list[Skipped]) -> Iterator[tuple[str, str]]:
    """Picture and caption of each line of the original table."""
    for number, line in _lines(root, file, skipped):
        key, tab, caption = line.partition("\t")
        name, mark, order = key.rpartition("#")
        if tab and mark and order.isdecimal() and name:
            yield name, caption
        else:
            reason = f"line {number} is not name#number, a tab and a caption"
            skipped.append(Skipped(file, reason))


def _table(root: Path, file: str, skipped: list[Skipped]) -> Iterator[tuple[str, str]]:
    """Picture and caption of each row of Kaggle's table."""
    for row in read_table(root, file, skipped, is_csv=True):
        name, caption = (row.values.get(column) for column in HEAD)
        if isinstance(name, str) and isinstance(caption, str):
            yield name.strip(), caption
        else:
            skipped.append(Skipped(row.where, "the row has no image or no caption"))


def _lines(root: Path, file: str, skipped: list[Skipped]) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    try:
        text = decoded(read_regular(root / file, MAX_BYTES))
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start + 1}); save the file as UTF-8"
        skipped.append(Skipped(file, reason))
        return
    except OSError as error:
        skipped.append(Skipped(file, f"it cannot be read: {error.strerror}"))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()
