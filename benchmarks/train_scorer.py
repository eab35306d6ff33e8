"""Train the scorer of `shapes`, whose weights come with the package.

python benchmarks/train_scorer.py --out lineage/evaluation/weights/scorer_shapes.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset, Example
from lineage.data.shapes import LEVELS
from lineage.evaluation.scorer import SIDE, fit_scorer, own_r_precision

TEST_SETS = (("validation", 16), ("validation", 32), ("validation", 64), ("heldout", 32))


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


def main() -> None:
    """Train, measure on every level and at three sizes, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scorer = fit_scorer(AllLevels(), steps=options.steps, seed=options.seed)
    for level, (split, size) in product(LEVELS, TEST_SETS):
        measured = own_r_precision(scorer, load_dataset(f"shapes:{level}", split, size))
        scorer.protocol["r_precision"].append(measured)
        print(measured)
    scorer.save(options.out)


if __name__ == "__main__":
    main()
