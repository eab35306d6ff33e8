"""Number of steps that a sampler needs: the judge's score of a trained run against steps and time.

    python benchmarks/samplers.py runs/ddpm --out results/ddpm/samplers

Draws the 352 prompts of the test split with each sampler and number of steps, from the same seed,
and writes a JSON document, its table and its curves. Ancestral sampling in 100 steps is the
yardstick.
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
from lineage.files import write_bytes
from lineage.training.store import write_json

CURVES = {
    ("ddpm", None): (10, 25, 50, 100),
    ("ddim", None): (5, 10, 25),
    ("dpmpp_2m", None): (3, 5, 10, 20),
    ("dpmpp_2m_sde", None): (5, 10, 20),
    ("dpmpp_2m_sde", "exponential"): (5, 10, 20),
    ("heun", "karras"): (5, 10),
}
"""(sampler, spacing, or None for the run's own): numbers of steps."""
TWO_EVALUATIONS = ("heun",)


def score(system: Any, judge: Judge, prompts: list[Prompt], **options: Any) -> dict[str, float]:
    """Share of exact pictures in each task, their mean, and the seconds of sampling."""
    start = time.perf_counter()
    pictures: Tensor = system.generate([p.prompt for p in prompts], **options)
    seconds = time.perf_counter() - start
    exact: dict[str, list[bool]] = {}
    for prompt, detections in zip(prompts, judge.detect(to_bytes(pictures).cpu()), strict=True):
        exact.setdefault(prompt.tag, []).append(verdict(detections, prompt)["strict"])
    tasks = {tag: float(np.mean(values)) for tag, values in exact.items()}
    return {**tasks, "mean": float(np.mean(list(tasks.values()))), "seconds": seconds}


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Curves of the mean score against evaluations and seconds."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for sampler, spacing in CURVES:
        curve = [r for r in rows if (r["sampler"], r["spacing"]) == (sampler, spacing)]
        name = f"{sampler}, {spacing}" if spacing else sampler
        for axis, key in zip(axes, ("evaluations", "seconds"), strict=True):
            axis.plot([r[key] for r in curve], [r["mean"] for r in curve], "o-", label=name)
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


def table(rows: list[dict[str, Any]], spacing: str) -> str:
    """The rows as Markdown; `spacing` is the run's own."""
    head = ["sampler", "spacing", "steps", "evaluations", "mean of six tasks", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["sampler"], row["spacing"] or f"{spacing} (the run's)", row["steps"]]
        cells += [row["evaluations"], f"{row['mean']:.3f}", f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    system, judge = lineage.load(arguments.run), Judge.load()
    prompts = [p for p in make_prompts("easy") if p.split == "test"]
    rows: list[dict[str, Any]] = []
    for (sampler, spacing), counts in CURVES.items():
        for steps in counts:
            row: dict[str, Any] = {"sampler": sampler, "steps": steps, "spacing": spacing}
            row["evaluations"] = steps * (2 if sampler in TWO_EVALUATIONS else 1)
            options = {"sampler": sampler, "sampling_steps": steps, "spacing": spacing}
            row |= score(system, judge, prompts, **options)
            rows.append(row)
            print(sampler, steps, spacing or "", round(row["mean"], 3), round(row["seconds"], 1))
    write_json(
        arguments.out.with_suffix(".json"),
        {"run": arguments.run.name, "prompts": len(prompts), "machine": machine(), "rows": rows},
    )
    plot(rows, arguments.out.with_suffix(".png"))
    text = table(rows, system.config.spacing)
    write_bytes(arguments.out.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
