"""A style by LoRA: what it gains, and what is forgotten.

    OMP_NUM_THREADS=1 python benchmarks/lora_style.py [--cpu-minutes 3] [--out results/lora]

The style is hatching: every second pair of diagonals is lighter. Adapters of `pretrained:ddpm`
learn it from 64 captioned pictures. (Not of `pretrained:ldm`: its autoencoder has never seen
a texture, and what it cannot decode no adapter of the denoiser can draw; `reconstructed` says so.)

    six tasks   share of prompts that the judge finds drawn as asked; hatched real pictures get 1.00
    hatching    darkness of the lighter diagonals divided by that of the others, inside objects:
                1 is none, and the style is 0.6

    results/lora/style.json, style.md, style.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from composition import captions_of, cell, markdown_table, prompts_of, write_pictures
from torch import Tensor

import lineage
from lineage.data import load_dataset
from lineage.data.contract import to_bytes, to_unit
from lineage.evaluation import sections
from lineage.evaluation.cost import machine
from lineage.evaluation.real import PromptSet
from lineage.files import write_bytes
from lineage.official.adapters import add_adapters, read_lora
from lineage.sheets import save_picture, sheet
from lineage.training.cost import read_cost
from lineage.training.store import write_json

ROOT = Path(__file__).parent.parent
BASE = "pretrained:ddpm"
SIZE, PICTURES, SEED = 32, 64, 7
LIGHTER = 0.6
SHOWN = ("a red circle", "two blue squares", "a yellow triangle above a green circle")
TRIALS = {
    "attention, rank 4": {"adapter.target_modules": "to_q,to_k,to_v,to_out"},
    "attention and convolutions, rank 1": {"adapter.rank": "1", "adapter.alpha": "1"},
    "attention and convolutions, rank 4": {},
}


def diagonals() -> Tensor:
    """(S, S) bool: the diagonals that hatching leaves dark."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return (x + y) % 4 < 2


def hatched(pictures: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1], with lighter diagonals; white stays white."""
    return 1 - (1 - pictures) * torch.where(diagonals(), 1.0, LIGHTER)


def hatching(pictures: Tensor) -> float:
    """Darkness of the lighter diagonals inside objects, divided by that of the others."""
    darkness = (1 - pictures).amax(1)  # (B, S, S)
    inside, dark = darkness > 0.3, diagonals()
    means = [darkness[inside & one].mean() for one in (~dark, dark)]
    return round((means[0] / means[1]).item(), 3)


def write_style(folder: Path) -> None:
    """Captioned pictures in the style."""
    data = load_dataset("shapes", "train", SIZE, SEED)
    examples = [data[number] for number in range(PICTURES)]
    images = to_bytes(hatched(to_unit(torch.stack([one.image for one in examples]))))
    write_pictures(folder, list(images), [one.captions[0] for one in examples])


def scored(pictures: Tensor, prompts: PromptSet) -> dict[str, Any]:
    """Six tasks and hatching of one picture of each prompt, (P, 3, S, S) in [-1, 1]."""
    verdicts = prompts.verdicts(prompts.judge.detect(to_bytes(pictures)))
    composition = sections.composition(prompts.prompts, verdicts)
    return {"composition": composition, "hatching": hatching(pictures)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-minutes", type=float, default=3, help="of each adapter")
    parser.add_argument("--every", type=int, default=2, help="prompts between two that are drawn")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "lora")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made_by, prompts = machine(), prompts_of("shapes", SIZE, options.every)
    captions = captions_of(prompts.prompts)
    real = to_unit(prompts.pictures)
    rows: dict[str, dict[str, Any]] = {"real": scored(real, prompts)}
    rows["real, hatched"] = scored(hatched(real), prompts)
    decoded = lineage.load("pretrained:ldm", "cpu").reconstruct(hatched(real))
    rows["reconstructed by ldm"] = scored(decoded.detach(), prompts)
    base: Any = lineage.load(BASE, "cpu")
    count = sum(p.numel() for p in base.network.parameters())
    rows[BASE], shown = scored(base.generate(captions), prompts), list(base.generate([*SHOWN]))
    with tempfile.TemporaryDirectory() as folder:
        style = Path(folder) / "style"
        write_style(style)
        for name, settings in TRIALS.items():
            run = lineage.train(
                "lora",
                data=str(style),
                cpu_minutes=options.cpu_minutes,
                out=Path(folder) / name.replace(" ", "_"),
                threads=1,
                settings={"train.sample_every": "0", **settings},
                stages_from={"base": BASE},
            )
            size = sum(p.numel() for p in read_lora(run).parameters())
            for scale in (1.0, 0.5) if name == [*TRIALS][-1] else (1.0,):
                system = lineage.load(BASE, "cpu")
                add_adapters(system, BASE, [f"{run}:{scale}"])
                title = name if scale == 1 else f"{name}, scale {scale:g}"
                rows[title] = {
                    **scored(system.generate(captions), prompts),
                    "parameters": size,
                    "share": round(size / count, 4),
                    "cost": read_cost(run),
                }
                shown += list(system.generate([*SHOWN]))
    write_json(
        options.out / "style.json",
        {"cpu_minutes": options.cpu_minutes, "rows": rows, "machine": made_by},
    )
    head = ["", "six tasks", "unseen combinations", "hatching", "parameters", "of the network"]
    table = []
    for name, row in rows.items():
        test, unseen = (row["composition"][split]["overall"] for split in ("test", "heldout"))
        sizes = [f"{row['parameters']:,}", f"{row['share']:.1%}"] if "share" in row else ["–", "–"]
        table.append([name, cell(test), f"{unseen['value']:.2f}", f"{row['hatching']:.2f}", *sizes])
    text = "\n".join(markdown_table(head, table)) + "\n"
    write_bytes(options.out / "style.md", text.encode())
    images = [to_bytes(image) for image in shown]
    drawn = [BASE, *[name for name, row in rows.items() if "share" in row]]
    labels = [f"{name}: {caption}" for name in drawn for caption in SHOWN]
    save_picture(sheet(images, labels, len(SHOWN), side=128), options.out / "style.png")
    print(text)


if __name__ == "__main__":
    main()
