"""What a system costs: parameters, arithmetic, seconds and bytes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lineage.contract import System


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
    with FlopCounterMode(display=False) as counter:
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
    """All of the above for a trained system whose weights lie in `weights`."""
    sixteen = (captions * 16)[:16]
    return {
        "parameters": parameters(system),
        "flops_per_picture": flops_per_picture(system, captions[0]),
        "sampling_seconds_per_picture_at_1": seconds_per_picture(system, captions[:1]),
        "sampling_seconds_per_picture_at_16": seconds_per_picture(system, sixteen),
        "model_bytes": weights.stat().st_size,
    }
