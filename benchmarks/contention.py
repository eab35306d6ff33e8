"""Speed of training and drawing on a machine that does something else, too.

    python benchmarks/contention.py              writes results/contention.json
    python benchmarks/contention.py drawing      measures drawing alone, and keeps the rest of it

Each system at preset tiny trains its last stage for some seconds with one thread, with as many as
PyTorch takes by itself (`all`, what the package did before it measured), and with the number that
`lineage.threads` chooses, its measurements included (`measured`); and draws pictures in the same
three ways:

    alone        nothing else runs
    one busy     beside one process that computes without a pause
    two busy     beside two
    one CPU      in a control group with a quota of one CPU, where the system lets us make one

`share` is the rate with the measured number over the better of the other two. Beside busy
processes, drawing with `all` is left out: it can take minutes for a picture.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lineage.catalog import working
from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.options import configure
from lineage.recipes import find_recipe
from lineage.system import System
from lineage.text.tokenizer import make_tokenizer
from lineage.threads import _tuners, use_threads
from lineage.training.loop import Trainer
from lineage.training.machine import keep_freed_memory
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
SECONDS = 4.0  # of training in each way
PICTURES = 16
CAPTIONS = ["a red circle", "two blue squares", "a green cross left of a yellow triangle"]
GROUP = "lineage_contention"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside `count` processes that never pause."""
    command = [sys.executable, "-c", "while True: pass"]
    children = [subprocess.Popen(command) for _ in range(count)]
    try:
        time.sleep(1.0)
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def one_cpu() -> Iterator[None]:
    """In a control group with a quota of one CPU. Raises `OSError` if none can be made."""
    root, quota = Path("/sys/fs/cgroup"), {"cpu.max": "100000 100000"}
    if (root / "cpu").is_dir():  # version 1
        root /= "cpu"
        quota = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}
    before = _own_group(root)
    group = root / GROUP
    group.mkdir(exist_ok=True)
    try:
        for name, value in quota.items():
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _own_group(root: Path) -> Path:
    """The folder below `root` of the group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (not controllers) if root.name == "cgroup" else ("cpu" in controllers.split(",")):
            return root / path.lstrip("/")
    return root


def last_stage(key: str) -> Callable[[], Trainer]:
    """A function that makes a trainer of the last stage of a system, untrained."""
    config = configure(key, minutes=60)
    dataset = load_dataset(config.data, "train", config.size)
    tokenizer = make_tokenizer("word", dataset.all_captions(), config.encoder.vocab_size)
    stage = find_recipe(key).stages(config, tokenizer)[-1]

    def make() -> Trainer:
        stage.construct()
        return stage.trainer(dataset)

    return make


def training_rate(make: Callable[[], Trainer], threads: int | None) -> float:
    """Pictures a second of a fresh trainer; None measures the number of threads."""
    with use_threads(threads):
        trainer = make()
        batches = trainer.loader.batches()
        with trainer.threads.unit():  # what only a first step does
            trainer.advance(next(batches))
        started = time.perf_counter()
        while (seconds := time.perf_counter() - started) < SECONDS:
            with trainer.threads.unit():
                trainer.advance(next(batches))
    return (trainer.step - 1) * trainer.batch_size / seconds


def drawing_rate(system: System, threads: int | None) -> float:
    """Pictures a second, in batches of 16."""
    captions, count = (CAPTIONS * PICTURES)[:PICTURES], 0
    _tuners.clear()  # as in a new process
    with use_threads(threads):
        started = time.perf_counter()
        while (seconds := time.perf_counter() - started) < SECONDS / 2:
            system.generate(captions)
            count += PICTURES
    return count / seconds


def compared(rate: Callable[[int | None], float], ways: dict[str, int | None]) -> dict[str, Any]:
    """The rate in each way, and the share of the best fixed one."""
    rates = {name: round(rate(threads), 1) for name, threads in ways.items()}
    best = max(value for name, value in rates.items() if name != "measured")
    return {**rates, "share": round(rates["measured"] / best, 3)}


def measure(kind: str, make: Callable[[], Trainer], beside_others: bool) -> dict[str, Any]:
    """Rates of one system under the present condition."""
    ways: dict[str, int | None] = {"one": 1, "all": torch.get_num_threads(), "measured": None}
    if kind == "training":
        return compared(lambda threads: training_rate(make, threads), ways)
    system = make().system
    assert isinstance(system, System)
    if beside_others:
        del ways["all"]
    return compared(lambda threads: drawing_rate(system, threads), ways)


def main() -> None:
    if "OMP_NUM_THREADS" in os.environ:
        sys.exit("OMP_NUM_THREADS overrules what is measured here: unset it.")
    keep_freed_memory()
    makers = {key: last_stage(key) for key in working() if key != "retrieval"}
    gc.freeze()
    conditions = {
        "alone": lambda: busy(0),
        "one busy": lambda: busy(1),
        "two busy": lambda: busy(2),
        "one CPU": one_cpu,
    }
    path = RESULTS / "contention.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for kind in sys.argv[1:] or ("training", "drawing"):
        section: dict[str, Any] = {"machine": machine(), "seconds": SECONDS}
        for name, condition in conditions.items():
            with ExitStack() as stack:
                try:
                    stack.enter_context(condition())
                except OSError as error:
                    section[name] = f"not measured: {error}"
                    continue
                section[name] = {}
                for key, make in makers.items():
                    section[name][key] = measure(kind, make, name != "alone")
                    print(kind, name, key, section[name][key], flush=True)
        document[kind] = section
        write_json(path, document)


if __name__ == "__main__":
    main()
