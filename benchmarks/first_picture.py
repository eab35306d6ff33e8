"""Time to the first picture, relative to `import torch`.

    OMP_NUM_THREADS=1 python benchmarks/first_picture.py      writes results/first_picture.json

Each working system is trained at preset `tiny` for a few steps. Then `python -c "import torch"` and
`lineage sample RUN "a red circle"` of each run are called in turn, as processes with one thread;
the median of each counts. A first round, which is not counted, fills the caches of files and of
Python's bytecode. The systems draw with their defaults: the diffusion models take 25 steps.

A ratio can be below 1: the command imports PyTorch without the garbage collector, which takes a
third of a plain import and exit (`lineage/cli/imports.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prior import medians

from lineage.catalog import working
from lineage.evaluation.cost import machine
from lineage.training.store import write_json

OUT = Path(__file__).parent.parent / "results" / "first_picture.json"
STEPS, ROUNDS = 20, 15
LINEAGE = ("-m", "lineage")


def python(*arguments: str) -> None:
    """Run Python in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else our modules are compiled each time
    subprocess.run(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True
    )


def main() -> None:
    calls: dict[str, Callable[[], object]] = {"torch": partial(python, "-c", "import torch")}
    with tempfile.TemporaryDirectory() as name:
        for key in working():
            run, out = str(Path(name) / key), str(Path(name) / f"{key}.png")
            python(*LINEAGE, "train", key, "--steps", str(STEPS), "--out", run)
            calls[key] = partial(python, *LINEAGE, "sample", run, "a red circle", "--out", out)
        seconds = medians(calls, ROUNDS)
    torch_seconds = seconds.pop("torch")
    systems = {
        key: {"seconds": round(value, 3), "ratio": round(value / torch_seconds, 2)}
        for key, value in seconds.items()
    }
    result = {
        "machine": machine(),
        "import_torch_seconds": round(torch_seconds, 3),
        "systems": systems,
    }
    write_json(OUT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
