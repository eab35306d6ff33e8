"""What systems that draw through CLIP share: a frozen CLIP, and nothing to train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lineage.clip.clip import CLIP
from lineage.data.contract import Batch
from lineage.nn.noise import NoiseStreams
from lineage.system import System, Turn
from lineage.text.contract import TextEncoder, TextFeatures


class CLIPGuided(System):
    """A system whose `sample` optimises each picture through a frozen CLIP.

    Args:
        clip: Compares pictures and captions; it is frozen.
        size: S, side of the pictures in pixels.
    """

    def __init__(self, clip: CLIP, size: int) -> None:
        super().__init__()
        self.clip, self.size = clip.requires_grad_(False), size

    @property
    def text(self) -> TextEncoder:  # type: ignore[override]
        """Text tower of CLIP."""
        return self.clip.text

    def groups(self) -> dict[str, list[nn.Module]]:
        return {}

    def losses(self, batch: Batch, text: TextFeatures, noise: NoiseStreams) -> Iterator[Turn]:
        """There is nothing to train, so that no turn is yielded."""
        yield from ()
