"""`wds:PATH`: WebDataset shards, tar archives of pictures with captions.

    00000.tar
        000000000.jpg    a picture (.png .jpg .webp .gif and others)
        000000000.txt    captions, one on each line that is not blank; also .cap, .caption, .text
        000000000.json   more of them, in the columns that `imagefolder` reads; the rest is `meta`
        000000000.cls    the label

PATH is a folder of shards, one shard, or a brace list: `wds:shards/{00000..00009}.tar`. A shard is
read in place, never unpacked: its members are listed once (`shard_index`), and a picture is read at
its offset when it is due. So the order is shuffled over all shards, workers and ranks read
different rows, and a run resumes at any position, as with files. A compressed archive (.tar.gz) has
no such offsets.

Members of one sample have the same name up to the first dot, in the same shard; they need not be
neighbours. Where names hold dots, so that a sample would have two pictures, the last dot counts. An
example's id is `shard/name`. Its split is the JSON's `split`; else the first folder of the shard's
path with the name of a split, or a word of the shard's name (`cc3m-val-0000.tar`); else `train`.

Left out and reported: samples without a picture or a caption, a second picture, members that are no
files, captions over 1 MB, and what comes after a shard's damaged place.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any, NamedTuple

from tqdm import tqdm

from lineage.characters import decoded, plain, same_name
from lineage.data.contract import Skipped
from lineage.data.decoding import MAX_BYTES
from lineage.data.imagefolder import captions_in, is_too_large, label_in, meta_in, split_in
from lineage.data.records import (
    MAX_TEXT,
    Record,
    clean_captions,
    is_hidden,
    is_picture,
    list_files,
    open_root,
    with_unique_ids,
)
from lineage.data.shard_index import indexed, make_room
from lineage.data.splits import SPLIT_NAMES, split_name
from lineage.data.tables import json_object
from lineage.errors import UserError
from lineage.files import check_regular, check_stand_in, expanded, read_span

OPTIONS: dict[str, tuple[str, ...]] = {}
LAYOUT_HINT = "the shards need pictures with texts of the same name (0001.jpg and 0001.txt)."
TEXTS = ("txt", "cap", "caption", "text")
PROGRESS_FROM = 100_000_000
"""Number of bytes of all shards above which listing them shows a progress bar."""
MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")


class Member(NamedTuple):
    """One file in a shard: where its bytes are, and those of a text."""

    name: str
    offset: int
    size: int
    content: bytes | None


def resembles(root: Path, files: list[str]) -> bool:
    """Whether there are shards, and no pictures beside them."""
    return any(is_shard(file) for file in files) and not any(map(is_picture, files))


def is_shard(path: str) -> bool:
    """Whether a path has the name of a shard."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz"))


def locate(path: str, skipped: list[Skipped]) -> tuple[Path, list[str]]:
    """Folder and relative paths of the shards of a folder, a file or a brace list.

    Raises:
        UserError: There is nothing at the path.
    """
    names = [path] if os.path.exists(expanded(path)) else braces(path)
    if len(names) == 1 and not is_shard(names[0]):
        root = open_root(path)
        return root, list_files(root, skipped)
    paths = [Path(os.path.abspath(expanded(name))) for name in names]
    missing = [name for name, file in zip(names, paths, strict=True) if not os.path.exists(file)]
    if len(missing) == len(names):
        raise UserError(f"There is no shard {plain(names[0])!r}; check the spelling.")
    skipped += [Skipped(name, "the shard is missing") for name in missing]
    root = Path(os.path.commonpath([file.parent for file in paths]))
    files = [file for file in paths if os.path.exists(file)]
    return root, [file.relative_to(root).as_posix() for file in files]


def braces(path: str) -> list[str]:
    """Every name that a brace list stands for: `{00..02}.tar` -> `00.tar`, `01.tar`, `02.tar`.

    Raises:
        UserError: It stands for no name, or for more than `MAX_SHARDS`.
    """
    names, rest = [], [path]
    while rest:
        name = rest.pop()
        part = _RANGE.search(name) or _LIST.search(name)
        if part is None:
            names.append(name)
            continue
        if part.re is _RANGE:
            first, last, width = int(part[1]), int(part[2]), len(part[1])
            options = [f"{n:0{width}d}" for n in range(first, min(last, first + MAX_SHARDS) + 1)]
        else:
            options = part[1].split(",")
        if not options:
            raise UserError(f"{plain(path)!r}: {part[0]} stands for no name.")
        if len(names) + len(rest) + len(options) > MAX_SHARDS:
            raise UserError(f"{plain(path)!r} stands for more than {MAX_SHARDS:,} shards.")
        rest += [name[: part.start()] + o + name[part.end() :] for o in reversed(options)]
    return names


def read(
    root: Path, files: list[str], skipped: list[Skipped], options: Mapping[str, str]
) -> list[Record]:
    """Records in the order of the shards and their members; what is left out is added to `skipped`.

    Raises:
        UserError: There are no shards.
    """
    shards = [file for file in files if is_shard(file)]
    if not shards:
        raise UserError(f"{plain(root)} holds no shard, whose name ends in .tar.")
    sizes = {shard: _size(root / shard) for shard in shards}
    records: list[Record] = []
    bar = tqdm(
        total=sum(sizes.values()),
        desc="listing shards",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=sum(sizes.values()) < PROGRESS_FROM or None,
    )
    with bar:
        for shard in shards:
            own, left_out = indexed(root, shard, partial(_listed, root, shard))
            records += own
            skipped += left_out
            bar.update(sizes[shard])
    make_room()
    return with_unique_ids(records)


def _listed(root: Path, shard: str) -> tuple[list[Record], list[Skipped]]:
    """Records of a shard, and what was left out of it."""
    skipped: list[Skipped] = []
    samples = _samples(root, shard, skipped)
    records = [_record(shard, name, members, skipped) for name, members in samples.items()]
    return [record for record in records if record is not None], skipped


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _samples(root: Path, shard: str, skipped: list[Skipped]) -> dict[str, dict[str, Member]]:
    """Members of each sample of a shard by their endings, in order."""
    samples: dict[str, dict[str, Member]] = {}
    members = list(_members(root, shard, skipped))
    pictures = Counter(_parts(m.name, first=True)[0] for m in members if is_picture(m.name))
    for member in members:
        key, ending = _parts(member.name, first=True)
        if pictures[key] > 1:
            key, ending = _parts(member.name, first=False)
        sample = samples.setdefault(key, {})
        if ending in sample:
            where = f"{shard}: {member.name}"
            skipped.append(Skipped(where, "a second member of the same name; the first is used"))
        else:
            sample[ending] = member
    return _joined(samples)


def _joined(samples: dict[str, dict[str, Member]]) -> dict[str, dict[str, Member]]:
    """The samples; texts without a picture join the one whose name has other accents' form."""
    foreign = {key: members for key, members in samples.items() if not key.isascii()}
    alone = [
        key for key, own in foreign.items() if not any(is_picture(m.name) for m in own.values())
    ]
    pictures = {same_name(key): key for key in foreign.keys() - set(alone)}
    for key in alone:
        target = samples.get(pictures.get(same_name(key), ""))
        if target is not None and not target.keys() & samples[key].keys():
            target.update(samples.pop(key))
    return samples


def _parts(name: str, first: bool) -> tuple[str, str]:
    """Name of a member without its ending, and the ending in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".") if first else base.rpartition(".")
    return folder + slash + stem, ending.lower()


def _members(root: Path, shard: str, skipped: list[Skipped]) -> Iterator[Member]:
    """Every file in a shard, with the bytes of texts."""
    path = root / shard
    try:
        size = check_regular(path)
        check_stand_in(read_span(path, 0, 512))
        if not shard.lower().endswith(".tar"):
            reason = "a compressed shard is not read; unpack it with gunzip"
            skipped.append(Skipped(shard, reason))
            return
        with tarfile.open(path, "r:") as archive:
            last = -1
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile remembers them all
                if info.size < 0 or archive.offset <= last:
                    raise tarfile.ReadError("a member has a negative size")
                last = archive.offset
                name = normpath(info.name)
                base = name.rpartition("/")[2]
                if info.isdir() or info.name.endswith("/") or any(map(is_hidden, name.split("/"))):
                    continue
                where = f"{shard}: {name}"
                if not info.isreg() or info.issparse():
                    skipped.append(Skipped(where, "the member is a link or a device, not a file"))
                    continue
                if info.offset_data + info.size > size:
                    skipped.append(Skipped(where, "the shard ends within it; copy it again"))
                    return
                if is_picture(base) and info.size > MAX_BYTES:
                    reason = f"it has {info.size / 1e6:,.0f} MB; make it smaller"
                    skipped.append(Skipped(where, reason))
                    continue
                content = None
                if _parts(base, first=False)[1] in (*TEXTS, "json", "cls"):
                    if info.size > MAX_TEXT:
                        reason = f"it has {info.size / 1e6:,.0f} MB, more than the 1 MB allowed"
                        skipped.append(Skipped(where, reason))
                        continue
                    file = archive.extractfile(info)
                    content = file.read() if file else b""
                yield Member(name, info.offset_data, info.size, content)
            if archive.offset + tarfile.BLOCKSIZE > size:  # no empty block, which ends an archive
                skipped.append(Skipped(shard, "the shard is cut short; copy it again"))
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        reason = f"the shard is damaged ({plain(error)}); what comes after is left out"
        skipped.append(Skipped(shard, reason))
    except OSError as error:
        reason = f"the shard cannot be read: {error.strerror or plain(error)}"
        skipped.append(Skipped(shard, reason))


def _record(
    shard: str, name: str, members: dict[str, Member], skipped: list[Skipped]
) -> Record | None:
    """The record of one sample; None, and the reason in `skipped`, if it has none."""
    where = f"{shard}: {name}"
    pictures = [member for member in members.values() if is_picture(member.name)]
    if not pictures:
        skipped.append(Skipped(where, f"no picture among {', '.join(members)[:80]}"))
        return None
    for other in pictures[1:]:
        skipped.append(Skipped(f"{shard}: {other.name}", "a second picture of the sample"))
    values: dict[str, Any] = {}
    captions: list[str] = []
    for ending, member in members.items():
        kind = ending.rpartition(".")[2]
        if member.content is None or kind == "cls":
            continue
        try:
            check_stand_in(member.content)
            text = decoded(member.content)
            if kind == "json":
                values = {**json_object(text), **values}
            else:
                captions += text.split("\n")
        except OSError as error:
            skipped.append(Skipped(f"{shard}: {member.name}", str(error.strerror)))
        except ValueError as error:
            reason = (
                f"it is no {'object of JSON' if kind == 'json' else 'UTF-8'} ({plain(error)[:80]})"
            )
            skipped.append(Skipped(f"{shard}: {member.name}", reason))
    own = clean_captions([*captions, *captions_in(values)])
    if not own:
        skipped.append(Skipped(where, "a picture without captions"))
        return None
    own_label = (members["cls"].content or b"").decode("latin-1") if "cls" in members else None
    label = label_in(values if own_label is None else {"label": own_label})
    if label is None and (own_label is not None or is_too_large(values.get("label"))):
        file = f"{shard}: {name}.{'json' if own_label is None else 'cls'}"
        skipped.append(Skipped(file, "the label is no whole number of 64 bits"))
    path = PurePosixPath(shard)
    stem = str(path.with_suffix(""))
    picture = pictures[0]
    span = (picture.offset, picture.size)
    return Record(
        id=f"{stem}/{name}",
        path=shard,
        captions=own,
        label=label,
        split=split_in(values) or _split(path),
        meta=meta_in(values, drop_label=label is not None),
        span=span,
    )


def _split(shard: PurePosixPath) -> str:
    """Split of a shard: of a folder of its path, or a word of its name (`cc3m-val-0000.tar`)."""
    names = [*shard.parts[:-1], *re.split(r"[^A-Za-z]+", shard.stem)]
    return next((split_name(name) for name in names if name.lower() in SPLIT_NAMES), "train")
