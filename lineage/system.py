"""The contract of a system: what every family gives to the loop, to `lineage.load` and to a
comparison.

    losses    one training step as a coroutine, which yields each loss in the order in which it is
              optimised;
    groups    the parameters that each of those losses moves;
    generate  captions -> pictures.

What only helps others to draw (a text encoder, a matching model) has the first two: `Trainable`.

Axes: B pictures, 3 H W.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from lineage.config import typed
from lineage.data.contract import Batch
from lineage.errors import UserError, nearest
from lineage.nn.noise import NoiseStreams
from lineage.text.contract import TextEncoder, TextFeatures

Turn = tuple[str, dict[str, Tensor]]
"""(name of the parameter group to update, named loss terms whose sum is minimised)."""

Named = tuple[str, Tensor]
"""A picture (3, S, S) under the name that stands below it."""

T = TypeVar("T")


class Trainable(nn.Module):
    """What a stage trains: a step as a coroutine, and the parameters that its turns move.

    Attributes:
        text: the encoder through which it reads captions; trained with it if one of `groups` holds
            it.
        facts: what the last watched step found out beside its losses, scalars for the log.
        watched: whether the facts of the next step will be read; if not, costly ones may be left
            out.
    """

    text: TextEncoder
    facts: dict[str, Tensor]
    watched: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.facts = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Module]]:
        """The modules that each turn of `losses` trains, by the turn's name.

        Empty if nothing is trained.
        """

    @abstractmethod
    def losses(self, batch: Batch, text: TextFeatures, draws: NoiseStreams) -> Iterator[Turn]:
        """One training step.

        Args:
            batch: pictures (B, 3, H, W) in [-1, 1] and what is known of them.
            text: the batch's captions, encoded, with gradient.
            draws: random numbers of each row; all noise of the step comes from here.

        Yields:
            (group, terms): the loop minimises the sum of `terms` over the parameters of `group`,
            then resumes.
        """

    def remark(self, means: dict[str, float]) -> str:
        """What the means of `facts` over some steps say of the training's health, in a few words;
        empty if all is well.
        """
        return ""


class System(Trainable):
    """One text-to-image system.

    Attributes:
        at_once: how many pictures `generate` makes in one go.
        begun: what is done with a picture that is given: `complete` it or `edit` it.
    """

    at_once: int = 64
    begun: str = "complete"

    @abstractmethod
    def draw(self, captions: list[str], draws: NoiseStreams) -> Tensor:
        """Pictures of `captions`, (B, 3, H, W).

        Row i uses stream i of `draws`. Further keywords are the knobs.
        """

    def generate(self, captions: str | Sequence[str], *, seed: int = 0, **knobs: Any) -> Tensor:
        """Draw one picture for each caption.

        Picture i depends on (seed, i, caption i) alone, never on the batch it was made in.

        Args:
            captions: B captions; one string is one caption.
            seed: chooses the noise.
            **knobs: what the system's `draw` takes, such as `steps` or `guidance`.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].

        Raises:
            UserError: for no captions, or for a knob that the system does not have.
        """
        return torch.cat(list(self.generate_in_parts(captions, seed=seed, **knobs)))

    def generate_in_parts(
        self, captions: str | Sequence[str], *, seed: int = 0, **knobs: Any
    ) -> Iterator[Tensor]:
        """What `generate` returns, `at_once` pictures at a time, as soon as they are drawn."""
        knobs = self.typed_knobs(knobs)

        def part(chunk: list[str], draws: NoiseStreams) -> Tensor:
            return self.draw(chunk, draws, **knobs).float().clamp(-1, 1)

        yield from self.in_parts(captions, seed, part)

    def in_parts(
        self, captions: str | Sequence[str], seed: int, make: Callable[[list[str], NoiseStreams], T]
    ) -> Iterator[T]:
        """What `make` gives for `at_once` captions at a time and the streams of their pictures, in
        evaluation mode and without gradients.
        """
        wanted = [captions] if isinstance(captions, str) else list(captions)
        if not wanted:
            raise UserError("There is nothing to draw: give at least one caption.")
        for first in range(0, len(wanted), self.at_once):
            chunk = wanted[first : first + self.at_once]
            draws = NoiseStreams.for_pictures(seed, len(chunk), self.device, first)
            training = self.training
            self.eval()
            try:
                with torch.no_grad():
                    made = make(chunk, draws)
            finally:
                self.train(training)
            yield made

    def variants(self) -> dict[str, dict[str, Any]]:
        """What a sample sheet shows of each caption: knobs, by a name that stands below."""
        return {"": {}}

    def picture_vectors(self, images: Tensor) -> Tensor | None:
        """Pictures (B, 3, S, S) as vectors (B, D) to be held against `text.sentence` by cosine, if
        the system was trained with a model that matches the two; else None.
        """
        return None

    def complete(
        self,
        captions: str | Sequence[str],
        images: Tensor,
        *,
        keep: float = 0.5,
        seed: int = 0,
        **knobs: Any,
    ) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] whose upper part is that of `images`.

        Args:
            images: (B, 3, S, S) in [-1, 1].
            keep: share of the picture, from above, that is given.
            **knobs: those of `generate`.

        Raises:
            UserError: for a system that cannot go on with a picture that is begun.
        """
        raise UserError(
            f"{type(self).__name__} cannot go on with a picture that is begun; vqvae, dalle and "
            "vqgan can."
        )

    def edit(
        self,
        captions: str | Sequence[str],
        images: Tensor,
        *,
        mask: Tensor | None = None,
        strength: float | None = None,
        seed: int = 0,
        **knobs: Any,
    ) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] made from `images` by the captions.

        Args:
            images: (B, 3, S, S) in [-1, 1].
            mask: (B, 1, S, S) bool, True where to paint anew; None for all of the picture.
            strength: how far to go from the picture, above 0 up to 1.
            **knobs: those of `generate`.

        Raises:
            UserError: for a system that cannot change a given picture.
        """
        raise UserError(
            f"{type(self).__name__} cannot change a given picture; ddpm, ldm and dit can."
        )

    def reconstruct(self, images: Tensor) -> Tensor | None:
        """Pictures (B, 3, S, S) in [-1, 1] as the first of two stages, a codec, gives them back;
        None if there is no such stage.
        """
        return None

    def stage_scores(self, batch: Batch) -> dict[str, Tensor]:
        """What each stage does on a batch of pictures, (B,) numbers by name, so that a failure can
        be laid at one stage's door. Empty if there is one stage only, or nothing to measure.
        """
        return {}

    def inside(self, caption: str, *, seed: int = 0) -> list[list[Named]]:
        """What happened on the way to the picture of `caption`: rows of pictures (3, S, S) in [-1,
        1] with their names. Empty if there is nothing to show.
        """
        return []

    def knobs(self) -> dict[str, Any]:
        """The keywords that `generate` takes beside `seed`, with their defaults."""
        parameters = list(inspect.signature(self.draw).parameters.values())[2:]
        return {p.name: p.default for p in parameters}

    def typed_knobs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Knobs as the types that `draw` asks for, from values or from text.

        Raises:
            UserError: for a knob that there is not, or a value of the wrong type.
        """
        hints = get_type_hints(self.draw)
        for name in given:
            if name not in self.knobs():
                hint = nearest(name, self.knobs()) if self.knobs() else "it has none."
                raise UserError(f"{type(self).__name__} has no knob {name!r}: {hint}")
        return {name: typed(hints[name], value, name) for name, value in given.items()}
