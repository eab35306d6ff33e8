"""What a system costs: parameters, arithmetic, seconds and bytes.

    measure         all of it for a run, in a process of its own, so that peak memory is that of
                    drawing and of nothing else
    measured_once   the same, kept in the run folder: seconds differ from one time to the next, and
                    a run that is scored twice should have one score

`python -m lineage.evaluation.cost RUN` prints it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import lineage
from lineage.errors import CheckFailed, UserError
from lineage.system import System
from lineage.training.machine import peak_memory
from lineage.training.store import read_json, write_json

TOGETHER = 16  # pictures drawn at once, beside one alone


def parameters(system: System) -> dict[str, int]:
    """How many numbers the system has learnt, in all and in each group that training moves."""
    groups = {
        name: sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())
        for name, modules in system.groups().items()
    }
    return {"all": sum(p.numel() for p in system.parameters()), **groups}


def flops_per_picture(system: System, caption: str) -> int:
    """Floating-point operations of drawing one picture, as torch counts them: products and sums of
    matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode  # late: it alone takes 200 MB

    plain = sdpa_kernel(SDPBackend.MATH)  # the CPU's fused attention is not counted
    with plain, FlopCounterMode(display=False) as counter:
        system.generate([caption])
    return int(counter.get_total_flops())


def seconds_per_picture(system: System, captions: list[str], repeats: int = 3) -> float:
    """Seconds for one picture when all `captions` are drawn together.

    The median of `repeats`, after one more.
    """
    times = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        system.generate(captions, seed=number)
        if system.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / len(captions))
    return statistics.median(times[1:])


def sampling_cost(system: System, captions: list[str], weights: Path) -> dict[str, Any]:
    """All of the above for a trained system whose weights lie in `weights`.

    Peak memory is that of the whole process so far: the allocator's on a GPU, resident on a CPU.
    """
    together = (captions * TOGETHER)[:TOGETHER]
    alone, of_many = (
        seconds_per_picture(system, captions[:1]),
        seconds_per_picture(system, together),
    )
    return {
        "sampling_seconds_per_picture_at_1": alone,
        "sampling_seconds_per_picture_at_16": of_many,
        "sampling_peak_memory_bytes": peak_memory(system.device),
        "flops_per_picture": flops_per_picture(system, captions[0]),
        "parameters": parameters(system),
        "model_bytes": weights.stat().st_size,
    }


def measure(run: Path, captions: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """`sampling_cost` of a run, in a fresh process.

    Raises:
        CheckFailed: that process failed; what it said stands on standard error.
    """
    command = [sys.executable, "-m", "lineage.evaluation.cost", str(run), "--device", device]
    done = subprocess.run(
        command, input=json.dumps(list(captions)), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise CheckFailed(f"The cost of {run} could not be measured, for the reason above.")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measured_once(run: Path, captions: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """`measure`, kept in `evaluation/cost.json` of the run folder until model or machine change."""
    weights = (run / "model.safetensors").read_bytes()
    key = {
        "model": hashlib.blake2b(weights, digest_size=16).hexdigest(),
        "machine": machine(),
        "device": device,
    }
    path = run / "evaluation" / "cost.json"
    if path.exists():
        kept = read_json(path)
        if kept.get("measured_on") == key:
            return dict(kept["cost"])
    cost = measure(run, captions, device)
    try:
        write_json(path, {"measured_on": key, "cost": cost})
    except UserError as error:
        print(f"lineage: {error}", file=sys.stderr)  # a run that can only be read is scored as well
    return cost


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lineage": lineage.__version__,
    }


def _processor() -> str:
    """The processor's name, as well as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print the sampling cost of a run as JSON; captions come on standard input as a JSON list."""
    import argparse

    from lineage.runs import load

    parser = argparse.ArgumentParser(prog="python -m lineage.evaluation.cost")
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    captions = json.load(sys.stdin)
    system = load(options.run, options.device)
    print(json.dumps(sampling_cost(system, captions, options.run / "model.safetensors")))


if __name__ == "__main__":
    main()
