"""The judge's exam at every level and several sizes, and its speed.

python benchmarks/judge.py             writes results/judge.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lineage.data.shapes import LEVELS
from lineage.evaluation.cost import machine
from lineage.evaluation.exam import exam
from lineage.evaluation.judge import Judge
from lineage.evaluation.prompts import make_prompts
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--repeats", type=int, default=8, help="number of pictures of each prompt (8)"
    )
    parser.add_argument(
        "--seed", type=int, default=2026, help="seed, different from other exams' (2026)"
    )
    options = parser.parse_args()
    judge = Judge.load()
    exams = {
        f"{level} {size}": exam(judge, make_prompts(level), size, options.repeats, options.seed)
        for level in LEVELS
        for size in (16, 32, 64)
    }
    pictures = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8)
    judge.detect(pictures[:128])
    started = time.perf_counter()
    judge.detect(pictures)
    seconds = time.perf_counter() - started
    write_json(
        RESULTS / "judge.json",
        {
            "judge": judge.fingerprint(),
            "exams": exams,
            "worst_accepted": min(min(e["accepted"].values()) for e in exams.values()),
            "worst_near_misses": max(max(e["near_misses"].values()) for e in exams.values()),
            "pictures_per_second": round(1024 / seconds),
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
