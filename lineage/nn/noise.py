"""Random numbers that do not depend on who draws them.

Where pictures are drawn, each row has its own stream (`NoiseStreams`), seeded by a seed and a number of
the picture: picture i of `generate` is the same whether it is made alone or among others. A
training step has one stream for its whole batch (`BatchNoise`), of which a process takes the
numbers of its rows: a run that is resumed draws what it would have drawn, and two processes that
share a batch draw what one would, at a fraction of what a stream for each row costs.

The numbers are drawn on the CPU and then moved, so a GPU starts from the same noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers: `stream_seed("sample", seed, i)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class NoiseStreams:
    """Random numbers of B rows, each from a stream of its own.

    Args:
        seeds: B seeds.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    @staticmethod
    def for_pictures(
        seed: int, count: int, device: torch.device | str, first: int = 0
    ) -> NoiseStreams:
        """The streams of pictures `first` to `first + count - 1` under `seed`."""
        return NoiseStreams((stream_seed("picture", seed, first + i) for i in range(count)), device)

    def __len__(self) -> int:
        return len(self._streams)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) of what `draw(size, generator=...)` gives."""
        return torch.stack([draw(shape, generator=stream) for stream in self._streams])

    def _moved(self, drawn: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return drawn.pin_memory().to(self.device, non_blocking=True)
        return drawn.to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal."""
        return self._moved(self._drawn(torch.randn, shape))

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) uniform in [0, 1)."""
        return self._moved(self._drawn(torch.rand, shape))

    def randint(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 uniform in 0 .. high - 1."""
        return self._moved(self._drawn(partial(torch.randint, high), shape))

    def turned(self, widths: Sequence[int], share: float) -> list[Tensor]:
        """(B, width) standard normal for each of `widths`, `share` of a quarter turn on the way to
        other noise. A turn keeps the variance, which a straight line would not.
        """
        own = [self.randn(width) for width in widths]
        if not share:
            return own
        turn = share * math.pi / 2
        return [math.cos(turn) * part + math.sin(turn) * self.randn(part.shape[1]) for part in own]


class BatchNoise(NoiseStreams):
    """The random numbers of some rows of a batch, from one stream.

    Args:
        seed: of the whole batch.
        batch: how many rows it has in all.
        rows: which of them are wanted; row i gets the same numbers whichever others are.
        device: where the numbers are wanted.
    """

    def __init__(
        self, seed: int, batch: int, rows: range, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__((seed,), device)
        self.batch, self.rows = batch, rows

    def __len__(self) -> int:
        return len(self.rows)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        drawn = draw((self.batch, *shape), generator=self._streams[0])
        return drawn[self.rows.start : self.rows.stop : self.rows.step]
