"""Training of the contrastive scorer, and the scorer of a data set.

    fit_scorer   trains a scorer on any captioned data, in about a minute
    scorer_for   the scorer of a data set: shipped for `shapes`, otherwise trained once

The shipped weights (FILE is lineage/evaluation/weights/scorer_shapes.safetensors):
    python -m lineage.evaluation.scorer_training --out FILE
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lineage.config import OptimConfig, TextConfig
from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset, Example
from lineage.data.shapes import LEVELS
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.judge import resized
from lineage.evaluation.scorer import SIDE, ContrastiveScorer, Scorer, load_scorer
from lineage.text.tokenizer import make_tokenizer
from lineage.training.group import Group
from lineage.training.loader import Loader
from lineage.training.machine import Distributed
from lineage.training.store import cache_folder, fingerprint

VERSION = 1  # of network and training; a new one makes cached scorers of an old one unused
TEXT = TextConfig(vocab_size=1024, max_words=32, width=48, num_layers=2, num_heads=4)
STEPS, BATCH_SIZE = 800, 96  # of `fit_scorer`
OPTIM = OptimConfig(lr=1.5e-3, beta2=0.98, weight_decay=0.05, ema_decay=0.0)
TEST_SETS = (("validation", 16), ("validation", 32), ("validation", 64), ("heldout", 32))


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> (B, 3, 32, 32), as a weak generator might draw them.

    Half of the batches are blurred by way of 24 or 16 pixels; each picture has noise of its own
    strength, with a deviation of at most 0.15.
    """
    side = (SIDE, SIDE, 24, 16)[int(torch.randint(4, (), generator=generator))]
    small = resized(resized(resized(images, SIDE), side), SIDE)
    sigma = 0.15 * torch.rand(len(small), 1, 1, 1, generator=generator)
    return small + sigma * torch.randn(small.shape, generator=generator)


def fit_scorer(
    dataset: CaptionedDataset,
    validation: CaptionedDataset | None = None,
    *,
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> ContrastiveScorer:
    """Train a scorer on the CPU; the same arguments give the same scorer.

    Args:
        dataset: Data set to train on.
        validation: Unseen pictures, on which its own R-precision is then measured.
        steps: Number of steps of AdamW, with a warm-up over the first twentieth and a cosine;
            `STEPS` if None.
        batch_size: Number of pairs of a step; at most the number of pictures.
        seed: Seed of weights, order, captions and noise.
        progress: If true, show a bar on standard error if that is a terminal.

    Raises:
        UserError: all captions are the same, so there is nothing to tell apart.
    """
    captions = list(dataset.all_captions())
    if len(set(captions)) < 2:
        raise UserError(
            f"All captions of {dataset.name} are the same: a scorer needs at least 2 to tell apart."
        )
    steps = STEPS if steps is None else steps
    batch_size = batch_size if dataset.endless else min(batch_size, len(dataset))
    with torch.random.fork_rng(devices=[]):  # the global random state is restored
        torch.default_generator.manual_seed(seed)
        tokenizer = make_tokenizer(TEXT.tokenizer, captions, TEXT.vocab_size)
        scorer = ContrastiveScorer(TEXT, tokenizer, f"contrastive scorer of {dataset.name}", {})
    group, generator = Group("scorer", [scorer], OPTIM), torch.Generator().manual_seed(seed)
    batches = Loader(dataset, batch_size, seed).batches()
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=steps, desc="fitting a scorer", unit=" steps", disable=disable) as bar:
        for step in range(steps):
            warmup = min(1.0, 20 * (step + 1) / steps)
            lr_factor = warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            batch = next(batches)
            batch.image = degraded(batch.image, generator)
            loss = scorer.loss(batch)
            group.update(loss, lr_factor, step, Distributed())
            if step % 10 == 0:
                lr = OPTIM.lr * lr_factor
                bar.set_postfix_str(f"loss {loss.item():.3f}, rate {lr:.1e}", refresh=False)
            bar.update()
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.copy_(parameter.half())
    scorer.protocol |= {"data": dataset.name, "split": dataset.split, "size": dataset.size}
    scorer.protocol |= {"steps": steps, "batch": batch_size, "seed": seed, "version": VERSION}
    scorer.protocol |= {"parameters": sum(map(Tensor.numel, group.parameters)), "r_precision": []}
    if validation is not None:
        scorer.protocol["r_precision"].append(own_r_precision(scorer, validation))
    return scorer.eval().requires_grad_(False)


def own_r_precision(
    scorer: Scorer, dataset: CaptionedDataset, max_pictures: int = 1000
) -> dict[str, Any]:
    """R-precision of real pictures; its value is None if all captions are the same."""
    examples = [dataset[i] for i in range(min(max_pictures, len(dataset)))]
    captions = [example.captions[0] for example in examples]
    image = scorer.image(torch.stack([example.image for example in examples]))
    section = sections.text_fit(image, scorer.text(captions), captions, scorer.kind)
    return {
        "data": dataset.name,
        "split": dataset.split,
        "size": dataset.size,
        "n": len(examples),
        "pool": section.get("pool"),
        "value": section.get("r_precision", {}).get("value"),
    }


def scorer_for(
    dataset_spec: str,
    train: CaptionedDataset,
    data_fingerprint: str,
    validation: CaptionedDataset | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ContrastiveScorer:
    """The scorer of a data set: for `shapes` the shipped one, for other data one fitted to `train`.

    A fitted one is cached in `$LINEAGE_CACHE` (or `~/.cache/lineage`), in the folder `scorers`,
    under a hash of `data_fingerprint` and the arguments of `fit_scorer`. A damaged file is
    replaced; if the folder cannot be written, nothing is cached.
    """
    if dataset_spec.partition(":")[0] == "shapes":
        shipped = resources.files("lineage.evaluation") / "weights" / "scorer_shapes.safetensors"
        with resources.as_file(shipped) as path:
            return load_scorer(path)
    inputs = [data_fingerprint, train.size, steps or STEPS, seed, VERSION, validation is not None]
    path = cache_folder("scorers") / f"{fingerprint(json.dumps(inputs).encode())}.safetensors"
    if path.exists():
        with contextlib.suppress(UserError):
            return load_scorer(path)
    scorer = fit_scorer(train, validation, steps=steps, seed=seed, progress=progress)
    with contextlib.suppress(UserError):
        scorer.save(path)
    return scorer


# --- the shipped scorer -----------------------------------------------------------------------


class AllLevels(CaptionedDataset):
    """The three levels of `shapes` in turn: example i is example i // 3 of level i % 3."""

    endless = True

    def __init__(self) -> None:
        self.levels = [load_dataset(f"shapes:{level}", "train", SIDE) for level in LEVELS]
        self.name, self.split, self.size, self.skipped = "shapes (all levels)", "train", SIDE, []

    def __len__(self) -> int:
        return sum(map(len, self.levels))

    def __getitem__(self, index: int) -> Example:
        return replace(self.levels[index % 3][index // 3], id=str(index))

    def batch(self, indices: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        parts = [level.batch([i // 3 for i in indices], epochs, seed) for level in self.levels]
        rows = [(i % 3, row) for row, i in enumerate(indices)]
        image = torch.stack([parts[k].image[row] for k, row in rows])
        caption = [parts[k].caption[row] for k, row in rows]
        return Batch(image, caption, None, [str(i) for i in indices])

    def all_captions(self, limit: int = 20_000) -> Iterator[str]:
        for level in self.levels:
            yield from level.all_captions(limit)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the shipped scorer, and measure it on every level and at three sizes."""
    parser = argparse.ArgumentParser(prog="python -m lineage.evaluation.scorer_training")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    scorer = fit_scorer(AllLevels(), steps=options.steps, seed=options.seed)
    for level, (split, size) in product(LEVELS, TEST_SETS):
        measured = own_r_precision(scorer, load_dataset(f"shapes:{level}", split, size))
        scorer.protocol["r_precision"].append(measured)
        print(measured)
    scorer.save(options.out)


if __name__ == "__main__":
    main()
