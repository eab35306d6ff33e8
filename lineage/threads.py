"""Number of threads that PyTorch uses on a CPU, decided in one place for training, sampling and
evaluation.

PyTorch starts a thread for each core that it counts. On a quiet machine the second one gains 1.1 to
1.6; beside another busy process it costs up to thirty times, since every parallel region, of which
a training step has a thousand, waits for its slowest thread, and that one for a time slice of the
system. So the count is measured:

    free_threads       the largest count for which there are free cores right now
    use_free_threads   that count for one piece of work
    ThreadTuner        the fastest count for work that repeats, such as training steps: timed at the
                       start, and again when the work gets slower or cores become free
    tuned              one unit of such work, by its name: a batch of pictures to draw or to score
    use_threads        the count that the user demands

`--threads N` or OMP_NUM_THREADS overrules all measuring. `torch.set_num_threads`, called before, is
the largest count that is tried.

Threads that wait compute in a loop, which counts as processor time: with one thread, processor time
is work, and with several it is not.

The count changes the last bits of results: oneDNN splits the sum over a batch, in the gradient of a
convolution's weights, among its threads, and so do PyTorch's layer norm and sums to one number. In
one training step of each stage at preset tiny, between 0 and 66 % of the convolutions gave another
gradient with two threads than with one (AMD Zen 5, bfloat16); in float32, more than half did.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from lineage.cores import free_cpus, usable_cpus
from lineage.errors import UserError

REGION = 2**15  # numbers for each thread: PyTorch adds no fewer than these in parallel
PROBE_SECONDS = 0.02
PROBE_LASTS = 1.0  # seconds for which `use_free_threads` believes what it found
KEPT_WAITING = 1.8
"""Factor on the time of a small region above which its threads are kept waiting: it is at most 1.5
on free cores, and 2.3 to 1,700 beside busy processes (two cores, 20 probes of 20 ms each)."""

# --- what the user asks for -----------------------------------------------------------------------

MAX_THREADS = 256  # with far more, OpenMP crashes
_requested: ContextVar[int | None] = ContextVar("_requested", default=None)


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Use exactly `count` threads; None: those of PyTorch, but no more than the process may use."""
    if count is None:
        with _threads(available()):
            yield
        return
    token = _requested.set(count)
    try:
        with _threads(count):
            yield
    finally:
        _requested.reset(token)


def available() -> int:
    """The largest number of threads that work may use."""
    return requested() or min(usable_cpus(), torch.get_num_threads())


def worded(count: int) -> str:
    """`1 thread`, `2 threads`, ..."""
    return f"{count} thread{'' if count == 1 else 's'}"


def requested() -> int | None:
    """The count that `--threads` or OMP_NUM_THREADS demands; None without either.

    Raises:
        UserError: OMP_NUM_THREADS is larger than PyTorch could use.
    """
    if (count := _requested.get()) is not None:
        return count
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first.isdecimal() or int(first) == 0:
        return None
    if int(first) > MAX_THREADS:
        raise UserError(f"OMP_NUM_THREADS={first[:20]} must be at most {MAX_THREADS}.")
    return int(first)


# --- what is free right now -----------------------------------------------------------------------


def free_threads(largest: int) -> int:
    """The largest count, `largest` or a half, a quarter, ... of it, for which there are free cores
    and whose parallel regions are not kept waiting; found in about 35 ms.

    The first is not enough: the cores of a virtual machine may be shared by others. Nor the second:
    a thread that has rested is preferred to others for tens of milliseconds.
    """
    free = free_cpus()
    while free is not None and largest > max(1, free):
        largest //= 2
    if largest == 1:
        return 1
    region = torch.zeros(largest * REGION)
    with _threads(1):
        alone = statistics.median(_region_seconds(region, PROBE_SECONDS / 10))
    while largest > 1:
        with _threads(largest):
            for _ in range(2):  # the first time, a system service may have had a core
                seconds = _region_seconds(region, PROBE_SECONDS)
                if statistics.mean(seconds) < KEPT_WAITING * alone:
                    return largest
        largest //= 2
    return largest


def _region_seconds(x: torch.Tensor, at_least: float) -> list[float]:
    """Seconds of each of the parallel regions that fit into `at_least` seconds."""
    torch.add(x, x)  # starts the threads
    times = [time.perf_counter()]
    while len(times) == 1 or times[-1] - times[0] < at_least:
        torch.add(x, x)
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with `count` threads."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


_probed: dict[int, tuple[float, int]] = {}


@contextmanager
def use_free_threads() -> Iterator[None]:
    """As many threads as are free, for a piece of work of less than a few seconds."""
    largest, count, now = torch.get_num_threads(), requested(), time.perf_counter()
    if count is None and largest in _probed and now - _probed[largest][0] < PROBE_LASTS:
        count = _probed[largest][1]
    if count is None:
        count = free_threads(available())
        _probed[largest] = now, count
    with _threads(count):
        yield


# --- work that repeats ----------------------------------------------------------------------------

ROUNDS = 3  # measurements of each count, after one to warm up
SHORTEST = 0.05
"""Seconds of a measurement: a thread that has rested is not kept waiting for some milliseconds."""
LONG = 2.0
"""Seconds of a unit of large work from which on it is not tried with fewer threads: its regions are
long, and to try them would take longer than they could gain.
"""
LARGE = 5 * 10**7
"""Number of parameters from which on work is large."""
SLOWER = 1.3
"""Factor on the usual time of a unit of work above which the counts are measured again."""
FIRST_PROBE, LAST_PROBE = 5.0, 60.0
"""Seconds until the first look for more free cores; each one in vain doubles them, up to the last.
"""
FAR_SLOWER = 4.0
"""Factor on the usual time above which one unit is enough to try all counts."""
WAITS = 1.5
"""Factor on the time of the unit before, with fewer threads, above which a count is not tried
again: it waits, since that unit also prepared memory and kernels.
"""
BUSY = "other processes use the other cores"
GAIN = 1.05
"""Factor by which more threads must be faster, as they take cores from others."""


class ThreadTuner:
    """The number of threads for work that repeats, such as training steps.

    All its counts are tried on the first units of work, and the fastest is used. When the work gets
    slower, or cores become free, they are tried again.

    Args:
        fixed: A count that is used without measuring; None to measure.
        large: If true, a unit may take minutes with one thread, so that the largest count is tried
            first.

    Attributes:
        count: Count in use.
        reason: Why, in a few words.
        seconds: Usual time of a unit of work; None before it is known.
    """

    def __init__(self, fixed: int | None = None, large: bool = False) -> None:
        self.largest, self.large = available(), large
        demanded = requested()
        self.fixed = demanded or fixed or (1 if self.largest == 1 else None)
        self.count, self.reason = self.fixed or self.largest, ""
        if demanded:
            self.reason = "as requested"
        elif self.fixed == 1 and fixed is None:
            self.reason = "all that this process may use"
        self.seconds: float | None = None
        self._recent: deque[float] = deque(maxlen=5)
        self._plan: list[int] = []  # counts of the units to come
        self._times: dict[int, list[float]] = {}
        self._one = 0.0  # usual time with one thread
        self._measured: tuple[float, ...] = ()  # units of the present measurement
        self._spent = 0.0  # seconds of them
        self._next_probe, self._wait = 0.0, FIRST_PROBE
        self._last_probe = 0.0
        if self.fixed is None:
            self._try_all()

    @property
    def measuring(self) -> bool:
        """Whether the next unit of work is there to be timed."""
        return bool(self._plan)

    def keep(self, count: int, reason: str) -> None:
        """Use `count` from now on, whatever happens."""
        self.count = self.fixed = count
        self.reason = reason
        self._plan.clear()

    @contextmanager
    def unit(self, size: float = 1.0) -> Iterator[None]:
        """Around one unit of work, or around `size` of them."""
        count = self._plan[0] if self._plan else self.count
        started = time.perf_counter()
        with _threads(count):
            yield
        seconds = time.perf_counter() - started
        if not self._plan:
            self._watch(seconds / size)
            return
        self._measured = (*self._measured, seconds / size)
        self._spent += seconds
        if self._spent < SHORTEST:
            return  # the next unit is a part of the same measurement
        mean, self._measured, self._spent = statistics.mean(self._measured), (), 0.0
        self._plan.pop(0)
        if self.large and not self._times and seconds > LONG:
            self._plan.clear()
            self._use(count, "as many as are free", None)
            return
        self._times.setdefault(count, []).append(mean)
        self._compare()

    def _try_all(self) -> None:
        """Plan to time all counts whose cores are free."""
        self._last_probe = time.perf_counter()
        free = free_threads(self.largest)
        counts = [1, *(c for c in (free // 8, free // 4, free // 2, free) if c > 1)]
        self._times = {}
        self._recent.clear()
        if len(counts) == 1:
            self._use(1, BUSY, None)
        else:
            self._plan = sorted(counts, reverse=self.large)  # a round to warm up

    def _compare(self) -> None:
        """After each round, plan the next one, or use the fastest count."""
        if self._plan:
            return
        rounds = min(len(times) for times in self._times.values()) - 1
        after = {count: times[1:] for count, times in self._times.items()}
        if rounds == 0 and not self.large:
            first = {count: times[0] for count, times in self._times.items()}
            waits = {c for c in first if first[c] > WAITS * min(first[d] for d in first if d <= c)}
            self._times = {c: times for c, times in self._times.items() if c not in waits}
        if rounds and 1 in after:
            self._one = statistics.median(after[1])
        if 0 < rounds < ROUNDS and len(after) > 2:  # the two best go on
            best = sorted(after, key=lambda count: after[count][-1])[:2]
            self._times = {count: self._times[count] for count in sorted(best)}
        if rounds < ROUNDS and len(self._times) > 1:
            self._plan = list(self._times)
            return
        if rounds == 0:  # its first unit took longer than usual
            (count,) = self._times
            self._use(count, "more are slower", None)
            return
        usual = {count: statistics.median(times[1:]) for count, times in self._times.items()}
        fastest = min(usual.values())
        count = min(count for count in usual if usual[count] <= GAIN * fastest)
        self._use(count, self._why(count, usual), usual[count])

    def _why(self, count: int, usual: dict[int, float]) -> str:
        """The measured reason for a count, in a few words.

        Args:
            usual: Usual time with each count that was tried to the end.
        """
        if count > 1:
            return f"{self._one / usual[count]:.2f} times as fast as one"
        others = [seconds for other, seconds in usual.items() if other != count]
        return f"more are {min(others) / usual[count]:.2f} times as slow"

    def _use(self, count: int, reason: str, seconds: float | None) -> None:
        """Use `count`, and look for more cores later: soon after a change, ever less without."""
        self._wait = FIRST_PROBE if count != self.count else min(LAST_PROBE, 2 * self._wait)
        self._next_probe = time.perf_counter() + self._wait
        self.count, self.reason, self.seconds = count, reason, seconds

    def _watch(self, seconds: float) -> None:
        """Try all counts again when the work has got slower, or more cores are free."""
        self._recent.append(seconds)
        usual = statistics.median(self._recent)
        if self.seconds is None and len(self._recent) == self._recent.maxlen:
            self.seconds = usual
        now = time.perf_counter()
        if self.fixed is not None or now - self._last_probe < 1.0:
            return
        if self.count > 1 and self.seconds is not None:
            full = len(self._recent) == self._recent.maxlen
            if seconds > FAR_SLOWER * self.seconds or (full and usual > SLOWER * self.seconds):
                self._try_all()
                return
        if self.count < self.largest and now > self._next_probe:
            self._last_probe = now
            if free_threads(self.largest) > self.count:
                self._try_all()
            else:
                self._use(self.count, self.reason, self.seconds)


_tuners: dict[tuple[Hashable, ...], ThreadTuner] = {}


@contextmanager
def tuned(*name: Hashable, size: float = 1.0, large: bool = False) -> Iterator[None]:
    """Around one unit, or `size` units, of the work called `name`, whose times are remembered."""
    key = (*name, torch.get_num_threads(), requested())
    if key not in _tuners:
        _tuners[key] = ThreadTuner(large=large)
    with _tuners[key].unit(size):
        yield
