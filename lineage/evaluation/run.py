"""`lineage evaluate`: every score of a run, between those of real pictures and a floor.

    {"runs": [{"run", "system", "composition", "quality", "diversity", "memorisation", "stages",
               "text_fit", "cost", "failed"}, ...],
     "real": {...}, "shuffled": {...},      the same sections for real pictures, with their own
                                            captions and with those of others
     "judge": {...},                        the judge's exam
     "protocol": {section: {...}},          how the scores of each section were made
     "warnings": [...]}

The real pictures come from a split that training does not use. As many pictures are generated, from
the same captions. Results for real pictures are cached for each data set, size and network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lineage.bounds import NUM_SEEDS, PositiveInt, Seed, Threads
from lineage.catalog import CATALOG
from lineage.characters import plain
from lineage.config import RunConfig, configuration, to_dict
from lineage.data import load_dataset
from lineage.data.contract import Batch, fingerprint_of, to_bytes, to_unit
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.cost import cached_cost
from lineage.evaluation.features import find_features, find_scorer
from lineage.evaluation.judge import Detections, Judge
from lineage.evaluation.matching import matching
from lineage.evaluation.protocol import protocol_of, warnings_of
from lineage.evaluation.real import (
    SPREAD_SAMPLES,
    PromptSet,
    RealPictures,
    prompt_set,
    unseen_split,
)
from lineage.evaluation.scored import Failure, ScoredRun, scored_once
from lineage.evaluation.scorer import Scorer, check_captions, clip_scorer
from lineage.files import check_output, expanded
from lineage.pretrained import run_folder, run_name
from lineage.runs import load_system, read_config
from lineage.sheets import save_picture, sheet
from lineage.system import Reconstructs, ScoresStages, System
from lineage.threads import use_free_threads, use_threads
from lineage.training.cost import budget_warnings, read_cost
from lineage.training.machine import pick_device
from lineage.training.store import write_json

MAX_FAILURES = 24  # pictures on the sheet of failures
MAX_NEAREST = 12  # pairs on the sheet of pictures nearest to training pictures


@configuration
class EvalConfig:
    """Settings of an evaluation.

    Attributes:
        data: Data set of the scores; None for the one the runs were trained on.
        pictures: Largest number of pictures for quality and text fit; never more than there are
            real ones.
        seed: Seed of the pictures and of all chance in the scores.
        prompts: File of prompts; None for the package's own.
        features: `judge`, `scorer`, `inception:FILE`, or `auto`: the judge for `shapes`, otherwise
            the scorer.
        scorer: `auto`, `none`, `hub:MODEL` (a CLIP of the Hugging Face hub or a local path), or
            `damsm:RUN` (the matching model of an AttnGAN's run).
        device: As in `TrainConfig`.
        batch_size: Number of pictures drawn at once; the system's own if None. It changes no score.
        threads: Number of threads on a CPU; None to measure.
    """

    data: str | None = None
    pictures: PositiveInt = 1000
    seed: Seed = 0
    prompts: str | Path | None = None
    features: str = "auto"
    scorer: str = "auto"
    device: str = "auto"
    batch_size: PositiveInt | None = None
    threads: Threads | None = None


def evaluate(
    runs: str | Path | Sequence[str | Path], *, out: str | Path | None = None, **settings: Any
) -> dict[str, Any]:
    """Score one run or several on the same data.

    Args:
        runs: Run folders.
        out: Folder for `scores.json` and, for each run, the sheets `<run>_failed.png` and
            `<run>_nearest.png` under the name of its folder, or more of its path where names are
            the same; nothing is written if None.
        **settings: Fields of `EvalConfig`.

    Returns:
        The document at the head of this module.

    Raises:
        UserError: a folder is no run, a setting is wrong, or the runs differ in data or size.
    """
    folders = [run_folder(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    names = run_names(folders)
    if out is not None:
        out = expanded(out, "out")
        sheets = [f"{name}_{kind}.png" for name in names for kind in ("failed", "nearest")]
        for name in ("scores.json", *sheets):
            check_output(out / name)
    config = EvalConfig(**settings)
    with use_threads(config.threads):
        draws = [CATALOG[read_config(folder).key].draws for folder in folders]
        if any(draws) and not all(draws):
            other = run_name(folders[draws.index(False)])
            raise UserError(f"{other} draws no pictures, as the other runs do: evaluate it apart.")
        if folders and not any(draws):
            scored: list[ScoredRun] = []
            document = score_matching(folders, config)
        else:
            document, scored = score_runs(folders, config)
    if out is not None:
        write_json(out / "scores.json", document)
        for name, one in zip(names, scored, strict=bool(scored)):
            write_sheets(one, out, name)
    return document


def score_matching(folders: Sequence[Path], config: EvalConfig) -> dict[str, Any]:
    """The document of runs that compare pictures with captions, such as those of CLIP: their cost
    and the section of `matching.py`.
    """
    run_configs = [read_config(folder) for folder in folders]
    spec, size, data_seed = _common_data(folders, run_configs, config.data)
    unseen = unseen_split(spec, size, data_seed)
    prompts = prompt_set(unseen, config.prompts, Judge.load(), config.seed)
    runs = []
    for folder, run_config in zip(folders, run_configs, strict=True):
        scorer = clip_scorer(folder, pick_device(config.device))
        section = matching(scorer, unseen, prompts, config.pictures, config.seed)
        cost = {"training": read_cost(folder)}
        run = {"run": run_name(folder), "system": run_config.key}
        runs.append({**run, "matching": section, "cost": cost})
    protocol = {
        "pictures": min(config.pictures, len(unseen)),
        "split": unseen.split,
        "captions": "the first of each picture",
        "pool": 1 + sections.WRONG_CAPTIONS,
        "seed": config.seed,
    }
    shared = {"data": unseen.name, "size": size, "seed": config.seed}
    return {**shared, "runs": runs, "protocol": {"matching": protocol}, "warnings": []}


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name of each run folder, for its files: as much of the end of its path as tells them apart.

    Raises:
        UserError: a folder is named twice.
    """
    first: dict[Path, Path] = {}
    for folder in folders:
        if (same := first.setdefault(folder.resolve(), folder)) is not folder:
            raise UserError(f"{same} and {folder} are the same folder: name it once.")
    parts = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 2):
        names = ["_".join(part[-length:]) or "run" for part in parts]
        if len({name.casefold() for name in names}) == len(names):
            return names
    return [f"{name}_{number}" for number, name in enumerate(names, start=1)]


def score_runs(
    folders: Sequence[Path], config: EvalConfig, cached: bool = False
) -> tuple[dict[str, Any], list[ScoredRun]]:
    """`evaluate`, with the pictures.

    Args:
        cached: If true, a run that was scored so before is not scored again.
    """
    if not folders:
        raise UserError("There is nothing to evaluate: name at least one run folder.")
    run_configs = [read_config(folder) for folder in folders]
    spec, size, data_seed = _common_data(folders, run_configs, config.data)
    pictures, prompts = real_pictures(spec, size, data_seed, config)
    protocol = protocol_of(pictures, config.seed, (_seed(config.seed, 1), _seed(config.seed, 2)))
    if prompts:
        protocol["composition"] = {"seed": config.seed, **prompts.protocol()}
    depends_on = {
        "protocol": {name: value for name, value in protocol.items() if name != "cost"},
        "data": [fingerprint_of(split) for split in (pictures.data, pictures.train)],
        "device": pick_device(config.device).type,
    }
    scored = []
    for folder, run_config in zip(folders, run_configs, strict=True):
        compute = partial(_score, folder, run_config, pictures, prompts, config)
        if cached:
            own = {n: value for n, value in to_dict(run_config).items() if n != "train"}
            one = scored_once(folder, {"run": own, **depends_on}, compute)
        else:
            one = compute()
        one.scores["run"] = run_name(folder)
        one.scores["cost"] = {
            "training": read_cost(folder),
            "sampling": cached_cost(folder, pictures.captions[:16], config.device),
        }
        scored.append(one)
    runs = [one.scores for one in scored]
    real, shuffled = pictures.rows()
    document: dict[str, Any] = {
        "data": pictures.data.name,
        "size": size,
        "seed": config.seed,
        "seed_of_data": data_seed,
        "runs": runs,
        "real": real,
        "shuffled": shuffled,
        "protocol": protocol,
        "warnings": [],
    }
    if not any("stages" in run for run in runs):
        del document["protocol"]["stages"]
    if prompts:
        real["composition"], shuffled["composition"] = prompts.rows()
        document["judge"] = prompts.judge_exam()
    document["warnings"] = warnings_of(pictures, document)
    for folder, run_config in zip(folders, run_configs, strict=True):
        document["warnings"] += budget_warnings(folder, run_config.train)
    return document, scored


def _common_data(
    folders: Sequence[Path], configs: Sequence[RunConfig], data: str | None
) -> tuple[str, int, int]:
    """(data, size, seed of the data) of all runs."""
    specs = [config.data if data is None else data for config in configs]
    sources = {(spec, config.size) for spec, config in zip(specs, configs, strict=True)}
    if len(sources) > 1:
        listed = ", ".join(
            f"{folder}: {spec} at {config.size} pixels"
            for folder, spec, config in zip(folders, specs, configs, strict=True)
        )
        raise UserError(f"These runs cannot be in one table ({listed}): evaluate them apart.")
    ((spec, size),) = sources
    return spec, size, min(config.seed for config in configs)


def check_scoring(spec: str, size: int, data_seed: int, config: EvalConfig) -> None:
    """Raise `UserError` if runs on this data cannot be scored; asked before they are trained."""
    device = pick_device(config.device)
    unseen = unseen_split(spec, size, data_seed)
    judged = prompt_set(unseen, config.prompts, Judge.load(), config.seed) is not None
    if config.features not in ("auto", "judge", "scorer"):
        find_features(config.features, None, device)
    if config.scorer != "auto":
        train = load_dataset(spec, "train", size, data_seed)
        scorer = find_scorer(config.scorer, spec, train, device)
        _features_name(config, judged, scorer)
    elif not judged:
        check_captions(load_dataset(spec, "train", size, data_seed))


def _features_name(config: EvalConfig, judged: bool, scorer: Scorer | None) -> str:
    """Name of the feature network. Raises `UserError` if it needs a scorer and there is none."""
    of_data = "judge" if judged else "scorer"
    name = of_data if config.features == "auto" else config.features
    if name == "scorer" and scorer is None:
        raise UserError(
            "The features need a scorer: leave out --scorer none, or add --features judge."
        )
    return name


def real_pictures(
    spec: str, size: int, data_seed: int, config: EvalConfig
) -> tuple[RealPictures, PromptSet | None]:
    """The real pictures, and the prompts if the judge can read the data."""
    device = pick_device(config.device)
    unseen = unseen_split(spec, size, data_seed)
    prompts = prompt_set(unseen, config.prompts, Judge.load(), config.seed)
    train = load_dataset(spec, "train", size, data_seed)
    scorer = find_scorer(config.scorer, spec, train, device)
    network = find_features(_features_name(config, prompts is not None, scorer), scorer, device)
    return RealPictures(unseen, train, config.pictures, network, scorer, config.seed), prompts


# --- one run ----------------------------------------------------------------------------------


def _score(
    folder: Path,
    run_config: RunConfig,
    real: RealPictures,
    prompts: PromptSet | None,
    config: EvalConfig,
) -> ScoredRun:
    """All sections of one run."""
    system = load_system(folder, config.device)
    system.sample_batch_size = config.batch_size or system.sample_batch_size
    shared, real_groups = real.shared_captions()
    prompt_captions = [prompt.prompt for prompt in prompts.prompts] if prompts else []
    groups = [caption for caption in shared for _ in range(SPREAD_SAMPLES)]
    total = len(prompt_captions) + len(real.captions) + len(groups)
    with tqdm(
        total=total,
        desc=f"drawing {plain(folder.name)}",
        unit=" pictures",
        leave=False,
        disable=None,  # shown only on a terminal
    ) as bar:

        def draw(captions: list[str], seed: int) -> Tensor:
            return to_bytes(system.generate(captions, seed=seed, progress=bar.update)).cpu()

        of_prompts = draw(prompt_captions, config.seed) if prompts else torch.empty(0)
        pictures, samples = (
            draw(real.captions, _seed(config.seed, 1)),
            draw(groups, _seed(config.seed, 2)),
        )
    features = real.network.extract(pictures)
    scores: dict[str, Any] = {"run": run_name(folder), "system": run_config.key}
    failures: list[Failure] = []
    if prompts:
        detections = prompts.judge.detect(of_prompts)
        verdicts = prompts.verdicts(detections)
        scores["composition"] = sections.composition(prompts.prompts, verdicts)
        failures = _failures(prompts, detections, verdicts, of_prompts)
        scores["failed"] = [
            {"tag": f.tag, "prompt": f.prompt, "detected": f.detected} for f in failures
        ]
    scores["quality"] = sections.quality(real.features, features)
    spread = real.network.extract(samples).unflatten(0, (-1, SPREAD_SAMPLES))  # (G, K, D)
    scores["diversity"] = sections.diversity(spread, real_groups)
    scores["memorisation"] = sections.memorisation(real.train_features, real.features, features)
    if stages := _stages(system, real, prompts):
        scores["stages"] = stages
    if real.scorer:
        image, text = real.scorer.image(pictures), real.scorer.text(real.captions)
        scores["text_fit"] = real.text_fit(image, text, real.captions)
    return ScoredRun(scores, failures, _nearest(real, pictures, features))


def _seed(seed: int, number: int) -> int:
    """Seed of another set of pictures; the first one follows the last."""
    return (seed + number) % NUM_SEEDS


def _stages(system: System, real: RealPictures, prompts: PromptSet | None) -> dict[str, Any]:
    """The section of a system whose stages can be measured apart; empty for others."""
    if not isinstance(system, ScoresStages):
        return {}
    rows, device = system.sample_batch_size, system.device
    ids = [str(i) for i in range(len(real.images))]
    batches = Batch(to_unit(real.images), real.captions, None, ids).split(rows)
    verdicts: list[dict[str, bool]] = []
    with system.inference(), use_free_threads():
        parts = [system.stage_scores(batch.to(device)) for batch in batches]
        if prompts and isinstance(system, Reconstructs):
            images = to_unit(prompts.pictures).to(device).split(rows)
            decoded = torch.cat([to_bytes(system.reconstruct(part)).cpu() for part in images])
            verdicts = prompts.verdicts(prompts.judge.detect(decoded))
    values = {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}
    return sections.stages(values, prompts.prompts if prompts else [], verdicts)


def _failures(
    prompts: PromptSet,
    detections: Sequence[Detections],
    verdicts: Sequence[dict[str, bool]],
    pictures: Tensor,
) -> list[Failure]:
    """Pictures that failed, from each task in turn."""
    queues: dict[tuple[str, str], list[Failure]] = {}
    for prompt, one, result, picture in zip(
        prompts.prompts, detections, verdicts, pictures, strict=True
    ):
        if not result["strict"]:
            failure = Failure(prompt.tag, prompt.prompt, str(one), picture)
            queues.setdefault((prompt.split, prompt.tag), []).append(failure)
    return [one for turn in zip_longest(*queues.values()) for one in turn if one is not None]


def _nearest(real: RealPictures, pictures: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The generated pictures nearest to training pictures, with these."""
    distance, indices = real.nearest(features)
    order = distance.argsort(stable=True)[:MAX_NEAREST].tolist()
    return [(pictures[i], real.train[indices[i]].image) for i in order]


def write_sheets(run: ScoredRun, folder: Path, name: str) -> None:
    """Write the sheets of failed pictures and of those nearest to training pictures."""
    if failures := run.failures[:MAX_FAILURES]:
        labels = [f"{one.prompt}: {one.detected}" for one in failures]
        save_picture(
            sheet([one.picture for one in failures], labels), folder / f"{name}_failed.png"
        )
    pairs = [picture for pair in run.nearest for picture in pair]
    labels = ["generated", "nearest in training"] * len(run.nearest)
    save_picture(sheet(pairs, labels), folder / f"{name}_nearest.png")
