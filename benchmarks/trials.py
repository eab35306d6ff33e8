"""Short trials: which setting learns fastest on this machine? One change at a time.

    python benchmarks/trials.py NAME KEY --minutes 2 --set optim.lr=1e-3 --out results/trials.jsonl

Trains KEY at preset `tiny` with the changes, scores it as `lineage evaluate` does, appends a line
to the file and writes the table beside it as Markdown (`--table` only writes it again). With
`--sheet` the last sample sheet is saved as `sheets/NAME.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lineage
from lineage.evaluation.cost import machine
from lineage.evaluation.run import EvalConfig, score_runs
from lineage.files import write_bytes
from lineage.training.store import read_json

RESULTS = Path(__file__).parent.parent / "results"
HEAD = ["trial", "system", "changes", "seed", "min", "threads", "cpu s", "steps", "pictures/s"]
HEAD += ["single", "two", "counting", "colours", "position", "attributes", "overall", "held out"]
HEAD += ["object", "colour", "count", "relation", "FID", "spread"]
LEGEND = """Six tasks, `overall` (their mean) and `held out` (the same for combinations that
are not in the training data): share of pictures with exactly the scene of the prompt. `object`,
`colour`, `count`, `relation`: share with that part right. `spread`: deviation over samples of one
caption, 1 for real pictures. If `cpu s` is below threads times the seconds of the budget, the
machine was shared: compare `steps` before scores. The last lines are the scores of real pictures,
with their own prompts and with others of the same task.
"""


def trial(name: str, key: str, minutes: float, changes: list[str], sheet: Path | None) -> Any:
    """Train in a temporary folder, and score; the last sample sheet is saved as `sheet`."""
    settings = dict(change.split("=", 1) for change in changes)
    with tempfile.TemporaryDirectory() as folder:
        run = lineage.train(key, minutes=minutes, out=Path(folder) / key, settings=settings)
        document, _ = score_runs([run], EvalConfig(pictures=500))
        cost, config = read_json(run / "cost.json"), read_json(run / "config.json")
        if sheet is not None:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sorted((run / "samples").glob("*.png"))[-1], sheet)
    scores = document["runs"][0]
    return {
        "name": name,
        "key": key,
        "changes": changes,
        "minutes": minutes,
        "seed": config["seed"],
        "cost": cost,
        "parameters": scores["cost"]["sampling"]["parameters"]["all"],
        "scores": {n: scores[n] for n in ("composition", "quality", "diversity", "text_fit")},
        "bounds": {row: document[row]["composition"] for row in ("real", "shuffled")},
        "protocol": document["protocol"],
        "machine": machine(),
    }


def shares(composition: Any) -> list[str]:
    """The cells from `single` to `relation`."""
    test, heldout = composition["test"], composition["heldout"]
    scores = [*test["tasks"].values(), test["overall"], heldout["overall"], *test["parts"].values()]
    return [f"{score['value']:.2f}" for score in scores]


def table(path: Path) -> str:
    """All trials of a file as a Markdown table."""
    lines = ["# Trials", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    trials = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    for t in trials:
        stages, scores = t["cost"].values(), t["scores"]
        cells = [t["name"], t["key"], " ".join(t["changes"]) or "–", t["seed"], f"{t['minutes']:g}"]
        cells += [t["machine"]["threads"], round(sum(s["cpu_seconds"] for s in stages))]
        cells += [" + ".join(str(s["steps"]) for s in stages)]
        cells += [" / ".join(f"{s['pictures_per_second']:.0f}" for s in stages)]
        cells += shares(scores["composition"])
        cells += [f"{scores['quality']['fid']['value']:.2f}"]
        cells += [f"{scores['diversity']['spread_against_real']['value']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for row, composition in trials[-1]["bounds"].items():
        cells = [f"*{row}*", *[""] * 8, *shares(composition), "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + LEGEND


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?")
    parser.add_argument("key", nargs="?")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--sheet", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "trials.jsonl")
    options = parser.parse_args()
    if options.name:
        sheet = options.out.parent / "sheets" / f"{options.name}.png" if options.sheet else None
        result = trial(options.name, options.key, options.minutes, options.set, sheet)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    if options.table or options.name:
        write_bytes(options.out.with_suffix(".md"), table(options.out).encode())


if __name__ == "__main__":
    main()
