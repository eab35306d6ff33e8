"""The common loader: batches 0, 1, 2, ... of a data set.

Batch `n` is a function of (data set, batch size, seed, n) alone. So the position in the data is the
step number, a resumed run continues where it stopped, and processes that share a batch each take
their rows of the same one.

Where a data set has pictures of several shapes, a batch is of one of its `parts`. Parts take turns
in a seeded order, each as often as its share of the pictures says (SDXL: Podell et al. 2023,
arXiv:2307.01952, section 2.3).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from lineage.data.contract import Batch, CaptionedDataset

CHUNK = 256  # rows that are read at once


class Loader:
    """Batches of a data set in a seeded order.

    A finite data set, or part of one, is visited in a new order each epoch; a batch may reach from
    one epoch into the next, so no picture is ever left out. An endless one is read from index 0 on.

    Args:
        dataset: Data set to read.
        batch_size: Number of rows of the whole batch, all processes together.
        seed: Seed of the order and of the captions drawn.
        rank, world_size: This process reads rows from `rank * batch_size / world_size` on.
        prefetch: Number of batches prepared ahead in a thread; 0 for none.
        pin: If true, batches are put in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
        pin: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rows = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.prefetch, self.pin = prefetch, pin
        self._parts = dataset.parts
        self._turns = Turns([len(part) for part in self._parts], batch_size, seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def at(self, number: int) -> Batch:
        """Batch `number`, counted from 0."""
        return self.several(number, 1)[0]

    def several(self, first: int, count: int) -> list[Batch]:
        """Batches `first` to `first + count - 1`, read together, which costs less for each."""
        if len(self._parts) == 1:
            return self._read(0, first, count)
        turns = map(self._turns.at, range(first, first + count))
        return [batch for part, number in turns for batch in self._read(part, number, 1)]

    def _read(self, part: int, first: int, count: int) -> list[Batch]:
        """Some batches of one part, read together."""
        dataset = self._parts[part]
        numbers = range(first, first + count)
        visits = [number * self.batch_size + row for number in numbers for row in self.rows]
        epochs, indices = [0] * len(visits), visits
        if not dataset.endless:
            epochs = [visit // len(dataset) for visit in visits]
            positions = [visit % len(dataset) for visit in visits]
            visited = zip(epochs, positions, strict=True)
            indices = [int(self._order_of(part, epoch)[i]) for epoch, i in visited]
        batches = dataset.batch(indices, epochs, self.seed).split(len(self.rows))
        return [batch.pin() for batch in batches] if self.pin else batches

    def _order_of(self, part: int, epoch: int) -> np.ndarray:
        """The order of one epoch of a part; only its last one is cached."""
        if part not in self._orders or self._orders[part][0] != epoch:
            seeds = [self.seed, epoch, *([part] if part else [])]
            order = np.random.default_rng(seeds).permutation(len(self._parts[part]))
            self._orders[part] = (epoch, order)
        return self._orders[part][1]

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Batches `first`, `first + 1`, ... without end.

        An error of the data set is raised when the batch that caused it is due.
        """
        if self.prefetch == 0:
            yield from self._without_thread(first)
        ready: queue.Queue[Batch | Exception] = queue.Queue(self.prefetch)
        done = threading.Event()
        worker = threading.Thread(target=self._work, args=(first, ready, done), daemon=True)
        worker.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            done.set()
            while not ready.empty():  # a worker that waits for room must wake up to end
                ready.get_nowait()
            worker.join(timeout=5)

    def _without_thread(self, number: int) -> Iterator[Batch]:
        """A few batches are read together, the next few when those are used up."""
        count = max(1, CHUNK // len(self.rows))
        while True:
            try:
                batches = self.several(number, count)
            except Exception:
                batches = [self.at(number)]  # the error belongs to a later batch, perhaps
            yield from batches
            number += len(batches)

    def _work(
        self, first: int, ready: queue.Queue[Batch | Exception], done: threading.Event
    ) -> None:
        number = first
        while not done.is_set():
            item: Batch | Exception
            try:
                item = self.at(number)
            except Exception as error:
                item = error
            while not done.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            number += 1


class Turns:
    """Which part of a data set each batch is of.

    By the end of epoch e of the whole, a part of n pictures has had e n / B batches, rounded down;
    the batches of an epoch are in a seeded order.

    Args:
        sizes: Number of pictures of each part.
        batch_size: B.
        seed: Seed of the order.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.batch_size, self.seed = batch_size, seed

    def _before(self, epoch: int) -> np.ndarray:
        """Number of batches of each part before an epoch."""
        return np.asarray(epoch * self.sizes // self.batch_size)

    def at(self, number: int) -> tuple[int, int]:
        """Part of a batch of the whole, and the batch's number within the part."""
        epoch = number * self.batch_size // int(self.sizes.sum())
        while self._before(epoch + 1).sum() <= number:
            epoch += 1
        before = self._before(epoch)
        turns = np.repeat(np.arange(len(self.sizes)), self._before(epoch + 1) - before)
        np.random.default_rng([self.seed, epoch]).shuffle(turns)
        place = number - int(before.sum())
        part = int(turns[place])
        return part, int(before[part] + (turns[:place] == part).sum())
