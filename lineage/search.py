"""`lineage search`: the pictures of a data set that fit words best, by a run of CLIP.

    pictures_in     a folder of pictures, with captions or without, or any data set
    embeddings      a unit vector of each picture; kept in the cache, so that a second search of
                    10,000 pictures takes less than a second
    search          the nearest pictures of each query
    choose          the other way round: which of several captions fits one picture
    matches_sheet   the sheet that training of CLIP writes
    search_sheet    a row of pictures for each query

Axes: N pictures, K queries, P width of the joint space, S side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lineage.cache import cache_folder, cached
from lineage.characters import plain
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, Skipped, fingerprint_of, to_unit
from lineage.data.decoding import decode, why_broken
from lineage.data.records import is_picture, list_files
from lineage.errors import UserError, say_once
from lineage.sheets import sheet
from lineage.text.contract import TextEncoder
from lineage.threads import use_free_threads
from lineage.training.store import fingerprint, load_tensors, save_tensors

CHUNK = 64
"""Number of pictures that are embedded at once."""
COLUMNS = 8
"""Number of pictures in a row of a sheet."""
NUM_PICTURES = 256
"""Number of pictures among which a sheet of training shows the best."""


@runtime_checkable
class Comparer(Protocol):
    """What `search` needs of a CLIP.

    Attributes:
        size: S, side of the pictures that it takes.
        embed_dim: P.
        text: Encoder of the captions.
    """

    size: int
    embed_dim: int
    text: TextEncoder

    def parameters(self) -> Iterator[Tensor]:
        """All weights."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, P)."""

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, P)."""


class Hit(NamedTuple):
    """A picture that was found: its number, its name and its cosine with the query."""

    number: int
    name: str
    cosine: float


@dataclass(frozen=True)
class Pictures:
    """Pictures that can be opened one by one.

    Attributes:
        names: Name of each.
        image: Function that returns the picture of a number, (3, S, S) uint8; raises `UserError`.
        key: Text that changes when a picture does.
    """

    names: list[str]
    image: Callable[[int], Tensor]
    key: str


def pictures_in(data: str, split: str, size: int) -> Pictures:
    """Pictures of a folder, whether they have captions or not, or of any other data set.

    Args:
        data: Folder, or spec of a data set.
        split: Split of a data set; a folder has none.
        size: S.

    Raises:
        UserError: there are none.
    """
    root = Path(data).expanduser()
    if root.is_dir():
        return _of_folder(root, size)
    return _of_dataset(load_dataset(data, split, size))


def _of_folder(root: Path, size: int) -> Pictures:
    skipped: list[Skipped] = []
    files = [file for file in list_files(root, skipped) if is_picture(file)]
    if not files:
        raise UserError(f"There is no picture in {root}: name a folder that holds some.")
    if skipped:
        _say_left_out(f"{skipped[0].path} ({skipped[0].reason})", len(skipped))
    stamps = [[file, *_stamp(root / file)] for file in files]

    def image(number: int) -> Tensor:
        path = root / files[number]
        try:
            return torch.from_numpy(decode(path, size).copy())  # Pillow's memory is read-only
        except Exception as error:  # of many kinds: a broken file may hold anything
            raise UserError(f"{path}: {why_broken(error, path)}") from error

    names = [plain(file) for file in files]
    return Pictures(names, image, fingerprint(json.dumps([str(root.resolve()), stamps]).encode()))


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros for a link to nothing."""
    try:
        info = path.stat()
    except OSError:
        return 0, 0
    return info.st_size, info.st_mtime_ns


def _say_left_out(first: str, count: int) -> None:
    say_once(f"Left out: {first}{f', and {count - 1} more' if count > 1 else ''}.")


def _of_dataset(dataset: CaptionedDataset) -> Pictures:
    key = f"{fingerprint_of(dataset)} {dataset.split} {len(dataset)}"
    names = [f"{dataset.split}-{i}" for i in range(len(dataset))]
    return Pictures(names, lambda number: dataset[number].image, key)


def embeddings(model: Comparer, pictures: Pictures, weights: str) -> Tensor:
    """A unit vector of each picture, (N, P); zeros for one that cannot be opened, which is said.

    Args:
        weights: Hash of the model's weights, under which the vectors are kept.

    Raises:
        UserError: no picture can be opened.
    """
    key = fingerprint(json.dumps([weights, pictures.key, model.size, CHUNK]).encode())
    path = cache_folder("search") / f"{key}.safetensors"
    broken: list[str] = []

    def embed() -> dict[str, Tensor]:
        return {"image": _embed(model, pictures, broken)}

    vectors = cached(path, load_tensors, embed, save_tensors)["image"]
    broken = broken or [pictures.names[i] for i in (~vectors.any(1)).nonzero()[:, 0].tolist()]
    if broken:
        _say_left_out(broken[0], len(broken))
    return vectors


def _embed(model: Comparer, pictures: Pictures, broken: list[str]) -> Tensor:
    """The vectors; a sentence about each picture that cannot be opened is added to `broken`."""
    rows: list[Tensor] = []
    numbers = range(len(pictures.names))
    with tqdm(total=len(numbers), desc="embedding", unit=" pictures", disable=None) as bar:
        for first in range(0, len(numbers), CHUNK):
            images, opened = [], []
            for number in numbers[first : first + CHUNK]:
                try:
                    images.append(pictures.image(number))
                    opened.append(True)
                except UserError as error:
                    broken.append(str(error))
                    images.append(torch.zeros(3, model.size, model.size, dtype=torch.uint8))
                    opened.append(False)
            unit = image_vectors(model, torch.stack(images))
            rows.append(unit * torch.tensor(opened)[:, None])
            bar.update(len(images))
    if len(broken) == len(numbers):
        raise UserError(f"No picture can be opened: {broken[0]}.")
    return torch.cat(rows)


@torch.no_grad()
def image_vectors(model: Comparer, images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, P) unit vectors on the CPU."""
    with use_free_threads():
        device = next(iter(model.parameters())).device
        vectors = model.encode_image(to_unit(images.to(device)))
        return F.normalize(vectors.float(), dim=-1).cpu()


@torch.no_grad()
def text_vectors(model: Comparer, captions: Sequence[str]) -> Tensor:
    """K captions -> (K, P) unit vectors on the CPU."""
    return F.normalize(model.encode_text(list(captions)).float(), dim=-1).cpu()


def similarity(
    model: Comparer, images: Tensor, captions: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Cosines of pictures (B, 3, S, S) uint8 with each of their captions."""
    counts = torch.tensor([len(own) for own in captions])
    image = image_vectors(model, images).repeat_interleave(counts, 0)
    text = text_vectors(model, [caption for own in captions for caption in own])
    cosines = (image * text).sum(1)  # one row a caption
    return [own.tolist() for own in cosines.split(counts.tolist())]


def search(
    model: Comparer, image: Tensor, names: Sequence[str], queries: Sequence[str], count: int
) -> list[list[Hit]]:
    """The `count` pictures that are nearest to each query, the nearest first.

    Args:
        image: (N, P) unit vectors of the pictures; zeros for those that are left out.
        names: N names.
    """
    is_open = image.any(1)  # (N,)
    cosines = (text_vectors(model, queries) @ image.T).masked_fill(~is_open, -torch.inf)  # (K, N)
    best = cosines.topk(min(count, int(is_open.sum())), dim=1)
    return [
        [Hit(number, names[number], cosine) for number, cosine in zip(row, values, strict=True)]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def choose(model: Comparer, image: Tensor, captions: Sequence[str]) -> list[tuple[str, float]]:
    """Captions of one picture (3, S, S) uint8 and their cosines, the best first."""
    cosines = (image_vectors(model, image[None]) @ text_vectors(model, captions).T)[0].tolist()
    return sorted(zip(captions, cosines, strict=True), key=lambda pair: -pair[1])


def search_sheet(
    pictures: Pictures,
    queries: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    columns: int = COLUMNS,
) -> Image.Image:
    """A sheet with each query's pictures one after the other, best first."""
    blank = torch.full_like(pictures.image(hits[0][0].number), 255)
    images: list[Tensor] = []
    labels: list[str] = []
    for query, row in zip(queries, hits, strict=True):
        for hit, label in _filled(row, columns, query):
            images.append(pictures.image(hit.number) if hit else blank)
            labels.append(label)
    return sheet(images, labels, columns)


def matches_sheet(
    model: Any, dataset: CaptionedDataset, examples: Sequence[Example]
) -> Image.Image:
    """For each example's first caption, the best of the first `NUM_PICTURES` of a data set: what a
    CLIP has learnt so far.
    """
    count = NUM_PICTURES if dataset.endless else min(NUM_PICTURES, len(dataset))
    pictures = replace(_of_dataset(dataset), names=[f"{i}" for i in range(count)])
    images = torch.stack([pictures.image(number) for number in range(count)])
    training = model.training
    model.eval()
    try:
        vectors = torch.cat([image_vectors(model, part) for part in images.split(CHUNK)])
        captions = [example.captions[0] for example in examples]
        hits = search(model, vectors, pictures.names, captions, COLUMNS)
    finally:
        model.train(training)
    return search_sheet(pictures, captions, hits)


def _filled(row: Sequence[Hit], columns: int, query: str) -> Iterator[tuple[Hit | None, str]]:
    """The hits of a row with their labels, filled up to whole rows of the sheet."""
    for number, hit in enumerate(row):
        yield hit, f"{query}: {hit.cosine:.2f}" if number == 0 else f"{hit.cosine:.2f}"
    for _ in range(-len(row) % columns):
        yield None, ""
