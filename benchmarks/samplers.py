"""How few steps a sampler needs: the judge's score of a trained run against steps and seconds.

    python benchmarks/samplers.py runs/ddpm --out results/ddpm/samplers

NoiseStreams the 352 prompts of seen combinations with each sampler at each number of steps, the same seed
for all, and writes a JSON document, its table and the curves. Ancestral sampling with 100 steps is
what the others are held against.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

import lineage
from lineage.data.contract import to_bytes
from lineage.evaluation.cost import machine
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import Prompt, make_prompts
from lineage.training.store import write_bytes, write_json

CURVES = {
    ("ddpm", None): (10, 25, 50, 100),
    ("ddim", None): (5, 10, 25),
    ("dpmpp_2m", None): (3, 5, 10, 20),
    ("dpmpp_2m_sde", None): (5, 10, 20),
    ("dpmpp_2m_sde", "exponential"): (5, 10, 20),
    ("heun", "karras"): (5, 10),
}
"""(sampler, spacing, which is its own where there is none): numbers of steps."""
TWICE = ("heun",)  # evaluate the network twice a step


def scored(system: Any, judge: Judge, prompts: list[Prompt], **knobs: Any) -> dict[str, float]:
    """The share of exact pictures of each task, their mean, and the seconds of the drawing."""
    started = time.perf_counter()
    pictures: Tensor = system.generate([p.prompt for p in prompts], **knobs)
    seconds = time.perf_counter() - started
    readings = judge.read(to_bytes(pictures).cpu())
    right: dict[str, list[bool]] = {}
    for prompt, reading in zip(prompts, readings, strict=True):
        right.setdefault(prompt.tag, []).append(verdict(reading, prompt)["strict"])
    tasks = {tag: float(np.mean(values)) for tag, values in right.items()}
    return {**tasks, "mean": float(np.mean(list(tasks.values()))), "seconds": seconds}


def drawing(rows: list[dict[str, Any]], out: Path) -> None:
    """The curves."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for sampler, spacing in CURVES:
        own = [r for r in rows if (r["sampler"], r["spacing"]) == (sampler, spacing)]
        name = f"{sampler}, {spacing}" if spacing else sampler
        for axis, what in zip(axes, ("evaluations", "seconds"), strict=True):
            axis.plot([r[what] for r in own], [r["mean"] for r in own], "o-", label=name)
    for axis, label in zip(
        axes, ("evaluations of the network", "seconds for 352 pictures"), strict=True
    ):
        axis.set(xlabel=label, xscale="log", ylim=(0, 1))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of exact pictures, mean of six tasks")
    axes[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    system, judge = lineage.load(options.run), Judge.load()
    prompts = [p for p in make_prompts("easy") if p.split == "test"]
    rows: list[dict[str, Any]] = []
    for (sampler, spacing), counts in CURVES.items():
        for steps in counts:
            knobs = {"sampler": sampler, "steps": steps, "spacing": spacing}
            row: dict[str, Any] = {**knobs, "evaluations": steps * (2 if sampler in TWICE else 1)}
            row |= scored(system, judge, prompts, **{k: v for k, v in knobs.items() if v})
            rows.append(row)
            print(sampler, steps, spacing or "", round(row["mean"], 3), round(row["seconds"], 1))
    write_json(
        options.out.with_suffix(".json"),
        {"run": options.run.name, "prompts": len(prompts), "machine": machine(), "rows": rows},
    )
    drawing(rows, options.out.with_suffix(".png"))
    head = ["sampler", "spacing", "steps", "evaluations", "mean of six tasks", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    own = f"{system.config.spacing} (the run's)"
    for row in rows:
        cells = [row["sampler"], row["spacing"] or own, row["steps"], row["evaluations"]]
        cells += [f"{row['mean']:.3f}", f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    write_bytes(options.out.with_suffix(".md"), ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
