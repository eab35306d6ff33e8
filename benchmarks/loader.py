"""What data costs: pictures a second of `shapes` on one core, and the loader's share of a training
step.

    python benchmarks/loader.py            writes results/loader.json

The share is measured in one run, side by side: blocks of steps on one batch that is kept, and
blocks on fresh batches from the loader as training uses it, in turn; the median of the ratio of
neighbouring blocks is reported.
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
from lineage.recipes import find_recipe, preset
from lineage.runs import build
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.store import write_json

OUT = Path(__file__).parent.parent / "results" / "loader.json"


def pictures_per_second(spec: str, size: int, batch: int = 64, seconds: float = 2.0) -> float:
    """Pictures with captions that `batch` gives in a second, on one core."""
    dataset = load_dataset(spec, "train", size)
    made, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        dataset.batch(range(made, made + batch), [0] * batch, 0)
        made += batch
    return made / (time.perf_counter() - started)


def loader_share(key: str, blocks: int = 12, block_seconds: float = 1.5) -> dict[str, Any]:
    """How much longer a training step takes on fresh data than on a batch that is kept."""
    config = with_field(preset(key, "tiny"), "train.minutes", 60)
    dataset = load_dataset(config.data, "train", config.size)
    tokenizer = make_tokenizer("word", dataset.all_captions(), config.encoder.vocabulary)
    gc.freeze()  # as Trainer.run does
    trainer = Trainer(
        build(find_recipe(key).stages(config, tokenizer)), dataset, config.optim, config.train
    )
    kept = trainer.loader.at(0)
    for _ in range(5):
        trainer.advance(kept)

    def block(batches: Iterator[Batch], steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.advance(next(batches))
        return (time.perf_counter() - started) / steps

    def same() -> Iterator[Batch]:
        while True:
            yield Batch(kept.image.clone(), kept.caption, kept.label, kept.id)

    steps = max(2, round(block_seconds / block(same(), 3)))
    fresh = trainer.loader.batches()
    pairs = [(block(same(), steps), block(fresh, steps)) for _ in range(blocks)]
    ratios = [new / old for old, new in pairs]
    return {
        "batch": config.train.batch,
        "steps_per_block": steps,
        "milliseconds_kept": round(1e3 * statistics.median(old for old, _ in pairs), 2),
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
