"""The number of threads of a run: measured without a trace in its bytes, kept by a run whose bytes
can be the same twice, and told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import trainer
from toys import ZeroEncoder

import lineage
from lineage import threads
from lineage.config import TrainConfig
from lineage.data.cached import CachedDataset
from lineage.data.contract import CaptionedDataset
from lineage.errors import Interrupted, UserError
from lineage.threads import ThreadTuner
from lineage.training import loop, rehearsal
from lineage.training.cost import budget_warnings
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.progress import RateWatch, described
from lineage.training.rehearsal import _is_short
from lineage.training.store import read_json, write_json

assert ZeroEncoder  # test_loop imports it


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two free cores, and no run so short that nothing is measured."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    monkeypatch.setattr("lineage.resume.usable_cpus", lambda: 2)
    monkeypatch.setattr(threads, "free_threads", lambda largest: min(2, largest))
    monkeypatch.setattr(rehearsal, "FEW_STEPS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fastest(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets which number of threads is measured as the fastest."""

    use = ThreadTuner._use

    def set_fastest(count: int) -> None:
        monkeypatch.setattr(ThreadTuner, "_use", lambda self, _, *rest: use(self, count, *rest))

    return set_fastest


def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of threads of the steps from now on, without those that are only measured."""
    counts: list[int] = []
    advance = Trainer.advance

    def note(self: Trainer, *arguments: Any) -> Any:
        counts.append(torch.get_num_threads())
        return advance(self, *arguments)

    monkeypatch.setattr(Trainer, "advance", note)
    return counts


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("key", ["ddpm", "ldm", "vqvae", "stackgan", "attngan", "gan_int_cls"])
def test_measuring_leaves_no_trace(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that were only timed change nothing: not the weights, codebooks, averages or moments,
    nor what a system remembers beside its state.
    """
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    counts = used(monkeypatch)
    settings = {"train.batch_size": 4}
    measured = lineage.train(key, preset="smoke", steps=8, out=tmp_path / "a", settings=settings)
    kept = read_json(measured / "config.json")["made_with"]["threads"]
    assert kept in (1, 2) and set(counts) == {kept}
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache2"))
    plain = lineage.train(
        key, preset="smoke", steps=8, out=tmp_path / "b", settings=settings, threads=kept
    )
    assert (measured / "model.safetensors").read_bytes() == (
        plain / "model.safetensors"
    ).read_bytes()


def test_a_resumed_run_keeps_its_number_of_threads(
    fastest: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = used(monkeypatch)
    fastest(2)
    advance = Trainer.advance

    def stop_at_3(self: Trainer, *arguments: Any) -> Any:
        self._stop_requested = self.step == 2
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stop_at_3)
        with pytest.raises(Interrupted):
            lineage.train("ddpm", preset="smoke", steps=6, out=tmp_path / "run")
    assert read_json(tmp_path / "run/config.json")["made_with"]["threads"] == 2
    fastest(1)
    lineage.train("ddpm", out=tmp_path / "run", resume=True)
    assert counts == [2] * 6


def test_a_run_of_a_larger_machine_is_measured_again(
    fastest: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fastest(1)
    lineage.train("ddpm", preset="smoke", steps=2, out=tmp_path / "run")
    config = read_json(tmp_path / "run/config.json")
    config["made_with"]["threads"] = 16
    write_json(tmp_path / "run/config.json", config)
    counts = used(monkeypatch)
    lineage.train("ddpm", out=tmp_path / "run", steps=4, resume=True)
    assert counts == [1, 1]
    assert "began with 16 threads; here it may use 2" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [-3, 0, True, "many"])
def test_a_damaged_number_of_threads_is_measured_again(
    damaged: Any, fastest: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage.train("ddpm", preset="smoke", steps=1, out=tmp_path / "run", threads=1)
    config = read_json(tmp_path / "run/config.json")
    config["made_with"]["threads"] = damaged
    write_json(tmp_path / "run/config.json", config)
    fastest(2)
    counts = used(monkeypatch)
    lineage.train("ddpm", out=tmp_path / "run", steps=2, resume=True)
    assert counts == [2]


def test_the_last_bits_of_a_timed_run_are_not_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lineage.train("ddpm", preset="smoke", minutes=0.005, out=tmp_path / "run", threads=2)
    spent = read_json(tmp_path / "run/cost.json")["denoiser"]["seconds"] / 60  # on a busy machine
    lineage.train("ddpm", minutes=spent + 0.05, out=tmp_path / "run", resume=True, threads=1)
    assert "last bits" not in capsys.readouterr().err


def test_a_run_that_begins_beside_others_keeps_one_thread(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though cores become free later: its bytes would be those of no other run."""
    monkeypatch.setattr(threads, "free_threads", lambda largest: 1)
    counts = used(monkeypatch)
    run = lineage.train("ddpm", preset="smoke", steps=4, out=tmp_path / "run")
    assert read_json(run / "config.json")["made_with"]["threads"] == 1
    assert counts == [1] * 4


def test_a_budget_in_minutes_keeps_none(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = used(monkeypatch)
    settings = {"train.log_every": 1}
    run = lineage.train("ddpm", preset="smoke", minutes=0.02, out=tmp_path, settings=settings)
    assert read_json(run / "config.json")["made_with"]["threads"] is None
    assert counts[0] == 1 and set(counts) <= {1, 2}  # real steps, none of them thrown away
    lines = read_log(run / "metrics.jsonl")
    assert {line["threads"] for line in lines} <= {1, 2}
    assert all("threads_reason" in line for line in lines)


def test_short_runs_use_one_thread_and_measure_nothing(
    two_cores: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: CaptionedDataset,
) -> None:
    """The same in every run, so that short runs are the same bytes without a record."""
    monkeypatch.setattr(rehearsal, "FEW_STEPS", 20)
    counts = used(monkeypatch)
    one = trainer(shapes, max_steps=20)
    one.run()
    assert counts == [1] * 20 and one.system.calls == 20  # type: ignore[attr-defined]
    assert one.threads.reason == "a short run"
    counts.clear()
    resumed = trainer(shapes, max_steps=21)
    resumed.load_state(one.state() | {"step": 20})
    assert not _is_short(resumed)  # by the whole budget, as it was before it was stopped


# --- budgets in minutes of the processor ----------------------------------------------------------


def test_a_budget_of_the_processor_is_spent(
    shapes: CaptionedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By processor time alone: a step that sleeps costs nothing."""
    clock = [0.0]
    monkeypatch.setattr(loop.time, "process_time", lambda: clock[0])
    one = trainer(shapes, cpu_minutes=1.0)
    advance = one._advance

    def spend(*arguments: Any) -> Any:
        clock[0] += 7.0
        return advance(*arguments)

    monkeypatch.setattr(one, "_advance", spend)
    one.run()
    assert one.step == 9 and one.cpu_seconds == 63.0 and one.spent() == 63 / 60
    assert one.seconds < 30


def test_the_shares_of_stages_hold_for_processor_time(tmp_path: Path) -> None:
    run = lineage.train("vqvae", preset="smoke", cpu_minutes=0.05, out=tmp_path / "run")
    costs = read_json(run / "cost.json")
    total = sum(cost["cpu_seconds"] for cost in costs.values())
    assert len(costs) == 2 and 3.0 <= total < 4.5
    config = read_json(run / "config.json")["train"]
    assert (config["minutes"], config["max_steps"], config["cpu_minutes"]) == (None, None, 0.05)


def test_processor_time_is_no_budget_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lineage.runs.pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match=r"cpu_minutes=1 .*for a GPU: give --minutes or --steps"):
        lineage.train("ddpm", preset="smoke", cpu_minutes=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [0, -1, 257, 1.5, "many"])
def test_threads_out_of_range_are_refused(count: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="threads="):
        lineage.train("ddpm", preset="smoke", steps=1, out=tmp_path / "run", threads=count)
    assert not (tmp_path / "run").exists()


# --- what is told ---------------------------------------------------------------------------------


@pytest.fixture
def _nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def watch(kept: int | None, **budget: Any) -> RateWatch:
    tuner = ThreadTuner(fixed=kept)
    if kept is None:
        tuner.keep(2, "")
        tuner.fixed = None
    return RateWatch(TrainConfig(**budget), tuner)


def test_a_fall_of_the_rate_is_told_once() -> None:
    one = watch(None, minutes=5)
    assert [one.sentence(20, rate) for rate in (400.0, 500.0, 260.0)] == ["", "", ""]
    warning = one.sentence(80, 240.0)
    assert "Step 80: 240 pictures a second, where it was 500 before" in warning
    assert "--steps or --cpu-minutes" in warning
    assert one.sentence(100, 100.0) == ""


@pytest.mark.usefixtures("_nothing_asked")
def test_the_advice_depends_on_the_budget() -> None:
    for one, words, others in (
        (watch(2, max_steps=100), "--resume --threads 1", "--cpu-minutes"),
        (watch(1, max_steps=100), "may use the processor", "--threads"),
        (watch(None, cpu_minutes=5), "may use the processor", "--cpu-minutes"),
    ):
        one.sentence(1, 500.0)
        warning = one.sentence(2, 10.0)
        assert words in warning and others not in warning


@pytest.mark.usefixtures("_nothing_asked")
def test_the_number_of_threads_is_described() -> None:
    tuner = ThreadTuner(fixed=1)
    tuner.reason = "because"
    assert described(tuner) == "1 thread (because)"
    tuner = ThreadTuner(fixed=4)
    tuner.reason = ""
    assert described(tuner) == "4 threads"
    tuner._plan = [1, 2]
    assert described(tuner) == "comparing numbers of threads"


@pytest.mark.usefixtures("two_cores")
def test_a_fall_is_written_above_the_bar(
    shapes: CaptionedDataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    one = trainer(shapes, max_steps=8, log_every=2)
    one.threads.keep(1, "")
    advance = one._advance

    def slow(*arguments: Any) -> Any:
        clock[0] += 1.0 if one.step < 4 else 3.0
        return advance(*arguments)

    monkeypatch.setattr(one, "_advance", slow)
    one.run()
    told = capsys.readouterr().err
    assert told.count("lineage: Step 6: 1 pictures a second, where it was 4 before") == 1


def test_the_log_names_the_threads_of_each_line(shapes: CaptionedDataset, tmp_path: Path) -> None:
    one = trainer(shapes, max_steps=2, log_every=1)
    one.threads.keep(1, "as requested")
    from lineage.training.log import Log

    log = Log(tmp_path)
    one.run(log)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["threads"] for line in lines] == [1, 1]
    assert lines[0]["threads_reason"] == "as requested"


@pytest.mark.usefixtures("two_cores")
def test_another_number_of_threads_is_recorded_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that a stopped run prints goes on with it."""
    lineage.train("ddpm", preset="smoke", steps=2, out=tmp_path / "run", threads=2)
    lineage.train("ddpm", steps=4, out=tmp_path / "run", threads=1, resume=True)
    config = read_json(tmp_path / "run/config.json")
    assert config["made_with"]["threads"] == 2
    (change,) = config["changes"]
    assert change["step"] == 2 and change["fields"]["threads"] == [2, 1]
    counts = used(monkeypatch)
    lineage.train("ddpm", steps=6, out=tmp_path / "run", resume=True)
    assert counts == [1, 1]


def test_a_finished_run_is_not_changed_by_another_number_of_threads(
    two_cores: None, tmp_path: Path
) -> None:
    run = lineage.train("ddpm", preset="smoke", steps=2, out=tmp_path / "run", threads=2)
    before = (run / "config.json").read_bytes()
    lineage.train("ddpm", out=run, threads=1, resume=True)
    assert (run / "config.json").read_bytes() == before


def test_processor_time_is_that_of_one_thread(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one that waits would count as well."""
    counts = used(monkeypatch)
    lineage.train("ddpm", preset="smoke", cpu_minutes=0.02, out=tmp_path / "a")
    assert set(counts) == {1}
    counts.clear()
    lineage.train("ddpm", preset="smoke", cpu_minutes=0.02, out=tmp_path / "b", threads=2)
    assert set(counts) == {2}


def test_cached_values_do_not_depend_on_the_step_that_asks_for_them(
    shapes: CaptionedDataset,
) -> None:
    """A step that is only timed may be the first to ask."""
    counts: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        counts.append(torch.get_num_threads())
        return images.flatten(1)

    for endless, count in ((False, 1), (True, 2)):
        counts.clear()
        wrapped = CachedDataset(shapes, "values", encode, 100)
        wrapped.endless = endless
        with threads.use_threads(2):
            wrapped.batch([0, 1], [0, 0], 0)
        assert set(counts) == {count}


@pytest.mark.parametrize(
    ("budget", "cpu_seconds", "device", "warned"),
    [
        ({"minutes": 5}, 150.0, "cpu", True),
        ({"minutes": 5}, 295.0, "cpu", False),
        ({"cpu_minutes": 5}, 150.0, "cpu", False),
        ({"max_steps": 10}, 150.0, "cpu", False),
        ({"minutes": 5}, 150.0, "cuda", False),
    ],
    ids=["busy", "quiet", "processor", "steps", "gpu"],
)
def test_minutes_that_others_took_are_told_with_the_scores(
    budget: dict[str, Any], cpu_seconds: float, device: str, warned: bool, tmp_path: Path
) -> None:
    stage = {
        "steps": 1200,
        "pictures": 9600,
        "seconds": 300.0,
        "cpu_seconds": cpu_seconds,
        "pictures_per_second": 32.0,
        "peak_memory_bytes": 0,
        "device": device,
        "finished": True,
    }
    write_json(tmp_path / "cost.json", {"gan": stage})
    warnings = budget_warnings(tmp_path, TrainConfig(**budget))
    assert len(warnings) == warned
    if warned:
        assert "150 of 300 seconds and made 1,200 steps" in warnings[0]
