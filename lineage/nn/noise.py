"""Random numbers that do not depend on the batch they are drawn in.

`NoiseStreams` gives each row a stream of its own, seeded by a seed and the picture's number, so
that picture i of `generate` is the same alone and among others. `BatchNoise`, for a training step,
has one stream for its whole batch, of which each process takes its rows: a resumed run repeats the
same numbers, two processes that share a batch draw what one would, and one stream costs a fraction
of one for each row.

The numbers are drawn on the CPU and then moved, so that a GPU starts from the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers: `stream_seed("sample", seed, i)`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_weights(seed: int) -> None:
    """Set the random state from which every system is built."""
    torch.manual_seed(stream_seed("weights", seed))


class NoiseStreams:
    """Random numbers of B rows, each from a stream of its own.

    Args:
        seeds: B seeds.
        device: Device of the numbers.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    @staticmethod
    def for_pictures(
        seed: int, count: int, device: torch.device | str, first: int = 0
    ) -> NoiseStreams:
        """Streams of pictures `first` to `first + count - 1` under `seed`."""
        return NoiseStreams((stream_seed("picture", seed, first + i) for i in range(count)), device)

    def __len__(self) -> int:
        return len(self._streams)

    def _draw(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) numbers of `function(size, generator=...)` on the CPU."""
        return torch.stack([function(shape, generator=stream) for stream in self._streams])

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return numbers.pin_memory().to(self.device, non_blocking=True)
        return numbers.to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal."""
        return self._to_device(self._draw(torch.randn, shape))

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) uniform in [0, 1)."""
        return self._to_device(self._draw(torch.rand, shape))

    def randint(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 uniform in 0 .. high - 1."""
        return self._to_device(self._draw(partial(torch.randint, high), shape))


class BatchNoise(NoiseStreams):
    """Random numbers of some rows of a batch, from one stream.

    Args:
        seed: Seed of the whole batch.
        batch_size: Number of rows of the whole batch.
        rows: Rows that are wanted; row i gets the same numbers whichever others are.
        device: Device of the numbers.
    """

    def __init__(
        self, seed: int, batch_size: int, rows: range, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__((seed,), device)
        self.batch_size, self.rows = batch_size, rows

    def __len__(self) -> int:
        return len(self.rows)

    def _draw(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        numbers = function((self.batch_size, *shape), generator=self._streams[0])
        return numbers[self.rows.start : self.rows.stop : self.rows.step]
