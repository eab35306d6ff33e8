"""The spaces in which a diffusion model noises pictures; `ldm.py` has the latents.

Axes: B pictures; 3, S S of the pictures; C, H W of the space.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from lineage.data.contract import Batch
from lineage.nn.noise import NoiseStreams


class Space(nn.Module):
    """The space in which pictures are noised.

    Attributes:
        size: S, side of the pictures in pixels.
        shape: (C, H, W) of a picture in the space.
    """

    size: int
    shape: tuple[int, int, int]

    @abstractmethod
    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) in the space of pictures of this height and width in pixels."""

    @abstractmethod
    def encode(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        """x_0 of a training batch, (B, C, H, W)."""

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] -> x_0 (B, C, H, W), without randomness."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """x_0 (B, C, H, W) -> pictures (B, 3, S, S)."""


class PixelSpace(Space):
    """The pictures themselves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.shape = size, self.shape_of(size, size)

    def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode(self, batch: Batch, noise: NoiseStreams) -> Tensor:
        return batch.image

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x0: Tensor) -> Tensor:
        return x0
