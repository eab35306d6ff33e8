"""Two processes: one at a time trains in a folder, and a comparison does not leave its child."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lineage.cli import main
from lineage.training.log import read_log
from lineage.training.store import load_state

LONG = ["--preset", "smoke", "--steps", 100_000, "--set", "train.sample_every=0"]
CHECKPOINTS = ["--set", "train.checkpoint_every=5"]
Command = Callable[..., subprocess.Popen[str]]


def wait_until(condition: Callable[[], bool], seconds: float = 50) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def started(command: Command) -> Iterator[Command]:
    """Start commands that are killed at the end of the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        processes.append(command(*arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot lock a folder")
@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_folder(
    started: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second is refused while the first lives; a killed one leaves no lock behind."""
    folder = tmp_path / "run"
    first, second = (started("train", "ddpm", *LONG, *CHECKPOINTS, "--out", folder) for _ in "ab")
    wait_until(lambda: first.poll() is not None or second.poll() is not None)
    loser, winner = (first, second) if first.poll() is not None else (second, first)
    _, errors = loser.communicate()
    assert loser.returncode == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("lineage: ") and str(folder) in errors
    wait_until(lambda: (folder / "state.pt").exists())
    resume = ["train", "ddpm", "--out", str(folder), "--resume"]
    assert main(resume) == 2
    assert "Another process" in capfd.readouterr().err
    assert winner.poll() is None
    winner.kill()
    winner.communicate()
    steps = load_state(folder / "state.pt")["step"]
    assert main([*resume, "--steps", str(steps + 1)]) == 0
    lines = [line["step"] for line in read_log(folder / "metrics.jsonl")]
    assert lines == sorted(set(lines))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists children")
def test_the_child_of_a_killed_comparison_ends(started: Command, tmp_path: Path) -> None:
    """Nobody would wait for it, and the same command would train beside it."""
    process = started("compare", "ddpm", *LONG, *CHECKPOINTS, "--pictures", 5, "--out", tmp_path)
    wait_until(lambda: (tmp_path / "ddpm" / "state.pt").exists())
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert listed
    process.kill()
    process.communicate()
    wait_until(lambda: not any(lives(int(child)) for child in listed), 20)


def lives(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
