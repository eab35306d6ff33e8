"""`lineage compare`: the named systems on the same data, budget and captions, and a report.

Each system is trained by a process of its own (`lineage train`), so that its peak memory is its
own, and in a folder of its own, so that the same command continues a comparison that was stopped.

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
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lineage.catalog import CATALOG, lookup, working
from lineage.comparison.report import SystemPage, write_report
from lineage.config import RunConfig, to_dict
from lineage.data import load_dataset
from lineage.data.contract import Example, to_bytes
from lineage.errors import CheckFailed, Interrupted, UserError
from lineage.evaluation.cost import machine
from lineage.evaluation.real import unseen_split
from lineage.evaluation.run import (
    EvalConfig,
    ScoredRun,
    check_scoring,
    score_runs,
    write_sheets,
)
from lineage.files import check_output, claimed, expanded
from lineage.plan import read_config, read_saved
from lineage.resume import differences, result_settings
from lineage.runs import check_runs, configure, fingerprint_of, load
from lineage.sheets import save_picture, sheet
from lineage.system import LabelledImage, Visualises
from lineage.training.log import read_log
from lineage.training.loop import STOP_SIGNALS
from lineage.training.store import write_json

CAPTIONS = 12  # rows of the sheet
SEEDS = (0, 1)  # of the pictures of each caption and system


def compare(
    keys: str | Sequence[str] | None = None,
    *,
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    preset: str = "tiny",
    out: str | Path = "runs/compare",
    seed: int | None = None,
    device: str | None = None,
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
            every system.
        out: Folder for runs and report.
        pictures, features, scorer: As for `lineage.evaluate`.

    Raises:
        UserError: an argument does not fit some system; raised before any is trained.
        CheckFailed: a system could not be trained.
        Interrupted: a request to stop; the same command goes on.
    """
    folder = expanded(out, "out")
    names = working() if keys is None else [keys] if isinstance(keys, str) else keys
    keys = list(dict.fromkeys(names))
    if not keys:
        raise UserError("There is nothing to compare: name at least one system.")
    options = {"data": data, "minutes": minutes, "steps": steps, "seed": seed, "device": device}
    for key in keys:
        lookup(key)
    for name in ("report.html", "report.json", "sheet.png"):
        check_output(folder / name)
    configs: list[Any] = [
        configure(key, preset_name=preset, settings=settings, **options)  # type: ignore[arg-type]
        for key in keys
    ]
    if len({config.size for config in configs}) > 1:
        raise UserError(
            f"The systems draw at different sizes at preset {preset}; set one with --set size=..."
        )
    config = configs[0]

    @functools.cache
    def fingerprint() -> str:
        return fingerprint_of(load_dataset(config.data, "train", config.size, config.seed))

    for key, one in zip(keys, configs, strict=True):
        _check_existing(folder / key, one, fingerprint)
    check_runs(configs)
    scoring = EvalConfig(
        pictures=pictures, device=config.train.device, features=features, scorer=scorer
    )
    check_scoring(config.data, config.size, config.seed, scoring)
    examples = unseen_split(config.data, config.size, config.seed).showcase(CAPTIONS)
    flags = ["--preset", preset, *_flags(options, settings or {})]
    with claimed(folder):
        for number, key in enumerate(keys, start=1):
            print(f"[{number}/{len(keys)}] {key}: {CATALOG[key].title}", file=sys.stderr)
            resume = ["--resume"] if (folder / key / "config.json").exists() else []
            _train(key, ["--out", str(folder / key), *resume, *flags])
        return _report(folder, keys, config, scoring, examples, flags)


def _report(
    folder: Path,
    keys: Sequence[str],
    config: RunConfig,
    scoring: EvalConfig,
    examples: Sequence[Example],
    flags: Sequence[str],
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
        "budget": {"minutes": config.train.minutes, "steps": config.train.max_steps},
        "machine": machine(),
        "reproduce": _commands(keys, flags, scoring, folder.name),
    }
    write_json(folder / "report.json", summary)
    real = [example.image for example in examples]
    _write_sheet(folder / "sheet.png", summary["captions"], real, pages)
    write_report(folder / "report.html", summary, real, pages)
    return folder / "report.html"


def _check_existing(folder: Path, config: RunConfig, fingerprint: Callable[[], str]) -> None:
    """Raise `UserError` if `folder` holds a run of other settings or data than asked for."""
    if not (folder / "config.json").exists():
        return
    before = read_config(folder)
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
    if saved.get("data_fingerprint") != fingerprint():
        raise UserError(
            f"The data {config.data} is no longer what {folder} was trained on: restore it, or "
            "choose another --out."
        )


def _train(key: str, flags: Sequence[str]) -> None:
    """Train one system in a process of its own, or continue its run."""
    command = [sys.executable, "-m", "lineage.cli.child", "train", key, *flags]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def terminate(number: int, frame: object) -> None:
        child.terminate()

    main = threading.current_thread() is threading.main_thread()
    numbers = [
        number
        for number in STOP_SIGNALS
        if main and number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, terminate) for number in numbers}
    interrupted = False
    try:
        code = child.wait()
    except KeyboardInterrupt:
        interrupted = True
        child.terminate()  # the terminal has asked it too, a program may not have
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted or code in (130, *(-number for number in STOP_SIGNALS)):
        raise Interrupted("The comparison stopped; give the same command again to go on.")
    if code == 2:
        raise UserError(f"{key} could not be trained, for the reason above.")
    if code:
        raise CheckFailed(f"{key} stopped with exit code {code}, for the reason above.")


def _flags(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Options and settings as arguments of the command line."""
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    pairs += [("--set", f"{name}={value}") for name, value in settings.items()]
    return [part for pair in pairs for part in pair]


def _commands(
    keys: Sequence[str], flags: Sequence[str], scoring: EvalConfig, out: str
) -> list[str]:
    """Commands that make this report again, and each run alone."""
    names = ("pictures", "features", "scorer")
    changed = [n for n in names if getattr(scoring, n) != getattr(EvalConfig(), n)]
    own = [part for n in changed for part in (f"--{n}", str(getattr(scoring, n)))]
    lines = [["lineage", "compare", *keys, *flags, *own, "--out", out]]
    lines += [["lineage", "train", key, *flags, "--out", f"{out}/{key}"] for key in keys]
    return [shlex.join(line) for line in lines]


def _page(folder: Path, examples: Sequence[Example], scored: ScoredRun) -> SystemPage:
    """Pictures of the captions, and a visualisation of the longest one."""
    captions = [example.captions[0] for example in examples]
    system = load(folder, device=read_config(folder).train.device)
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
    row = CATALOG[key]
    return {
        "title": row.title,
        "year": row.year,
        "paper": row.paper,
        "idea": row.idea,
        **scored.scores["cost"],
        "config": to_dict(read_config(folder)),
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
