"""Two processes under torchrun train what one process does on a batch of twice the size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lineage.training.log import read_log
from lineage.training.store import load_tensors

SETTINGS = {"train.precision": "fp32", "train.log_every": 1, "train.sample_every": 0}
FLAGS = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_train_what_one_does(train_run: Callable[..., Any], tmp_path: Path) -> None:
    """8 pictures a step either way; rows have noise of their own, and gradients are averaged."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    train_run(alone, "ddpm", SETTINGS, steps=12)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train", "ddpm", "--preset", "smoke", "--steps", "12", "--out", str(together)]
    done = subprocess.run(
        [
            sys.executable,
            *torchrun,
            "-m",
            "lineage",
            *arguments,
            *FLAGS,
            "--set",
            "train.batch_size=4",  # in each process
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_log(folder / "metrics.jsonl") for folder in (alone, together))
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, 13))
    for first, second in zip(one, two, strict=True):
        assert second["denoiser/mse_x0"] == pytest.approx(first["denoiser/mse_x0"], rel=1e-3)
        assert second["pictures"] == first["pictures"]
    assert len({line["denoiser/mse_x0"] for line in one}) == 12
    weights = [load_tensors(folder / "model.safetensors") for folder in (alone, together)]
    worst = max((weights[0][n].float() - weights[1][n].float()).abs().max() for n in weights[0])
    assert worst < 0.01
