"""Short trials: what learns fastest on this machine? One thing changed at a time.

    python benchmarks/trials.py NAME KEY --minutes 2 --set optim.lr=1e-3

Trains KEY at preset `tiny` with the changes, scores 192 validation scenes with `reader.py`, and
appends a line to `results/trials.jsonl`, which `results/trials.md` shows as a table (`--table`
writes it again). With `--sheet`, the pictures are kept as `results/sheets/NAME.png`: 96 of the
captions, 8 times "a red circle", 8 times "a blue square".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from reader import scores

from lineage.compare.run import machine
from lineage.config import RunConfig, with_field
from lineage.contract import System
from lineage.data import load_dataset
from lineage.data.contract import Example, to_bytes
from lineage.nn.draws import stream_seed
from lineage.recipes import find_recipe, preset
from lineage.runs import build
from lineage.text.tokenizer import make_tokenizer
from lineage.train.loop import Trainer
from lineage.train.store import write_bytes

RESULTS = Path(__file__).parent.parent / "results"
SAME = ["a red circle"] * 8 + ["a blue square"] * 8
COLUMNS = ["trial", "system", "changes", "min", "threads", "cpu s", "steps", "pictures/s"]
COLUMNS += ["size", "single", "pair", "group", "colour", "held out", "spread"]
LEGEND = """`single`, `pair`, `group`: share of pictures with exactly the scene asked for.
`colour`: exactly its set of colours. `held out`: exactly the scene, for combinations that training
never shows. `spread`: mean standard deviation of a pixel, of 255, over 8 pictures of one caption.
`size`: parameters. `cpu s` below threads times the seconds of the budget means that the machine
was shared, so compare `steps` before you compare scores. `benchmarks/reader.py` prints what real
pictures score, and what they score with the captions of others.
"""


class LastLine:
    """A log that remembers only its last line."""

    line: dict[str, Any]

    def write(self, line: dict[str, Any]) -> None:
        self.line = line


def examples(config: RunConfig, split: str) -> list[Example]:
    """The 192 scenes of `split` that every trial is scored on."""
    held = load_dataset(config.data, split, config.size, config.seed)
    return [held[i] for i in range(192)]


def draw(system: System, wanted: list[Example], knobs: dict[str, Any]) -> np.ndarray:
    """(N, 3, S, S) uint8 pictures of the plain captions."""
    return to_bytes(system.generate([e.captions[0] for e in wanted], **knobs)).cpu().numpy()


def score_splits(system: System, config: RunConfig, knobs: dict[str, Any]) -> dict[str, Any]:
    """The reader's scores on scenes of both kinds: as in training, and with unseen combinations."""
    result = {}
    for split in ("validation", "heldout"):
        wanted = examples(config, split)
        result[split] = scores(draw(system, wanted, knobs), [e.meta for e in wanted])
    return result


def trial(
    name: str, key: str, minutes: float, changes: list[str], knobs: dict[str, Any], keep: bool
) -> dict[str, Any]:
    """Train, draw, score."""
    import torch

    config = with_field(preset(key, "tiny"), "train.minutes", minutes)
    for change in changes:
        config = with_field(config, *change.split("=", 1))
    dataset = load_dataset(config.data, "train", config.size, config.seed)
    tokenizer = make_tokenizer(
        config.encoder.tokenizer, dataset.all_captions(), config.encoder.vocabulary
    )
    torch.manual_seed(stream_seed("weights", config.seed))
    system = build(find_recipe(key).stages(config, tokenizer))
    trainer = Trainer(system, dataset, config.optim, config.train, seed=config.seed, stage=name)
    log = LastLine()
    trainer.run(log)  # type: ignore[arg-type]
    result = {
        "name": name,
        "key": key,
        "changes": changes,
        "knobs": knobs,
        "minutes": minutes,
        "seed": config.seed,
        "steps": trainer.step,
        "pictures_per_second": round(trainer.step * config.train.batch / trainer.seconds),
        "cpu_seconds": round(trainer.cpu_seconds),
        "parameters": sum(p.numel() for p in system.parameters()),
        "losses": {k: round(v, 5) for k, v in log.line.items() if "/" in k},
    }
    with trainer.averaged() as averaged:
        result |= score_splits(averaged, config, knobs)
        same = to_bytes(averaged.generate(SAME, **knobs)).cpu().numpy()
    result["spread"] = round(float(same[:8].astype(float).std(0).mean()), 1)
    if keep:
        with trainer.averaged() as averaged:
            shown = draw(averaged, examples(config, "validation")[:96], knobs)
        tiles = np.concatenate([shown, same]).transpose(0, 2, 3, 1)  # (112, S, S, 3)
        rows = [np.concatenate(list(tiles[i : i + 16]), axis=1) for i in range(0, len(tiles), 16)]
        path = RESULTS / "sheets" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(rows)).resize((1024, 448), Image.Resampling.NEAREST).save(
            path
        )
    return result | {"machine": machine()}


def table() -> str:
    """All trials as a Markdown table."""
    lines = ["# Trials", "", __doc__.split("\n\n")[0], ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for text in (RESULTS / "trials.jsonl").read_text().splitlines():
        t = json.loads(text)
        v = t["validation"]
        cells = [
            t["name"],
            t["key"],
            " ".join(t["changes"] + [f"{k}={w}" for k, w in t["knobs"].items()]) or "–",
        ]
        cells += [
            f"{t['minutes']:g}",
            t["machine"]["threads"],
            t["cpu_seconds"],
            t["steps"],
            t["pictures_per_second"],
            f"{t['parameters'] / 1e6:.2f} M",
        ]
        cells += [v[k]["strict"] for k in ("single", "pair", "group")]
        cells += [v["all"]["colour"], t["heldout"]["all"]["strict"], t["spread"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n\n" + LEGEND


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?")
    parser.add_argument("key", nargs="?")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--knob", action="append", default=[], help="of generate, as in guidance=2")
    parser.add_argument("--sheet", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.name:
        knobs = {k: json.loads(v) for k, v in (item.split("=", 1) for item in options.knob)}
        line = json.dumps(
            trial(options.name, options.key, options.minutes, options.set, knobs, options.sheet)
        )
        with open(RESULTS / "trials.jsonl", "a") as file:
            file.write(line + "\n")
        print(line)
    if options.table or options.name:
        write_bytes(RESULTS / "trials.md", table().encode())


if __name__ == "__main__":
    main()
