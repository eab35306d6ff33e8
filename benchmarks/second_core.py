"""What a second thread gains in a training step of each stage, and what does not part.

    python benchmarks/second_core.py           writes results/second_core.json

Steps at preset tiny with one thread and with two, in turn, on a machine that does nothing else:
pictures a second, and the milliseconds of a step by kind of operation, from PyTorch's profiler.
`other` is everything that is no large operation: Python, dispatch, autograd, allocation, casts and
the data. The profiler itself makes a step of many small operations longer, so the milliseconds
compare with each other, not with the rates.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from lineage.catalog import working
from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.options import configure
from lineage.recipes import find_recipe
from lineage.text.tokenizer import make_tokenizer
from lineage.threads import use_threads
from lineage.training.loop import Trainer
from lineage.training.machine import keep_freed_memory
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
COUNTS = (1, 2)
ROUNDS, STEPS, PROFILED = 5, 10, 5
KINDS = {
    "convolution": ("mkldnn_convolution", "convolution_backward", "slow_conv"),
    "products": ("mm", "bmm", "addmm", "baddbmm", "einsum"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax": ("softmax",),
    "norms": ("batch_norm", "group_norm", "layer_norm"),
    "recurrent": ("mkldnn_rnn", "lstm"),
    "optimiser": ("_fused_adam", "_foreach", "lerp", "linalg_vector_norm"),
}
"""Parts of the names of operations, by kind."""


def trainers(key: str) -> Iterator[tuple[str, Trainer]]:
    """A trainer of each stage of a system, untrained."""
    config = configure(key, minutes=60)
    dataset = load_dataset(config.data, "train", config.size)
    tokenizer = make_tokenizer("word", dataset.all_captions(), config.encoder.vocab_size)
    for stage in find_recipe(key).stages(config, tokenizer):
        stage.construct()
        yield stage.name, stage.trainer(dataset)


def kind_of(name: str) -> str:
    """Kind of an operation of the profiler, such as `aten::addmm`."""
    short = name.removeprefix("aten::").removeprefix("_")
    for kind, parts in KINDS.items():
        if any(short == part or (len(part) > 5 and part in name) for part in parts):
            return kind
    return "other"


def measure(trainer: Trainer) -> dict[str, Any]:
    """Rates, gain and milliseconds by kind of one stage."""
    batches = trainer.loader.batches()
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    for number in range(ROUNDS + 1):
        for count in COUNTS:
            with use_threads(count):
                started = time.perf_counter()
                for _ in range(STEPS):
                    trainer.advance(next(batches), False)
                rate = STEPS * trainer.batch_size / (time.perf_counter() - started)
            if number:
                rates[count].append(rate)
    kinds: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        with use_threads(count), profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            for _ in range(PROFILED):
                trainer.advance(next(batches), False)
            whole = (time.perf_counter() - started) / PROFILED * 1e3
        spent = dict.fromkeys(KINDS, 0.0)
        for event in profiler.key_averages():
            if (kind := kind_of(event.key)) in spent:
                spent[kind] += event.self_cpu_time_total / PROFILED / 1e3
        spent["other"] = whole - sum(spent.values())
        for kind, milliseconds in spent.items():
            if milliseconds >= 0.05:
                kinds.setdefault(kind, {})[str(count)] = round(milliseconds, 2)
    medians = {str(count): round(statistics.median(values)) for count, values in rates.items()}
    gain = statistics.median(two / one for one, two in zip(*rates.values(), strict=True))
    return {"pictures_per_second": medians, "gain": round(gain, 2), "milliseconds": kinds}


def main() -> None:
    if "OMP_NUM_THREADS" in os.environ:
        sys.exit("OMP_NUM_THREADS would make both counts the same: unset it.")
    keep_freed_memory()
    results: dict[str, Any] = {}
    for key in working():
        if key == "retrieval":
            continue
        for stage, trainer in trainers(key):
            gc.freeze()
            results[f"{key} {stage}"] = measure(trainer)
            print(f"{key} {stage}", results[f"{key} {stage}"], flush=True)
    write_json(RESULTS / "second_core.json", {"machine": machine(), "stages": results})


if __name__ == "__main__":
    main()
