"""`lineage`: the history of text-to-image generation, from scratch, on the same captions.

    lineage.load_dataset(spec, split="train", size=32)   a captioned data set
    lineage.train(key, data=..., preset=..., out=...)    train a system; returns its run folder
    lineage.training_steps(key, ...)                     the same in memory, one step at a time
    lineage.load(run)                                    a trained system, which can `generate`
    lineage.evaluate(run)                                its scores, each with its protocol
    lineage.evaluate(pictures=FOLDER, prompts=FILE)      those of pictures of another program
    lineage.compare(keys, data=..., minutes=..., out=...)  train several on one budget, and a report

Nothing heavy is imported until one of these is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_dataset": "lineage.data",
    "load": "lineage.runs",
    "train": "lineage.runs",
    "training_steps": "lineage.stepping",
    "evaluate": "lineage.evaluation.run",
    "compare": "lineage.comparison.run",
}

__all__ = ["compare", "evaluate", "load", "load_dataset", "train", "training_steps"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'lineage' has no attribute {name!r}")
