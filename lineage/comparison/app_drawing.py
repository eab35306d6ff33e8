"""What `lineage app` draws: a caption by several systems, the judge's verdicts, a picture that is
repainted, and how a picture came about. No part of it needs the page.

    draw_each          a caption, drawn by one run after the other
    repaint_each       a picture, repainted or continued by one run after the other
    verdicts_of        what the judge detects in pictures, and whether the caption says so
    visualisation_of   the frames, or the rows, that show how a picture came about

Axes: B pictures, S side.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lineage.bounds import Int, Seed
from lineage.comparison.app_controls import MAX_TEXT
from lineage.comparison.app_runs import AppRun
from lineage.config import typed
from lineage.data.contract import to_bytes, to_unit
from lineage.data.shapes_languages import parse_rest
from lineage.errors import UserError
from lineage.evaluation.captions import read_caption
from lineage.evaluation.judge import Detections, Judge, verdict
from lineage.notes import idle_options, unread_text
from lineage.system import CAPTION_OPTIONS, HasFrames, LabelledImage, Visualises
from lineage.threads import use_threads

MAX_PICTURES = 8  # of a system and call
MAX_PIXELS = 4096 * 4096  # of a picture that somebody brings along
_PARTS = {"object": "shape"}
"""Names of the verdict's parts that say more beside a picture."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one picture.

    Attributes:
        detected: The objects in words: `1 red circle, 2 blue squares`.
        is_right: Whether they are what the caption says; None for a caption that it cannot read.
        wrong: What is wrong, in a few words; empty if nothing is.
    """

    detected: str
    is_right: bool | None = None
    wrong: str = ""


@dataclass(frozen=True)
class Result:
    """What one run has answered.

    Attributes:
        run: The run.
        images: Pictures (3, S, S) uint8; none if the run has failed.
        seconds: Time that they took.
        verdicts: One of each picture; none if the judge cannot read them.
        notes: Sentences about captions and options.
        error: Why there are no pictures; empty if there are.
    """

    run: AppRun
    images: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class DrawRequest:
    """What somebody wants to have drawn.

    Attributes:
        caption: Caption.
        count: Number of pictures of each system.
        seed: Seed of the noise.
        options: Options of each run, by the run's place among all runs.
    """

    caption: str
    count: int = 1
    seed: int = 0
    options: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def draw_request(caption: Any, count: Any = 1, seed: Any = 0, options: Any = None) -> DrawRequest:
    """A request, checked; it may have come without the page, which has these bounds too.

    Raises:
        UserError: the caption is empty or too long, or a number is out of its bounds.
    """
    caption = typed(str, caption or "", "caption").strip()
    if not caption:
        raise UserError("There is nothing to draw: write a caption.")
    if len(caption) > MAX_TEXT:
        raise UserError(f"The caption has {len(caption):,} letters: write at most {MAX_TEXT}.")
    seed = typed(Seed, 0 if seed is None else seed, "seed")
    number: int = typed(Int, 1 if count is None else count, "The number of pictures")
    if not 1 <= number <= MAX_PICTURES:
        raise UserError(f"The number of pictures must be from 1 to {MAX_PICTURES}, not {number}.")
    return DrawRequest(caption, number, seed, options or {})


# --- drawing --------------------------------------------------------------------------------------


def draw_each(
    runs: Mapping[int, AppRun], request: DrawRequest, threads: int | None = None
) -> Iterator[Result]:
    """The results of runs, one after the other; a run that fails does not stop the others.

    Args:
        runs: The runs by their places among all runs.
        threads: Number of threads on a CPU; None for as many as are free.
    """
    for place, run in runs.items():
        yield _result(run, partial(_draw, run, request, request.options.get(place, {})), threads)


def repaint_each(
    runs: Mapping[int, AppRun],
    request: DrawRequest,
    image: Image.Image,
    mask: NDArray[np.bool_] | None,
    strength: float | None = None,
    keep: float | None = None,
    threads: int | None = None,
) -> Iterator[Result]:
    """A picture, repainted under a mask by the runs that can, and continued below its upper part by
    those that can do that; the others answer that they can do neither.

    Args:
        image: The picture; its centred square is used.
        mask: (height, width) of the picture, true where it is repainted; None, or true nowhere, to
            change all of it.
        strength: Option of the runs that repaint; None for their own.
        keep: Option of the runs that continue; None for their own.
    """
    for place, run in runs.items():
        options = request.options.get(place, {})
        yield _result(
            run, partial(_repaint, run, request, options, image, mask, strength, keep), threads
        )


def _repaint(
    run: AppRun,
    request: DrawRequest,
    options: Mapping[str, Any],
    image: Image.Image,
    mask: NDArray[np.bool_] | None,
    strength: float | None,
    keep: float | None,
) -> Result:
    own: dict[str, Any] = {**options, "image": to_unit(square_picture(image, run.size))[None]}
    if run.inpaints:
        own["mask"] = None if mask is None else square_mask(mask, run.size)
        whole = own["mask"] is None and strength == 1  # nothing of the picture would be left
        own["strength"] = None if whole else strength
    elif run.continues:
        own["keep"] = keep
    else:
        raise UserError("This system neither repaints nor continues pictures.")
    return _draw(run, request, own)


def _result(run: AppRun, draw: Callable[[], Result], threads: int | None) -> Result:
    """The result of `draw`, or what went wrong, in a sentence."""
    try:
        with use_threads(threads):
            return draw()
    except UserError as error:
        return Result(run, error=str(error))
    except Exception as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
            return Result(run, error="There is not enough memory: draw fewer pictures.")
        traceback.print_exc()
        return Result(run, error="This is a defect of lineage: the terminal shows where.")


def _draw(run: AppRun, request: DrawRequest, options: Mapping[str, Any]) -> Result:
    system, captions = run.system, [request.caption] * request.count
    options = {name: value for name, value in options.items() if value is not None}
    texts = [request.caption, *(options[name] for name in CAPTION_OPTIONS if name in options)]
    notes = unread_text(system.text, system.texts(texts), system.text_len)
    notes = [f"{note[0].upper()}{note[1:]}." for note in notes]
    notes += idle_options(system, [request.caption], options)
    start = time.perf_counter()
    images = to_bytes(system.generate(captions, seed=request.seed, **options)).cpu()
    seconds = time.perf_counter() - start
    return Result(run, list(images), seconds, verdicts_of(images, request.caption, run.data), notes)


# --- the judge ------------------------------------------------------------------------------------


def level_of(data: str) -> str | None:
    """The level of `shapes` that a run was trained on; None for other data."""
    kind, _, rest = data.partition(":")
    kind, question, options = kind.partition("?")
    return parse_rest(f"{rest}{question}{options}")[0] if kind == "shapes" else None


def verdicts_of(images: Tensor, caption: str, data: str) -> list[Verdict]:
    """What the judge says of pictures (B, 3, S, S) uint8 of a caption; nothing if they are no
    squares, or their data is not `shapes`.
    """
    level = level_of(data)
    if level is None or images.shape[-1] != images.shape[-2]:
        return []
    prompt = read_caption(caption, level)
    verdicts = []
    for detections in Judge.load().detect(images):
        if prompt is None:
            verdicts.append(Verdict(in_words(detections)))
            continue
        parts = verdict(detections, prompt)
        is_right = parts.pop("strict")
        wrong = [_PARTS.get(name, name) for name, holds in parts.items() if not holds]
        reason = "" if is_right else ", ".join(wrong) or "what belongs to what"
        verdicts.append(Verdict(in_words(detections), is_right, reason))
    return verdicts


def in_words(detections: Detections) -> str:
    """`1 red circle, 2 blue squares`; `?` of the judge is `unclear shape`."""
    counts = Counter((o.colour, o.shape) for o in detections.objects)
    words = []
    for (colour, shape), count in counts.items():
        noun = "unclear shape" if shape == "?" else shape
        plural = ("es" if noun.endswith("s") else "s") if count > 1 else ""
        words.append(f"{count} {colour} {noun}{plural}")
    return ", ".join(words) or "nothing"


# --- pictures that somebody brings along ----------------------------------------------------------


def square_picture(image: Image.Image, size: int) -> Tensor:
    """The centred square of a picture, (3, S, S) uint8; what is transparent becomes white.

    Raises:
        UserError: it has too many pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"The picture has more than {MAX_PIXELS / 1e6:.0f} million pixels.")
    ground = Image.new("RGBA", image.size, "white")
    rgb = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    way = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    square = rgb.resize((size, size), way, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def square_mask(mask: NDArray[np.bool_], size: int) -> Tensor | None:
    """The centred square of a mask, (1, 1, S, S): true where more than half of a pixel is painted;
    None if nothing is.

    Raises:
        UserError: too little is painted for a picture of this size, or all of it.
    """
    if not mask.any():
        return None
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    part = torch.from_numpy(mask[top : top + side, left : left + side]).float()[None, None]
    small = F.adaptive_avg_pool2d(part, (size, size)) > 0.5
    if not small.any():
        raise UserError(f"Too little is painted for a picture of {size} x {size} pixels.")
    if small.all():
        raise UserError("All of the picture is painted over: leave a part of it.")
    return small


# --- how a picture came about ---------------------------------------------------------------------


@dataclass(frozen=True)
class Visualisation:
    """How a picture came about.

    Attributes:
        frames: Labelled pictures of each step; empty if the system shows no steps.
        rows: Rows of labelled pictures; empty if there are frames.
    """

    frames: list[list[LabelledImage]] = field(default_factory=list)
    rows: list[list[LabelledImage]] = field(default_factory=list)


def visualisation_of(
    run: AppRun, request: DrawRequest, threads: int | None = None
) -> Visualisation:
    """How the first picture of a request came about, with the system's default options.

    Raises:
        UserError: the system has nothing to show.
    """
    system = run.system
    with use_threads(threads):
        if isinstance(system, HasFrames):
            return Visualisation(frames=system.frames(request.caption, seed=request.seed))
        if isinstance(system, Visualises):
            return Visualisation(rows=system.visualise(request.caption, seed=request.seed))
    raise UserError(f"{run.title} draws in one step and has nothing to show.")


def runs_at(runs: Sequence[AppRun], places: Sequence[int] | None) -> dict[int, AppRun]:
    """The runs at some places, oldest first.

    Raises:
        UserError: there is none.
    """
    named = {place: run for place, run in enumerate(runs) if place in (places or ())}
    if not named:
        raise UserError("No system is chosen: tick at least one.")
    return named
