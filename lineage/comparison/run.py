"""The comparison: the named systems on the same data, the same budget and the same captions, and a
report.

Each system is trained by a process of its own (`lineage train`), so that its peak memory is its
own, and in a folder of its own, so that a comparison that was stopped goes on where it was when the
same command is given again.

    OUT/<key>/         the run folder of each system
    OUT/report.html    the page: one file, no network
    OUT/report.json    the same facts
    OUT/sheet.png      the same captions across systems
    OUT/<key>_failed.png, <key>_nearest.png    prompts that were not met, and the pictures that lie
                       nearest to training pictures
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lineage.catalog import CATALOG, lookup, working
from lineage.comparison.report import write_report
from lineage.config import to_dict
from lineage.data.contract import Example, to_bytes
from lineage.errors import CheckFailed, Interrupted, UserError
from lineage.evaluation.cost import machine
from lineage.evaluation.real import unseen_split
from lineage.evaluation.run import Scored, Setting, score_runs, write_sheets
from lineage.runs import configure, load, read_config, save_picture
from lineage.sheets import sheet
from lineage.system import Named
from lineage.training.log import read_log
from lineage.training.store import write_json

CAPTIONS = 12  # rows of the sheet
SEEDS = (0, 1)  # pictures of each caption and system


def compare(
    keys: Sequence[str] | None = None,
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
) -> Path:
    """Train each system on the same budget, score it and write the report; returns its path.

    Args:
        keys: the systems; all that work if none are named.
        data, minutes, steps, preset, seed, device, settings: as for `lineage.train`; the same for
            every system.
        out: the folder for runs and report. Finished runs in it are not trained again.
        pictures: drawn for the scores of each, at most; see `lineage.evaluate`.

    Raises:
        UserError: what was given does not fit some system; told before any is trained.
        CheckFailed: a system could not be trained.
        Interrupted: asked to stop; the same command goes on.
    """
    folder, chosen = Path(out), list(dict.fromkeys(keys or working()))
    for key in chosen:
        lookup(key)
    options: dict[str, Any] = {
        "data": data,
        "minutes": minutes,
        "steps": steps,
        "seed": seed,
        "device": device,
    }
    configs = {
        key: configure(key, preset_name=preset, settings=settings, **options) for key in chosen
    }
    sizes = {config.size for config in configs.values()}
    if len(sizes) > 1:
        raise UserError(
            f"The systems draw at different sizes at preset {preset}; set one with --set size=..."
        )
    config = configs[chosen[0]]
    shown = unseen_split(config.data, config.size, config.seed).showcase(CAPTIONS)

    for number, key in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {key}: {CATALOG[key].title}", file=sys.stderr)
        _train(key, folder / key, preset, options, settings or {})

    setting = Setting(pictures=pictures, device=config.train.device)
    scores, scored = score_runs([folder / key for key in chosen], setting)
    columns, facts, inside = {}, {}, {}
    for key, one in zip(chosen, scored, strict=True):
        columns[key], inside[key] = _draw(folder / key, shown)
        facts[key] = _facts(key, folder / key, one)
        write_sheets(one, folder, key)
    summary = {
        "systems": facts,
        "scores": scores,
        "order": chosen,
        "captions": [example.captions[0] for example in shown],
        "seeds": list(SEEDS),
        "data": config.data,
        "size": config.size,
        "preset": preset,
        "budget": {"minutes": config.train.minutes, "steps": config.train.steps},
        "machine": machine(),
        "reproduce": _command(chosen, preset, options, settings or {}, pictures, folder),
    }
    write_json(folder / "report.json", summary)
    real = [example.image for example in shown]
    _write_sheet(folder / "sheet.png", summary, real, columns)
    write_report(
        folder / "report.html",
        summary,
        real,
        columns,
        inside,
        {k: read_log(folder / k / "metrics.jsonl") for k in chosen},
        {k: one.failed for k, one in zip(chosen, scored, strict=True)},
    )
    return folder / "report.html"


def _train(
    key: str, folder: Path, preset: str, options: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Train one system in a process of its own, or go on with what its folder holds."""
    command = [
        sys.executable,
        "-m",
        "lineage",
        "train",
        key,
        "--out",
        str(folder),
        "--resume",
        "--preset",
        preset,
    ]
    command += _flags(options, settings)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def pass_on(number: int, frame: object) -> None:
        child.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, pass_on) if main else None
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal has told the child as well
        code = child.wait() or 130
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    if code in (130, -signal.SIGTERM):
        raise Interrupted("The comparison stopped; give the same command again to go on.")
    if code == 2:
        raise UserError(f"{key} could not be trained, for the reason above.")
    if code:
        raise CheckFailed(f"{key} stopped with exit code {code}, for the reason above.")


def _flags(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    flags = [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]
    return flags + [
        part for name, value in settings.items() for part in ("--set", f"{name}={value}")
    ]


def _command(
    keys: list[str],
    preset: str,
    options: dict[str, Any],
    settings: Mapping[str, Any],
    pictures: int,
    folder: Path,
) -> list[str]:
    """What to type to get this report again, and each run alone."""
    flags = ["--preset", preset, *_flags(options, settings)]
    drawn = ["--pictures", str(pictures)] if pictures != Setting.pictures else []
    lines = [["lineage", "compare", *keys, *flags, *drawn, "--out", folder.name]]
    lines += [["lineage", "train", key, *flags, "--out", f"{folder.name}/{key}"] for key in keys]
    return [shlex.join(line) for line in lines]


def _draw(folder: Path, shown: list[Example]) -> tuple[list[list[Tensor]], list[list[Named]]]:
    """The pictures of one system, [caption][seed] of (3, S, S) uint8, and a look inside at the
    longest caption.
    """
    captions = [example.captions[0] for example in shown]
    system = load(folder, device=read_config(folder).train.device)
    by_seed = [to_bytes(system.generate(captions, seed=seed)).cpu() for seed in SEEDS]
    rows = system.inside(max(captions, key=len), seed=SEEDS[0])
    inside = [[(name, to_bytes(image).cpu()) for name, image in row] for row in rows]
    return [[pictures[i] for pictures in by_seed] for i in range(len(captions))], inside


def _facts(key: str, folder: Path, scored: Scored) -> dict[str, Any]:
    """What the report says of one system beside its scores."""
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
    path: Path, summary: dict[str, Any], real: list[Tensor], columns: dict[str, Any]
) -> None:
    """Two captions a row, each behind its real picture; for the README and for slides."""
    keys = list(columns)
    pictures = [
        p for i, truth in enumerate(real) for p in (truth, *(columns[key][i][0] for key in keys))
    ]
    texts = [t for caption in summary["captions"] for t in (caption, *keys)]
    save_picture(sheet(pictures, texts, columns=2 * (1 + len(keys)), side=96), path)
