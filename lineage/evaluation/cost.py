"""Cost of a system: parameters, arithmetic, seconds and bytes; and the machine it was measured on.

measure        the cost of a run, in a process of its own, so that its peak memory is that of
               sampling alone
cached_cost    the same, stored in the run folder: seconds differ from one time to the next, and
               a run that is scored twice should have one score
machine        processor, versions, and the commit of this package
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
from lineage.cache import cache_folder, write_cache
from lineage.characters import protect
from lineage.errors import CheckFailed
from lineage.pretrained import is_packaged
from lineage.system import System
from lineage.text.contract import caption_list
from lineage.threads import available, requested, use_free_threads, use_threads
from lineage.training.machine import peak_memory
from lineage.training.store import read_json_object, write_json

PACKAGE = Path(lineage.__file__).parent


def parameters(system: System) -> dict[str, int]:
    """Number of parameters, in all and in each group that training updates."""
    groups = {
        name: sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())
        for name, modules in system.groups().items()
    }
    return {"all": sum(p.numel() for p in system.parameters()), **groups}


def flops_per_picture(system: System, caption: str) -> int:
    """Floating-point operations of matrix products, convolutions and attention for one picture."""
    from torch.utils.flop_counter import FlopCounterMode  # late: it alone takes 200 MB

    plain = sdpa_kernel(SDPBackend.MATH)  # the CPU's fused attention is not counted
    with plain, FlopCounterMode(display=False) as counter:
        system.generate([caption])
    return int(counter.get_total_flops())


def seconds_per_picture(system: System, captions: list[str], repeats: int = 3) -> float:
    """Seconds per picture when all `captions` are drawn together: the median of `repeats`, after
    one more to warm up.
    """
    captions, times = caption_list(captions), []
    for seed in range(repeats + 1):
        started = time.perf_counter()
        system.generate(captions, seed=seed)
        if system.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / len(captions))
    return statistics.median(times[1:])


def sampling_cost(system: System, captions: list[str], weights: Path) -> dict[str, Any]:
    """All of the above for a trained system, with the size of its file of `weights`.

    Peak memory is that of the whole process so far: the allocator's on a GPU, resident on a CPU.
    """
    captions = caption_list(captions)
    return {
        "sampling_seconds_per_picture_at_1": seconds_per_picture(system, captions[:1]),
        "sampling_seconds_per_picture_at_16": seconds_per_picture(system, (captions * 16)[:16]),
        "sampling_peak_memory_bytes": peak_memory(system.device),
        "flops_per_picture": flops_per_picture(system, captions[0]),
        "parameters": parameters(system),
        "model_bytes": weights.stat().st_size,
    }


def measure(run: Path, captions: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """`sampling_cost` of a run, in a fresh process.

    Raises:
        CheckFailed: that process failed; its message is on standard error.
    """
    process = subprocess.run(
        [sys.executable, "-m", "lineage.evaluation.cost", str(run), device, str(requested() or "")],
        input=json.dumps(caption_list(captions)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        raise CheckFailed(f"The cost of {run} could not be measured, for the reason above.")
    cost: dict[str, Any] = json.loads(process.stdout)
    return cost


def cached_cost(run: Path, captions: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """`measure`, stored in the run's `evaluation/cost.json` until model or machine change; for a
    run of the package, in the cache.
    """
    weights = (run / "model.safetensors").read_bytes()
    measured_on = {
        "model": hashlib.blake2b(weights, digest_size=16).hexdigest(),
        "machine": machine(),
        "device": device,
    }
    folder = cache_folder("evaluate") / run.name if is_packaged(run) else run / "evaluation"
    path = folder / "cost.json"
    cached = read_json_object(path)
    if cached.get("measured_on") == measured_on and _is_cost(cached.get("cost")):
        return dict(cached["cost"])
    cost = measure(run, captions, device)
    write_cache(lambda: write_json(path, {"measured_on": measured_on, "cost": cost}))
    return cost


def _is_cost(value: Any) -> bool:
    """Whether a value has the form of `sampling_cost`."""
    if not isinstance(value, dict) or not isinstance(value.get("parameters"), dict):
        return False
    numbers = [value.get(name) for name in NUMBERS] + [value["parameters"].get("all")]
    return all(isinstance(number, (int, float)) for number in numbers)


NUMBERS = (
    "sampling_seconds_per_picture_at_1",
    "sampling_seconds_per_picture_at_16",
    "sampling_peak_memory_bytes",
    "flops_per_picture",
    "model_bytes",
)


# --- machine ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What numbers were measured on and with."""
    return {
        "processor": _processor(),
        "threads": available(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lineage": lineage.__version__,
        **source(PACKAGE),
    }


def source(folder: Path) -> dict[str, Any]:
    """The git commit of the files in `folder`, and whether they are unchanged since (`clean`).

    Both are None without git, or if no repository tracks the folder.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # a copy may be installed in another repository
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "clean": None}
    return {"commit": commit, "clean": not changes}


def _processor() -> str:
    """Name of the processor, as exact as the system states it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print the cost of a run as JSON: `RUN DEVICE THREADS`, with a JSON list of captions as input;
    THREADS is empty to measure.
    """
    from lineage.runs import load_system

    run, device, threads = sys.argv[1:]
    with protect(), use_free_threads(), use_threads(int(threads or torch.get_num_threads())):
        captions, weights = json.load(sys.stdin), Path(run) / "model.safetensors"
        print(json.dumps(sampling_cost(load_system(run, device), captions, weights)))


if __name__ == "__main__":
    main()
