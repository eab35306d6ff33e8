"""`lineage evaluate`: every score of a run, or of pictures that another program drew, between those
of real pictures and a floor.

    {"runs": [{"run", "system", "composition", "quality", "diversity", "memorisation", "stages",
               "text_fit", "cost", "failed"}, ...],
     "real": {...}, "shuffled": {...},      the same sections for real pictures, with their own
                                            captions and with those of others
     "judge": {...},                        the judge's exam
     "protocol": {section: {...}},          how the scores of each section were made
     "warnings": [...]}

The real pictures come from a split that training does not use. As many pictures are generated, from
the same captions. Results for real pictures are cached for each data set, size and network.
Pictures of another program have no `cost` and no `stages`, and the other sections as far as their
file of prompts goes (see `prompt_files`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lineage.bounds import PositiveInt, Seed, Threads
from lineage.catalog import CATALOG
from lineage.characters import plain
from lineage.config import RunConfig, configuration
from lineage.data import load_dataset
from lineage.data.contract import Batch, CaptionedDataset, to_bytes, to_unit
from lineage.errors import UserError
from lineage.evaluation import sections
from lineage.evaluation.cost import cached_cost
from lineage.evaluation.features import find_features, find_scorer
from lineage.evaluation.judge import Judge
from lineage.evaluation.matching import matching
from lineage.evaluation.outsiders import OutsidePictures, read_folder, split_pictures
from lineage.evaluation.prompt_files import (
    SIZE,
    PromptFile,
    kind_seed,
    read_prompt_file,
    repeated_captions,
)
from lineage.evaluation.protocol import protocol_of, warnings_of
from lineage.evaluation.real import (
    PromptSet,
    RealPictures,
    prompt_set,
    unseen_examples,
    unseen_split,
)
from lineage.evaluation.scored import scored_once, scoring_inputs
from lineage.evaluation.scorer import Scorer, check_captions, clip_scorer
from lineage.evaluation.scoring import (
    GeneratedPictures,
    ScoredRun,
    score_pictures,
    write_sheets,
)
from lineage.files import check_output, expanded
from lineage.pretrained import run_folder, run_name
from lineage.runs import load_system, read_config
from lineage.system import Reconstructs, ScoresStages, System
from lineage.threads import use_free_threads, use_threads
from lineage.training.cost import budget_warnings, read_cost
from lineage.training.machine import pick_device
from lineage.training.store import write_json


@configuration
class EvalConfig:
    """Settings of an evaluation.

    Attributes:
        data: Data set of the scores; None for the one the runs were trained on.
        pictures: Largest number of pictures for quality and text fit; never more than there are
            real ones.
        seed: Seed of the pictures and of all chance in the scores.
        prompts: File of prompts, GenEval's or of `lineage prompts`; None for the package's own.
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
    runs: str | Path | Sequence[str | Path] = (),
    *,
    pictures: int | str | Path | Sequence[int | str | Path] | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score runs, and pictures that another program drew, on the same data.

    Args:
        runs: Run folders.
        pictures: Largest number of pictures, as in `EvalConfig`; or folders of pictures, drawn from
            the file `prompts` (see `outsiders`).
        out: Folder for `scores.json` and, for each run, the sheets `<run>_failed.png` and
            `<run>_nearest.png` under the name of its folder, or more of its path where names are
            the same; nothing is written if None.
        **settings: Further fields of `EvalConfig`.

    Returns:
        The document at the head of this module.

    Raises:
        UserError: a folder is no run, a setting is wrong, the runs differ in data or size, or the
            pictures do not fit the prompts.
    """
    folders = [run_folder(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    count, outside = split_pictures(pictures)
    names = run_names([*folders, *outside])
    if out is not None:
        out = expanded(out, "out")
        sheets = [f"{name}_{kind}.png" for name in names for kind in ("failed", "nearest")]
        for name in ("scores.json", *sheets):
            check_output(out / name)
    config = EvalConfig(**count, **settings)
    with use_threads(config.threads):
        draws = [CATALOG[read_config(folder).key].draws for folder in folders]
        if (any(draws) or outside) and not all(draws):
            other = run_name(folders[draws.index(False)])
            raise UserError(f"{other} draws no pictures, as the other runs do: evaluate it apart.")
        if folders and not any(draws):
            scored: list[ScoredRun] = []
            document = score_matching(folders, config)
        else:
            document, scored = score_runs(folders, config, outside)
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
    folders: Sequence[Path],
    config: EvalConfig,
    outside: Sequence[Path] = (),
    cached: bool = False,
) -> tuple[dict[str, Any], list[ScoredRun]]:
    """`evaluate`, with the pictures.

    Args:
        folders: Runs that draw.
        config: Settings.
        outside: Folders of pictures, drawn from `config.prompts`.
        cached: If true, a run that was scored so before is not scored again.
    """
    if not folders and not outside:
        raise UserError(
            "There is nothing to evaluate: name at least one run folder (RUN), or a folder of "
            "pictures with --pictures."
        )
    run_configs = [read_config(folder) for folder in folders]
    file = _prompt_file(config, outside) if outside else None
    if file:
        count = len(file.of_kind("caption"))
        scenes = config.prompts if file.of_kind("prompt") else None
        config = replace(config, prompts=scenes, pictures=count or config.pictures)
    spec, size, data_seed = _common_data(folders, run_configs, config.data, file)
    unseen = unseen_split(spec, size, data_seed)
    prompts = prompt_set(unseen, config.prompts, Judge.load(), config.seed)
    outsiders = _outsiders(outside, file, unseen, prompts, config) if file else []
    real: RealPictures | None = None
    scored: list[ScoredRun] = []
    if file is None or folders or file.of_kind("caption") or file.of_kind("sample"):
        train = load_dataset(spec, "train", size, data_seed)
        real = real_pictures(spec, unseen, train, prompts is not None, config)
        of_seed = {
            seed: real
            if seed == data_seed
            else real.beside(load_dataset(spec, "train", size, seed))
            for seed in {run_config.seed for run_config in run_configs}
        }
        scored = [
            _scored(folder, run_config, of_seed[run_config.seed], prompts, config, cached)
            for folder, run_config in zip(folders, run_configs, strict=True)
        ]
    scored += [
        score_pictures(str(one.folder), one.name, one.pictures, real, prompts) for one in outsiders
    ]
    runs = [one.scores for one in scored]
    ceiling, floor = real.rows() if real else ({}, {})
    document: dict[str, Any] = {
        "data": unseen.name,
        "size": size,
        "seed": config.seed,
        "seed_of_data": data_seed,
        "runs": runs,
        "real": ceiling,
        "shuffled": floor,
        "protocol": protocol_of(
            real,
            config.seed,
            (kind_seed(config.seed, "caption"), kind_seed(config.seed, "sample")),
        ),
        "warnings": [],
    }
    if not any("stages" in run for run in runs):
        document["protocol"].pop("stages", None)
    if prompts:
        ceiling["composition"], floor["composition"] = prompts.rows()
        document["judge"] = prompts.judge_exam()
        document["protocol"]["composition"] = {"seed": config.seed, **prompts.protocol()}
    if outsiders:
        read = {str(one.folder): one.protocol for one in outsiders}
        document["protocol"]["pictures"] = read
    if real:
        document["warnings"] = warnings_of(real, document)
    for folder, run_config in zip(folders, run_configs, strict=True):
        document["warnings"] += budget_warnings(folder, run_config.train)
    for one in outsiders:
        document["warnings"] += one.warnings
    return document, scored


def _prompt_file(config: EvalConfig, outside: Sequence[Path]) -> PromptFile:
    """The file of prompts of some folders of pictures. Raises `UserError` if none is named."""
    if config.prompts is None:
        raise UserError(
            f"The pictures of {outside[0]} need the file of their prompts: add --prompts FILE, "
            "which `lineage prompts --out FILE` writes."
        )
    return read_prompt_file(Path(config.prompts))


def _outsiders(
    folders: Sequence[Path],
    file: PromptFile,
    unseen: CaptionedDataset,
    prompts: PromptSet | None,
    config: EvalConfig,
) -> list[OutsidePictures]:
    """The pictures of other programs. A fault is found before anything is computed or drawn."""
    captions: list[str] = []
    if file.of_kind("caption") or file.of_kind("sample"):
        captions = [one.captions[0] for one in unseen_examples(unseen, config.pictures)]
    file.check_fits(unseen, captions, config.seed)
    level = prompts.prompts[0].level if prompts else None
    return [read_folder(folder, file, level, unseen.size) for folder in folders]


def _common_data(
    folders: Sequence[Path],
    configs: Sequence[RunConfig],
    data: str | None,
    file: PromptFile | None = None,
) -> tuple[str, int, int]:
    """(data, size, seed of the data) of all runs; without runs, of a file of prompts."""
    if file and not configs:
        return data or file.spec(), file.size or SIZE, file.data_seed or 0
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
    spec: str,
    unseen: CaptionedDataset,
    train: CaptionedDataset,
    judged: bool,
    config: EvalConfig,
) -> RealPictures:
    """The real pictures of two splits of `spec`; `judged` says whether the judge can read them."""
    device = pick_device(config.device)
    scorer = find_scorer(config.scorer, spec, train, device)
    network = find_features(_features_name(config, judged, scorer), scorer, device)
    return RealPictures(unseen, train, config.pictures, network, scorer, config.seed)


# --- one run ----------------------------------------------------------------------------------


def _scored(
    folder: Path,
    run_config: RunConfig,
    real: RealPictures,
    prompts: PromptSet | None,
    config: EvalConfig,
    cached: bool,
) -> ScoredRun:
    """All sections of one run, from the cache if `cached` and it was scored so before."""
    compute = partial(_score, folder, run_config, real, prompts, config)
    if cached:
        device = pick_device(config.device).type
        settings = scoring_inputs(run_config, real, prompts, config.seed, device)
        scored = scored_once(folder, settings, compute)
    else:
        scored = compute()
    scored.scores["run"] = run_name(folder)
    scored.scores["cost"] = {
        "training": read_cost(folder),
        "sampling": cached_cost(folder, real.captions[:16], config.device),
    }
    return scored


def _score(
    folder: Path,
    run_config: RunConfig,
    real: RealPictures,
    prompts: PromptSet | None,
    config: EvalConfig,
) -> ScoredRun:
    """All sections of one run but its cost."""
    system = load_system(folder, config.device)
    system.sample_batch_size = config.batch_size or system.sample_batch_size
    prompt_captions = [prompt.prompt for prompt in prompts.prompts] if prompts else []
    groups = repeated_captions(real.captions)
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

        pictures = GeneratedPictures(
            prompts=draw(prompt_captions, config.seed) if prompts else None,
            captions=draw(real.captions, kind_seed(config.seed, "caption")),
            samples=draw(groups, kind_seed(config.seed, "sample")),
        )
    scored = score_pictures(run_name(folder), run_config.key, pictures, real, prompts)
    if stages := _stages(system, real, prompts):
        scored.scores["stages"] = stages
    return scored


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
