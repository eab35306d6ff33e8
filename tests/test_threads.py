"""The number of threads: what is free, and what is fastest, with a clock and a processor that are
made up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from lineage import threads
from lineage.errors import UserError
from lineage.threads import (
    BUSY,
    FIRST_PROBE,
    GAIN,
    LONG,
    ROUNDS,
    SLOWER,
    ThreadTuner,
    available,
    requested,
    tuned,
    use_free_threads,
    use_threads,
)

# --- what the user asks for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "count"),
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("0", None), ("-1", None), ("many", None), ("", None)],
)
def test_omp_num_threads_overrules(
    value: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert requested() == count


def test_a_count_that_would_crash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    with pytest.raises(UserError, match="OMP_NUM_THREADS=100000 must be at most 256"):
        requested()


def test_counts_of_two_python_threads_are_apart() -> None:
    both = threading.Barrier(2)
    counts: dict[int, int | None] = {}

    def work(count: int) -> None:
        with use_threads(count):
            both.wait()
            counts[count] = requested()
            both.wait()

    workers = [threading.Thread(target=work, args=(count,)) for count in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts == {1: 1, 2: 2}


def test_an_explicit_count_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    with use_threads(3):
        assert (requested(), available(), torch.get_num_threads()) == (3, 3, 3)
        with use_threads(None):
            assert requested() == 3
        tuner = ThreadTuner()
        assert (tuner.count, tuner.fixed, tuner.measuring) == (3, 3, False)
        assert tuner.reason == "as requested"
        with use_free_threads():
            assert torch.get_num_threads() == 3
    assert (requested(), torch.get_num_threads()) == (2, before)


# --- the machine that is made up ------------------------------------------------------------------


class Machine:
    """A clock, and work whose time depends on the number of threads and on who else computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 2) -> None:
        self.now, self.cores, self.others, self.probes = 100.0, cores, 0, 0
        self.seconds: Callable[[int], float] = lambda count: 0.06 + 0.04 / count
        self.used: list[int] = []
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(threads, "usable_cpus", lambda: cores)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(threads, "free_threads", self.free)
        monkeypatch.setattr(threads, "_probed", {})
        monkeypatch.setattr(threads, "_tuners", {})
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.count)
        monkeypatch.setattr(torch, "set_num_threads", self.set)
        self.count = cores

    def set(self, count: int) -> None:
        self.count = count

    def free(self, largest: int) -> int:
        self.probes += 1
        while largest > 1 and largest > self.cores - self.others:
            largest //= 2
        return max(1, largest)

    def work(self, tuner: ThreadTuner, units: int = 1) -> None:
        for _ in range(units):
            with tuner.unit():
                waits = self.count > self.cores - self.others and self.count > 1
                self.now += self.seconds(self.count) * (30 if waits else 1)
                self.used.append(self.count)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_the_fastest_count_is_used_and_the_reason_stated(machine: Machine) -> None:
    tuner = ThreadTuner()
    assert tuner.measuring
    machine.work(tuner, 2 + 2 * ROUNDS)
    assert not tuner.measuring
    assert tuner.count == 2 and tuner.reason == "1.25 times as fast as one"
    assert sorted(machine.used) == [1] * (1 + ROUNDS) + [2] * (1 + ROUNDS)
    assert machine.used[:4] == [1, 2, 1, 2]  # in turn, so that what changes hits both
    assert machine.count == 2  # as before
    machine.used.clear()
    machine.work(tuner, 200)
    assert set(machine.used) == {2}


def test_a_small_gain_is_not_worth_a_core(machine: Machine) -> None:
    machine.seconds = lambda count: 0.1 if count == 1 else 0.101 / GAIN
    tuner = ThreadTuner()
    machine.work(tuner, 2 + 2 * ROUNDS)
    assert tuner.count == 1 and "more are 0.96 times as slow" in tuner.reason


def test_more_threads_can_be_slower(machine: Machine) -> None:
    machine.seconds = lambda count: 0.06 + 0.04 * count
    tuner = ThreadTuner()
    machine.work(tuner, 2 + 2 * ROUNDS)
    assert tuner.count == 1 and tuner.reason == "more are 1.40 times as slow"


def test_many_counts_are_tried_and_the_two_best_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, cores=16)
    machine.seconds = lambda count: {16: 0.28, 8: 0.2, 4: 0.25, 2: 0.6, 1: 1.0}[count]
    tuner = ThreadTuner()
    machine.work(tuner, 5 + 5 + 2 * (ROUNDS - 1))
    assert not tuner.measuring and tuner.count == 8
    assert tuner.reason == "5.00 times as fast as one"
    assert machine.used[:10] == [1, 2, 4, 8, 16] * 2
    assert set(machine.used[10:]) == {8, 4}


def test_beside_a_busy_process_one_thread_is_used_at_once(machine: Machine) -> None:
    machine.others = 1
    tuner = ThreadTuner()
    assert not tuner.measuring and (tuner.count, tuner.reason) == (1, BUSY)
    machine.work(tuner, 100)
    assert set(machine.used) == {1}


def test_a_process_that_comes_and_goes(machine: Machine) -> None:
    """The fall of the rate is noticed at once, and the free core at the next look."""
    tuner = ThreadTuner()
    machine.work(tuner, 60)
    assert tuner.count == 2
    machine.others, machine.used = 1, []
    machine.work(tuner, 60)
    assert machine.used == [2] + [1] * 59 and tuner.reason == BUSY
    machine.others, machine.used, came = 0, [], machine.now
    while tuner.count == 1 and machine.now < came + 100:
        machine.work(tuner)
    assert tuner.count == 2 and machine.now - came < 2 * FIRST_PROBE + 3


def test_looks_for_free_cores_get_rarer(machine: Machine) -> None:
    machine.others = 1
    tuner = ThreadTuner()
    machine.work(tuner, 6000)  # ten minutes
    assert 10 < machine.probes < 20
    assert set(machine.used) == {1}


def test_a_slower_machine_is_measured_again_but_not_for_ever(machine: Machine) -> None:
    """Work that has become slower for another reason, such as heat, gets a new usual time."""
    tuner = ThreadTuner()
    machine.work(tuner, 60)
    usual = tuner.seconds
    machine.seconds = lambda count: SLOWER * 1.1 * (0.06 + 0.04 / count)
    machine.used = []
    machine.work(tuner, 500)
    assert usual is not None and tuner.seconds is not None and tuner.seconds > usual * SLOWER
    assert tuner.count == 2 and machine.used.count(1) == 1 + ROUNDS


def test_one_slow_unit_is_no_fall(machine: Machine) -> None:
    """A gradient penalty at every sixteenth step, or a collection of garbage."""
    tuner = ThreadTuner()
    machine.work(tuner, 60)
    before = machine.probes
    for number in range(200):
        slow = 3.0 if number % 16 == 0 else 1.0
        machine.seconds = lambda count, slow=slow: slow * (0.06 + 0.04 / count)  # type: ignore[misc]
        machine.work(tuner)
    assert machine.probes == before


def test_long_units_of_large_work_are_not_tried_with_fewer_threads(machine: Machine) -> None:
    machine.seconds = lambda count: 3 * LONG / count
    tuner = ThreadTuner(large=True)
    machine.work(tuner, 5)
    assert machine.used == [2] * 5 and not tuner.measuring


def test_a_unit_that_waits_is_the_only_one(machine: Machine) -> None:
    tuner = ThreadTuner()
    machine.others = 1  # comes after the probe
    machine.work(tuner, 20)
    assert machine.used == [1, 2] + [1] * 18


def test_a_kept_count_is_never_measured(machine: Machine) -> None:
    tuner = ThreadTuner(fixed=2)
    machine.work(tuner, 50)
    machine.others = 1
    machine.work(tuner, 50)
    assert set(machine.used) == {2} and machine.probes == 0


def test_the_user_s_own_limit_is_the_largest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, cores=16)
    machine.count = 4  # torch.set_num_threads(4)
    tuner = ThreadTuner()
    machine.work(tuner, 40)
    assert max(machine.used) == 4


def test_short_units_are_measured_together(machine: Machine) -> None:
    machine.seconds = lambda count: 0.026 / count
    tuner = ThreadTuner()
    machine.work(tuner, 6)
    assert machine.used == [1, 1, 2, 2, 2, 2]
    machine.work(tuner, ROUNDS * 6)
    assert tuner.count == 2 and tuner.reason == "2.00 times as fast as one"


def test_tuned_work_is_remembered_by_its_name(machine: Machine) -> None:
    def draw(name: str, times: int) -> list[int]:
        machine.used.clear()
        for _ in range(times):
            with tuned(name):
                machine.now += machine.seconds(machine.count)
                machine.used.append(machine.count)
        return machine.used

    assert draw("one", 2 + 2 * ROUNDS)[:2] == [1, 2]
    assert set(draw("one", 5)) == {2}
    assert draw("another", 2) == [1, 2]
    with use_threads(1):
        assert set(draw("one", 5)) == {1}


def test_one_piece_of_work_uses_what_is_free_and_asks_once_a_second(machine: Machine) -> None:
    for others, count, probes in ((0, 2, 1), (1, 2, 1)):
        machine.others = others
        with use_free_threads():
            assert (machine.count, machine.probes) == (count, probes)
    machine.now += 2
    with use_free_threads():
        assert (machine.count, machine.probes) == (1, 2)
    assert machine.count == 2


def test_work_outside_of_units_stays_within_the_quota(machine: Machine) -> None:
    machine.count = 64  # what PyTorch counts in a container with a quota of two cores
    with use_threads(None):
        assert machine.count == 2
    assert machine.count == 64


def test_an_error_in_a_unit_restores_the_count(machine: Machine) -> None:
    tuner = ThreadTuner()
    machine.work(tuner)
    counts: list[int] = []

    def fail() -> None:
        with tuner.unit():
            counts.append(machine.count)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert counts == [2] and machine.count == 2


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds of a region with each number of threads, on a machine of eight cores."""
    machine = Machine(monkeypatch, cores=8)
    monkeypatch.undo()
    times: dict[int, float] = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.count)
    monkeypatch.setattr(torch, "set_num_threads", machine.set)
    monkeypatch.setattr(threads, "_region_seconds", lambda *_: [times[machine.count]])
    return times


@pytest.mark.parametrize("known", [None, 8], ids=["not told", "all free"])
@pytest.mark.parametrize(
    ("times", "free"),
    [
        ({1: 1.0, 8: 1.5}, 8),
        ({1: 1.0, 8: 500.0, 4: 0.9}, 4),
        ({1: 1.0, 8: 50.0, 4: 50.0, 2: 50.0}, 1),
    ],
    ids=["all", "half", "one"],
)
def test_counts_whose_regions_wait_are_not_free(
    times: dict[int, float],
    free: int,
    known: int | None,
    regions: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "free_cpus", lambda: known)
    regions |= times
    assert threads.free_threads(8) == free
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(("known", "free"), [(0, 1), (1, 1), (3, 2), (5, 4), (8, 8)])
def test_cores_of_others_are_not_free_though_no_region_waits(
    known: int, free: int, regions: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "free_cpus", lambda: known)
    regions |= dict.fromkeys((1, 2, 4, 8), 1.0)
    assert threads.free_threads(8) == free


def test_every_thread_takes_part_in_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives none fewer than 2**15 numbers."""
    regions: list[int] = []

    def note(region: torch.Tensor, _: float) -> list[float]:
        regions.append(region.numel())
        return [1.0]

    monkeypatch.setattr(threads, "free_cpus", lambda: None)
    monkeypatch.setattr(threads, "_region_seconds", note)
    threads.free_threads(16)
    assert set(regions) == {16 * 2**15}


def test_a_region_takes_microseconds() -> None:
    with use_threads(1):
        seconds = threads._region_seconds(torch.zeros(threads.REGION), 0.01)
    assert len(seconds) > 2 and sum(seconds) >= 0.01
