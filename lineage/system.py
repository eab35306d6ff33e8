"""The contract of a system: what every family gives to the training loop, to `lineage.load` and to
a comparison.

    losses     one training step as a coroutine, which yields each loss in the order in which it is
               optimised (`Turn`);
    groups     the modules that each of those losses trains;
    sample     captions and noise -> pictures; its keywords are the system's options;
    generate   captions and a seed -> pictures, in batches.

A model that only helps others to draw (a codec, a matching model) has the first two: `Trainable`.
What only some systems offer (`visualise`, `reconstruct`, ...) is a Protocol of its own.

Axes: B pictures, 3 channels, S side.
"""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_type_hints, runtime_checkable

import torch
from torch import Tensor, nn

from lineage.bounds import Seed
from lineage.config import typed
from lineage.data.contract import Batch
from lineage.errors import UserError, nearest
from lineage.nn.noise import NoiseStreams
from lineage.text.contract import TextEncoder, TextFeatures, caption_list
from lineage.threads import LARGE, tuned, use_free_threads

PICTURE_OPTIONS = ("image", "mask", "control", "reference")
"""Options that hold one picture for each caption, under the names of diffusers' pipelines."""
CAPTION_OPTIONS = ("negative", "interpolate_to")
"""Options that hold a caption."""


@dataclass(frozen=True)
class Turn:
    """One loss of a training step.

    Attributes:
        group: Name of the parameter group that is updated.
        terms: Loss terms by name, scalars; their sum is minimised.
        metrics: Function that returns further scalars by name, called by the loop when it logs.
    """

    group: str
    terms: Mapping[str, Tensor]
    metrics: Callable[[], Mapping[str, Tensor]] = dict


class LabelledImage(NamedTuple):
    """A picture (3, S, S) in [-1, 1] and the label that is written below it."""

    label: str
    image: Tensor


class Option(NamedTuple):
    """One keyword of a system's `sample`: its name, type, default and a sentence about it."""

    name: str
    type: Any
    default: Any
    sentence: str


class Trainable(nn.Module):
    """A model that a stage trains: its step as a coroutine, and the modules that its turns train.

    Attributes:
        text: Encoder of the captions, trained with the model if one of `groups` holds it; None for
            a model that reads no captions.
    """

    text: TextEncoder | None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Module]]:
        """Modules that each turn of `losses` trains, by the turn's group; empty if none is."""

    @abstractmethod
    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """One training step.

        Args:
            batch: Pictures (B, 3, S, S) in [-1, 1], their captions, and what data wrappers added.
            text: Features of the batch's captions, with gradient; None if `self.text` is None.
            noise: Random numbers of each row; all noise of the step comes from here.

        Yields:
            Turns: the loop minimises the sum of a turn's terms over its group's parameters, then
            resumes the coroutine, which sees the updated parameters.
        """

    def check_shape(self, height: int, width: int) -> None:
        """Raise `UserError` if pictures of this height and width cannot be learned from."""
        if height != width:
            raise UserError(
                f"{type(self).__name__} learns from squares alone, not from pictures of {width} x "
                f"{height} pixels: leave crop=buckets out."
            )

    def diagnose(self, means: Mapping[str, float]) -> str:
        """A few words on the training's health, from the mean of each metric over some steps; empty
        if all is well.
        """
        return ""


class System(Trainable):
    """One text-to-image system.

    Attributes:
        size: S, side of the pictures in pixels.
        text_len: Number of the words' vectors that the system uses; None for all.
        sample_batch_size: Number of pictures that `generate` draws at once.
    """

    text: TextEncoder
    size: int
    text_len: int | None = None
    sample_batch_size: int = 64

    @abstractmethod
    def sample(self, captions: list[str], noise: NoiseStreams) -> Tensor:
        """Pictures of `captions`, (B, 3, S, S).

        Row i uses stream i of `noise`. Further keywords are the system's options, each typed, with
        a default, and documented under Args; picture options come as (B, ...) tensors.
        """

    def generate(
        self,
        captions: str | Sequence[str],
        *,
        seed: int = 0,
        first: int = 0,
        progress: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw one picture for each caption.

        Picture i depends on (seed, i, caption i) alone, never on the batch it was made in.

        Args:
            captions: B captions; one string is one caption.
            seed: Seed of the noise.
            first: Number i of the first picture, for some of the pictures of a longer list.
            progress: Function that is called with the number of pictures of each finished batch.
            **options: Keywords of the system's `sample`, such as `guidance`; see `options()`. A
                picture option holds B pictures, or one that serves all captions.

        Returns:
            (B, 3, S, S) float32 in [-1, 1].

        Raises:
            UserError: for no captions, an unknown option, or a value that does not fit it.
        """
        pictures = []
        captions = caption_list(captions)
        for part, streams, own in self.sample_batches(captions, seed, options, first):
            several = len(captions) > self.sample_batch_size
            with self.inference(), self._threads(len(part), several):
                images = self.sample(part, streams, **own).float()
                if not images.isfinite().all():
                    raise UserError(
                        "The pictures are no numbers (NaN or infinite): options such as guidance "
                        "or eta are too large, or training has failed."
                    )
                pictures.append(images.clamp(-1, 1))
            if progress is not None:
                progress(len(part))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def sample_batches(
        self, captions: str | Sequence[str], seed: int, options: Mapping[str, Any], first: int = 0
    ) -> Iterator[tuple[list[str], NoiseStreams, dict[str, Any]]]:
        """Captions, noise streams and options of each batch that `generate` draws."""
        captions = caption_list(captions)
        seed, first = typed(Seed, seed, "seed"), typed(Seed, first, "first")
        if not captions:
            raise UserError("There is nothing to draw: give at least one caption.")
        options = self.typed_options(options, len(captions))
        for start in range(0, len(captions), self.sample_batch_size):
            part = captions[start : start + self.sample_batch_size]
            rows = slice(start, start + len(part))
            own = {n: v[rows] if n in PICTURE_OPTIONS else v for n, v in options.items()}
            streams = NoiseStreams.for_pictures(seed, len(part), self.device, first + start)
            yield part, streams, own

    def _threads(self, count: int, several: bool) -> AbstractContextManager[None]:
        """The context, with its number of threads, in which `count` pictures are drawn.

        Args:
            several: If true, there are several batches, so that it pays to time them.
        """
        if self.device.type != "cpu":
            return nullcontext()
        if not several:
            return use_free_threads()
        large = sum(p.numel() for p in self.parameters()) >= LARGE
        return tuned("draw", type(self).__name__, self.size, count, large=large)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; training mode is restored afterwards."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    def variants(self) -> dict[str, dict[str, Any]]:
        """Options with which a sample sheet draws each caption, by the label below the picture."""
        return {"": {}}

    # --- options ------------------------------------------------------------------------------

    def options(self) -> dict[str, Option]:
        """Options that `generate` takes, by name: the keywords of `sample`."""
        hints = get_type_hints(self.sample, include_extras=True)
        sentences = _argument_sentences(self.sample)
        parameters = list(inspect.signature(self.sample).parameters.values())[2:]
        return {
            p.name: Option(p.name, hints[p.name], p.default, sentences.get(p.name, ""))
            for p in parameters
        }

    def typed_options(self, options: Mapping[str, Any], count: int = 1) -> dict[str, Any]:
        """`options`, whose values may be text, as the types that `sample` declares; picture options
        as (`count`, ...) tensors on the system's device. An option that is None is left out.

        Raises:
            UserError: for an unknown option, or a value that does not fit it.
        """
        known, checked = self.options(), {}
        for name, value in options.items():
            if name not in known:
                hint = nearest(name, known) if known else "it has none."
                raise UserError(f"{type(self).__name__} has no option {name!r}: {hint}")
            if value is None:
                continue
            if name in PICTURE_OPTIONS:
                checked[name] = self._checked_pictures(name, value, count)
            else:
                checked[name] = typed(known[name].type, value, name)
        return checked

    def texts(self, captions: list[str]) -> list[str]:
        """The texts that the text encoder reads for `captions`; others where a caption has parts
        with weights.
        """
        return captions

    def idle_options(self, captions: list[str], options: Mapping[str, Any]) -> dict[str, str]:
        """Options that change no picture of `captions` beside the others, and why: name -> reason.

        Args:
            options: Result of `typed_options`. One that has its default's value is not named.
        """
        return {}

    def _checked_pictures(self, name: str, value: Any, count: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise UserError(f"{name} must be a tensor of pictures, not {value!r}.")
        wanted = (count, 1 if name == "mask" else 3, self.size, self.size)
        if value.dim() == 4 and len(value) == 1:
            value = value.expand(count, *value.shape[1:])
        if value.shape != wanted:
            raise UserError(f"{name} must be {wanted}, not {tuple(value.shape)}.")
        if name == "mask":
            if value.dtype != torch.bool:
                raise UserError(f"mask must be of bool, not of {value.dtype}.")
            return value.to(self.device)
        if not value.is_floating_point():
            raise UserError(f"{name} must be of float32 in [-1, 1], not of {value.dtype}.")
        if not value.abs().max() <= 1.001:  # also true of NaN
            raise UserError(f"{name} must hold numbers in [-1, 1]; bytes become so by `to_unit`.")
        return value.to(self.device, torch.float32)


def _argument_sentences(function: Callable[..., Any]) -> dict[str, str]:
    """The sentence about each parameter, from the Args section of a docstring."""
    sentences: dict[str, str] = {}
    names: list[str] = []
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2]
    for line in section.split("\n\n")[0].splitlines():
        if match := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            sentences |= dict.fromkeys(names, match[2])
        else:
            sentences |= {name: f"{sentences[name]} {line.strip()}" for name in names}
    return sentences


# --- what some systems offer beside pictures ------------------------------------------------------


@runtime_checkable
class Visualises(Protocol):
    """A system that shows how a picture came about (attention, a film of the denoising)."""

    def visualise(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """Rows of labelled pictures (3, S, S) in [-1, 1]."""


@runtime_checkable
class HasFrames(Protocol):
    """A system that shows each step on the way to a picture."""

    def frames(self, caption: str, *, seed: int = 0) -> list[list[LabelledImage]]:
        """Labelled pictures (3, S, S) in [-1, 1] of each step, in order; as many in each."""


@runtime_checkable
class DrawsVectors(Protocol):
    """A system whose pictures are drawn from strokes."""

    def svg(self, captions: str | Sequence[str], *, seed: int = 0, **options: Any) -> list[str]:
        """The pictures of `generate` for the same arguments, as the text of SVG files."""


@runtime_checkable
class Reconstructs(Protocol):
    """A system whose first stage encodes and decodes pictures."""

    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1], encoded and decoded."""


@runtime_checkable
class HasSides(Protocol):
    """A system that is trained on its pictures at several sizes.

    Attributes:
        sides: Sides of the pictures, from the smallest to S.
    """

    sides: list[int]


@runtime_checkable
class EmbedsImages(Protocol):
    """A system that was trained with a model that matches pictures and captions."""

    def image_embedding(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> (B, Ds), compared with `text.sentence` by cosine."""


@runtime_checkable
class ScoresStages(Protocol):
    """A system whose stages can be measured apart."""

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Per-image metrics of each stage, `{name: (B,)}`; they show which stage fails."""
