"""`lineage compare`: the named systems on the same data, budget and captions, and a report.

Each system is trained by a process of its own (`lineage train`), so that its peak memory is its
own, and in a folder of its own, so that the same command continues a comparison that was stopped.

On a CPU, a budget in minutes is one of the processor's time: minutes of the clock would give fewer
steps to the systems whose turn comes while the machine is busy. Each system is trained with one
thread, since several threads wait for each other more in some systems than in others and the wait
counts as processor time; and as many systems as there are cores are trained at a time, which uses
two cores better than two threads do.

Each system reads its captions with the encoder of its recipe (`text="historical"`), or all with one
(`text="transformer"`): then no system is ahead by its encoder alone. Sizes of the encoder are those
of each recipe, unless `settings` holds them (`encoder.width`).

    OUT/<key>/         the run folder of each system
    OUT/report.html    the page: one file, no network
    OUT/report.json    its data
    OUT/sheet.png      the same captions across systems
    OUT/<key>_failed.png, <key>_nearest.png    pictures that do not show their prompt, and pictures
                       nearest to training pictures
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.bounds import Threads
from lineage.catalog import CATALOG, drawing, lookup
from lineage.comparison.report import HISTORICAL, SystemPage, write_report
from lineage.comparison.training import train_all
from lineage.config import RunConfig, TrainConfig, to_dict, typed
from lineage.cores import usable_cpus
from lineage.data import load_dataset
from lineage.data.contract import Example, fingerprint_of, to_bytes
from lineage.errors import UserError, say
from lineage.evaluation.cost import machine
from lineage.evaluation.real import unseen_split
from lineage.evaluation.run import EvalConfig, check_scoring, score_runs
from lineage.evaluation.scoring import ScoredRun, write_sheets
from lineage.files import check_output, claimed, expanded
from lineage.options import configure
from lineage.plan import build, plan, read_config, read_saved, read_tokenizer
from lineage.resume import differences, last_threads, result_settings
from lineage.runs import check_runs, load_system
from lineage.sheets import save_picture, sheet
from lineage.system import LabelledImage, Visualises
from lineage.text.encoders import check_encoder
from lineage.threads import requested, use_threads, worded
from lineage.training.log import read_log
from lineage.training.machine import pick_device
from lineage.training.memory import total_memory
from lineage.training.store import write_json

CAPTIONS = 12  # rows of the sheet
BUDGET = {"train.minutes", "train.cpu_minutes", "train.max_steps", "train.max_pictures"}
MEMORY = 2 * 10**9
"""Bytes of memory for each system that is trained at a time; one at preset tiny needs up to half of
them.
"""
SEEDS = (0, 1)  # of the pictures of each caption and system


def compare(
    keys: str | Sequence[str] | None = None,
    *,
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    preset: str = "tiny",
    text: str = HISTORICAL,
    out: str | Path = "runs/compare",
    seed: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    pictures: int = 1000,
    features: str = "auto",
    scorer: str = "auto",
) -> Path:
    """Train each system on the same budget, score it and write the report; returns its path.

    A run in `out` that was stopped goes on, and a finished one is not trained again; one that was
    made with other settings than those asked for is refused.

    Args:
        keys: Keys of the systems; None for all that work.
        data, minutes, steps, preset, seed, device, settings: As for `lineage.train`; the same for
            every system. On a CPU, `minutes` are those of the processor in each thread.
        text: Text encoder of all systems, as `transformer`; `historical` gives each its recipe's.
        threads: Number of threads of each system on a CPU; 1 if None.
        out: Folder for runs and report.
        pictures, features, scorer: As for `lineage.evaluate`.

    Raises:
        UserError: an argument does not fit some system; raised before any is trained.
        CheckFailed: a system could not be trained.
        Interrupted: a request to stop; the same command goes on.
    """
    folder, settings = expanded(out, "out"), _with_encoder(settings, text)
    text = str(settings.get("text", HISTORICAL))
    names = drawing() if keys is None else [keys] if isinstance(keys, str) else keys
    keys = list(dict.fromkeys(names))
    if not keys:
        raise UserError("There is nothing to compare: name at least one system.")
    options: dict[str, Any] = {
        "data": data,
        "minutes": minutes,
        "steps": steps,
        "seed": seed,
        "device": device,
    }
    for key in keys:
        if not lookup(key).draws:
            raise UserError(f"{key} draws no pictures that could be compared: leave it out.")
    demanded, per_system = None, None
    if pick_device(device or "auto").type == "cpu":
        demanded = requested() if threads is None else typed(Threads, threads, "threads")
        per_system = demanded or 1
    for name in ("report.html", "report.json", "sheet.png"):
        check_output(folder / name)
    train = configure(keys[0], preset_name=preset, settings=settings, **options).train
    fair = options | _fair_budget(train, settings, per_system)
    configs = [configure(key, preset_name=preset, settings=settings, **fair) for key in keys]
    if len({config.size for config in configs}) > 1:
        raise UserError(
            f"The systems draw at different sizes at preset {preset}; set one with --set size=..."
        )
    config = configs[0]
    if text != HISTORICAL:
        check_encoder(text, config.encoder)

    @functools.cache
    def fingerprint() -> str:
        return fingerprint_of(load_dataset(config.data, "train", config.size, config.seed))

    for key, one in zip(keys, configs, strict=True):
        _check_existing(folder / key, one, fingerprint, per_system)
    check_runs(configs)
    scoring = EvalConfig(
        pictures=pictures, device=config.train.device, features=features, scorer=scorer
    )
    check_scoring(config.data, config.size, config.seed, scoring)
    examples = unseen_split(config.data, config.size, config.seed).showcase(CAPTIONS)
    flags = ["--preset", preset, *_flags(fair | {"threads": per_system}, settings)]
    held = None if text == HISTORICAL else text
    others = {name: value for name, value in settings.items() if name != "text"}
    whole = options | {"text": held, "threads": threads}
    compare_flags = ["--preset", preset, *_flags(whole, others)]
    at_once = systems_at_once(per_system)
    with claimed(folder):
        if per_system and config.train.cpu_minutes is not None:
            say(_fairness(config.train.cpu_minutes, per_system, min(at_once, len(keys))))
        commands = {}
        for key in keys:
            resume = ["--resume"] if (folder / key / "config.json").exists() else []
            commands[key] = ["--out", str(folder / key), *resume, *flags]
        train_all(commands, at_once)
        facts = {
            "budget": {"minutes": train.minutes, "steps": train.max_steps},
            "cpu_minutes": config.train.cpu_minutes,
            "threads": per_system,
            "text": text,
            "reproduce": _commands(keys, flags, compare_flags, scoring, folder.name),
        }
        with use_threads(demanded):
            return _report(folder, keys, config, scoring, examples, facts)


def systems_at_once(threads: int | None) -> int:
    """Number of systems that are trained at a time: as many as cores and memory allow, on a CPU.

    Args:
        threads: Number of threads of each; None on a GPU.
    """
    if threads is None:
        return 1
    return max(1, min(usable_cpus() // threads, total_memory("cpu") // MEMORY))


def _with_encoder(settings: Mapping[str, Any] | None, text: str) -> dict[str, Any]:
    """`settings` with the text encoder of all systems, if one is held fixed.

    Raises:
        UserError: `settings` name another one.
    """
    changed = dict(settings or {})
    if text == HISTORICAL:
        return changed
    if changed.get("text", text) != text:
        raise UserError(
            f"--text {text} and --set text={changed['text']} are two encoders: leave one out."
        )
    return {**changed, "text": text}


def _fair_budget(
    train: TrainConfig, settings: Mapping[str, Any], threads: int | None
) -> dict[str, Any]:
    """Options of `configure` that replace minutes of the clock by those of the processor.

    Args:
        train: Budget as the user gave it.
        settings: Fields that the user set, whose budget is left as it is.
        threads: Number of threads of each system; None on a GPU.
    """
    if threads is None or train.minutes is None or BUDGET & settings.keys():
        return {}
    return {"minutes": None, "cpu_minutes": threads * train.minutes}


def _fairness(minutes: float, threads: int, at_once: int) -> str:
    """What the budget is counted in, for the user."""
    return (
        f"Each system is trained for {minutes:g} minutes of the processor's time with "
        f"{worded(threads)}, {at_once} at a time, so that what else "
        "the machine does hardly changes a score."
    )


def _report(
    folder: Path,
    keys: Sequence[str],
    config: RunConfig,
    scoring: EvalConfig,
    examples: Sequence[Example],
    facts: Mapping[str, Any],
) -> Path:
    """Score the trained systems and write the report; returns its path."""
    scores, scored = score_runs([folder / key for key in keys], scoring)
    runs = dict(zip(keys, scored, strict=True))
    for key, run in runs.items():
        write_sheets(run, folder, key)
    pages = {key: _page(folder / key, examples, run) for key, run in runs.items()}
    summary: dict[str, Any] = {
        "systems": {key: _system_summary(key, folder / key, run) for key, run in runs.items()},
        "scores": scores,
        "order": keys,
        "captions": [example.captions[0] for example in examples],
        "seeds": list(SEEDS),
        "data": config.data,
        "size": config.size,
        "preset": config.preset,
        "machine": machine(),
        **facts,
    }
    write_json(folder / "report.json", summary)
    real = [example.image for example in examples]
    _write_sheet(folder / "sheet.png", summary["captions"], real, pages)
    write_report(folder / "report.html", summary, real, pages)
    return folder / "report.html"


def _check_existing(
    folder: Path, config: RunConfig, fingerprint: Callable[[], str], threads: int | None
) -> None:
    """Raise `UserError` if `folder` holds a run of other settings, data or number of threads."""
    if not (folder / "config.json").exists():
        return
    before = read_config(folder)
    if before.train.minutes is not None and config.train.cpu_minutes is not None:
        raise UserError(
            f"{folder} was trained for minutes of the clock, and a comparison counts those of the "
            "processor: choose another --out, or delete that folder to train it again."
        )
    if fields := result_settings(differences(before, config)):
        name, (old, new) = next(iter(fields.items()))
        raise UserError(
            f"{folder} was trained with {name}={old}, not {new} as asked: choose another --out, or "
            "delete that folder to train it again."
        )
    saved = read_saved(folder)
    if saved.get("changes"):
        raise UserError(
            f"{folder} was trained with other settings up to step {saved['changes'][-1]['step']} "
            "(`changes` in its config.json): choose another --out, or delete that folder."
        )
    if threads and (count := last_threads(saved)) not in (None, threads):
        raise UserError(
            f"{folder} was trained with {count} threads, not {threads}: add --threads {count}, or "
            "choose another --out."
        )
    if saved.get("data_fingerprint") != fingerprint():
        raise UserError(
            f"The data {config.data} is no longer what {folder} was trained on: restore it, or "
            "choose another --out."
        )


def _flags(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Options and settings as arguments of the command line."""
    set_options = {name: value for name, value in options.items() if value is not None}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in set_options.items()]
    pairs += [("--set", f"{name}={value}") for name, value in settings.items()]
    return [part for pair in pairs for part in pair]


def _commands(
    keys: Sequence[str],
    flags: Sequence[str],
    compare_flags: Sequence[str],
    scoring: EvalConfig,
    out: str,
) -> list[str]:
    """Commands that make this report again, and each run alone."""
    names = ("pictures", "features", "scorer")
    changed = [n for n in names if getattr(scoring, n) != getattr(EvalConfig(), n)]
    own = [part for n in changed for part in (f"--{n}", str(getattr(scoring, n)))]
    lines = [["lineage", "compare", *keys, *compare_flags, *own, "--out", out]]
    lines += [["lineage", "train", key, *flags, "--out", f"{out}/{key}"] for key in keys]
    return [shlex.join(line) for line in lines]


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


def _system_summary(key: str, folder: Path, scored: ScoredRun) -> dict[str, Any]:
    """The part of the report's data about one system, beside its scores."""
    row, config = CATALOG[key], read_config(folder)
    with torch.device("meta"):
        text = build(plan(config, read_tokenizer(folder))).text
    assert text is not None
    return {
        "title": row.title,
        "year": row.year,
        "paper": row.paper,
        "idea": row.idea,
        "encoder": {"name": config.text, "width": text.word_dim},
        **scored.scores["cost"],
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
