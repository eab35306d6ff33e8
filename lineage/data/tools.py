"""Tools for any captioned data set: a contact sheet, a check, an export to a disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from lineage.characters import plain, same_name
from lineage.data import ENDLESS, load_dataset, parse_spec
from lineage.data.contract import CaptionedDataset, Example, Skipped
from lineage.data.pictures import EmptyDatasetError, PictureDataset
from lineage.data.records import SUFFIXES
from lineage.errors import UserError
from lineage.files import expanded
from lineage.sheets import picture, sheet

SHARD = 1000
"""Number of examples in a shard that `export` writes."""


def contact_sheet(dataset: CaptionedDataset, count: int = 16, columns: int = 4) -> Image.Image:
    """A sheet of `count` pictures with their first captions below, in rows of `columns`.

    Raises:
        UserError: `count` or `columns` is less than 1.
    """
    if count < 1 or columns < 1:
        raise UserError(
            f"A sheet needs at least 1 picture and 1 column, not {count} and {columns}."
        )
    examples = dataset.showcase(count)
    return sheet([e.image for e in examples], [e.captions[0] for e in examples], columns)


def check(
    spec: str, size: int = 32, limits: Mapping[str, Callable[[str], bool]] = MappingProxyType({})
) -> dict[str, Any]:
    """Load all splits of a data set and count.

    For an endless data set it counts the nominal length of `train` and renders no picture.

    Args:
        spec: Data set.
        size: Side of the pictures in pixels.
        limits: Functions that return whether a caption is longer than some encoders read, by the
            limit's name.

    Returns:
        {"loaded": number of pictures, "captions": number of captions, "cut": {limit: number of
        longer captions}, "skipped": [{"path", "reason"}, ...]}. If the folder has files but none is
        usable, `loaded` is 0.

    Raises:
        UserError: The spec is wrong, or the folder is empty.
    """
    split = "train" if parse_spec(spec)[0] in ENDLESS else "all"
    try:
        dataset = load_dataset(spec, split, size)
        read_all(dataset)
    except EmptyDatasetError as error:
        if not error.skipped:
            raise
        return _counts(0, 0, dict.fromkeys(limits, 0), error.skipped)
    captions = list(dataset.all_captions(limit=len(dataset)))
    cut = {name: sum(map(is_longer, captions)) for name, is_longer in limits.items()}
    return _counts(len(dataset), len(captions), cut, dataset.skipped)


def read_all(dataset: CaptionedDataset, count: int | None = None) -> None:
    """Leave out what a streamed data set would find to be broken when it is due.

    Args:
        dataset: Data set; one that is not streamed has been read when it was loaded.
        count: If it is a number, a streamed data set keeps only so many records.
    """
    if isinstance(dataset, PictureDataset) and dataset.streamed:
        dataset.decode_all(count)


def _counts(
    loaded: int, captions: int, cut: dict[str, int], skipped: list[Skipped]
) -> dict[str, Any]:
    files = [{"path": s.path, "reason": s.reason} for s in skipped]
    return {"loaded": loaded, "captions": captions, "cut": cut, "skipped": files}


def export(
    dataset: CaptionedDataset,
    folder: str | Path,
    count: int | None = None,
    form: str = "imagefolder",
) -> int:
    """Write a data set in the Hugging Face layout, `images/*.png` and `metadata.jsonl`, or as
    WebDataset, `SPLIT-00000.tar` and so on.

    `imagefolder:` and `wds:` load it again with the same pixels, captions, labels and splits. The
    files are written to a hidden folder that is renamed to `folder` at the end, so that `folder`
    never holds a part of a data set.

    Args:
        dataset: Data set to write.
        folder: Folder that does not exist, or is empty.
        count: Largest number of examples; None for all, or the nominal length of an endless one.
        form: `imagefolder` or `wds`.

    Returns:
        Number of examples written.

    Raises:
        UserError: The folder has contents, or cannot be written.
    """
    check_new_folder(folder, dataset)
    read_all(dataset)
    number = len(dataset) if count is None else count
    number = number if dataset.endless else min(number, len(dataset))
    if number < 1:
        raise UserError(f"An export needs at least 1 example, not {count}.")
    with new_folder(folder, dataset) as partial:
        (_write_shards if form == "wds" else _write)(dataset, partial, number)
    return number


def check_new_folder(folder: str | Path, dataset: CaptionedDataset | None = None) -> None:
    """Check that a data set can be written to a folder, before the work that fills it.

    Raises:
        UserError: The folder has contents, or lies among the files of `dataset`, so that both would
            be read as one.
    """
    target = Path(os.path.realpath(expanded(folder)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{str(folder)!r} is not empty; choose a new or an empty folder.")
    if not isinstance(dataset, PictureDataset) or not dataset.has_files:
        return
    if target.is_relative_to(os.path.realpath(dataset.root)):
        raise UserError(
            f"{str(folder)!r} lies in the data set {plain(dataset.name)}, which would then hold "
            "its pictures twice; choose a folder outside."
        )


@contextlib.contextmanager
def new_folder(folder: str | Path, dataset: CaptionedDataset | None = None) -> Iterator[Path]:
    """A hidden folder whose contents are moved to `folder` at the end, and deleted after an error.

    Raises:
        UserError: As `check_new_folder`, or the folder cannot be written.
    """
    target = Path(os.path.realpath(expanded(folder)))
    try:
        check_new_folder(folder, dataset)
        exists = target.exists()
        place = target if exists else target.parent  # a folder that exists may be a disk of its own
        place.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name[:60]}-", dir=place))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield partial
        if exists:
            for file in partial.iterdir():
                file.rename(target / file.name)
        else:
            partial.chmod(0o777 & ~_umask())  # mkdtemp allows only the owner
            partial.rename(target)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(folder: str | Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"The data set cannot be written to {str(folder)!r}: {reason}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(dataset: CaptionedDataset, folder: Path, number: int) -> None:
    """Write pictures and metadata of the first `number` examples into an empty folder."""
    (folder / "images").mkdir()
    taken: dict[str, int] = {}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as metadata:
        for index in range(number):
            example = dataset[index]
            path = f"images/{file_name(example.id, taken)}.png"
            picture(example.image).save(folder / path)
            metadata.write(json_line(metadata_row(example, path, dataset.split)))


def _write_shards(dataset: CaptionedDataset, folder: Path, number: int) -> None:
    """Write the first `number` examples as shards of each split into an empty folder."""
    archives: dict[str, tarfile.TarFile] = {}
    counts: Counter[str] = Counter()
    taken: dict[str, int] = {}
    try:
        for index in range(number):
            example = dataset[index]
            row = metadata_row(example, "", dataset.split)
            split = re.sub(r"[^A-Za-z]", "", str(row["split"])) or "train"
            if counts[split] % SHARD == 0:
                if split in archives:
                    archives[split].close()
                name = f"{split}-{counts[split] // SHARD:05d}.tar"
                archives[split] = tarfile.open(folder / name, "w")  # noqa: SIM115 - closed below
            counts[split] += 1
            png = io.BytesIO()
            picture(example.image).save(png, "PNG")
            values = {key: value for key, value in row.items() if key != "file_name"}
            members = {
                "png": png.getvalue(),
                "json": json.dumps(values, ensure_ascii=False).encode(),
            }
            key = file_name(example.id, taken).replace(".", "_")
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                archives[split].addfile(info, io.BytesIO(content))
    finally:
        for archive in archives.values():
            archive.close()


def metadata_row(example: Example, path: str, split: str) -> dict[str, Any]:
    """One line of the metadata; the split in an example's `meta` goes before `split`."""
    meta = {key: value for key, value in example.meta.items() if _is_json(value)}
    row: dict[str, Any] = {"file_name": path, "text": example.captions[0]}
    if len(example.captions) > 1:
        row["alt_texts"] = list(example.captions[1:])
    if example.label is not None:
        row["label"] = example.label
    own = meta.pop("split", split)
    row["split"] = own if isinstance(own, str) and own.strip() else split
    return row | ({"meta": meta} if meta else {})


def json_line(row: Mapping[str, Any]) -> str:
    """A line of a .jsonl file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def picture_ending(raw: bytes) -> str:
    """Ending for a picture file with these bytes, whatever it was called; readers know it."""
    try:
        with Image.open(io.BytesIO(raw)) as image:
            name = {"MPO": ".jpg"}.get(image.format or "", f".{str(image.format).lower()}")
    except Exception:  # metadata of junk, without which the picture can be decoded
        name = ""
    return name if name in SUFFIXES else ".png"


def _is_json(value: object) -> bool:
    """Whether a value is unchanged after it is written to JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == _plain(value))
    except (TypeError, ValueError):
        return False


def _plain(value: object) -> object:
    """The value with its tuples as lists, as JSON stores them."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def file_name(example_id: str, taken: dict[str, int]) -> str:
    """An id as a file name for every operating system, which differs from all in `taken`.

    Args:
        example_id: Id.
        taken: Names so far in small letters, each with the number that its next copy gets; the new
            one is added.
    """
    safe = re.sub(r"[^\w.-]", "_", example_id).lstrip(".")[:60].rstrip(".") or "picture"
    key = same_name(safe).lower()
    name, copy = safe, taken.get(key, 1)
    while same_name(name).lower() in taken:
        copy += 1
        name = f"{safe}-{copy}"
    taken[key] = copy
    taken.setdefault(same_name(name).lower(), 1)
    return name
