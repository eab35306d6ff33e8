"""What a comparison says at a glance, and which differences are none.

Two systems differ in the six tasks if the 95 % interval of their difference, paired by prompts and
by seeds, does not hold 0. A system is among the best if it does not differ from the best one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lineage.evaluation.seeds import difference
from lineage.evaluation.table import ScoreTable
from lineage.units import as_seconds

SAME_TIME = 1.2
"""Ratio of times of drawing below which none is called faster: they were measured once."""

Runs = Mapping[str, Sequence[dict[str, Any]]]
"""Entries of `runs` of an evaluation for each system, by seed."""


class Answer(NamedTuple):
    """A question of the reader's, and what the scores answer."""

    question: str
    answer: str


def answers(
    systems: Mapping[str, dict[str, Any]], runs: Runs, titles: Mapping[str, str]
) -> list[Answer]:
    """Who is ahead, and in what.

    Args:
        systems: Scores of each system.
        runs: Those of its runs.
        titles: Names of the systems for the reader.
    """
    result = []
    if all("composition" in one for one in systems.values()):
        result.append(_follows(systems, runs, titles))
    if closest := _lowest(systems, ("quality", "kid")):
        result.append(
            Answer(
                "Which draws pictures most like real ones?",
                f"{titles[closest[0]]}: the lowest KID."
                if len(closest) == 1
                else f"{_names(closest, titles)}: no KID differs from the lowest beyond chance.",
            )
        )
    costs = {
        name: one["cost"]["sampling"]["sampling_seconds_per_picture_at_16"]
        for name, one in systems.items()
    }
    fast, slow = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    if fast != slow:
        times = costs[slow] / costs[fast]
        first, last = as_seconds(costs[fast]), as_seconds(costs[slow])
        text = (
            f"No system stands out: a picture takes {first} to {last}."
            if times < SAME_TIME
            else f"{titles[fast]}: {first} a picture; {titles[slow]} takes {last}, "
            f"{times:.{0 if times >= 10 else 1}f} times as long."
        )
        result.append(Answer("Which draws fastest?", text))
    if all("composition" in one for one in systems.values()):
        weakest = []
        for name, one in systems.items():
            tasks = one["composition"]["test"]["tasks"]
            task = min(tasks, key=lambda task: tasks[task]["value"])
            value = tasks[task]["value"]
            weakest.append(f"{titles[name]} in {task.replace('_', ' ')} ({value:.2f})")
        result.append(Answer("Where does each fail most?", "; ".join(weakest) + "."))
    return result


def _follows(
    systems: Mapping[str, dict[str, Any]], runs: Runs, titles: Mapping[str, str]
) -> Answer:
    values = {name: one["composition"]["test"]["overall"]["value"] for name, one in systems.items()}
    order = sorted(values, key=lambda name: -values[name])
    best, rest = order[0], order[1:]
    equal = [name for name in rest if not differs(difference(runs[best], runs[name]))]
    first = f"{titles[best]}: {values[best]:.2f} of the six tasks"
    if not rest:
        return Answer("How well does it follow captions?", f"{first}.")
    if equal:
        others = ", ".join(f"{titles[name]} ({values[name]:.2f})" for name in equal)
        text = f"{first}, which is no more than chance above {others}."
    else:
        ahead = difference(runs[best], runs[rest[0]])
        low, high = ahead["interval"]
        text = (
            f"{first}, {ahead['value']:.2f} more than {titles[rest[0]]}, the next "
            f"(95 % interval {low:.2f} to {high:.2f})."
        )
    return Answer("Which follows captions best?", text)


def differs(score: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference does not hold 0."""
    low, high = score["interval"]
    return bool(low > 0 or high < 0)


def _lowest(systems: Mapping[str, dict[str, Any]], path: tuple[str, str]) -> list[str]:
    """Systems with the lowest score, and those whose intervals reach its own; empty without one."""
    section, name = path
    scores = {k: one.get(section, {}).get(name) for k, one in systems.items()}
    known = {key: score for key, score in scores.items() if score is not None}
    if len(known) < 2:
        return []
    best = min(known, key=lambda key: known[key]["value"])
    limit = known[best]["interval"][1]
    return [best, *(k for k, one in known.items() if k != best and one["interval"][0] <= limit)]


def _names(keys: Sequence[str], titles: Mapping[str, str]) -> str:
    names = [titles[key] for key in keys]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def difference_table(runs: Runs, split: str, titles: Mapping[str, str]) -> ScoreTable | None:
    """How much more of the six tasks one system gets right than another; None for one system, or
    without a judge.
    """
    names = list(runs)
    judged = all(split in run.get("composition", {}) for own in runs.values() for run in own)
    if len(names) < 2 or not judged:
        return None
    rows = {}
    for number, name in enumerate(names[1:], start=1):
        cells = [_cell(difference(runs[name], runs[other], split)) for other in names[:number]]
        rows[f"{titles[name]} minus"] = [*cells, *[""] * (len(names) - 1 - number)]
    title = "in training" if split == "test" else "never in training"
    return ScoreTable(
        f"Differences, combinations {title}",
        [titles[name] for name in names[:-1]],
        rows,
        "share of the six tasks, paired by prompts and seeds, each pair by itself; = if the 95 % "
        "interval holds 0, so that there may be no difference",
    )


def _cell(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    mark = "" if differs(score) else "= "
    return f"{mark}{score['value']:+.2f} ({low:+.2f} to {high:+.2f})"
