"""Changes of settings when a run goes on, and their record.

A run goes on with its own settings. Another budget, or another rate after a loss that became
infinite, may be given; `config.json` then lists, under `changes`, what was trained with the
settings before. What a network or the data is built from cannot change.

    {"changes": [{"stage": "denoiser", "step": 500, "fields": {"optim.lr": [0.002, 0.001]}}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineage.config import RunConfig, flat
from lineage.cores import usable_cpus
from lineage.errors import UserError, say_once
from lineage.threads import requested, worded
from lineage.training.stage import NOT_IN_KEY, Stage, state_path
from lineage.training.store import load_state

Fields = dict[str, tuple[Any, Any]]
"""Value before and value now of each setting that differs, by its dotted name."""


def differences(before: RunConfig, now: RunConfig) -> Fields:
    """Settings that differ between two configurations of one system."""
    old, new = flat(before), flat(now)
    names = [*old, *(name for name in new if name not in old)]
    return {n: (old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)}


def result_settings(fields: Fields) -> Fields:
    """The settings among `fields` on which the result of a run depends."""
    return {name: pair for name, pair in fields.items() if name.split(".")[-1] not in NOT_IN_KEY}


def check_changes(folder: Path, fields: Fields) -> None:
    """Raise `UserError` for a setting that a run in `folder` cannot change."""
    for name, (before, now) in fields.items():
        group = name.split(".")[0]
        may_change = group == "train" or group.endswith("optim")
        if not may_change and result_settings({name: (before, now)}):
            raise UserError(
                f"{name}={now} does not fit the run in {folder}, which has {name}={before}: "
                "leave it out, or choose another --out."
            )


def last_threads(saved: dict[str, Any]) -> int | None:
    """The number of threads that a run used last; None if it keeps none, or if that is damaged.

    Args:
        saved: Content of `config.json`.
    """
    counts = [saved.get("made_with", {}).get("threads")]
    for change in saved.get("changes", []):
        counts += change.get("fields", {}).get("threads", [])[1:]
    last = counts[-1]
    return last if type(last) is int and last >= 1 else None


def recorded_changes(
    folder: Path,
    stages: list[Stage],
    fields: Fields,
    changes: list[dict[str, Any]],
    threads: tuple[Any, Any] | None = None,
) -> list[dict[str, Any]]:
    """The changes of a run in `folder`, with `fields` and the number of `threads`, before and now,
    from where it stands.

    Raises:
        UserError: the run is finished, so that other settings would have no effect.
    """
    fields = result_settings(fields)
    if not fields and threads is None:
        return changes
    for stage in reversed(stages):
        path = state_path(folder, stage, stages)
        if path.exists():
            break
    else:
        return changes  # nothing was trained with the settings before
    state, train = load_state(path), stage.budgeted()
    step = int(state["step"])
    spent = train.spent(
        step=step,
        pictures=step * train.batch_size,
        seconds=float(state.get("seconds", 0)),
        cpu_seconds=float(state.get("cpu_seconds", 0)),
    )
    if stage is [one for one in stages if one.trains][-1] and spent >= 1:
        if not fields:
            return changes
        name, (before, now) = next(iter(fields.items()))
        raise UserError(
            f"The run in {folder} has spent its budget ({step} steps of {stage.name}), "
            f"so {name}={now} (it has {before}) would have no effect: give a larger budget, or "
            "choose another --out."
        )
    for earlier in stages[: stages.index(stage)]:
        for name in fields:
            if earlier.optim_setting and name.split(".")[0] == earlier.optim_setting:
                raise UserError(
                    f"{name}={fields[name][1]} would have no effect: stage {earlier.name} of the "
                    f"run in {folder} is finished. Leave it out, or choose another --out."
                )
    pairs = {name: list(pair) for name, pair in fields.items()}
    if threads is not None:
        pairs["threads"] = list(threads)
    return [*changes, {"stage": stage.name, "step": step, "fields": pairs}]


def usable_threads(folder: Path, before: int | None) -> int | None:
    """The number of threads that a resumed run goes on with; None to measure.

    Args:
        folder: Run folder.
        before: Number that it used last; None if it has not measured.
    """
    demanded, usable = requested(), usable_cpus()
    if before is None or (demanded in (None, before) and before <= usable):
        return before
    now = f"with {demanded}" if demanded else f"here it may use {usable}, so"
    say_once(
        f"The run in {folder} began with {worded(before)}; {now} its "
        f"last bits may differ from those of an unstopped run. Add --threads {before}, or set "
        f"OMP_NUM_THREADS={before}, to keep them."
    )
    return None
