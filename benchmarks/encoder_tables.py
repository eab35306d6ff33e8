"""Scores, tables and plot of `encoders.py`, made from the lines of its trials."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from composition import cell, markdown_table
from matplotlib.lines import Line2D

from lineage.evaluation.intervals import seeds_score
from lineage.evaluation.prompts import SPLITS, TASKS
from lineage.text.encoders import CLIP_RUN

FAMILIES = {"vqvae": "codec", "ldm": "autoencoder"}
"""Systems, and the stage that their trials share."""
MINILM = "minilm"
BASELINE = "transformer"
ORDER = ("position", "color_attr")
"""Tasks in which two captions of the same words, in another order, describe other pictures."""
DARK = "#333333"

Values = list[list[list[float]]]
"""[run][task][prompt] verdicts, or their differences."""


def values_of(lines: list[dict[str, Any]], split: str, tasks: tuple[str, ...]) -> Values:
    return [[[float(v) for v in line["verdicts"][split][t]] for t in tasks] for line in lines]


def differences(ours: Values, others: Values) -> Values:
    """Verdict minus verdict, of the same seed and prompt."""
    return [
        [[a - b for a, b in zip(p, q, strict=True)] for p, q in zip(one, other, strict=True)]
        for one, other in zip(ours, others, strict=True)
    ]


def scored(lines: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of one encoder in one family over its seeds, and its paired differences to the
    baseline over the seeds of both.
    """
    of_seed = {line["seed"]: line for line in lines}
    base_of = {line["seed"]: line for line in base}
    both = sorted(of_seed.keys() & base_of.keys())
    result: dict[str, Any] = {}
    for split in SPLITS:
        result[split] = {}
        for name, tasks in {"overall": TASKS, **{task: (task,) for task in TASKS}}.items():
            values = values_of(lines, split, tuple(tasks))
            per_seed = [sum(sum(t) / len(t) for t in run) / len(run) for run in values]
            entry: dict[str, Any] = {
                **seeds_score(values),
                "of_seeds": {n: round(v, 4) for n, v in zip(of_seed, per_seed, strict=True)},
            }
            if both and lines[0]["encoder"] != BASELINE:
                ours = values_of([of_seed[n] for n in both], split, tuple(tasks))
                theirs = values_of([base_of[n] for n in both], split, tuple(tasks))
                entry["difference"] = seeds_score(differences(ours, theirs), lowest=-1.0)
            result[split][name] = entry
    return result


def page(document: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = ["# What a text encoder is worth", "", intro(document["cpu_minutes"])]
    for family in FAMILIES:
        rows = [row for row in document["rows"] if row["family"] == family]
        if rows:
            lines += ["", f"## `{family}`", "", *cost_table(rows)]
            for split, title in zip(SPLITS, ("Seen", "Held-out"), strict=True):
                bounds = bounds_of(document, family)
                lines += ["", f"{title} combinations:", "", *score_table(rows, split, bounds)]
    for name, reason in document["skipped"].items():
        lines += ["", f"No trial of `{name}`: {reason}."]
    for one in document["failed"]:
        name = f"{one['family']} {one['encoder']} {one['seed']}"
        lines += ["", f"Failed: {name} ({one['failed']})."]
    made = document["machine"]
    lines += ["", f"Made by `{document['command']}`, trained at commit "]
    lines[-1] += f"{', '.join(document['commits'])}, on {made['processor']}, torch {made['torch']}."
    return "\n".join(lines) + "\n"


def intro(cpu_minutes: float) -> str:
    """What the tables hold."""
    return (
        "Preset tiny, `shapes`. In each family all trials share one autoencoder; a trial trains "
        f"the rest for {cpu_minutes:g} minutes of one core. A score is a share of pictures with "
        "exactly the scene of the prompt; `overall` is the mean of six tasks. Intervals are 95 % "
        "bootstrap intervals over seeds and prompts; with one seed, over prompts alone. *minus "
        f"{BASELINE}* is the mean difference of pictures of the same prompt and seed. *real* are "
        "real pictures of the prompts, *autoencoder* the same encoded and decoded, *shuffled* real "
        "pictures of other prompts of the same task: the floor. `position` and `color_attr` need "
        "the order of the words. *encoding* is the share of processor time in forward passes of "
        "the encoder; a frozen one encodes each caption once. The budget does not hold the "
        "training of the frozen encoders. The prior of `vqvae` has positions for words, and is "
        "trained to predict the next word too if the encoder is causal (`bag`, `transformer`, "
        "`clip`)."
    )


def bounds_of(document: dict[str, Any], family: str) -> dict[str, Any]:
    """Sections of real pictures, by the names of their rows."""
    bounds = {"real": document["real"]}
    if family in document["reconstruction"]:
        bounds["autoencoder"] = document["reconstruction"][family]["composition"]
    return {**bounds, "shuffled": document["shuffled"]}


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    table_head = ["encoder", "trained", "width of words", "parameters of encoder"]
    table_head += ["trained parameters", "seeds", "steps", "encoding"]
    cells = []
    for row in rows:
        counts = row["parameters"]
        trained = sum(n for name, n in counts.items() if name not in ("encoder", "all"))
        cells.append(
            [
                f"`{row['encoder']}`",
                "yes" if row["trained"] else "frozen",
                row["word_width"],
                f"{counts['encoder']:,}",
                f"{trained:,}",
                " ".join(map(str, row["seeds"])),
                " / ".join(f"{n:,}" for n in row["steps"]),
                f"{100 * row['encoding_share']:.1f} %",
            ]
        )
    return markdown_table(table_head, cells)


def score_table(rows: list[dict[str, Any]], split: str, bounds: dict[str, Any]) -> list[str]:
    names = ["overall", *ORDER]
    rest = [task for task in TASKS if task not in ORDER]
    table_head = ["encoder"]
    for name in names:
        table_head += [f"`{name}`", f"minus {BASELINE}"]
    cells = []
    for row in rows:
        scores = row["scores"][split]
        line = [f"`{row['encoder']}`"]
        for name in names:
            difference = scores[name].get("difference")
            line += [cell(scores[name]), cell(difference, "+") if difference else ""]
        cells.append([*line, *(f"{scores[task]['value']:.2f}" for task in rest)])
    for name, section in bounds.items():
        one = {"overall": section[split]["overall"], **section[split]["tasks"]}
        line = [f"*{name}*"]
        for score in names:
            line += [f"{one[score]['value']:.2f}", ""]
        cells.append([*line, *(f"{one[task]['value']:.2f}" for task in rest)])
    return markdown_table([*table_head, *(f"`{task}`" for task in rest)], cells)


PANELS = (
    ("overall, seen", "test", "overall"),
    ("overall, held out", "heldout", "overall"),
    ("position, seen", "test", "position"),
    ("color_attr, seen", "test", "color_attr"),
)


def plot(document: dict[str, Any], path: Path) -> None:
    """A row of panels for each family: means with intervals, single seeds, floor and ceiling."""
    families = list(dict.fromkeys(row["family"] for row in document["rows"]))
    names = list(dict.fromkeys(row["encoder"] for row in document["rows"]))
    figure, axes = plt.subplots(
        len(families),
        len(PANELS),
        figsize=(12, 1.2 + len(families) * (0.8 + 0.3 * len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for (family, line), (column, panel) in product(
        zip(families, axes, strict=True), enumerate(PANELS)
    ):
        axis, (title, split, name) = line[column], panel
        bounds = {n: one[split] for n, one in bounds_of(document, family).items()}
        for kind, style in (("shuffled", ":"), ("autoencoder", "--")):
            if kind in bounds:
                section = bounds[kind]
                score = section["overall"] if name == "overall" else section["tasks"][name]
                axis.axvline(score["value"], color=DARK, linestyle=style, linewidth=1)
        for row in (row for row in document["rows"] if row["family"] == family):
            score, y = row["scores"][split][name], names.index(row["encoder"])
            colour, (low, high) = colours[row["encoder"]], score["interval"]
            axis.plot([low, high], [y, y], color=colour, linewidth=2)
            axis.plot(score["value"], y, "o", color=colour, markersize=7)
            seeds = list(score["of_seeds"].values())
            axis.plot(seeds, [y + 0.25] * len(seeds), "|", color=colour, markersize=6)
        axis.set(xlim=(-0.02, 1.02), title=f"{family}: {title}")
        axis.grid(alpha=0.25, axis="x")
    axes[0, 0].set_yticks(range(len(names)), [short(name) for name in names])
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    for axis in axes[-1]:
        axis.set_xlabel("share of exact pictures")
    handles = [
        Line2D([], [], color=DARK, marker="o", linewidth=2, label="mean, 95 % interval"),
        Line2D([], [], color=DARK, marker="|", linewidth=0, label="one seed"),
        Line2D([], [], color=DARK, linestyle=":", label="real pictures of other prompts"),
        Line2D([], [], color=DARK, linestyle="--", label="real pictures, encoded and decoded"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def short(name: str) -> str:
    return "clip (frozen)" if name.startswith(CLIP_RUN) else name.replace(MINILM, "MiniLM (frozen)")
