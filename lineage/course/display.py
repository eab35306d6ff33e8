"""Pictures in notebooks: rows of pictures, learning that one can watch, sliders, source lines.

Every function returns or displays something that stays in the saved notebook, small enough for it.
"""

from __future__ import annotations

import inspect
import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import lineage
from lineage.cores import usable_cpus
from lineage.data.contract import to_bytes
from lineage.errors import UserError
from lineage.sheets import rows_sheet, sheet
from lineage.stepping import TrainingStep
from lineage.system import LabelledImage, System, Visualises
from lineage.training.machine import pick_device

SIDE = 96  # pixels of a picture in a row
STILL = "LINEAGE_STILL"
"""Environment variable that leaves out sliders, where nobody is there to move them."""
PACKAGE = Path(lineage.__file__).parent


class Picture:
    """A picture that a notebook shows, and saves in few bytes: 256 colours, which flat pictures do
    not exceed by much.

    Args:
        image: The picture in all its colours.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def _repr_png_(self) -> bytes:
        few = self.image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        file = io.BytesIO()
        few.save(file, "png", optimize=True)
        return file.getvalue()


def begin(name: str, minutes: float) -> None:
    """Say where a notebook runs and how long it takes; the first line of each notebook.

    Args:
        name: Name of the notebook.
        minutes: Time of all its cells on two cores.
    """
    device = pick_device("auto")
    where = f"{usable_cpus()} processor cores" if device.type == "cpu" else device.type.upper()
    print(f"{name}: PyTorch {torch.__version__.split('+')[0]} on {where}.")
    unit = "minute" if minutes == 1 else "minutes"
    print(f"All cells take about {minutes:g} {unit} on two cores.")


def show(
    images: Tensor | Sequence[Tensor] | Sequence[Sequence[LabelledImage]],
    labels: Sequence[str] | None = None,
    *,
    columns: int = 8,
    side: int = SIDE,
) -> Picture:
    """Pictures side by side, for the last line of a cell.

    Args:
        images: (B, 3, S, S), a list of (3, S, S), in [-1, 1] or uint8; or rows of labelled
            pictures, as `visualise` returns.
        labels: A label below each picture.
        columns: Number of pictures in a row.
        side: Width of each picture in pixels.
    """
    if isinstance(images, Sequence) and isinstance(images[0], Sequence):
        rows = [[(label, _bytes(image)) for label, image in row] for row in images]
        return Picture(rows_sheet(rows, side))
    pictures = [_bytes(image) for image in images]  # type: ignore[arg-type]
    texts = [""] * len(pictures) if labels is None else list(labels)
    if len(texts) != len(pictures):
        raise UserError(f"{len(pictures)} pictures need as many labels, not {len(texts)}.")
    return Picture(sheet(pictures, texts, columns, side))


def _bytes(image: Tensor) -> Tensor:
    """A picture (3, S, S) as uint8; one channel is shown in grey."""
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        image = to_bytes(image.float().clamp(-1, 1))
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def film(system: System, caption: str, *, seed: int = 0, side: int = SIDE) -> Picture:
    """How the picture of a caption comes about: what `system.visualise` returns, as a sheet."""
    if not isinstance(system, Visualises):
        raise UserError(f"{type(system).__name__} has nothing to visualise.")
    return show(system.visualise(caption, seed=seed), side=side)


class SourceLines:
    """Lines of the package, as a notebook shows them: coloured where it can, else as Markdown.

    Args:
        place: File and number of the first line.
        code: The lines.
    """

    def __init__(self, place: str, code: str) -> None:
        self.place, self.code = place, code

    def _repr_markdown_(self) -> str:
        return f"{self.place}:\n```python\n{self.code}\n```"

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        formatter = HtmlFormatter(
            noclasses=True, prestyles="font-family: monospace; padding: 6px; color: #222"
        )
        return f"{self.place}:\n{highlight(self.code, PythonLexer(), formatter)}"


def source(function: Any, first: str = "", last: str = "") -> SourceLines:
    """Lines of a function or class as they stand in the installed package, with their file.

    Args:
        first: Text in the first line to show; the whole if empty.
        last: Text in the last line to show.

    Raises:
        UserError: no line holds the text.
    """
    function = inspect.unwrap(function)  # of a decorator, such as no_grad
    lines, number = inspect.getsourcelines(function)
    start = _line_with(lines, first, 0) if first else 0
    end = _line_with(lines, last, start) + 1 if last else len(lines)
    path = Path(inspect.getsourcefile(function) or "")
    inside = path.is_relative_to(PACKAGE)
    name = path.relative_to(PACKAGE.parent).as_posix() if inside else path.name
    code = inspect.cleandoc("\n" + "".join(lines[start:end]))
    return SourceLines(f"{name}, line {number + start}", code)


def _line_with(lines: Sequence[str], text: str, start: int) -> int:
    for number, line in enumerate(lines[start:], start):
        if text in line:
            return number
    raise UserError(f"No line of the source holds {text!r}.")


@dataclass
class Watched:
    """What `watch` saw of a training.

    Attributes:
        system: The trained system, with its averaged weights.
        losses: Step, and losses by name, at every step that was looked at.
        pictures: A row of labelled pictures for each caption, a column for each look.
    """

    system: Any
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pictures: list[list[LabelledImage]] = field(default_factory=list)


def watch(
    steps: Iterable[TrainingStep],
    captions: Sequence[str],
    *,
    looks: int = 6,
    side: int = SIDE,
    **options: Any,
) -> Watched:
    """Train, and show what the system draws as it learns: a row for each caption.

    Args:
        steps: Iterator of `lineage.training_steps`.
        captions: Captions to draw.
        looks: Number of looks, evenly spaced over the budget of each stage that draws.
        side: Width of each picture in pixels.
        **options: Options of the system's `sample`.
    """
    from IPython.display import Markdown, display

    place, watched, started = display(Markdown(""), display_id=True), Watched(None), time.time()
    step, due = None, 0.0
    for step in steps:
        if step.number == 1:
            due = 0.0
        if step.spent < due and step.spent < 1:
            continue
        due += 1 / max(1, looks - 1)
        watched.losses.append((step.number, step.losses))
        if isinstance(step.system, System):
            watched.pictures = watched.pictures or [[] for _ in captions]
            images = step.draw(list(captions), **options)
            for row, image in zip(watched.pictures, images, strict=True):
                row.append(LabelledImage("", image))
            watched.pictures[-1][-1] = LabelledImage(f"step {step.number}", images[-1])
            place.update(show(watched.pictures, side=side))
        else:
            seconds = time.time() - started
            place.update(Markdown(f"{step.stage}: step {step.number}, {seconds:.0f} s"))
    if step is None:
        raise UserError("There was no step to watch: the budget is spent.")
    watched.system = step.system
    return watched


def slider(
    draw: Callable[[Any], Tensor], name: str, values: Sequence[Any], still: Sequence[Any]
) -> Picture:
    """A picture that follows a slider, above a still sheet of some of its positions.

    Args:
        draw: Function from a value to a picture (3, S, S).
        name: Name of what the slider moves.
        values: Positions of the slider.
        still: The positions that the sheet shows, for readers on the web.
    """
    if STILL not in os.environ:
        _interactive(draw, name, values)
    pictures = [draw(value) for value in still]
    return show(pictures, [f"{name} {_text(value)}" for value in still])


def _interactive(draw: Callable[[Any], Tensor], name: str, values: Sequence[Any]) -> None:
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError:  # the extra `notebooks` is not installed: the still sheet remains
        return
    pictures: dict[Any, bytes] = {}

    def encoded(value: Any) -> bytes:
        if value not in pictures:
            pictures[value] = show([draw(value)], side=2 * SIDE)._repr_png_()
        return pictures[value]

    move = ipywidgets.SelectionSlider(
        options=[(_text(value), value) for value in values],
        description=name,
        continuous_update=False,
    )
    place = ipywidgets.Image(value=encoded(move.value), format="png")
    move.observe(lambda change: setattr(place, "value", encoded(change["new"])), "value")
    display(ipywidgets.VBox([move, place]))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
