"""Memory and time of preset `small`: does it fit a card of 8 GB and an hour?

    python benchmarks/small.py             writes results/small.json

On a GPU it is measured: the peak of the allocator and the pictures a second over a hundred steps.
Without one it is estimated. Memory: the tensors that autograd keeps for a step, measured in
bfloat16 at a small batch and scaled to the preset's (copies of weights included), and the weights,
gradients, moments and averages. Time: the floating-point operations of a step at `TERAFLOPS`, a
third of what a consumer card of 8 GB promises for bfloat16.

Convolutions of upsampled pictures are counted as the CPU computes them, with 4 / 9 of a GPU's
products. Left out are the GANs' gradient penalty and what grows with the square of the batch:
AttnGAN's pairs of pictures and captions, some eight tensors of 128 x 128 x 14 words x 64 regions,
half a gigabyte.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lineage.config import to_dict, with_field
from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.plan import build
from lineage.recipes import find_recipe, preset
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.machine import peak_memory
from lineage.training.store import write_json

OUT = Path(__file__).parent.parent / "results" / "small.json"
TERAFLOPS = 8.0
KEYS = ("gan_int_cls", "stackgan", "attngan", "vqvae", "vqgan", "dalle", "ddpm", "ldm", "dit")
"""Systems; of several stages, the last is measured."""


def trainer(key: str, batch_size: int | None) -> Trainer:
    """A trainer of `key` at `small`, with its own batch size or a smaller one."""
    config = with_field(preset(key, "small"), "train.precision", "bf16")
    if batch_size is not None:  # the counter does not support the penalty's second derivatives
        config = with_field(config, "train.batch_size", batch_size)
        if "r1_weight" in to_dict(config)["model"]:
            config = with_field(config, "model.r1_weight", 0)
    dataset = load_dataset(config.data, "train", config.size)
    tokenizer = make_tokenizer("word", dataset.all_captions(), config.encoder.vocab_size)
    system = build(find_recipe(key).stages(config, tokenizer))
    return Trainer(system, dataset, config.optim, config.train)


def measured(key: str, steps: int = 100) -> dict[str, Any]:
    """Measured on the GPU of this machine."""
    run = trainer(key, None)
    batches = run.loader.batches()
    for _ in range(10):
        run.advance(next(batches))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        run.advance(next(batches))
    torch.cuda.synchronize()
    speed = steps * run.train.batch_size / (time.perf_counter() - started)
    return {
        "kind": "measured",
        "pictures_per_second": round(speed),
        "peak_gigabytes": round(peak_memory(run.device) / 1e9, 2),
    }


def estimated(key: str, batch_size: int = 4) -> dict[str, Any]:
    """Estimated from floating-point operations and the tensors that autograd keeps."""
    run = trainer(key, batch_size)
    full = preset(key, "small").train
    sizes: dict[int, int] = {}  # bytes of each storage, by its address

    def record(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in run.system.parameters()}
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(record, lambda t: t),
    ):
        run.advance(run.loader.at(0))
    flops = counter.get_total_flops()
    activations = sum(size for address, size in sizes.items() if address not in weights)
    parameters = sum(p.numel() for p in run.system.parameters())
    # weights, gradients, two moments, an average: 4 bytes each
    memory = activations / batch_size * full.batch_size + 20 * parameters
    speed = TERAFLOPS * 1e12 / (flops / batch_size)
    minutes = full.minutes or 0.0
    return {
        "kind": "estimate",
        "parameters": parameters,
        "batch": full.batch_size,
        "gigaflops_per_picture_in_training": round(flops / batch_size / 1e9, 2),
        "gigabytes_of_activations": round(activations / batch_size * full.batch_size / 1e9, 2),
        "gigabytes_in_all": round(memory / 1e9, 2),
        "assumed_teraflops": TERAFLOPS,
        "pictures_per_second": round(speed),
        "minutes": minutes,
        "million_pictures": round(speed * minutes * 60 / 1e6, 2),
    }


def main() -> None:
    cost = measured if torch.cuda.is_available() else estimated
    result = {key: cost(key) for key in KEYS} | {"machine": machine()}
    write_json(OUT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
