"""`lineage compare`: systems on the same data, budget and captions, and a report.

Each run is trained by a process of its own (`lineage train`), so that its peak memory is its own,
and in a folder of its own, so that the same command continues a comparison that was stopped. A run
that fails does not stop the others; its system stays in the report with the reason. Finished runs
can be compared, too (`runs`); then nothing is trained.

Each system reads its captions with the encoder of its recipe (`text="historical"`), or all with one
(`text="transformer"`): then no system is ahead by its encoder alone. Sizes of the encoder are those
of each recipe, unless `settings` holds them (`encoder.width`).

    OUT/<key>/         the run folder of each system; OUT/<key>_seed_<n>/ of further seeds
    OUT/report.html    the page: one file, no network
    OUT/report.json    its data
    OUT/sheet.png      the same captions across systems
    OUT/<key>_failed.png, <key>_nearest.png    pictures that do not show their prompt, and pictures
                       nearest to training pictures
    OUT/figures/, tables/, systems.bib    parts for a report of one's own (`parts.py`)

Modules: `members` (the runs), `budget` (what is the same for all), `training` (their processes),
`curves` (scores on the way), `glance` (what the scores say), `summary` (all of it put together),
`figures`, `report`, `parts`, `bibliography`; and, apart from it, `gallery` (what the systems of the
package draw) and `app*` (the page of `lineage app`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lineage.bounds import PositiveInt, Threads
from lineage.catalog import CATALOG, drawing, lookup
from lineage.comparison.budget import (
    as_lines,
    fair_budget,
    fairness,
    flags_of,
    runs_at_once,
    scoring_flags,
)
from lineage.comparison.curves import SHARES
from lineage.comparison.members import (
    MAX_SEEDS,
    Member,
    by_system,
    finished_members,
    members_to_train,
)
from lineage.comparison.report import HISTORICAL
from lineage.comparison.summary import write_all
from lineage.comparison.training import train_all
from lineage.config import RunConfig, typed
from lineage.data import load_dataset
from lineage.data.contract import fingerprint_of
from lineage.errors import CheckFailed, UserError, say
from lineage.evaluation.run import (
    EvalConfig,
    check_scoring,
)
from lineage.files import check_output, claimed, expanded
from lineage.options import configure
from lineage.plan import read_config, read_saved
from lineage.pretrained import run_name
from lineage.resume import differences, last_threads, result_settings
from lineage.runs import check_runs
from lineage.text.encoders import check_encoder
from lineage.threads import requested, use_threads
from lineage.training.machine import pick_device


def compare(
    keys: str | Sequence[str] | None = None,
    *,
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    max_pictures: int | None = None,
    max_flops: float | None = None,
    preset: str = "tiny",
    text: str = HISTORICAL,
    out: str | Path = "runs/compare",
    seed: int | None = None,
    seeds: int = 1,
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
        keys: Keys of the systems; None for all that work, without adapters.
        data, preset, seed, device, settings: As for `lineage.train`; the same for every system.
        minutes, steps, max_pictures, max_flops: As for `lineage.train`, of each run. On a CPU,
            `minutes` are those of the processor in each thread.
        text: Text encoder of all systems, as `transformer`; `historical` gives each its recipe's.
        seeds: Number of runs of each system: with `seed`, and the seeds that follow it. Intervals
            then speak of training again, too.
        threads: Number of threads of each run on a CPU; 1 if None.
        out: Folder for runs and report.
        pictures, features, scorer: As for `lineage.evaluate`.

    Raises:
        UserError: an argument does not fit some system; raised before any is trained.
        CheckFailed: a run could not be trained; the report has the others, unless all failed.
        Interrupted: a request to stop; the same command goes on.
    """
    folder, settings = expanded(out, "out"), _with_encoder(settings, text)
    text, seed = str(settings.get("text", HISTORICAL)), settings.pop("seed", seed)
    seeds = typed(PositiveInt, seeds, "seeds")
    if seeds > MAX_SEEDS:
        raise UserError(f"seeds={seeds} must be at most {MAX_SEEDS}.")
    names = _compared() if keys is None else [keys] if isinstance(keys, str) else keys
    keys = list(dict.fromkeys(names))
    if not keys:
        raise UserError("There is nothing to compare: name at least one system.")
    options: dict[str, Any] = {
        "data": data,
        "minutes": minutes,
        "steps": steps,
        "max_pictures": max_pictures,
        "max_flops": max_flops,
        "seed": seed,
        "device": device,
    }
    for key in keys:
        if not lookup(key).draws:
            raise UserError(f"{key} draws no pictures that could be compared: leave it out.")
    demanded, per_run = None, None
    if pick_device(device or "auto").type == "cpu":
        demanded = requested() if threads is None else typed(Threads, threads, "threads")
        per_run = demanded or 1
    _check_outputs(folder)
    train = configure(keys[0], preset_name=preset, settings=settings, **options).train
    fair = options | fair_budget(train, settings, per_run)
    configs = [configure(key, preset_name=preset, settings=settings, **fair) for key in keys]
    if len({config.size for config in configs}) > 1:
        raise UserError(
            f"The systems draw at different sizes at preset {preset}; set one with --set size=..."
        )
    config = configs[0]
    if text != HISTORICAL:
        check_encoder(text, config.encoder)
    members = members_to_train(keys, config.seed, seeds, folder)

    @functools.cache
    def fingerprint(data_seed: int) -> str:
        return fingerprint_of(load_dataset(config.data, "train", config.size, data_seed))

    for member in members:
        asked = fair | {"seed": member.seed}
        own = configure(member.key, preset_name=preset, settings=settings, **asked)
        _check_existing(member.folder, own, fingerprint, per_run)
    check_runs(configs)
    scoring = EvalConfig(
        pictures=pictures, device=config.train.device, features=features, scorer=scorer
    )
    check_scoring(config.data, config.size, config.seed, scoring)

    def flags(own_seed: int | None = seed) -> list[str]:
        """Flags of `lineage train` for all runs of a seed."""
        own = fair | {"threads": per_run, "seed": own_seed}
        return ["--preset", preset, *flags_of(own, settings)]

    held = None if text == HISTORICAL else text
    others = {name: value for name, value in settings.items() if name != "text"}
    several: dict[str, Any] = {"seeds": seeds} if seeds > 1 else {}
    whole = options | several | {"text": held, "threads": threads}
    whole_flags = ["--preset", preset, *flags_of(whole, others), *scoring_flags(scoring)]
    at_once = runs_at_once(per_run)
    with claimed(folder):
        if per_run and config.train.cpu_minutes is not None:
            say(fairness(config.train.cpu_minutes, per_run, min(at_once, len(members))))
        commands = {
            member.name: _command(
                member, flags() if member.seed == config.seed else flags(member.seed)
            )
            for member in members
        }
        reasons = train_all(commands, at_once)
        trained = [member for member in members if member.name not in reasons]
        if not trained:
            name, reason = next(iter(reasons.items()))
            raise CheckFailed(f"No system could be trained; {name}: {reason}")
        alone = [
            ["lineage", "train", key, *flags(), "--out", f"{folder.name}/{key}"] for key in keys
        ]
        facts = {
            "budget": {
                "minutes": train.minutes,
                "steps": train.max_steps,
                "pictures": train.max_pictures,
                "flops": train.max_flops,
            },
            "cpu_minutes": config.train.cpu_minutes,
            "threads": per_run,
            "text": text,
            "failed": _failed(members, reasons),
            "reproduce": as_lines(
                [
                    ["lineage", "compare", *keys, *whole_flags, "--out", folder.name],
                    *alone,
                ]
            ),
        }
        with use_threads(demanded):
            report = write_all(folder, trained, config, scoring, facts)
    if reasons:
        raise CheckFailed(
            f"{'; '.join(reasons)} could not be trained, for the reasons above; {report} has the "
            "others."
        )
    return report


def compare_runs(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "runs/compare",
    device: str | None = None,
    threads: int | None = None,
    pictures: int = 1000,
    features: str = "auto",
    scorer: str = "auto",
) -> Path:
    """Score finished runs and write the report; returns its path. Nothing is trained.

    Args:
        runs: Run folders of the same data and size, or `pretrained:KEY`; those that differ in their
            seed alone are of one system.
        out, device, threads, pictures, features, scorer: As for `compare`.

    Raises:
        UserError: a folder is no finished run, or the runs differ in data or size.
    """
    folder = expanded(out, "out")
    members = finished_members(runs)
    if not members:
        raise UserError("There is nothing to compare: name at least one run.")
    _check_outputs(folder)
    config = read_config(members[0].folder)
    scoring = EvalConfig(
        pictures=pictures, device=device or "auto", features=features, scorer=scorer
    )
    encoders = {read_config(member.folder).text for member in members}
    command = ["lineage", "compare"]
    for member in members:
        command += ["--from", run_name(member.folder)]
    demanded = requested() if threads is None else typed(Threads, threads, "threads")
    facts = {
        "budget": dict.fromkeys(("minutes", "steps", "pictures", "flops")),
        "cpu_minutes": None,
        "threads": None,
        "text": encoders.pop() if len(encoders) == 1 and len(members) > 1 else HISTORICAL,
        "failed": {},
        "reproduce": as_lines([[*command, *scoring_flags(scoring), "--out", folder.name]]),
    }
    with claimed(folder), use_threads(demanded):
        return write_all(folder, members, config, scoring, facts)


def _compared() -> list[str]:
    """All systems that work and draw, adapters apart, whose base would be what is compared."""
    return [key for key in drawing() if not CATALOG[key].adapts]


def _check_outputs(folder: Path) -> None:
    for name in ("report.html", "report.json", "sheet.png", "systems.bib"):
        check_output(folder / name)


def _command(member: Member, flags: Sequence[str]) -> list[str]:
    """Arguments of `lineage train` for a run, with what its learning curve needs."""
    resume = ["--resume"] if (member.folder / "config.json").exists() else []
    shares = ",".join(f"{share:g}" for share in SHARES)
    extra = {"train.snapshots": shares, "train.count_flops": "true"}
    named = [flag.partition("=")[0] for flag in flags]
    measured = flags_of({}, {n: value for n, value in extra.items() if n not in named})
    return [member.key, "--out", str(member.folder), *resume, *flags, *measured]


def _failed(members: Sequence[Member], reasons: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Title and reason of each system of which no run could be trained."""
    failed = {}
    for system, own in by_system(members).items():
        if all(member.name in reasons for member in own):
            title, reason = CATALOG[own[0].key].title, reasons[own[0].name]
            failed[system] = {"title": title, "reason": reason}
    return failed


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


def _check_existing(
    folder: Path, config: RunConfig, fingerprint: Callable[[int], str], threads: int | None
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
    if saved.get("data_fingerprint") != fingerprint(config.seed):
        raise UserError(
            f"The data {config.data} is no longer what {folder} was trained on: restore it, or "
            "choose another --out."
        )
