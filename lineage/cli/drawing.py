"""What `lineage sample` does with PyTorch: options, picture files, and the best of several.

Axes: B pictures, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lineage.data.contract import to_bytes, to_unit
from lineage.data.decoding import decode, shown_size, why_broken
from lineage.errors import UserError
from lineage.sheets import picture, rows_sheet, sheet
from lineage.system import DrawsVectors, System, Visualises

T = TypeVar("T")

SCREEN_WIDTH = 1920  # pixels
CELL, MARGIN = 128, 10  # side of a picture on a sheet, and the space beside it


def draw(
    system: System,
    captions: list[str],
    options: Mapping[str, Any],
    *,
    seed: int,
    run: Path,
    candidates: int = 1,
    scorer: str = "auto",
) -> Tensor:
    """Pictures (B, 3, S, S) uint8 on the CPU, each the one of its candidates that fits best."""
    if candidates == 1:
        return to_bytes(system.generate(captions, seed=seed, **options)).cpu()
    from lineage.evaluation.best import best_of, scorer_of_run  # half a second that most skip

    judge = scorer_of_run(scorer, run, system.device)
    return best_of(system, captions, judge, candidates, seed=seed, **options)[0]


def draws_vectors(system: System, out: Path) -> DrawsVectors:
    """The system, if it draws strokes. Raises `UserError` if it draws pixels."""
    if not isinstance(system, DrawsVectors):
        raise UserError(
            f"{type(system).__name__} draws pixels, which are not written as SVG: write to "
            f"{out.with_suffix('.png')}."
        )
    return system


def options_of(
    system: System, settings: Mapping[str, str], files: Mapping[str, Path | None]
) -> dict[str, Any]:
    """Options of `generate`: text from --set, and pictures (1, C, S, S) from files.

    Raises:
        UserError: the system has no such option, or a value does not fit it.
    """
    options: dict[str, Any] = dict(settings)
    for name, path in files.items():
        if name in settings:
            raise UserError(f"{name} is a picture file: use --{name} in place of --set {name}=.")
        if path is not None:
            options[name] = _read_picture(path, system.size)
    image, mask = files.get("image"), files.get("mask")
    if mask is not None:
        options["mask"] = _read_mask(mask, system.size)
        if image is not None and not _same_shape(_size(image), _size(mask)):
            raise UserError(
                f"{mask} must have the shape of {image}, not {_size(mask)} beside {_size(image)} "
                "pixels."
            )
    system.typed_options(options)  # a fault is found before a scorer is trained
    return options


def _read_picture(path: Path, size: int) -> Tensor:
    """A picture file as (1, 3, S, S) in [-1, 1]."""
    return to_unit(pixels(path, size))[None]


def _read_mask(path: Path, size: int) -> Tensor:
    """A mask file as (1, 1, S, S), true where more than half of a pixel is nearer to white.

    Raises:
        UserError: it is true everywhere or nowhere.
    """
    grey = pixels(path, min(_size(path))).float().mean(0)  # of its own size
    white = (grey > 127.5).float()[None, None]
    mask = F.adaptive_avg_pool2d(white, (size, size)) > 0.5
    if mask.any() == mask.all():
        part, painted = ("black", "all") if mask.all() else ("white", "nothing")
        if white.any() != white.all():
            raise UserError(
                f"{path} has too little {part} for a picture of {size} x {size} pixels, so "
                f"{painted} would be painted over; make that part larger."
            )
        raise UserError(
            f"{path} must be white (255) where the picture is painted over and black (0) "
            f"elsewhere: its values are {grey.min():.0f} to {grey.max():.0f}, so "
            f"{painted} would be painted over."
        )
    return mask


def pixels(path: Path, size: int) -> Tensor:
    """The centred square of a picture file, (3, S, S) uint8."""
    return _opened(path, lambda: torch.from_numpy(decode(path, size).copy()))


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file, as it is shown."""
    return _opened(path, lambda: shown_size(path))


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other, enlarged, up to a pixel of the smaller one."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def _opened(path: Path, read: Callable[[], T]) -> T:
    """Result of `read`. Raises `UserError` if the file is no picture."""
    try:
        return read()
    except FileNotFoundError:
        raise UserError(f"There is no picture {path}.") from None
    except Exception as error:  # Pillow raises a dozen kinds for files that are broken or foreign
        raise UserError(f"{path}: {why_broken(error, path)}.") from error


def caption_sheet(images: Tensor, captions: list[str], count: int) -> Image.Image:
    """A sheet of pictures (B, 3, S, S) uint8, `count` of each caption, in rows that a screen has
    room for; each caption begins a row if it has several pictures.
    """
    cells = list(zip(captions, images, strict=True))
    cell = picture(images[0], CELL).width + MARGIN
    widest = max(1, SCREEN_WIDTH // cell)
    if count == 1:
        columns = min(8, widest)
        return sheet(list(images), captions, columns, CELL)
    groups = [cells[first : first + count] for first in range(0, len(cells), count)]
    rows = [g[first : first + widest] for g in groups for first in range(0, count, widest)]
    return rows_sheet(rows, CELL)


def visualisation(system: System, caption: str, *, seed: int) -> Image.Image:
    """A sheet that shows how the picture of `caption` came about."""
    if not isinstance(system, Visualises):
        raise UserError(f"{type(system).__name__} has nothing to visualise: leave out --visualise.")
    rows = system.visualise(caption, seed=seed)
    return rows_sheet([[(label, to_bytes(one).cpu()) for label, one in row] for row in rows])
