"""`hub:NAME`: a data set of the Hugging Face hub, or of a folder that its library `datasets` reads.

    hub:user/set                          of the hub, downloaded once into the library's own cache
    hub:user/set?config=NAME              one of its configurations
    hub:PATH                              a folder of `save_to_disk`, or of Parquet, JSON, CSV,
                                          shards or pictures, which `load_dataset` reads
    hub:user/set?image=jpg&caption=alt    columns of other names

Pictures are in the column `image=`; else in the first of type `Image`; else in `image` or `img`, if
it holds bytes. Captions are in the column `caption=`, else in the columns that `imagefolder` reads;
each holds a string or a list of them. Of a column with classes (`ClassLabel`), the names of the
classes are captions, as in `hub:cifar10?caption=label`.

The column `label` becomes the label, and the name of its class `meta["class"]`. Other columns of
texts, numbers and lists of them go into `meta`. A row's split is that of the data set; of a set
with only one, a column `split` divides it. An example's id is its row's `id` or `__key__`, if these
are unique, else `split/row`.

Nothing here runs a data set's own code, and no picture is fetched from an address in a row: a
picture is in its row, or in a file of the folder or of the library's cache. `lineage.data.decoding`
decodes all pictures, not the library.

Left out and reported: a row without a picture or a caption, a picture that is broken or elsewhere,
a split without these columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.characters import plain
from lineage.data.contract import Skipped
from lineage.data.decoding import MAX_BYTES, decode, shown_size, why_broken
from lineage.data.hub_source import Source, open_source
from lineage.data.imagefolder import ALL_COLUMNS, captions_in, label_in, meta_in, split_in
from lineage.data.layouts import COMMON, check_options, divided, split_options
from lineage.data.pictures import PictureDataset
from lineage.data.pixels import state_of
from lineage.data.records import Record, unique_ids
from lineage.data.splits import split_name
from lineage.errors import UserError
from lineage.files import read_regular

COLUMN_OPTIONS = ("caption", "image", "config")
"""Options that take any value."""
IMAGE_COLUMNS = ("image", "img")
ID_COLUMNS = ("id", "__key__")
BATCH = 1_000
"""Number of rows that are listed at once."""
HINT = "the data set needs a column of pictures and one of captions."
PLAIN_TYPES = ("string", "large_string", "int", "uint", "float", "bool")


# --- the data set ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row(Record):
    """A record whose picture is in a row of a data set.

    Attributes:
        place: Name of the split there, and number of the row in it.
        in_file: If true, the row only names a file, `path`.
    """

    place: tuple[str, int] = ("", 0)
    in_file: bool = False


class HubDataset(PictureDataset):
    """A `PictureDataset` with the pictures in rows of `tables`, one for each split."""

    def __init__(self, tables: Sequence[Table], *arguments: Any) -> None:
        self.tables = {table.split: table for table in tables}
        super().__init__(*arguments)

    def _part(self, record: Record) -> object:
        assert isinstance(record, Row)
        return self.tables[record.place[0]].state, record.place[1]

    def source(self, index: int) -> bytes:
        """Bytes of a record's picture file.

        Raises:
            OSError: The file cannot be read.
        """
        record = self.records[index]
        assert isinstance(record, Row)
        if record.in_file:
            return read_regular(self.root / record.path, MAX_BYTES)
        split, number = record.place
        return self.tables[split].picture(number)

    def file_size(self, index: int) -> tuple[int, int]:
        """Width and height of a record's upright picture in its file. Raises as `decode`."""
        return shown_size(self.source(index))

    def _decoded(self, index: int) -> NDArray[np.uint8] | Skipped:
        record = self.records[index]
        if getattr(record, "in_file", False):
            return super()._decoded(index)
        try:
            return decode(self.source(index), self._store.shape, whole=self.crop == "pad")
        except Exception as error:  # Pillow's and Arrow's readers raise errors of many kinds
            return Skipped(record.path, why_broken(error, None))


def load(rest: str, split: str, size: int) -> HubDataset:
    """Load one split of a data set of the hub or of a folder.

    Args:
        rest: Name or path with its options.
        split: Name of a split, or `all`.
        size: Side of the square pictures in pixels.

    Raises:
        UserError: `datasets` is not installed; the data set, an option, a column or the split does
            not exist; or nothing can be loaded.
    """
    name, options = split_options(rest)
    known = {**COMMON, **dict.fromkeys(COLUMN_OPTIONS, ())}
    fixed = {key: value for key, value in options.items() if key not in COLUMN_OPTIONS}
    check_options("hub", fixed, known)
    source = open_source(name, options.get("config"))
    skipped: list[Skipped] = []
    tables = list(_tables(name, source, options, skipped))
    records = divided(_records(tables, source, skipped), options.get("splits"))
    crop = options.get("crop", "centre")
    arguments = (f"hub:{rest}", source.root, records, split, size, skipped, HINT, crop)
    return HubDataset(tables, *arguments)


# --- columns --------------------------------------------------------------------------------------


@dataclass
class Table:
    """One split of a data set.

    Attributes:
        split: Name of the split there.
        data: `datasets.Dataset` with all columns.
        image: Name of the column of pictures.
        caption: Name of the column of captions; None for those that `imagefolder` reads.
        state: Hash of the rows.
        columns: Names of the columns of plain values.
        classes: Names of the classes of each column that has them.
        pictures: `datasets.Dataset` with the undecoded pictures alone.
    """

    split: str
    data: Any
    image: str
    caption: str | None
    state: str
    columns: list[str] = field(init=False)
    classes: dict[str, list[str]] = field(init=False)
    pictures: Any = field(init=False)

    def __post_init__(self) -> None:
        features = self.data.features
        self.columns = [name for name, feature in features.items() if _is_plain(feature)]
        self.classes = {n: f.names for n, f in features.items() if hasattr(f, "names")}
        self.pictures = self.data.select_columns([self.image])
        if _is_image(features[self.image]):
            undecoded = type(features[self.image])(decode=False)
            self.pictures = self.pictures.cast_column(self.image, undecoded)

    def picture(self, number: int) -> bytes:
        """Bytes of the picture in a row."""
        value = self.pictures[number][self.image]
        return bytes(value["bytes"] if isinstance(value, dict) else value)

    def rows(self) -> Iterator[tuple[dict[str, Any], str | None, bool]]:
        """Plain values of each row, the path of its picture, and whether its bytes are there."""
        columns = dict.fromkeys([*self.columns, self.image])
        for batch in self.data.select_columns(list(columns)).with_format("arrow").iter(BATCH):
            values = batch.select(self.columns).to_pylist()
            yield from zip(values, *_contents(batch.column(self.image)), strict=True)

    def named(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values with names in place of numbers of classes; None for a number without one."""
        named = dict(values)
        for column, names in self.classes.items():
            number = values[column]
            known = number is not None and 0 <= number < len(names)
            named[column] = names[number] if known else None
        return named

    def captions(self, named: dict[str, Any]) -> tuple[str, ...]:
        """Captions of a row; of a class, its name with spaces."""
        if self.caption is None:
            return captions_in({column: _flat(value) for column, value in named.items()})
        value = named[self.caption]
        if self.caption in self.classes:
            value = str(value or "").replace("_", " ")
        return captions_in({"text": _flat(value)})


def _contents(column: Any) -> tuple[list[str | None], list[bool]]:
    """Path of each picture of an Arrow column, and whether its bytes are there; none are copied."""
    from pyarrow import compute

    parts = [part.name for part in column.type] if hasattr(column.type, "get_field_index") else []
    raw = compute.struct_field(column, "bytes") if "bytes" in parts else column
    paths = compute.struct_field(column, "path").to_pylist() if "path" in parts else None
    return paths or [None] * len(column), raw.is_valid().to_pylist()


def _flat(value: Any) -> Any:
    """A list of lists, of any depth, as one list; another value as it is."""
    if not isinstance(value, list):
        return value
    inner = (_flat(item) for item in value)
    return [text for item in inner for text in (item if isinstance(item, list) else [item])]


def _is_image(feature: Any) -> bool:
    return getattr(feature, "dtype", None) == "PIL.Image.Image"


def _is_bytes(feature: Any) -> bool:
    """Whether a column holds bytes, or objects with them, as `Image` stores its pictures."""
    raw = feature.get("bytes") if isinstance(feature, dict) else feature
    return str(getattr(raw, "dtype", "")).endswith("binary")


def _is_plain(feature: Any) -> bool:
    """Whether a column holds texts, numbers or classes, or lists or objects of them. A list of
    fractions is none: it is an embedding.
    """
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return _is_plain(inner) and not str(getattr(inner, "dtype", "")).startswith("float")
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(PLAIN_TYPES) and not hasattr(feature, "shape")


def _tables(
    name: str, source: Source, options: Mapping[str, str], skipped: list[Skipped]
) -> Iterator[Table]:
    """A table for each split with pictures and captions; others are added to `skipped`.

    Raises:
        UserError: No split has them.
    """
    faults = []
    for split, data in source.splits.items():
        try:
            image = _image_column(name, data.features, options.get("image"))
            caption = _caption_column(name, data.features, options.get("caption"))
        except UserError as error:
            faults.append(error)
            skipped.append(Skipped(split, str(error)))
            continue
        files = [state_of(file["filename"]) for file in data.cache_files if source.is_saved]
        yield Table(split, data, image, caption, " ".join([data._fingerprint, *files]))
    if faults and len(faults) == len(source.splits):
        raise faults[0]


def _image_column(name: str, features: Mapping[str, Any], chosen: str | None) -> str:
    """Name of the column of pictures."""
    if chosen is not None:
        _check_column(name, features, chosen)
        if not _is_image(features[chosen]) and not _is_bytes(features[chosen]):
            raise UserError(f"The column {chosen!r} of hub:{plain(name)} holds no pictures.")
        return chosen
    images = [column for column, feature in features.items() if _is_image(feature)]
    images += [c for c in IMAGE_COLUMNS if c in features and _is_bytes(features[c])]
    if not images:
        raise UserError(
            f"hub:{plain(name)} has no column of pictures: it has {_listed(features)}; name one "
            "with ?image=COLUMN."
        )
    return images[0]


def _caption_column(name: str, features: Mapping[str, Any], chosen: str | None) -> str | None:
    """The chosen column of captions; None for those that `imagefolder` reads."""
    if chosen is not None:
        _check_column(name, features, chosen)
        if not _is_plain(features[chosen]):
            raise UserError(f"The column {chosen!r} of hub:{plain(name)} holds no captions.")
    elif not any(captions_in({column: "a caption"}) for column in features):
        raise UserError(
            f"hub:{plain(name)} has no column of captions: it has {_listed(features)}; name one "
            f"with ?caption=COLUMN, or call it one of {', '.join(ALL_COLUMNS)}."
        )
    return chosen


def _check_column(name: str, features: Mapping[str, Any], column: str) -> None:
    if column not in features:
        has = _listed(features)
        raise UserError(f"hub:{plain(name)} has no column {plain(column)!r}: it has {has}.")


def _listed(columns: Iterable[str]) -> str:
    """Names of columns for a sentence, as many as fit."""
    names = [plain(column)[:40] for column in columns]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


# --- rows -----------------------------------------------------------------------------------------


def _records(tables: Sequence[Table], source: Source, skipped: list[Skipped]) -> list[Record]:
    """Records of all rows; those without a picture or a caption are added to `skipped`."""
    records: list[Record] = []
    own_ids = []
    for table in tables:
        for number, row in enumerate(table.rows()):
            record = _record(table, number, row, source)
            if isinstance(record, Skipped):
                skipped.append(record)
            else:
                records.append(record)
                own_ids.append(next((row[0][c] for c in ID_COLUMNS if c in row[0]), None))
    return _with_ids(records, own_ids)


def _record(
    table: Table, number: int, row: tuple[dict[str, Any], str | None, bool], source: Source
) -> Record | Skipped:
    """The record of a row, or why it has none."""
    values, path, has_bytes = row
    where = f"{table.split}/{number}"
    fault = "" if has_bytes else source.fault(path)
    named = table.named(values)
    captions = table.captions(named)
    if fault or not captions:
        return Skipped(where, fault or "the row has no caption")
    has_class = named.get("label") is not None
    label = label_in(values) if has_class else None
    alone = len(source.splits) == 1
    return Row(
        id=where,
        path=where if has_bytes else source.relative(path or ""),
        captions=captions,
        label=label,
        split=(split_in(values) if alone else None) or split_name(table.split),
        meta=_meta(table, named, label, path if has_bytes else None),
        place=(table.split, number),
        in_file=not has_bytes,
    )


def _meta(
    table: Table, named: dict[str, Any], label: int | None, name: str | None
) -> dict[str, Any]:
    """What else a row holds: the name of its class and of its picture, and its other columns."""
    rest = {column: value for column, value in named.items() if column != table.caption}
    if "label" in table.classes:
        rest["class"] = rest.pop("label", named["label"])
    meta = meta_in(rest, drop_label=label is not None)
    return {"source": plain(name), **meta} if name else meta


def _with_ids(records: list[Record], own: Sequence[object]) -> list[Record]:
    """The records with the ids of their rows, if each has another."""
    if len({i for i in own if isinstance(i, (str, int))}) == len(records):
        names = unique_ids([str(i) for i in own])
        return [replace(record, id=i) for record, i in zip(records, names, strict=True)]
    return records
