"""The common loader: a data set, a batch size and a seed, turned into batch number 0, 1, 2, ...

Batch `n` is a function of (data set, batch size, seed, n) alone. So the position in the data is the
step number, a run that is resumed goes on where it was, and processes that share a batch each take
their rows of the same one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from lineage.data.contract import Batch, CaptionedDataset

READ_AT_ONCE = 256  # rows


class Loader:
    """Batches of a data set in a seeded order.

    A finite data set is visited in a fresh order each epoch; a batch may reach from one epoch into
    the next, so no picture is ever left out. An endless one is read from index 0 on.

    Args:
        dataset: what to read.
        batch: rows of the whole batch, all processes together.
        seed: of the order and of the captions drawn.
        rank, world: this process reads rows `rank * batch / world` and on.
        prefetch: batches prepared ahead in a thread; 0 for none.
        pin: put batches in page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 0,
        pin: bool = False,
    ) -> None:
        self.dataset, self.size, self.seed = dataset, batch, seed
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)
        self.prefetch, self.pin = prefetch, pin
        self._order: tuple[int, np.ndarray] | None = None

    def at(self, number: int) -> Batch:
        """Batch `number`, counted from 0."""
        return self.several(number, 1)[0]

    def several(self, first: int, count: int) -> list[Batch]:
        """Batches `first` to `first + count - 1`, read in one go, which costs less for each."""
        numbers = range(first, first + count)
        visits = [number * self.size + row for number in numbers for row in self.rows]
        places = [(0, v) if self.dataset.endless else divmod(v, len(self.dataset)) for v in visits]
        indices = [i if self.dataset.endless else int(self._epoch(e)[i]) for e, i in places]
        whole = self.dataset.batch(indices, [epoch for epoch, _ in places], self.seed)
        return [self._ready(part) for part in whole.split(len(self.rows))]

    def _ready(self, batch: Batch) -> Batch:
        return batch.pin() if self.pin else batch

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch; only the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self._order = (epoch, order)
        return self._order[1]

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Batches `first`, `first + 1`, ...

        without end. An error of the data set is raised here, in its turn.
        """
        if self.prefetch == 0:
            yield from self._one_after_the_other(first)
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
            while not ready.empty():  # let a worker that waits for room see that it is done
                ready.get_nowait()
            worker.join(timeout=5)

    def _one_after_the_other(self, number: int) -> Iterator[Batch]:
        """Without a thread: a few batches are read in one go, the next few when they are used."""
        count = max(1, READ_AT_ONCE // len(self.rows))
        while True:
            try:
                batches = self.several(number, count)
            except Exception:
                batches = [self.at(number)]  # an error is raised in its turn
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
