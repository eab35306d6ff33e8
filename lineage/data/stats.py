"""What is in a data set: captions, words, sizes, colours, labels, as numbers and as a page.

Of an endless or a large data set, the first `MAX_PICTURES` are read, which the page says.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader

from lineage.characters import plain
from lineage.data.contract import CaptionedDataset
from lineage.data.pictures import PictureDataset

MAX_PICTURES = 10_000
MAX_SIZES = 2_000
"""Number of files that are opened for the size of their pictures."""
TOP = 40
"""Number of words and labels that are listed."""
COLOURS = {
    "red": (220, 50, 47),
    "orange": (240, 150, 40),
    "yellow": (240, 220, 60),
    "green": (60, 160, 70),
    "blue": (50, 90, 200),
    "purple": (140, 70, 170),
    "pink": (240, 150, 190),
    "brown": (120, 80, 50),
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (245, 245, 245),
}
_WORD = re.compile(r"\w+")


def statistics(dataset: CaptionedDataset) -> dict[str, Any]:
    """Numbers about a data set.

    Returns:
        pictures, read: Number of pictures, and of those that were read.
        captions: Their captions.
        splits: Pictures of each split that was read.
        captions_per_picture, words_per_caption, letters_per_caption: `spread`s.
        repeated_captions: Share of captions that an earlier picture has too.
        vocabulary: Number of different words, in small letters.
        words: The most frequent words, with the share of captions that hold each.
        labels: Pictures of each label, the most frequent first.
        width, height: `spread`s of the files' pictures in pixels, if they have files.
        colours: Share of pixels that are nearest to each of `COLOURS`.
        left_out: Number of files that cannot be used.
    """
    count = min(len(dataset), MAX_PICTURES)
    per_picture, words_each, letters_each = [], [], []
    words, labels, splits, colours = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    seen: set[str] = set()
    repeated = 0
    for index in range(count):
        example = dataset[index]
        per_picture.append(len(example.captions))
        splits[str(example.meta.get("split", dataset.split))] += 1
        if example.label is not None:
            name = example.meta.get("class", example.meta.get("group", example.label))
            labels[str(name)] += 1
        for caption in example.captions:
            parts = _WORD.findall(caption.lower())
            words_each.append(len(parts))
            letters_each.append(len(caption))
            words.update(set(parts))
        repeated += sum(caption in seen for caption in example.captions)
        seen.update(example.captions)
        colours.update(nearest_colours(example.image))
    total = len(words_each)
    pixels = sum(colours.values())
    widths, heights = _sizes(dataset, count)
    return {
        "name": dataset.name,
        "pictures": len(dataset),
        "read": count,
        "captions": total,
        "splits": dict(splits.most_common()),
        "captions_per_picture": spread(per_picture),
        "words_per_caption": spread(words_each),
        "letters_per_caption": spread(letters_each),
        "repeated_captions": round(repeated / total, 4),
        "vocabulary": len(words),
        "words": {word: round(n / total, 4) for word, n in words.most_common(TOP)},
        "labels": dict(labels.most_common(TOP)),
        "num_labels": len(labels),
        "width": spread(widths),
        "height": spread(heights),
        "colours": {name: round(colours[name] / pixels, 4) for name in COLOURS},
        "left_out": len(dataset.skipped),
    }


def spread(values: Iterable[int]) -> dict[str, int] | None:
    """Smallest, median, 95th percentile and largest of some numbers; None of none."""
    array = np.fromiter(values, np.int64)
    if not len(array):
        return None
    low, middle, high, largest = np.quantile(array, [0, 0.5, 0.95, 1], method="inverted_cdf")
    return {"min": int(low), "median": int(middle), "p95": int(high), "max": int(largest)}


def nearest_colours(image: torch.Tensor) -> dict[str, int]:
    """Number of pixels nearest to each of `COLOURS` of a picture (3, H, W), on a grid of 16."""
    step = max(1, image.shape[-1] // 16)
    pixels = image[:, ::step, ::step].reshape(3, -1).T.float()  # (P, 3)
    near = torch.cdist(pixels, torch.tensor(list(COLOURS.values())).float()).argmin(1)
    counts = near.bincount(minlength=len(COLOURS)).tolist()
    return dict(zip(COLOURS, counts, strict=True))


def _sizes(dataset: CaptionedDataset, count: int) -> tuple[list[int], list[int]]:
    """Widths and heights of the pictures in their files; none where there are no such files."""
    if not isinstance(dataset, PictureDataset) or not dataset.has_files:
        return [], []
    sizes = []
    for index in range(0, count, max(1, count // MAX_SIZES)):
        with contextlib.suppress(Exception):  # broken, in a data set that is read when it is due
            sizes.append(dataset.file_size(index))
    return [width for width, _ in sizes], [height for _, height in sizes]


def page(numbers: dict[str, Any], sheet: str) -> str:
    """The numbers as one HTML page.

    Args:
        numbers: Of `statistics`.
        sheet: Picture of examples as a `data:` address.
    """
    environment = Environment(loader=PackageLoader("lineage.data", "."), autoescape=True)
    rgb = {name: "rgb({}, {}, {})".format(*colour) for name, colour in COLOURS.items()}
    template = environment.get_template("stats.html")
    return template.render(n=numbers, sheet=sheet, rgb=rgb, plain=plain)


def lines(numbers: dict[str, Any]) -> list[str]:
    """The numbers as lines of text."""
    first = f"{numbers['name']}: {numbers['pictures']:,} pictures"
    if numbers["read"] < numbers["pictures"]:
        first += f", of which the first {numbers['read']:,} are read here"
    rows = [first, f"  captions: {numbers['captions']:,}"]
    rows.append(
        "  splits: " + ", ".join(f"{name} {count:,}" for name, count in numbers["splits"].items())
    )
    for key in ("captions_per_picture", "words_per_caption", "letters_per_caption"):
        rows.append(f"  {key.replace('_', ' ')}: {_spread_text(numbers[key])}")
    for key in ("width", "height"):
        if numbers[key]:
            rows.append(f"  {key} in pixels: {_spread_text(numbers[key])}")
    rows.append(f"  captions that an earlier picture has too: {numbers['repeated_captions']:.1%}")
    frequent = ", ".join(
        f"{word} {share:.0%}" for word, share in list(numbers["words"].items())[:12]
    )
    rows.append(f"  different words: {numbers['vocabulary']:,}; most frequent: {frequent}")
    if numbers["labels"]:
        some = ", ".join(f"{name} {count:,}" for name, count in list(numbers["labels"].items())[:9])
        rows.append(f"  labels: {numbers['num_labels']:,}; most frequent: {some}")
    shares = sorted(numbers["colours"].items(), key=lambda item: -item[1])[:6]
    rows.append("  colours: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    if numbers["left_out"]:
        rows.append(f"  left out: {numbers['left_out']:,} files (lineage data check names them)")
    return [plain(row) for row in rows]


def _spread_text(spread: dict[str, int] | None) -> str:
    if spread is None:
        return "none"
    low, middle, high, largest = spread.values()
    return f"{low:,} to {largest:,}, median {middle:,}, 95 % up to {high:,}"
