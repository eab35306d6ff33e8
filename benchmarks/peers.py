"""What the same would be, built from other libraries: two of our systems and their like.

    pip install -c constraints.txt -e ".[dev,peers]"
    python benchmarks/peers.py                             10 minutes of one core each
    python benchmarks/peers.py --minutes 0.1 --count 300 --runs /tmp/runs --out /tmp/peers

`ddpm` against a text-conditional UNet of diffusers, with the recipe of that library's example and
with that of our `ddpm`; `vqvae` against transformers' GPT-2 on codes of vector-quantize-pytorch
(`peer_models.py`). All read the same pictures of `shapes` in the same order, train for the same
processor time with one thread, and draw the same file of prompts, which one judge scores. The
clock of a peer stands still while its pictures are drawn on the way.

A part that is finished is not done again.

    runs/peers/ours/           the comparison of our systems
    runs/peers/PEER/           `training.json`, and the pictures in a folder PEER
    results/peers/scores.json  the scores of `lineage evaluate`, ours and theirs in one table
    results/peers/peers.json   curves, cost, and the ratio of scores; peers.md, curves.svg and .png
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from composition import cell, markdown_table, prompts_of
from torch import Tensor
from tqdm import tqdm

import lineage
from lineage.comparison.curves import SHARES, score_name, score_of
from lineage.comparison.figures import save_figure, score_over_time
from lineage.data import load_dataset
from lineage.data.contract import to_bytes
from lineage.evaluation import sections
from lineage.evaluation.cost import machine
from lineage.evaluation.prompt_files import PromptLine, read_prompt_file, write_prompts
from lineage.evaluation.seeds import difference
from lineage.files import claimed, write_bytes
from lineage.sheets import picture, save_picture
from lineage.training.loader import Loader
from lineage.training.store import read_json, write_json

ROOT = Path(__file__).parent.parent
OURS = {"ddpm": "DDPM", "vqvae": "VQ-VAE and its prior"}
THEIRS = {
    "diffusers": "diffusers, its example's recipe",
    "diffusers_our_recipe": "diffusers, the recipe of `ddpm`",
    "gpt2_on_codes": "GPT-2 on codes of vector-quantize-pytorch",
}
LIKE = {"diffusers": "ddpm", "diffusers_our_recipe": "ddpm", "gpt2_on_codes": "vqvae"}
SIZE, ROWS = 32, 32
EVERY = 4  # prompts between two that a peer draws on the way; drawing takes it longer than training


# --- a peer -----------------------------------------------------------------------------------


def train_peer(name: str, minutes: float, prompts: Path, folder: Path) -> None:
    """Train a peer for some processor time, and write the picture of each line of `prompts`."""
    from peer_models import PEERS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made_by = machine()
    data = load_dataset("shapes", "train", SIZE, 0)
    peer = PEERS[name](list(data.all_captions()))
    batches = Loader(data, peer.batch_size, seed=0).batches()
    judged, waiting = prompts_of("shapes", SIZE, every=EVERY), list(SHARES)
    used, steps, loss, points = 0.0, 0, float("nan"), []
    with tqdm(total=60 * minutes, unit=" s of processor time", desc=name, disable=None) as bar:
        while (share := used / (60 * minutes)) < 1:
            if waiting and share >= waiting[0]:
                texts = [prompt.prompt for prompt in judged.prompts]
                pictures = to_bytes(drawn(peer, texts, list(range(len(texts)))))
                verdicts = judged.verdicts(judged.judge.detect(pictures))
                score = score_of([{"composition": sections.composition(judged.prompts, verdicts)}])
                points.append({"share": waiting.pop(0), "cpu_seconds": used, "score": score})
            start = time.process_time()
            batch = next(batches)
            loss = peer.step(batch.image, batch.caption, share)
            used += (passed := time.process_time() - start)
            steps += 1
            bar.update(passed)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    draw_lines(peer, read_prompt_file(prompts).lines, folder / name)
    networks = {n: sum(p.numel() for p in m.parameters()) for n, m in peer.networks().items()}
    document = {
        "cpu_seconds": round(used, 1),
        "steps": steps,
        "pictures": steps * peer.batch_size,
        "last_loss": loss,
        "parameters": networks,
        "points": points,
        "machine": made_by,
    }
    write_json(folder / "training.json", document)


def drawn(peer: Any, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Pictures of all captions, some at a time."""
    parts = [slice(i, i + ROWS) for i in range(0, len(captions), ROWS)]
    return torch.cat([peer.generate(captions[part], seeds[part]) for part in parts])


def draw_lines(peer: Any, lines: Sequence[PromptLine], folder: Path) -> None:
    """Write the picture of each line; its noise has a seed of its own."""
    seeds = [1_000_000 * (line.seed or 0) + (line.index or 0) for line in lines]
    images = to_bytes(drawn(peer, [line.prompt for line in lines], seeds))
    for line, image in zip(lines, images, strict=True):
        save_picture(picture(image), folder / line.file_name)


# --- all of them ------------------------------------------------------------------------------


def here(name: str) -> Path:
    """A folder of the project, relative to the working directory: results hold no other path."""
    return Path(os.path.relpath(ROOT / name))


def start_peer(name: str, options: argparse.Namespace, prompts: Path) -> None:
    """`train_peer` in a process of its own, unless it is finished."""
    folder = options.runs / name
    if (folder / "training.json").exists():
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--peer", name]
    command += ["--minutes", str(options.minutes), "--runs", str(options.runs)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> float | None:
    """Our score as a multiple of theirs; None where theirs is 0."""
    return round(ours["value"] / theirs["value"], 2) if theirs["value"] else None


def summarise(options: argparse.Namespace, report: dict[str, Any], scores: dict[str, Any]) -> None:
    """Write `peers.json`, the table and the figure."""
    runs = {Path(run["run"]).name: run for run in scores["runs"]}
    trained = {name: read_json(options.runs / name / "training.json") for name in THEIRS}
    curves = {name: report["curves"][name] for name in OURS}
    costs: dict[str, dict[str, Any]] = {}
    for name in OURS:
        stages = list(runs[name]["cost"]["training"].values())
        costs[name] = {
            field: round(sum(stage[field] for stage in stages), 1)
            for field in ("steps", "pictures", "cpu_seconds")
        }
        costs[name]["parameters"] = runs[name]["cost"]["sampling"]["parameters"]["all"]
    for name, one in trained.items():
        last = {"share": 1.0, "cpu_seconds": one["cpu_seconds"], "score": score_of([runs[name]])}
        curves[name] = [*one["points"], last]
        costs[name] = {field: one[field] for field in ("steps", "pictures", "cpu_seconds")}
        costs[name]["parameters"] = sum(one["parameters"].values())
    ratios = {}
    for name, like in LIKE.items():
        tests = {one: runs[one]["composition"]["test"] for one in (name, like)}
        ratios[name] = {
            "ours": like,
            "ratio": ratio(tests[name]["overall"], tests[like]["overall"]),
            "difference": difference([runs[like]], [runs[name]]),
        }
    document = {
        "minutes": options.minutes,
        "curves": curves,
        "costs": costs,
        "ratios": ratios,
        "machine": {"of_peers": {n: one["machine"] for n, one in trained.items()}},
    }
    write_json(options.out / "peers.json", document)
    titles = {**OURS, **THEIRS}
    bounds = [
        scores[row]["composition"]["test"]["overall"]["value"] for row in ("shuffled", "real")
    ]
    plain = {name: title.replace("`", "") for name, title in titles.items()}
    if figure := score_over_time(curves, plain, score_name(True), *bounds):
        save_figure(figure, options.out / "curves")
    head = ["", "six tasks", "object", "colour", "count", "relation", "unseen combinations", "FID"]
    head += ["parameters", "pictures in training", "six tasks, ours / theirs"]
    rows = []
    for name in titles:
        test = runs[name]["composition"]["test"]
        fid = runs[name].get("quality", {}).get("fid", {}).get("value")
        row = [titles[name], cell(test["overall"])]
        row += [f"{test['parts'][part]['value']:.2f}" for part in head[2:6]]
        row += [f"{runs[name]['composition']['heldout']['overall']['value']:.2f}"]
        row += ["–" if fid is None else f"{fid:.1f}", f"{costs[name]['parameters']:,}"]
        row += [f"{costs[name]['pictures']:,}"]
        own = ratios.get(name)
        row += ["–" if own is None else str(own["ratio"] or "theirs is 0")]
        rows.append(row)
    lines = [f"After {60 * options.minutes:g} seconds of one core each:", ""]
    text = "\n".join([*lines, *markdown_table(head, rows)]) + "\n"
    write_bytes(options.out / "peers.md", text.encode())
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10, help="processor time of each")
    parser.add_argument("--count", type=int, default=400, help="pictures for quality and text fit")
    parser.add_argument("--jobs", type=int, default=2, help="peers that are trained at a time")
    parser.add_argument("--runs", type=Path, default=here("runs/peers"))
    parser.add_argument("--out", type=Path, default=here("results/peers"))
    parser.add_argument("--peer", choices=THEIRS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prompts = options.runs / "prompts.jsonl"
    if options.peer:
        train_peer(options.peer, options.minutes, prompts, options.runs / options.peer)
        return
    with claimed(options.runs):
        write_prompts(prompts, data="shapes", size=SIZE, count=options.count)
        report = lineage.compare(
            list(OURS), minutes=options.minutes, out=options.runs / "ours", pictures=options.count
        )
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda name: start_peer(name, options, prompts), THEIRS))
        scores = lineage.evaluate(
            [options.runs / "ours" / name for name in OURS],
            pictures=[options.runs / name / name for name in THEIRS],
            prompts=prompts,
            out=options.out,
        )
        summarise(options, read_json(report.with_suffix(".json")), scores)


if __name__ == "__main__":
    main()
