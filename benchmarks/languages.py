"""Systems trained on one language of `shapes` and on all three, each scored in each language.

    python benchmarks/languages.py                      about 8 x 12 minutes of one core, and scores
    python benchmarks/languages.py --systems ddpm       two such programs may run side by side
    python benchmarks/languages.py --cpu-minutes 0.2 --every 20 --runs /tmp/runs --out /tmp/trial

The scenes and the order of pictures are the same in every language, and so are the prompts' scenes
and the judge; only words differ. All runs have a byte-level BPE tokeniser and a transformer as text
encoder, one thread and the same minutes of processor time, so that a run on three languages has
read a third of the captions of each.

A stopped program goes on where it was, and what is finished is not done again. Paths are those of
the folder that it is started in.

    runs/languages/SYSTEM-LANGUAGE-MINUTES     the runs; `scores.json` in each
    results/languages/languages.json, .md      all runs of this budget that are finished
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from composition import captions_of, cell, composition, markdown_table, prompts_of

from lineage.data.shapes_languages import ALL
from lineage.evaluation.cost import machine
from lineage.evaluation.prompts import SPLITS, TASKS
from lineage.files import write_bytes
from lineage.runs import load
from lineage.training.cost import read_cost
from lineage.training.store import read_json, write_json

SYSTEMS = ("ddpm", "vqvae")
TRAINED_ON = (*ALL, "all")
NAMES = {"en": "English", "zh": "Chinese", "ru": "Russian", "all": "all three"}


def command(key: str, language: str, minutes: float, folder: Path) -> list[str]:
    """The command that trains a system on a language."""
    return [
        *("lineage", "train", key, "--data", f"shapes:easy:{language}", "--out", str(folder)),
        *("--seed", "0", "--threads", "1", "--cpu-minutes", f"{minutes:g}"),
        *("--set", "text=transformer", "--set", "encoder.tokenizer=bpe"),
    ]


def scores(folder: Path, every: int) -> dict[str, Any]:
    """Scores of a run in each language, with the mean number of tokens of a prompt."""
    system, result = load(folder, "cpu"), {}
    for language in ALL:
        prompts = prompts_of(f"shapes:easy:{language}", system.size, every)
        lengths = [len(system.text.tokens(caption)) for caption in captions_of(prompts.prompts)]
        result[language] = {
            "tokens_per_prompt": round(sum(lengths) / len(lengths), 2),
            **composition(system, prompts),
        }
    return result


def train_and_score(key: str, language: str, minutes: float, folder: Path, every: int) -> None:
    """One run, unless it is finished."""
    done = folder / "scores.json"
    if done.exists():
        return
    made_by = machine()
    parts = command(key, language, minutes, folder)
    subprocess.run([sys.executable, "-m", *parts, "--resume"], check=True)
    write_json(
        done,
        {
            "system": key,
            "trained_on": language,
            "command": shlex.join(parts),
            "cost": read_cost(folder),
            "scores": scores(folder, every),
            "machine": made_by,
        },
    )


def table(runs: list[dict[str, Any]], split: str, bounds: dict[str, Any]) -> list[str]:
    """Mean of the six tasks of each run in each language."""
    rows = []
    for run in runs:
        steps = list(run["cost"].values())[-1]["steps"]
        values = [cell(run["scores"][name][split]["overall"]) for name in ALL]
        start = [f"`{run['system']}`", NAMES[run["trained_on"]], f"{steps:,}"]
        rows.append([*start, *values])
    for name, row in bounds.items():
        value = cell(row[split]["overall"])
        rows.append([f"*{name}*", "", "", *[value] * len(ALL)])
    head = ["system", "trained on", "steps", *(f"in {NAMES[name]}" for name in ALL)]
    return markdown_table(head, rows)


def tasks_table(runs: list[dict[str, Any]]) -> list[str]:
    """The tasks, of each run in each language that it was trained on."""
    head = ["system", "trained on", "scored in", *(task.replace("_", " ") for task in TASKS)]
    head += ["tokens of a prompt"]
    rows = []
    for run in runs:
        for language in ALL if run["trained_on"] == "all" else (run["trained_on"],):
            row = run["scores"][language]
            values = [f"{row['test']['tasks'][task]['value']:.2f}" for task in TASKS]
            start = [f"`{run['system']}`", NAMES[run["trained_on"]], NAMES[language]]
            rows.append([*start, *values, f"{row['tokens_per_prompt']:.1f}"])
    return markdown_table(head, rows)


def page(document: dict[str, Any]) -> str:
    """The tables as Markdown."""
    runs = document["runs"]
    bounds = {name: document[name] for name in ("real", "shuffled")}
    lines = [
        "# Languages",
        "",
        f"Preset tiny, level easy, {document['cpu_minutes']:g} minutes of one core for each run, "
        "byte-level BPE, text encoder `transformer`. A score is the mean of GenEval's six tasks: "
        "the share of pictures with exactly the scene of the prompt, with its 95 % interval over "
        "pictures. *real* are real pictures of the prompts, *shuffled* real pictures of other "
        "prompts of the same task: the floor. The score of a run in a language that it has never "
        "read shows what pictures earn that ignore their prompts. One seed. Made by "
        "`python benchmarks/languages.py`.",
    ]
    for split, title in zip(SPLITS, ("Seen combinations", "Held-out combinations"), strict=True):
        lines += ["", f"## {title}", "", *table(runs, split, bounds)]
    lines += ["", "## Tasks, seen combinations", "", *tasks_table(runs)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--cpu-minutes", type=float, default=12.0)
    parser.add_argument("--every", type=int, default=1, help="score one in so many prompts")
    parser.add_argument("--runs", type=Path, default=Path("runs/languages"))
    parser.add_argument("--out", type=Path, default=Path("results/languages"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    def folder(key: str, language: str) -> Path:
        return Path(options.runs / f"{key}-{language}-{options.cpu_minutes:g}")

    for key in options.systems:
        for language in TRAINED_ON:
            run = folder(key, language)
            train_and_score(key, language, options.cpu_minutes, run, options.every)
    files = [folder(key, name) / "scores.json" for key in SYSTEMS for name in TRAINED_ON]
    real, shuffled = prompts_of(
        "shapes:easy:en", 32, options.every
    ).rows()  # of pictures, so the same in every language
    document = {
        "cpu_minutes": options.cpu_minutes,
        "runs": [read_json(path) for path in files if path.exists()],
        "real": real,
        "shuffled": shuffled,
        "machine": machine(),
    }
    write_json(options.out / "languages.json", document)
    write_bytes(options.out / "languages.md", page(document).encode())
    print(page(document))


if __name__ == "__main__":
    main()
