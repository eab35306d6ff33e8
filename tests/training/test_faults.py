"""A run that is killed or whose disk fails at a write loses nothing: a sample of the faults of
`benchmarks/faults.py`, which injects all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lineage.training.store import read_json

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "faults.py"
KINDS = ("killed", "killed after", "ENOSPC", "EIO", "EACCES")


def inject(out: Path, system: str, stride: int) -> dict[str, Any]:
    """Results of every `stride`-th fault of a system."""
    done = subprocess.run(
        [sys.executable, PROGRAM, system, "--stride", str(stride), "--out", out],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = read_json(out)
    return results


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each fault is a fork")
@pytest.mark.parametrize(("system", "stride"), [("ddpm", 41), ("vqvae", 29)])
def test_a_fault_at_a_write_loses_nothing(system: str, stride: int, tmp_path: Path) -> None:
    results = inject(tmp_path / "faults.json", system, stride)
    assert results["failures"] == []
    systems = results["systems"]
    assert list(systems) == [system, f"{system} resumed", f"{system} refused"]
    assert systems.pop(f"{system} refused")["events"] == 0
    for name, counts in systems.items():
        assert counts["events"] > 30, name
        assert sum(kind["failed"] for kind in counts["kinds"].values()) == 0
    resumed = [
        sum(s["kinds"][kind]["resumed to the same bytes"] for s in systems.values())
        for kind in KINDS
    ]
    assert min(resumed) > 0  # every kind was injected
