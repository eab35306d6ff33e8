"""Cost of the data: pictures a second of `shapes` on one core, and the loader's share of a training
step.

    python benchmarks/loader.py            writes results/loader.json

The share is measured in one run: blocks of steps on one repeated batch and blocks on fresh batches
from the loader, as in training, alternate. The result is the median ratio of neighbouring blocks.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lineage.config import with_field
from lineage.data import load_dataset
from lineage.data.contract import Batch
from lineage.evaluation.cost import machine
from lineage.plan import build
from lineage.recipes import find_recipe, preset
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.store import write_json

OUT = Path(__file__).parent.parent / "results" / "loader.json"


def pictures_per_second(spec: str, size: int, rows: int = 64, seconds: float = 2.0) -> float:
    """Pictures with captions that a data set makes in a second, in batches of `rows`."""
    dataset = load_dataset(spec, "train", size)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        dataset.batch(range(count, count + rows), [0] * rows, 0)
        count += rows
    return count / (time.perf_counter() - started)


def loader_share(key: str, blocks: int = 12, block_seconds: float = 1.5) -> dict[str, Any]:
    """Time of a training step on fresh batches, relative to a repeated batch."""
    config = with_field(preset(key, "tiny"), "train.minutes", 60)
    dataset = load_dataset(config.data, "train", config.size)
    tokenizer = make_tokenizer("word", dataset.all_captions(), config.encoder.vocab_size)
    gc.freeze()  # as in Trainer.run
    stages = find_recipe(key).stages(config, tokenizer)
    trainer = Trainer(build(stages), dataset, config.optim, config.train)
    first = trainer.loader.at(0)
    for _ in range(5):
        trainer.advance(first)

    def block(batches: Iterator[Batch], steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.advance(next(batches))
        return (time.perf_counter() - started) / steps

    def repeated() -> Iterator[Batch]:
        while True:
            yield Batch(first.image.clone(), first.caption, first.label, first.id)

    steps = max(2, round(block_seconds / block(repeated(), 3)))
    fresh = trainer.loader.batches()
    pairs = [(block(repeated(), steps), block(fresh, steps)) for _ in range(blocks)]
    ratios = [new / old for old, new in pairs]
    return {
        "batch": config.train.batch_size,
        "steps_per_block": steps,
        "milliseconds_repeated": round(1e3 * statistics.median(old for old, _ in pairs), 2),
        "milliseconds_fresh": round(1e3 * statistics.median(new for _, new in pairs), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speeds = {
        f"{spec} at {size}": round(pictures_per_second(spec, size))
        for spec in ("shapes:easy", "shapes:medium", "shapes:hard")
        for size in (32, 64)
    }
    torch.set_num_threads(threads)
    shares = {key: loader_share(key) for key in ("gan_int_cls", "ddpm")}
    result = {"pictures_per_second_on_one_core": speeds, "step": shares, "machine": machine()}
    write_json(OUT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
