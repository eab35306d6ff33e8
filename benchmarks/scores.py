"""Make the README's tables from the scores of a comparison or of runs.

python benchmarks/scores.py results/demo/report.json --bounds --out results/demo/scores.md
python benchmarks/scores.py results/{stackgan,vqvae,attngan}/long/scores.json --out results/long.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lineage.evaluation.judge import PARTS
from lineage.evaluation.prompts import TASKS
from lineage.files import write_bytes
from lineage.training.store import read_json

HEAD = ["", *(task.replace("_", " ") for task in TASKS), "unseen combinations", *PARTS]


def row(name: str, composition: dict[str, Any]) -> str:
    """A row of the table."""
    test, heldout = composition["test"], composition["heldout"]
    scores = [*(test["tasks"][task] for task in TASKS), heldout["overall"]]
    scores += [test["parts"][part] for part in PARTS]
    return "| " + " | ".join([name, *(f"{score['value']:.2f}" for score in scores)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+", help="report.json or scores.json")
    parser.add_argument(
        "--bounds", action="store_true", help="add rows of real and shuffled pictures"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for path in options.files:
        document = read_json(path)
        scores = document.get("scores", document)
        lines += [row(f"`{run['system']}`", run["composition"]) for run in scores["runs"]]
    if options.bounds:
        lines += [row(f"*{name}*", scores[name]["composition"]) for name in ("real", "shuffled")]
    text = "\n".join(lines) + "\n"
    write_bytes(options.out, text.encode())
    print(text)


if __name__ == "__main__":
    main()
