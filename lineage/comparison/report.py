"""The report of a comparison: one HTML file with everything in it, readable on a phone and on a
wide screen, in light and in dark.

The page is `report.html` in this folder, a Jinja2 template; this module makes its parts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from lineage.characters import valid
from lineage.evaluation.scoring import Failure
from lineage.evaluation.table import ScoreTable, score_tables
from lineage.files import write_bytes
from lineage.sheets import data_url, picture
from lineage.system import LabelledImage
from lineage.units import as_seconds

_INK = "#0a0b0c"  # replaced by the page's own text colour
_COLOURS = ("#3b7ddd", "#d9822b", "#2f9e6e", "#b0569f", "#8a8f2a", "#7a5cc9")
_DASHES = ("-", "--", ":", "-.")

MAX_TERMS = 12  # curves in one figure; beyond, the sum of each group's terms
MAX_FAILURES = 12  # failed pictures of a system on the page

HISTORICAL = "historical"
"""`text` of a comparison in which each system has the encoder of its recipe."""

SPLIT_TITLES = {
    "test": "Combinations in training",
    "heldout": "Combinations never in training",
}


@dataclass(frozen=True)
class SystemPage:
    """Pictures and log of one system; all pictures are (3, S, S) uint8.

    Attributes:
        pictures: [caption][seed] pictures.
        visualisation: Rows of labelled pictures; empty if the system has none.
        log: Lines of its `metrics.jsonl`.
        failures: Pictures that do not show their prompt.
    """

    pictures: list[list[Tensor]]
    visualisation: list[list[LabelledImage]]
    log: list[dict[str, Any]]
    failures: list[Failure]


def write_report(
    path: Path, summary: dict[str, Any], real: Sequence[Tensor], pages: Mapping[str, SystemPage]
) -> None:
    """Write the page.

    Args:
        summary: The data, as in `report.json`.
        real: One real picture (3, S, S) uint8 for each caption.
        pages: Pictures and log of each system, by its key.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"seconds": as_seconds, "embed": embed}
    source = resources.files("lineage.comparison").joinpath("report.html")
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        **summary,
        real=real,
        pages=pages,
        max_failures=MAX_FAILURES,
        visualised_caption=max(summary["captions"], key=len),
        curves={key: figure for key in pages if (figure := curve(pages[key].log)) is not None},
        wall=wall_time(summary),
        bars=bars(summary["scores"], summary["order"]),
        tables=[encoder_table(summary), *score_tables(summary["scores"])],
    )
    write_bytes(path, valid(page).encode())


def bars(scores: dict[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """The strict shares as bars: a panel for each split, in it the tasks, in each the systems."""
    panels = []
    for split, title in SPLIT_TITLES.items():
        if split not in scores["real"].get("composition", {}):
            continue
        rows = [scores["real"], scores["shuffled"], *scores["runs"]]
        sections = [row["composition"][split] for row in rows]
        real, floor, *runs = [{**one["tasks"], "overall": one["overall"]} for one in sections]
        tasks = [
            {
                "name": name.replace("_", " "),
                "bars": [{"key": key, **run[name]} for key, run in zip(order, runs, strict=True)],
                "real": real[name]["value"],
                "floor": floor[name]["value"],
            }
            for name in real
        ]
        panels.append({"title": title, "tasks": tasks})
    return panels


def encoder_table(summary: dict[str, Any]) -> ScoreTable:
    """The text encoder of each system."""
    encoders = {key: system["encoder"] for key, system in summary["systems"].items()}
    historical = summary["text"] == HISTORICAL
    return ScoreTable(
        "Text encoders",
        ["encoder", "width of a word"],
        {key: [one["name"], str(one["width"])] for key, one in encoders.items()},
        "each system has the encoder of its recipe"
        if historical
        else "one encoder for all systems, of the sizes of each recipe where the command sets none",
    )


def wall_time(summary: dict[str, Any]) -> float:
    """Seconds of training of all systems together."""
    systems = summary["systems"].values()
    return sum(stage["seconds"] for system in systems for stage in system["training"].values())


def embed(image: Tensor) -> str:
    """(3, S, S) uint8 -> a data URL of a PNG."""
    return data_url(picture(image))


# --- curves -----------------------------------------------------------------------------------


def curve(log: list[dict[str, Any]]) -> Markup | None:
    """The loss terms of a log over the minutes of training, as SVG in the page's colours.

    None for a log without losses.
    """
    minutes = _minutes(log)
    names = [name for name in dict.fromkeys(n for line in log for n in line) if "/" in name]
    names = [name for name in names if not name.startswith(("gradient/", "metric/"))]
    if not names:
        return None
    if len(names) > MAX_TERMS:
        log, names = _group_sums(log, names)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lineage", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            points = [(m, line[name]) for m, line in zip(minutes, log, strict=True) if name in line]
            colour, dash = line_style(number)
            axes.plot(*zip(*thinned(points), strict=True), dash, label=name, color=colour, lw=1.2)
        if all(line.get(name, 1) > 0 for line in log for name in names):
            axes.set_yscale("log")
        axes.set_xlabel("minutes of training", color=_INK)
        axes.tick_params(colors=_INK, which="both")
        axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        longest = max(map(len, names))  # of 331 points, a letter needs about 4.5 and a line 45
        figure.legend(
            loc="outside upper left",
            ncols=min(3, max(1, round(331 // (45 + 4.5 * longest)))),
            handlelength=3,
            frameon=False,
            labelcolor=_INK,
            fontsize=7,
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def line_style(number: int) -> tuple[str, str]:
    """Colour and dash of a curve: 24 pairs, and neighbours differ in both."""
    colours, dashes = len(_COLOURS), len(_DASHES)
    return _COLOURS[number % colours], _DASHES[(number + number // colours) % dashes]


def _group_sums(
    log: list[dict[str, Any]], names: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The log with the sum of each group's terms in place of the terms, and the groups."""
    groups = list(dict.fromkeys(name.split("/")[0] for name in names))
    lines = []
    for line in log:
        terms = {g: [line[n] for n in names if n in line and n.split("/")[0] == g] for g in groups}
        lines.append({**line, **{g: sum(values) for g, values in terms.items() if values}})
    return lines, groups


def _minutes(log: list[dict[str, Any]]) -> list[float]:
    """Time of each line, in minutes of training of all stages together."""
    minutes: list[float] = []
    before, stage, seconds = 0.0, None, 0.0
    for line in log:
        if line["stage"] != stage:
            before += seconds
        stage, seconds = line["stage"], line["seconds"]
        minutes.append((before + seconds) / 60)
    return minutes


def thinned(points: list[tuple[float, float]], count: int = 120) -> list[tuple[float, float]]:
    """About `count` points at most: means of neighbours."""
    size = max(1, len(points) // count)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
