"""`lineage evaluate`: every score of a run, between the best and the worst there could be.

    {"runs": [{"run", "system", "composition", "quality", "diversity", "memorisation", "stages",
               "text_fit", "cost", "failed"}, ...],
     "real": {...}, "shuffled": {...},      the same sections for real pictures, with their own
                                            captions and with those of others
     "judge": {...},                        how well the judge judges, measured
     "protocol": {section: {...}},          how each number came about
     "warnings": [...]}

The real pictures come from a split that training does not see, and as many are drawn as there are
real ones, from the same captions. What is known of real pictures is computed once for each data
set, size and network, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lineage.config import RunConfig
from lineage.data import load_dataset
from lineage.data.contract import Batch, to_bytes, to_unit
from lineage.data.shapes import Shapes
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.cost import machine, measured_once
from lineage.evaluation.features import find_features, find_scorer
from lineage.evaluation.judge import Judge, Reading
from lineage.evaluation.real import (
    SPREAD_SAMPLES,
    Composition,
    RealPictures,
    composition_of,
    unseen_split,
)
from lineage.runs import load, read_config, save_picture
from lineage.sheets import sheet
from lineage.system import System
from lineage.training.machine import pick_device
from lineage.training.store import read_json, write_json

FAILED = 24  # pictures on the sheet of failures
NEAREST = 12  # pictures on the sheet of those nearest to training pictures


@dataclass(frozen=True)
class Setting:
    """What an evaluation is asked for.

    Attributes:
        data: score on this data set instead of the one they were trained on.
        pictures: drawn for quality and text fit, at most; never more than there are real ones.
        seed: of the drawn pictures and of all chance in the scores.
        prompts: a file of prompts, in place of the package's.
        features: `judge`, `scorer`, `inception:FILE`, or `auto`: the judge for `shapes`, else the
            scorer.
        scorer: `auto`, `none`, `hub:MODEL`, a CLIP of the Hugging Face hub or a local path, or
            `damsm:RUN`, the matching model of an AttnGAN's run.
        batch: pictures drawn at once; the system's own number if None. Changes no score.
    """

    data: str | None = None
    pictures: int = 1000
    seed: int = 0
    prompts: str | None = None
    features: str = "auto"
    scorer: str = "auto"
    device: str = "auto"
    batch: int | None = None


@dataclass
class Scored:
    """One evaluated run: its part of the document, and pictures for eyes.

    Attributes:
        scores: its part of the JSON.
        failed: (tag, caption, what the judge sees, picture) of prompts that were not met.
        nearest: (generated picture, nearest training picture), the nearest pair first.
    """

    scores: dict[str, Any]
    failed: list[tuple[str, str, str, Tensor]]
    nearest: list[tuple[Tensor, Tensor]]


def evaluate(
    runs: str | Path | Sequence[str | Path], *, out: str | Path | None = None, **setting: Any
) -> dict[str, Any]:
    """Score one run or several on the same data.

    Args:
        runs: run folders.
        out: where to write `scores.json`, and for each run the sheets `<run>_failed.png` and
            `<run>_nearest.png`; nothing is written if None.
        **setting: see `Setting`.

    Returns:
        The document at the head of this module.

    Raises:
        UserError: a folder is no run, or the runs differ in data or size.
    """
    folders = [Path(runs)] if isinstance(runs, (str, Path)) else [Path(run) for run in runs]
    document, scored = score_runs(folders, Setting(**setting))
    if out is not None:
        write_json(Path(out) / "scores.json", document)
        for folder, one in zip(folders, scored, strict=True):
            write_sheets(one, Path(out), folder.name)
    return document


def score_runs(folders: Sequence[Path], setting: Setting) -> tuple[dict[str, Any], list[Scored]]:
    """`evaluate`, with the pictures."""
    if not folders:
        raise UserError("There is nothing to evaluate: name at least one run folder.")
    if setting.pictures < 1 or (setting.batch or 1) < 1:
        raise UserError("--pictures and --batch must be 1 or more.")
    configs = [read_config(folder) for folder in folders]
    spec, size, data_seed = _common(folders, configs, setting.data)
    world, prompts = _frame(spec, size, data_seed, setting)
    scored = [
        _score(folder, config, world, prompts, setting)
        for folder, config in zip(folders, configs, strict=True)
    ]
    real, shuffled = world.frame()
    document: dict[str, Any] = {
        "data": world.data.name,
        "size": size,
        "seed": setting.seed,
        "runs": [one.scores for one in scored],
        "real": real,
        "shuffled": shuffled,
        "protocol": _protocol(world, setting, [one.scores for one in scored]),
        "warnings": [],
    }
    if prompts:
        real["composition"], shuffled["composition"] = prompts.real(), prompts.shuffled()
        document["judge"] = prompts.judge_exam()
        document["protocol"]["composition"] = {"seed": setting.seed, **prompts.protocol()}
    document["warnings"] = _warnings(world, document)
    return document, scored


def _common(
    folders: Sequence[Path], configs: Sequence[RunConfig], data: str | None
) -> tuple[str, int, int]:
    """(data, size, seed of the data) that all runs share."""
    facts = {(data or config.data, config.size, config.seed) for config in configs}
    if len(facts) > 1 and len({fact[:2] for fact in facts}) > 1:
        told = ", ".join(
            f"{folder}: {data or config.data} at {config.size} pixels"
            for folder, config in zip(folders, configs, strict=True)
        )
        raise UserError(f"These runs cannot stand in one table ({told}): evaluate them apart.")
    return min(facts)


def _frame(
    spec: str, size: int, data_seed: int, setting: Setting
) -> tuple[RealPictures, Composition | None]:
    """The real pictures, and the prompts if the data has a judge."""
    device = pick_device(setting.device)
    unseen = unseen_split(spec, size, data_seed)
    prompts = composition_of(unseen, setting.prompts, Judge.load(), setting.seed)
    train = load_dataset(spec, "train", size, data_seed)
    scorer = find_scorer(setting.scorer, spec, train, unseen, device)
    judged = isinstance(unseen, Shapes)
    name = ("judge" if judged else "scorer") if setting.features == "auto" else setting.features
    if name == "scorer" and scorer is None:
        raise UserError(
            "This data needs a feature network: leave out --scorer none, or give --features."
        )
    features = find_features(name, scorer, device)
    world = RealPictures(unseen, train, setting.pictures, features, scorer, setting.seed)
    return world, prompts


def _score(
    folder: Path,
    config: RunConfig,
    world: RealPictures,
    prompts: Composition | None,
    setting: Setting,
) -> Scored:
    """All sections of one run."""
    system = load(folder, setting.device)
    system.at_once = setting.batch or system.at_once
    shared, real_groups = world.shared_captions()
    groups = [caption for caption in shared for _ in range(SPREAD_SAMPLES)]
    asked = [prompt.prompt for prompt in prompts.prompts] if prompts else []
    total = len(asked) + len(world.captions) + len(groups)
    with tqdm(total=total, desc=f"drawing {folder.name}", unit="picture", leave=False) as bar:
        of_prompts = _draw(system, asked, setting.seed, bar)
        pictures = _draw(system, world.captions, setting.seed + 1, bar)
        samples = _draw(system, groups, setting.seed + 2, bar)
    features = world.network(pictures)
    scores: dict[str, Any] = {"run": str(folder), "system": config.key}
    failed: list[tuple[str, str, str, Tensor]] = []
    if prompts:
        readings = prompts.judge.read(of_prompts)
        scores["composition"], failed = _judged(prompts, readings, of_prompts)
        scores["failed"] = [
            {"tag": tag, "prompt": prompt, "seen": seen} for tag, prompt, seen, _ in failed
        ]
    scores["quality"] = sections.quality(world.features, features)
    spread = world.network(samples).unflatten(0, (-1, SPREAD_SAMPLES))  # (G, K, D)
    scores["diversity"] = sections.diversity(spread, real_groups)
    scores["memorisation"] = sections.memorisation(world.train_features, world.features, features)
    of_stages = _stages(system, world, prompts)
    if of_stages:
        scores["stages"] = of_stages
    if world.scorer:
        scores["text_fit"] = world.text_fit(
            world.scorer.image(pictures), world.scorer.text(world.captions), world.captions
        )
    scores["cost"] = {
        "training": read_json(folder / "cost.json"),
        "sampling": measured_once(folder, world.captions[:16], setting.device),
    }
    return Scored(scores, failed, _nearest(world, pictures, features))


@torch.no_grad()
def _stages(system: System, world: RealPictures, prompts: Composition | None) -> dict[str, Any]:
    """The section of systems whose stages can be measured apart; else empty."""
    numbers = range(len(world.images))
    whole = Batch(to_unit(world.images), world.captions, None, [str(i) for i in numbers])
    parts = [system.stage_scores(part.to(system.device)) for part in whole.split(system.at_once)]
    values = {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}
    verdicts: list[dict[str, bool]] = []
    if values and prompts:
        given = to_unit(prompts.pictures).to(system.device).split(system.at_once)
        back = [system.reconstruct(part) for part in given]
        seen = [to_bytes(part).cpu() for part in back if part is not None]
        verdicts = prompts.verdicts(prompts.judge.read(torch.cat(seen))) if seen else []
    return sections.stages(values, prompts.prompts if prompts else [], verdicts)


@torch.no_grad()
def _draw(system: System, captions: Sequence[str], seed: int, bar: tqdm[Any]) -> Tensor:
    """(N, 3, S, S) uint8 on the CPU."""
    parts = []
    for part in system.generate_in_parts(captions, seed=seed) if captions else ():
        parts.append(to_bytes(part).cpu())
        bar.update(len(part))
    return torch.cat(parts) if parts else torch.empty(0)


def _judged(
    prompts: Composition, readings: Sequence[Reading], pictures: Tensor
) -> tuple[dict[str, Any], list[tuple[str, str, str, Tensor]]]:
    """The section, and the pictures that failed, the tasks in turn."""
    verdicts = prompts.verdicts(readings)
    queues: dict[tuple[str, str], list[int]] = {}
    for number, (prompt, result) in enumerate(zip(prompts.prompts, verdicts, strict=True)):
        if not result["strict"]:
            queues.setdefault((prompt.split, prompt.tag), []).append(number)
    turns = range(max(map(len, queues.values()), default=0))
    order = [queue[turn] for turn in turns for queue in queues.values() if turn < len(queue)]
    failed = [
        (prompts.prompts[i].tag, prompts.prompts[i].prompt, str(readings[i]), pictures[i])
        for i in order
    ]
    return sections.composition(prompts.prompts, verdicts), failed


def _nearest(
    world: RealPictures, pictures: Tensor, features: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The pictures that lie nearest to training pictures, with these."""
    apart, numbers = world.nearest(features)
    order = apart.argsort(stable=True)[:NEAREST].tolist()
    return [(pictures[i], world.train[numbers[i]].image) for i in order]


def write_sheets(one: Scored, folder: Path, name: str) -> None:
    """The pictures that failed and those nearest to training pictures, as sheets in `folder`."""
    if one.failed:
        some = one.failed[:FAILED]
        texts = [f"{prompt}: seen {seen}" for _, prompt, seen, _ in some]
        save_picture(sheet([p for *_, p in some], texts), folder / f"{name}_failed.png")
    pairs = [picture for pair in one.nearest for picture in pair]
    texts = ["drawn", "nearest in training"] * len(one.nearest)
    save_picture(sheet(pairs, texts), folder / f"{name}_nearest.png")


def _protocol(
    world: RealPictures, setting: Setting, runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """How the numbers of each section came about."""
    count = len(world.images)
    drawn = {
        "features": world.network.name,
        "width": world.network.width,
        "real": count,
        "generated": count,
        "real_split": world.data.split,
        "captions": "the first of each real picture",
        "size": world.data.size,
        "seed": setting.seed + 1,
    }
    protocol: dict[str, Any] = {
        "intervals": "95 %, bootstrap over pictures; Wilson's where all have one verdict",
        "quality": {
            **drawn,
            "neighbours_of_precision_and_recall": sections.PRECISION_NEIGHBOURS,
            "neighbours_of_density_and_coverage": sections.DENSITY_NEIGHBOURS,
            "kid": "unbiased, polynomial kernel of degree 3, all pictures",
            "real_row": "training pictures against the unseen ones",
        },
        "diversity": {
            "features": world.network.name,
            "captions": len(world.shared_captions()[0]),
            "samples_of_each": SPREAD_SAMPLES,
            "distance": "mean Euclidean distance of two samples",
            "seed": setting.seed + 2,
        },
        "memorisation": {**drawn, "training_pictures": len(world.train_features)},
        "stages": {
            "pictures": count,
            "real_split": world.data.split,
            "nats_per_code": "of the true codes, each given the caption and all before it",
            "bits_per_dim": "of bytes: the prior's, and the decoder's density given the codes",
            "reconstruction": "real pictures of the prompts, encoded, decoded and judged",
        },
        "cost": {"machine": machine(), "captions": "of real pictures"},
    }
    if not any("stages" in run for run in runs):
        del protocol["stages"]
    if world.scorer:
        protocol["text_fit"] = {
            "scorer": world.scorer.name,
            "kind": world.scorer.kind,
            "scorer_made": world.scorer.protocol,
            "used_in_training": False,
            "wrong_captions": sections.WRONG_CAPTIONS,
            "wrong_captions_from": "other pictures, all with other words",
            "pictures": count,
            "seed": setting.seed,
        }
    return protocol


def _warnings(world: RealPictures, document: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    told = []
    if world.data.split == "train":
        told.append(
            f"{world.data.name} has no validation or test split: real pictures are training "
            "pictures, so memorisation says nothing."
        )
    for one in (document["real"], *document["runs"]):
        quality = one["quality"]
        told += [quality[key] for key in ("warning", "reason") if key in quality]
    ceiling = document["real"].get("text_fit", {}).get("r_precision", {}).get("value", 1.0)
    if ceiling < 0.5:
        told.append(
            f"The scorer finds the true caption of {ceiling:.0%} of unseen real pictures only: "
            "R-precision and CLIP score say little here; --scorer hub:MODEL names a better one."
        )
    if world.scorer is None:
        told.append("No scorer was asked for, so text fit was not measured.")
    return list(dict.fromkeys(told))
