"""Inpainting: does it change what it should, and nothing else?

    python benchmarks/editing.py runs/ddpm --out results/ddpm/editing

Real pictures show one object of a named colour. The object and a margin around it are masked, and
the caption asks for another object in another colour; the judge decides whether it is there. Pixels
outside the mask are compared bit by bit.
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
from lineage.evaluation.prompts import Prompt, make_prompts
from lineage.evaluation.scenes import draw_scenes, scene_spec
from lineage.sheets import save_picture, sheet
from lineage.training.store import write_json

MARGIN = 3
"""Number of pixels around the object that are masked too."""
SHEET_ROWS = 8


def object_masks(images: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) of bytes -> masks (B, 1, S, S): the object's box and a margin."""
    background = images.flatten(2).float().median(2).values[..., None, None]
    differs = ((images.float() - background).abs().amax(1, keepdim=True) > 40).float()
    rows, columns = differs.amax(3, keepdim=True), differs.amax(2, keepdim=True)

    def fill(line: Tensor, dim: int) -> Tensor:
        """Ones from the first to the last."""
        from_start = line.cummax(dim).values
        from_end = line.flip(dim).cummax(dim).values.flip(dim)
        return from_start * from_end

    box = fill(rows, 2) * fill(columns, 3)
    return F.max_pool2d(box, 2 * MARGIN + 1, 1, MARGIN) > 0


def other_prompts(prompts: list[Prompt], rng: np.random.Generator) -> list[Prompt]:
    """For each prompt, one with another shape and another colour."""
    others = []
    for prompt in prompts:
        own = prompt.include[0]
        differ = [
            other
            for other in prompts
            if other.include[0].shape != own.shape and other.include[0].colour != own.colour
        ]
        others.append(differ[rng.integers(len(differ))])
    return others


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    system, judge = lineage.load(arguments.run), Judge.load()
    prompts = [p for p in make_prompts("easy") if p.tag == "colors" and p.split == "test"]
    rng = np.random.default_rng(0)
    specs = [scene_spec(prompt, rng) for prompt in prompts]
    real = torch.from_numpy(draw_scenes(LEVELS["easy"], specs, 0, system.size))
    targets = other_prompts(prompts, rng)
    masks, images = object_masks(real), to_unit(real)
    edited = system.generate([target.prompt for target in targets], image=images, mask=masks)
    outside = ~masks.expand_as(images)

    def verdicts(pictures: Tensor) -> list[dict[str, bool]]:
        detections = judge.detect(pictures)
        return [verdict(d, target) for d, target in zip(detections, targets, strict=True)]

    after, before = verdicts(to_bytes(edited)), verdicts(real)
    document = {
        "run": arguments.run.name,
        "pictures": len(prompts),
        "outside_unchanged": bool(torch.equal(edited[outside], images[outside])),
        "masked_share": float(masks.float().mean()),
        "exact": float(np.mean([v["strict"] for v in after])),
        "colour": float(np.mean([v["colour"] for v in after])),
        "object": float(np.mean([v["object"] for v in after])),
        "exact_before": float(np.mean([v["strict"] for v in before])),
        "machine": machine(),
    }
    print(document)
    write_json(arguments.out.with_suffix(".json"), document)
    pictures: list[Tensor] = []
    labels: list[str] = []
    for number in range(SHEET_ROWS):
        masked = torch.where(masks[number], torch.tensor(128, dtype=torch.uint8), real[number])
        pictures += [real[number], masked, to_bytes(edited[number])]
        labels += [prompts[number].prompt, "masked", targets[number].prompt]
    save_picture(sheet(pictures, labels, 6), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
