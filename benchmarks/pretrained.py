"""Train the runs that come with the package, and score them.

    python benchmarks/pretrained.py [NAME ...]  all of `RUNS` if left out
    make pretrained                               the same

Each system trains at preset tiny on `shapes`, or on `emoji`, which needs the system's font of
emoji, with one thread, for the minutes of processor time in `RUNS`, as many systems at a time as
there are cores. A stopped program goes on where it was.

    runs/pretrained/NAME       the run itself
    lineage/pretrained/NAME    what comes with the package: weights in half precision
    results/pretrained/NAME    command, commit, cost and scores of these weights, and a sheet

`RUNS` also has the settings that keep a file below 3 MB, and why they may.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.cores import usable_cpus
from lineage.evaluation.cost import machine
from lineage.evaluation.prompts import make_prompts, to_lines
from lineage.evaluation.run import evaluate
from lineage.pretrained import FOLDER, PREFIX
from lineage.runs import load, load_dataset, sample_sheet
from lineage.search import matches_sheet
from lineage.sheets import save_picture
from lineage.system import System
from lineage.training.store import load_tensors, save_tensors, write_json

ROOT = Path(__file__).parent.parent
LARGEST = 3_000_000  # bytes of a file of weights
FILES = ("config.json", "tokenizer.json", "cost.json")


@dataclass(frozen=True)
class Run:
    """Processor time, and settings beside the preset's.

    Attributes:
        cpu_minutes: Budget of training; None for a system with a budget of its own.
        settings: Fields of the configuration.
        stages_from: Stages that are taken from other runs of this table, which are trained first.
        pictures: Largest number of pictures of its scores, beside those of the prompts; fewer for
            systems that optimise each picture.
        every: One in so many prompts is drawn for its scores.
        data: Data set. A run on another one than `shapes` is named `KEY_data`.
        halve_vectors: If true, vectors are in half precision too, which saves one percent.
    """

    cpu_minutes: float | None
    settings: dict[str, str] = field(default_factory=dict)
    stages_from: dict[str, str] = field(default_factory=dict)
    pictures: int = 1000
    every: int = 1
    data: str = "shapes"
    halve_vectors: bool = False


# An autoencoder of 0.4 in place of 0.7 million parameters, the same in both.
NARROW = {"autoencoder.net.channels": "24"}

RUNS = {
    "retrieval": Run(None, {"model.memory_size": "870"}),  # 2.7 MB of pictures
    "gan_int_cls": Run(15),
    "stackgan": Run(25),
    "vqvae": Run(12),
    "attngan": Run(25),
    "ddpm": Run(14),
    "vqgan": Run(20),
    "clip": Run(10),
    "dalle": Run(20),
    "vqgan_clip": Run(8, stages_from={"clip": "clip"}, pictures=50, every=8),
    "clipdraw": Run(None, stages_from={"clip": "clip"}, pictures=100),
    "ldm": Run(25, NARROW),
    "dit": Run(8, {**NARROW, "model.net.depth": "3", "encoder.width": "64"}),
    # 1,707 words.
    "ldm_emoji": Run(45, {**NARROW, "encoder.width": "44"}, data="emoji", halve_vectors=True),
}


def command(key: str) -> list[str]:
    """The command that trains a system."""
    run = RUNS[key]
    system = key.removesuffix(f"_{run.data}")
    parts = ["lineage", "train", system, "--out", f"runs/pretrained/{key}", "--seed", "0"]
    if run.data != "shapes":
        parts += ["--data", run.data]
    if run.cpu_minutes is not None:
        parts += ["--cpu-minutes", f"{run.cpu_minutes:g}"]
    for name, value in run.settings.items():
        parts += ["--set", f"{name}={value}"]
    for stage, other in run.stages_from.items():
        parts += ["--from", f"{stage}=runs/pretrained/{other}"]
    return parts


def halved(tensor: Tensor, vectors: bool) -> Tensor:
    """Matrices and kernels in half precision. Vectors (scales, biases, schedules) are small, and
    integers are what they are.
    """
    large = tensor.dim() > 1 or vectors
    return tensor.half() if tensor.is_floating_point() and large else tensor


def export(key: str) -> None:
    """Copy what drawing needs of a finished run into the package."""
    run, folder = ROOT / "runs" / "pretrained" / key, FOLDER / key
    weights = load_tensors(run / "model.safetensors")
    tensors = {n: halved(t, RUNS[key].halve_vectors) for n, t in weights.items()}
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} overflows"
    for file in FILES:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / file, folder / file)
    config = json.loads((run / "config.json").read_text())
    for source in config.get("stages_from", {}).values():
        source.pop("weights", None)  # which lie where the other run was trained
    write_json(folder / "config.json", config)
    save_tensors(folder / "model.safetensors", tensors)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGEST:
        sys.exit(f"{key}: {size / 1e6:.2f} MB are more than {LARGEST / 1e6:g} MB.")


def score(key: str) -> dict[str, Any]:
    """Scores of the run as it comes with the package, and its sheet."""
    folder = ROOT / "results" / "pretrained" / key
    run = RUNS[key]
    options: dict[str, Any] = {"threads": 1, "pictures": run.pictures}
    with tempfile.TemporaryDirectory() as temporary:
        if run.every > 1:
            options["prompts"] = Path(temporary) / f"one_in_{run.every}.jsonl"
            options["prompts"].write_text(to_lines(make_prompts("easy")[:: run.every]))
        document = evaluate(PREFIX + key, out=folder, **options)
    system, data = load(PREFIX + key), load_dataset(run.data, "train")
    if isinstance(system, System):
        sample_sheet(system, data.showcase(16), folder / "sheet.png")
    else:
        save_picture(matches_sheet(system, data, data.showcase(8)), folder / "sheet.png")
    return document


def train(key: str, made_by: dict[str, Any]) -> None:
    """Train one system in a process of its own, export its weights and score them.

    Args:
        made_by: The machine, with the commit; measured before the first export changes files.
    """
    done = ROOT / "results" / "pretrained" / key / "run.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LINEAGE_LABEL": f"{key} "}
    subprocess.run(
        [sys.executable, "-m", *command(key), "--resume"], cwd=ROOT, env=environment, check=True
    )
    export(key)
    source = f"import pretrained; pretrained.score({key!r})"
    subprocess.run(
        [sys.executable, "-c", source], cwd=Path(__file__).parent, env=environment, check=True
    )
    cost = json.loads((FOLDER / key / "cost.json").read_text())
    write_json(
        done,
        {
            "command": shlex.join(command(key)),
            "seed": 0,
            "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in cost.values())),
            "stages": cost,
            "bytes": (FOLDER / key / "model.safetensors").stat().st_size,
            "machine": made_by,
        },
    )


def main() -> None:
    keys = sys.argv[1:] or list(RUNS)
    for key in keys:
        if key not in RUNS:
            sys.exit(f"There is no {key} among {', '.join(RUNS)}.")
    torch.set_num_threads(1)
    work = partial(train, made_by=machine())
    later = [key for key in keys if RUNS[key].stages_from]
    with ThreadPoolExecutor(max(1, min(usable_cpus(), len(keys)))) as pool:
        list(pool.map(work, [key for key in keys if key not in later]))
        list(pool.map(work, later))


if __name__ == "__main__":
    main()
