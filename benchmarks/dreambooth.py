"""A new shape from five pictures: what DreamBooth learns, and what is forgotten of the rest.

    OMP_NUM_THREADS=1 python benchmarks/dreambooth.py [--cpu-minutes 3] [--out results/dreambooth]

The subject is a ring, which no caption of `pretrained:ldm` has ever named: five pictures, red,
green and blue, captioned "a red sks". `sks` is no word of its vocabulary.

    known colours   share of pictures of "a red sks" and so on that show one ring of that colour
    new colour      the same of "a yellow sks", in a colour that no picture had
    in a scene      "a red sks left of a blue square" and three more: ring, square, colours, places
    six tasks       the judge's score on the prompts of the base, none of which is of a ring

Rows: the base; fine-tuning of the whole network without prior preservation, with it, and by LoRA
with it. `decoded` are real rings behind the base's autoencoder: no adapter can do better.

    results/dreambooth/subject.json, subject.md, subject.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composition import (
    captions_of,
    cell,
    composition,
    markdown_table,
    prompts_of,
    write_pictures,
)
from torch import Tensor

import lineage
from lineage.data.contract import to_bytes, to_unit
from lineage.data.shapes import LEVELS
from lineage.evaluation.cost import machine
from lineage.evaluation.intervals import mean_score
from lineage.evaluation.judge import Detections, Judge, relations
from lineage.evaluation.scenes import SceneSpec, draw_scenes
from lineage.files import write_bytes
from lineage.sheets import save_picture, sheet
from lineage.system import System
from lineage.training.cost import read_cost
from lineage.training.store import write_json

ROOT = Path(__file__).parent.parent
BASE, SIZE = "pretrained:ldm", 32
SUBJECT, WORD = "ring", "sks"
SHOWN_COLOURS, NEW_COLOUR = ("red", "green", "blue"), "yellow"
INSTANCES = ("red", "green", "blue", "red", "green")
COUNT = 24  # pictures of each prompt
PLACES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
TRIALS: dict[str, dict[str, str]] = {
    "whole network, no prior preservation": {"adapter.prior_weight": "0"},
    "whole network": {},
    "LoRA": {"adapter.use_lora": "true", "adapter_optim.lr": "2e-3"},
}


def rings(colours: Sequence[str], seed: int) -> Tensor:
    """(N, 3, S, S) uint8, a ring of each colour."""
    specs = [SceneSpec(((SUBJECT, colour),)) for colour in colours]
    return torch.from_numpy(draw_scenes(LEVELS["easy"], specs, seed, SIZE))


def is_ring(found: Detections, colour: str) -> bool:
    """Whether a picture shows one ring of a colour and nothing else."""
    return [(one.shape, one.colour) for one in found.objects] == [(SUBJECT, colour)]


def is_scene(found: Detections, place: str) -> bool:
    """Whether a picture shows a red ring at a place of a blue square, and nothing else."""
    objects = sorted(found.objects, key=lambda one: one.shape)
    if [(one.shape, one.colour) for one in objects] != [(SUBJECT, "red"), ("square", "blue")]:
        return False
    return place in relations(objects[0], objects[1])


def subject_scores(system: System, judge: Judge) -> dict[str, Any]:
    """The three scores of the subject."""

    def found(caption: str, seed: int) -> list[Detections]:
        return list(judge.detect(to_bytes(system.generate([caption] * COUNT, seed=seed)).cpu()))

    known = [
        is_ring(one, c) for i, c in enumerate(SHOWN_COLOURS) for one in found(f"a {c} {WORD}", i)
    ]
    new = [is_ring(one, NEW_COLOUR) for one in found(f"a {NEW_COLOUR} {WORD}", 10)]
    scene = [
        is_scene(one, place)
        for i, (words, place) in enumerate(PLACES.items())
        for one in found(f"a red {WORD} {words} a blue square", 20 + i)
    ]
    names = ("known colours", "new colour", "in a scene")
    pairs = zip(names, (known, new, scene), strict=True)
    return {name: mean_score([float(x) for x in values]) for name, values in pairs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-minutes", type=float, default=3, help="of each trial")
    parser.add_argument("--every", type=int, default=2, help="prompts between two that are drawn")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "dreambooth")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made_by, judge = machine(), Judge.load()
    prompts = prompts_of("shapes", SIZE, options.every)
    base: Any = lineage.load(BASE, "cpu")
    colours = [c for c in (*SHOWN_COLOURS, NEW_COLOUR) for _ in range(COUNT)]
    with torch.no_grad():
        decoded = to_bytes(base.reconstruct(to_unit(rings(colours, seed=2))))
    verdicts = [is_ring(d, c) for d, c in zip(judge.detect(decoded), colours, strict=True)]
    rows: dict[str, dict[str, Any]] = {
        "base": {**subject_scores(base, judge), "composition": composition(base, prompts)}
    }
    shown = [f"a red {WORD}", f"a {NEW_COLOUR} {WORD}", f"a red {WORD} left of a blue square"]
    shown += ["a green circle", captions_of(prompts.prompts)[-1]]
    images, labels = list(base.generate(shown, seed=3)), [f"base: {text}" for text in shown]
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"a {colour} {WORD}" for colour in INSTANCES]
        write_pictures(Path(folder) / "subject" / "train", list(rings(INSTANCES, seed=1)), texts)
        for name, settings in TRIALS.items():
            run = lineage.train(
                "dreambooth",
                data=str(Path(folder) / "subject"),
                cpu_minutes=options.cpu_minutes,
                out=Path(folder) / name.replace(" ", "_"),
                threads=1,
                settings={"train.sample_every": "0", **settings},
                stages_from={"base": BASE},
            )
            system = lineage.load(run, "cpu")
            rows[name] = {
                **subject_scores(system, judge),
                "composition": composition(system, prompts),
                "parameters": sum(p.numel() for p in system.adapter.parameters()),
                "cost": read_cost(run),
            }
            images += list(system.generate(shown, seed=3))
            labels += [f"{name}: {text}" for text in shown]
    document = {
        "cpu_minutes": options.cpu_minutes,
        "decoded": mean_score([float(x) for x in verdicts]),
        "rows": rows,
        "machine": made_by,
    }
    write_json(options.out / "subject.json", document)
    head = ["", "known colours", "new colour", "in a scene", "six tasks", "parameters"]
    table = [["decoded", cell(document["decoded"]), "–", "–", "–", "–"]]
    for name, row in rows.items():
        scores = [cell(row[column]) for column in head[1:4]]
        six = cell(row["composition"]["test"]["overall"])
        table.append([name, *scores, six, f"{row['parameters']:,}" if "parameters" in row else "–"])
    text = "\n".join(markdown_table(head, table)) + "\n"
    write_bytes(options.out / "subject.md", text.encode())
    pictures = [to_bytes(image) for image in images]
    save_picture(sheet(pictures, labels, len(shown), side=128), options.out / "subject.png")
    print(text)


if __name__ == "__main__":
    main()
