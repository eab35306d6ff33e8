"""The common loader: batches 0, 1, 2, ... of a data set.

Batch `n` is a function of (data set, batch size, seed, n) alone. So the position in the data is the
step number, a resumed run continues where it stopped, and processes that share a batch each take
their rows of the same one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from lineage.data.contract import Batch, CaptionedDataset

CHUNK = 256  # rows that are read at once


class Loader:
    """Batches of a data set in a seeded order.

    A finite data set is visited in a new order each epoch; a batch may reach from one epoch into
    the next, so no picture is ever left out. An endless one is read from index 0 on.

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
        self._order: tuple[int, np.ndarray] | None = None

    def at(self, number: int) -> Batch:
        """Batch `number`, counted from 0."""
        return self.several(number, 1)[0]

    def several(self, first: int, count: int) -> list[Batch]:
        """Batches `first` to `first + count - 1`, read together, which costs less for each."""
        numbers = range(first, first + count)
        visits = [number * self.batch_size + row for number in numbers for row in self.rows]
        epochs, indices = [0] * len(visits), visits
        if not self.dataset.endless:
            epochs = [visit // len(self.dataset) for visit in visits]
            positions = [visit % len(self.dataset) for visit in visits]
            indices = [int(self._order_of(e)[i]) for e, i in zip(epochs, positions, strict=True)]
        whole = self.dataset.batch(indices, epochs, self.seed)
        parts = whole.split(len(self.rows))
        return [part.pin() for part in parts] if self.pin else parts

    def _order_of(self, epoch: int) -> np.ndarray:
        """The order of one epoch; only the last one is cached."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._order = (epoch, order)
        return self._order[1]

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
