"""Does inpainting change what it should, and nothing else?

    python benchmarks/editing.py runs/ddpm --out results/ddpm/editing

Real pictures of one object of a named colour. The object's surroundings are masked, and the caption
asks for another object in another colour; the judge says whether it is there. What is not masked is
compared bit by bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lineage
from lineage.data.contract import to_bytes, to_unit
from lineage.data.shapes import LEVELS
from lineage.evaluation.cost import machine
from lineage.evaluation.judge import Judge, verdict
from lineage.evaluation.prompts import make_prompts
from lineage.evaluation.scenes import draw, plan
from lineage.runs import save_picture
from lineage.sheets import sheet
from lineage.training.store import write_json

MARGIN = 3  # pixels about the object that are painted anew too


def surroundings(images: Tensor) -> Tensor:
    """(B, 3, S, S) bytes -> (B, 1, S, S) bool: the box of what is not ground, and a margin."""
    ground = images.flatten(2).float().median(2).values[..., None, None]
    thing = ((images.float() - ground).abs().amax(1, keepdim=True) > 40).float()
    rows, columns = thing.amax(3, keepdim=True), thing.amax(2, keepdim=True)

    def filled(line: Tensor, dim: int) -> Tensor:
        from_start = line.cummax(dim).values
        from_end = line.flip(dim).cummax(dim).values.flip(dim)
        return from_start * from_end

    box = filled(rows, 2) * filled(columns, 3)
    return F.max_pool2d(box, 2 * MARGIN + 1, 1, MARGIN) > 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    system, judge = lineage.load(options.run), Judge.load()
    prompts = [p for p in make_prompts("easy") if p.tag == "colors" and p.split == "test"]
    chance = np.random.default_rng(0)
    real = torch.from_numpy(
        draw(LEVELS["easy"], [plan(p, chance) for p in prompts], 0, system.size)
    )
    wanted = []
    for prompt in prompts:
        own = prompt.include[0]
        others = [
            p
            for p in prompts
            if p.include[0].shape != own.shape and p.include[0].colour != own.colour
        ]
        wanted.append(others[chance.integers(len(others))])
    masks, images = surroundings(real), to_unit(real)
    edited = system.edit([p.prompt for p in wanted], images, mask=masks)
    kept = bool(torch.equal(edited[~masks.expand_as(edited)], images[~masks.expand_as(images)]))
    right = [verdict(r, p) for r, p in zip(judge.read(to_bytes(edited)), wanted, strict=True)]
    before = [verdict(r, p) for r, p in zip(judge.read(real), wanted, strict=True)]
    document = {
        "run": options.run.name,
        "pictures": len(prompts),
        "outside_unchanged": kept,
        "masked_share": float(masks.float().mean()),
        "exact": float(np.mean([v["strict"] for v in right])),
        "colour": float(np.mean([v["colour"] for v in right])),
        "object": float(np.mean([v["object"] for v in right])),
        "exact_before": float(np.mean([v["strict"] for v in before])),
        "machine": machine(),
    }
    print(document)
    write_json(options.out.with_suffix(".json"), document)
    shown: list[Tensor] = []
    texts: list[str] = []
    for number in range(8):
        hole = torch.where(masks[number], torch.tensor(128, dtype=torch.uint8), real[number])
        shown += [real[number], hole, to_bytes(edited[number])]
        texts += [prompts[number].prompt, "masked", wanted[number].prompt]
    save_picture(sheet(shown, texts, 6), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
