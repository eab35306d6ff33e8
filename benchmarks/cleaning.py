"""What cleaning is worth: one system on `shapes`, on the same dirtied, and on that cleaned again.

    python benchmarks/cleaning.py                                 3 sets x 2 seeds, 5 minutes each
    python benchmarks/cleaning.py --cpu-minutes 0.2 --pictures 400 --seeds 0 --runs /tmp/r
    python benchmarks/cleaning.py --sets                          makes and cleans the sets, no more

The clean set has `PICTURES` pictures of `shapes:easy`. Dirtied, a fifth of the pictures has the
captions of another one, a tenth has a watermark, and some come again and again, a little larger or
saved as a JPEG, so that they are a fifth of the set. The name of a picture says what was done to
it. The CLIP that cleans is trained on the dirtied set itself: a user has no other. How well it
separates wrong captions is measured for two lengths of its training, and for a CLIP of clean
pictures.

A stopped program goes on where it was. Paths are those of the folder that it is started in.

    runs/cleaning/                             sets and runs
    results/cleaning/cleaning.json, .md        removals by kind, and scores of all finished runs
    results/cleaning/page.png                  pictures of each kind
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composition import cell, composition, markdown_table, prompts_of
from PIL import Image, ImageDraw, ImageFont

from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example
from lineage.evaluation.cost import machine
from lineage.evaluation.prompts import SPLITS, TASKS
from lineage.files import write_bytes
from lineage.runs import load, load_comparer
from lineage.search import similarity
from lineage.sheets import picture, save_picture, sheet
from lineage.training.cost import read_cost
from lineage.training.store import read_json, write_json

SETS = ("clean", "dirtied", "cleaned")
KINDS = {
    "good": "as they should be",
    "wrong": "captions of another picture",
    "marked": "a watermark",
    "again": "copies of another picture",
}
PICTURES, SIZE = 4_000, 32
WRONG, MARKED, COPIED, COPIES = 0.2, 0.1, 0.01, 25
"""Shares of the pictures, and copies of each that is copied."""
LONGER = 5
"""How much longer the second CLIP is trained."""
RULES = ("--duplicates", "near", "--worst", "0.2")


# --- sets -----------------------------------------------------------------------------------------


def save_set(folder: Path, rows: Iterator[tuple[str, bytes, tuple[str, ...]]]) -> None:
    """Write an imagefolder of (name, file, captions), unless it is there."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / "metadata.jsonl").open("w") as metadata:
        for name, file, captions in rows:
            (partial / name).write_bytes(file)
            metadata.write(json.dumps({"file_name": name, "text": list(captions)}) + "\n")
    partial.rename(folder)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def clean_rows(examples: list[Example]) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    for number, example in enumerate(examples):
        yield f"good-{number:05d}.png", saved(picture(example.image)), example.captions


def dirtied_rows(examples: list[Example]) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """The same pictures: wrong captions, watermarks, and copies beside their originals."""
    rng = random.Random(0)
    for number, example in enumerate(examples):
        image, captions, share = picture(example.image), example.captions, rng.random()
        kind = "good"
        if share < WRONG:
            kind, captions = "wrong", rng.choice(examples).captions
        elif share < WRONG + MARKED:
            kind, image = "marked", watermarked(image)
        yield f"{kind}-{number:05d}.png", saved(image), captions
        if rng.random() < COPIED:
            for copy in range(COPIES):
                file = copied(image, rng)
                yield f"again-{number:05d}-{copy}.{file[1]}", file[0], captions


def copied(image: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    """A copy as the web has it, and the ending of its name."""
    side = rng.choice((SIZE, SIZE * 3 // 2, SIZE * 2))
    larger = image.resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        return saved(larger, "JPEG", quality=rng.randrange(60, 95)), "jpg"
    return saved(larger), "png"


def watermarked(image: Image.Image) -> Image.Image:
    """The picture with the name of its seller across it."""
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    font = ImageFont.load_default(image.height // 4)
    place = (image.width // 2, image.height // 2)
    draw.text(place, "STOCK", (90, 90, 90, 160), font, anchor="mm")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def kind_of(name: str) -> str:
    return name.rpartition("/")[2].partition("-")[0]


def make_sets(runs: Path, pictures: int, clip_minutes: float) -> None:
    """The three sets; the CLIP is trained on the dirtied one."""
    made = {"pictures": pictures, "clip_minutes": clip_minutes, "rules": list(RULES)}
    settings = runs / "settings.json"
    if settings.exists() and read_json(settings) != made:
        sys.exit(f"{runs} has sets of other settings: choose another --runs.")
    write_json(settings, made)
    shapes = load_dataset("shapes", "train", SIZE)
    examples = [shapes[index] for index in range(pictures)]
    save_set(runs / "clean", clean_rows(examples))
    save_set(runs / "dirtied", dirtied_rows(examples))
    for minutes in (clip_minutes, LONGER * clip_minutes):
        train_clip(runs, minutes)
    if not (runs / "cleaned").exists():
        lineage(*filter_command(runs, clip_minutes))


def train_clip(runs: Path, minutes: float) -> None:
    command = [
        "train",
        "clip",
        "--data",
        str(runs / "dirtied"),
        "--out",
        str(clip_of(runs, minutes)),
    ]
    lineage(*command, "--cpu-minutes", f"{minutes:g}", "--threads", "1", "--resume")


def clip_of(runs: Path, minutes: float) -> Path:
    return runs / f"clip-{minutes:g}"


def filter_command(runs: Path, clip_minutes: float) -> list[str]:
    command = ["data", "filter", str(runs / "dirtied"), "--out", str(runs / "cleaned")]
    return [*command, "--clip", str(clip_of(runs, clip_minutes)), *RULES]


def separation(run: str | Path, dirtied: CaptionedDataset) -> float:
    """Probability that a caption of a good pair has a larger cosine than a wrong one, by a CLIP:
    the area under the ROC curve.
    """
    model = load_comparer(run, "cpu")
    cosines: dict[str, list[float]] = {kind: [] for kind in KINDS}
    examples = list(dirtied)
    for first in range(0, len(examples), 64):
        part = examples[first : first + 64]
        own = similarity(model, torch.stack([e.image for e in part]), [e.captions for e in part])
        for example, values in zip(part, own, strict=True):
            cosines[kind_of(example.id)] += values
    good, wrong = (torch.tensor(cosines[kind]).sort().values for kind in ("good", "wrong"))
    below = torch.searchsorted(wrong, good).sum().item()
    return round(below / (len(good) * len(wrong)), 4)


def lineage(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "lineage", *command], check=True)


def removals(runs: Path) -> dict[str, dict[str, int]]:
    """Number of pictures of each kind in the dirtied set, and of those that each rule removed."""
    names = [path.name for path in (runs / "dirtied").glob("*-*.*")]
    counts = {kind: {"pictures": n} for kind, n in Counter(map(kind_of, names)).items()}
    for row in removed_rows(runs):
        if "caption" not in row:
            own = counts[kind_of(row["id"])]
            own[row["rule"]] = own.get(row["rule"], 0) + 1
    return counts


def identical_share(runs: Path) -> float:
    """Of the good pictures that were removed as duplicates, the share with no difference."""
    reasons = [
        row["reason"]
        for row in removed_rows(runs)
        if row["rule"] == "duplicate" and kind_of(row["id"]) == "good"
    ]
    return sum("nearly" not in reason for reason in reasons) / max(1, len(reasons))


def removed_rows(runs: Path) -> list[dict[str, Any]]:
    lines = (runs / "cleaned" / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- runs -----------------------------------------------------------------------------------------


def train_and_score(name: str, seed: int, options: argparse.Namespace) -> None:
    """One run on a set, unless it is finished."""
    folder = options.runs / f"{options.system}-{name}-{options.cpu_minutes:g}-{seed}"
    done = folder / "scores.json"
    if done.exists():
        return
    made_by = machine()
    command = ["train", options.system, "--data", str(options.runs / name), "--out", str(folder)]
    command += ["--cpu-minutes", f"{options.cpu_minutes:g}", "--threads", "1", "--seed", str(seed)]
    lineage(*command, "--resume")
    system = load(folder, "cpu")
    prompts = prompts_of("shapes:easy", system.size)
    write_json(
        done,
        {
            "set": name,
            "seed": seed,
            "command": shlex.join(["lineage", *command]),
            "cost": read_cost(folder),
            "scores": composition(system, prompts),
            "machine": made_by,
        },
    )


# --- results --------------------------------------------------------------------------------------


def removal_table(counts: dict[str, dict[str, int]]) -> list[str]:
    """Share of the pictures of each kind that was removed."""
    rules = sorted({rule for own in counts.values() for rule in own} - {"pictures"})
    rows = []
    for kind, what in KINDS.items():
        own = counts.get(kind, {"pictures": 0})
        removed = [own.get(rule, 0) for rule in rules]
        share = sum(removed) / max(1, own["pictures"])
        rows.append([what, f"{own['pictures']:,}", *(f"{n:,}" for n in removed), f"{share:.0%}"])
    return markdown_table(["pictures with", "number", *rules, "removed"], rows)


def score_table(runs: list[dict[str, Any]], bounds: dict[str, Any]) -> list[str]:
    rows = []
    for run in runs:
        scores = run["scores"]
        tasks = [f"{scores['test']['tasks'][task]['value']:.2f}" for task in TASKS]
        means = [cell(scores[split]["overall"]) for split in SPLITS]
        steps = list(run["cost"].values())[-1]["steps"]
        rows.append([run["set"], str(run["seed"]), f"{steps:,}", *means, *tasks])
    for name, row in bounds.items():
        tasks = [f"{row['test']['tasks'][task]['value']:.2f}" for task in TASKS]
        rows.append([f"*{name}*", "", "", *[cell(row[s]["overall"]) for s in SPLITS], *tasks])
    head = ["trained on", "seed", "steps", "seen combinations", "held-out combinations"]
    return markdown_table([*head, *(task.replace("_", " ") for task in TASKS)], rows)


def page(document: dict[str, Any]) -> str:
    """The tables as Markdown."""
    bounds = {name: document[name] for name in ("real", "shuffled")}
    lines = [
        "# Cleaning",
        "",
        f"{document['pictures']:,} pictures of `shapes:easy`, dirtied, and cleaned again by "
        f"`{document['filter']}`. Of the duplicates among the pictures as they should be, "
        f"{document['identical']:.0%} are scenes that `shapes` draws again without any difference.",
        "",
        *removal_table(document["removals"]),
        "",
        "How well a CLIP separates the captions of another picture: the probability that a right "
        "caption has a larger cosine than a wrong one (0.5 is chance). A CLIP that has read the "
        "dirtied pairs too often has learned the wrong ones too.",
        "",
        *markdown_table(["CLIP", "probability"], [*document["separation"].items()]),
        "",
        f"`{document['system']}` at preset tiny, {document['cpu_minutes']:g} minutes of one core "
        "for each run. A score is the mean of GenEval's six tasks, the share of pictures with "
        "exactly the scene of the prompt, with its 95 % interval over pictures. *real* are real "
        "pictures of the prompts, *shuffled* those of other prompts of the same task.",
        "",
        *score_table(document["runs"], bounds),
        "",
        "![Pictures of each kind](page.png)",
    ]
    return "\n".join(lines) + "\n"


def kinds_sheet(dirtied: CaptionedDataset) -> Image.Image:
    """A row of pictures of each kind, with their captions in the dirtied set."""
    shown: dict[str, list[Example]] = {kind: [] for kind in KINDS}
    for example in dirtied:
        if len(shown[kind_of(example.id)]) < 8:
            shown[kind_of(example.id)].append(example)
    every = [(kind, example) for kind, own in shown.items() for example in own]
    labels = [f"{kind}: {example.captions[0]}" for kind, example in every]
    return sheet([example.image for _, example in every], labels, 8, 96)


def write_results(options: argparse.Namespace) -> None:
    stem = f"{options.system}-*-{options.cpu_minutes:g}-*"
    runs = [read_json(path) for path in options.runs.glob(f"{stem}/scores.json")]
    real, shuffled = prompts_of("shapes:easy", SIZE).rows()
    dirtied = load_dataset(f"imagefolder:{options.runs / 'dirtied'}", "train", SIZE)
    document = {
        "system": options.system,
        "cpu_minutes": options.cpu_minutes,
        "clip_minutes": options.clip_minutes,
        "pictures": options.pictures,
        "filter": shlex.join(["lineage", *filter_command(options.runs, options.clip_minutes)]),
        "separation": {
            **{
                f"of the dirtied pictures, processor minutes: {minutes:g}": separation(
                    clip_of(options.runs, minutes), dirtied
                )
                for minutes in (options.clip_minutes, LONGER * options.clip_minutes)
            },
            "`pretrained:clip`, of clean pictures": separation("pretrained:clip", dirtied),
        },
        "removals": removals(options.runs),
        "identical": identical_share(options.runs),
        "runs": sorted(runs, key=lambda run: (SETS.index(run["set"]), run["seed"])),
        "real": real,
        "shuffled": shuffled,
        "machine": machine(),
    }
    write_json(options.out / "cleaning.json", document)
    write_bytes(options.out / "cleaning.md", page(document).encode())
    save_picture(kinds_sheet(dirtied), options.out / "page.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", default="ldm")
    parser.add_argument("--cpu-minutes", type=float, default=5.0)
    parser.add_argument("--clip-minutes", type=float, default=1.0)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sets", action="store_true", help="make and clean the sets, no more")
    parser.add_argument("--runs", type=Path, default=Path("runs/cleaning"))
    parser.add_argument("--out", type=Path, default=Path("results/cleaning"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_sets(options.runs, options.pictures, options.clip_minutes)
    if not options.sets:
        for seed in options.seeds:
            for name in SETS:
                train_and_score(name, seed, options)
                print(f"{name} {seed} is finished", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_results(options)
    print((options.out / "cleaning.md").read_text())


if __name__ == "__main__":
    main()
