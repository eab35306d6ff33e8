"""`folder:PATH`: pictures, each with a text file of the same name beside it.

    dogs/rex.jpg      a picture (.png .jpg .webp .gif and others)
    dogs/rex.txt      its captions in UTF-8, one on each line that is not blank

Folders may be nested. An example's id is its path without the suffix, `dogs/rex`, so that equal
names in different folders do not collide. Bytes of a name that are not UTF-8 are escaped in the id.
A picture and its text may write accents in different ways (`è` as one character or as two). All
examples belong to the split `train`. Hidden files and files of other kinds are ignored.

Left out and reported: a picture without a text, a text without a picture, a text that is empty, too
large or not UTF-8, a picture that cannot be decoded, a second picture with the same id (`rex.png`
beside `rex.jpg`), a table of metadata, and a folder that cannot be opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from posixpath import basename

from lineage.characters import same_name
from lineage.data.contract import Skipped
from lineage.data.pictures import STREAM_FROM
from lineage.data.records import Record, is_picture, read_captions, unique_ids
from lineage.data.tables import has_table_ending, is_misnamed, is_table, why_misnamed

OPTIONS: dict[str, tuple[str, ...]] = {}
LAYOUT_HINT = (
    "put a text file of the same name beside each picture (cat.png and cat.txt, one caption a "
    "line), or a metadata.jsonl into the folder."
)


def resembles(root: Path, files: list[str]) -> bool:
    """True: what is of no other layout is read as pictures and texts, and explained."""
    return True


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records of a folder, sorted by id; files that are left out are added to `skipped`."""
    pictures = _by_key(filter(is_picture, files), "picture", skipped)
    texts = _by_key(filter(_is_text, files), "text", skipped)
    pairs = _pairs(pictures, texts)
    for file in files:
        if is_table(file) or (pairs and is_misnamed(file)):
            reason = "a table is not read where texts hold the captions"
            hint = "; write imagefolder:PATH to read it instead" if is_table(file) else ""
            skipped.append(Skipped(file, reason + hint))
        elif not pairs and has_table_ending(file) and _key(file) not in pictures:
            skipped.append(Skipped(file, f"the table is not read: it {why_misnamed(file)[:-1]}"))
    for key in sorted(texts.keys() - set(pairs.values())):
        skipped.append(Skipped(texts[key], "a text without a picture of the same name"))
    matched: list[tuple[str, tuple[str, ...], str]] = []
    streamed = len(pairs) > STREAM_FROM
    for key, picture in sorted(pictures.items()):
        if key not in pairs:
            name = basename(key)
            skipped.append(Skipped(picture, f"a picture without captions: {name}.txt is missing"))
            continue
        text = texts[pairs[key]]
        own = () if streamed else read_captions(root, text)
        if isinstance(own, Skipped):
            skipped.append(own)
        else:
            matched.append((picture, own, "" if own else text))
    ids = unique_ids([_key(path) for path, _, _ in matched])
    return [
        Record(name, path, own, text=text)
        for name, (path, own, text) in zip(ids, matched, strict=True)
    ]


def count_pairs(files: Iterable[str]) -> int:
    """Number of pictures among the files that have a text of the same name."""
    texts = {same_name(_key(f)) for f in files if _is_text(f)}
    return sum(same_name(_key(f)) in texts for f in files if is_picture(f))


def _is_text(path: str) -> bool:
    return path[-4:].lower() == ".txt"


def _key(path: str) -> str:
    """Path without its suffix, which it has."""
    return path.rpartition(".")[0]


def _pairs(pictures: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, str]:
    """Key of the text for the key of each picture that has one.

    Where no text has exactly the picture's name, one with its accents written in another way fits.
    """
    pairs = {key: key for key in pictures if key in texts}
    others = {same_name(key): key for key in texts if key not in pairs}
    for key in pictures:
        if key not in pairs and same_name(key) in others:
            pairs[key] = others.pop(same_name(key))
    return pairs


def _by_key(paths: Iterable[str], what: str, skipped: list[Skipped]) -> dict[str, str]:
    """Paths by their path without suffix: the first of each; the others are reported."""
    by_key: dict[str, str] = {}
    for path in paths:
        key = _key(path)
        if key in by_key:
            name = basename(by_key[key])
            skipped.append(Skipped(path, f"a second {what} of the same name; {name} is used"))
        else:
            by_key[key] = path
    return by_key
