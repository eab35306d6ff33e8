"""Scores of trained runs on `shapes:easy`, by `reader.py`: what stands in the README.

    python benchmarks/score.py RUN ... --out results/demo/scores.json

Writes JSON, and beside it a Markdown table: the share of 192 validation scenes with exactly the
things asked for (strict), and with the right colours, shapes and count; then the strict share for
unseen combinations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reader import real_and_shuffled
from trials import score_splits

from lineage.runs import load, read_config
from lineage.train.store import read_json, write_bytes, write_json

HEAD = ["", "single", "pair", "group", "colours", "shapes", "count", "unseen combinations"]


def row(name: str, seen: dict[str, Any], unseen: dict[str, Any] | None) -> str:
    """One line of the table."""
    cells = [f"{seen[kind]['strict']:.2f}" for kind in ("single", "pair", "group")]
    cells += [f"{seen['all'][part]:.2f}" for part in ("colour", "shape", "count")]
    cells.append(f"{unseen['all']['strict']:.2f}" if unseen else "–")
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"bounds": real_and_shuffled(192), "runs": {}}
    for folder in options.runs:
        config = read_config(folder)
        scored = score_splits(load(folder), config, {})
        cost = read_json(folder / "cost.json")
        result["runs"][config.key] = {**scored, "training": cost}
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += [row(f"`{key}`", r["validation"], r["heldout"]) for key, r in result["runs"].items()]
    lines += [row(f"*{name}*", bound, None) for name, bound in result["bounds"].items()]
    write_json(options.out, result)
    write_bytes(options.out.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
