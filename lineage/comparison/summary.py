"""The scores of a comparison's runs, put together for its report, and all its files written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.catalog import CATALOG
from lineage.comparison.curves import curves
from lineage.comparison.glance import answers
from lineage.comparison.members import Member, by_system
from lineage.comparison.report import SystemPage, write_report
from lineage.config import RunConfig, to_dict
from lineage.data import load_dataset
from lineage.data.contract import Example, to_bytes
from lineage.evaluation.cost import machine
from lineage.evaluation.judge import Judge
from lineage.evaluation.real import prompt_set, unseen_split
from lineage.evaluation.run import EvalConfig, real_pictures, score_runs
from lineage.evaluation.scoring import ScoredRun, write_sheets
from lineage.evaluation.seeds import over_seeds
from lineage.plan import build, read_config, saved_stages
from lineage.runs import load_system
from lineage.sheets import save_picture, sheet
from lineage.system import LabelledImage, Visualises
from lineage.training.log import read_log
from lineage.training.store import write_json

CAPTIONS = 12  # rows of the sheet
SEEDS = (0, 1)  # of the pictures of each caption and system


def write_all(
    folder: Path,
    members: Sequence[Member],
    config: RunConfig,
    scoring: EvalConfig,
    facts: Mapping[str, Any],
) -> Path:
    """Score the runs and write the report; returns its path.

    Args:
        folder: Folder of the report.
        members: Runs to compare.
        config: Configuration of one of them, for the data, their size and the preset.
        scoring: How the runs are scored.
        facts: What `report.json` says of the budget, and of systems that failed.
    """
    systems = by_system(members)
    ordered = [member for own in systems.values() for member in own]
    scores, scored = score_runs([member.folder for member in ordered], scoring, cached=True)
    of_member = dict(zip(ordered, scored, strict=True))
    runs = {name: [of_member[one].scores for one in own] for name, own in systems.items()}
    merged = {name: {**over_seeds(own), "system": name} for name, own in runs.items()}
    scores["runs"] = list(merged.values())
    spec, size, data_seed = config.data, config.size, scores["seed_of_data"]
    unseen = unseen_split(spec, size, data_seed)
    train = load_dataset(spec, "train", size, data_seed)
    prompts = prompt_set(unseen, None, Judge.load(), scoring.seed)
    real = real_pictures(spec, unseen, train, prompts is not None, scoring)
    folders = {name: [member.folder for member in own] for name, own in systems.items()}
    points = curves(folders, runs, real, prompts, scoring)
    examples = unseen.showcase(CAPTIONS)
    pages = {}
    for name, own in systems.items():
        write_sheets(of_member[own[0]], folder, name)
        pages[name] = _page(own[0].folder, examples, of_member[own[0]])
    titles = _titles(systems)
    summary: dict[str, Any] = {
        "systems": {
            name: _system_summary(own[0], titles[name], merged[name])
            for name, own in systems.items()
        },
        "scores": scores,
        "runs": runs,
        "run_seeds": {name: [member.seed for member in own] for name, own in systems.items()},
        "curves": points,
        "answers": [answer._asdict() for answer in answers(merged, runs, titles)],
        "order": list(systems),
        "captions": [example.captions[0] for example in examples],
        "seeds": list(SEEDS),
        "data": config.data,
        "size": config.size,
        "preset": config.preset,
        "machine": machine(),
        **facts,
    }
    write_json(folder / "report.json", summary)
    pictures = [example.image for example in examples]
    _write_sheet(folder / "sheet.png", summary["captions"], pictures, pages)
    write_report(folder / "report.html", summary, pictures, pages)
    return folder / "report.html"


def _titles(systems: Mapping[str, Sequence[Member]]) -> dict[str, str]:
    """Titles of the systems; with the run's name where two are of one key."""
    keys = [own[0].key for own in systems.values()]
    return {
        name: CATALOG[own[0].key].title + (f" ({name})" if keys.count(own[0].key) > 1 else "")
        for name, own in systems.items()
    }


def _page(folder: Path, examples: Sequence[Example], scored: ScoredRun) -> SystemPage:
    """Pictures of the captions, and a visualisation of the longest one."""
    captions = [example.captions[0] for example in examples]
    system = load_system(folder, device=read_config(folder).train.device)
    by_seed = [to_bytes(system.generate(captions, seed=seed)).cpu() for seed in SEEDS]
    rows: list[list[LabelledImage]] = []
    if isinstance(system, Visualises):
        rows = system.visualise(max(captions, key=len), seed=SEEDS[0])
    return SystemPage(
        pictures=[list(pictures) for pictures in zip(*by_seed, strict=True)],
        visualisation=[
            [LabelledImage(label, to_bytes(image).cpu()) for label, image in row] for row in rows
        ],
        log=read_log(folder / "metrics.jsonl"),
        failures=scored.failures,
    )


def _system_summary(member: Member, title: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the report's data about one system, beside its scores."""
    row, config = CATALOG[member.key], read_config(member.folder).without_files()
    with torch.device("meta"):
        text = build(saved_stages(member.folder)).text
    assert text is not None
    return {
        "title": title,
        "year": row.year,
        "paper": row.paper,
        "idea": row.idea,
        "encoder": {"name": config.text, "width": text.word_dim},
        **scores["cost"],
        "config": to_dict(config),
    }


def _write_sheet(
    path: Path,
    captions: Sequence[str],
    real: Sequence[Tensor],
    pages: Mapping[str, SystemPage],
) -> None:
    """Two captions a row, each after its real picture; for the README and for slides."""
    pictures = [
        p for i, r in enumerate(real) for p in (r, *(s.pictures[i][0] for s in pages.values()))
    ]
    labels = [label for caption in captions for label in (caption, *pages)]
    save_picture(sheet(pictures, labels, columns=2 * (1 + len(pages)), side=96), path)
