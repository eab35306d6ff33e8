"""Random numbers that belong to a row, not to a batch.

Each row of a batch has its own stream, seeded by what the row is (a training step and position, or
a seed and a number of the picture). So picture i of `generate` is the same whether it is made alone
or among others, a run that is resumed draws what it would have drawn, and two processes that share
a batch draw what one would.

The numbers are drawn on the CPU and then moved, so a GPU starts from the same noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers: `stream_seed("sample", seed, i)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """Independent random streams, one for each of B rows.

    Args:
        seeds: B seeds.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def for_pictures(
        cls, seed: int, count: int, device: torch.device | str, first: int = 0
    ) -> Draws:
        """The streams of pictures `first` to `first + count - 1` under `seed`."""
        return cls((stream_seed("picture", seed, first + i) for i in range(count)), device)

    def __len__(self) -> int:
        return len(self._streams)

    def _stack(self, rows: list[Tensor]) -> Tensor:
        stacked = torch.stack(rows)
        if self.device.type == "cuda":
            return stacked.pin_memory().to(self.device, non_blocking=True)
        return stacked.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal."""
        return self._stack([torch.randn(shape, generator=stream) for stream in self._streams])

    def turned(self, widths: Sequence[int], share: float) -> list[Tensor]:
        """(B, width) standard normal for each of `widths`, `share` of a quarter turn on the way to
        other noise. A turn keeps the variance, which a straight line would not.
        """
        own = [self.normal(width) for width in widths]
        if not share:
            return own
        turn = share * math.pi / 2
        return [math.cos(turn) * part + math.sin(turn) * self.normal(part.shape[1]) for part in own]

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) uniform in [0, 1)."""
        return self._stack([torch.rand(shape, generator=stream) for stream in self._streams])

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 uniform in 0 .. high - 1."""
        return self._stack(
            [torch.randint(high, shape, generator=stream) for stream in self._streams]
        )
