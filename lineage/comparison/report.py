"""The report of a comparison: one HTML file with everything in it, readable on a phone, on a wide
screen and on paper, in light and in dark; and its parts as files of their own (`parts.py`).

The page is `report.html` in this folder, a Jinja2 template; this module makes its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from torch import Tensor

from lineage.characters import valid
from lineage.comparison.curves import score_name
from lineage.comparison.figures import as_svg, loss_figure, score_over_sampling, score_over_time
from lineage.comparison.glance import difference_table
from lineage.comparison.parts import write_parts
from lineage.evaluation.prompts import SPLITS
from lineage.evaluation.scoring import Failure
from lineage.evaluation.table import ScoreTable, score_tables
from lineage.files import write_bytes
from lineage.sheets import data_url, picture
from lineage.system import LabelledImage
from lineage.units import as_count, as_seconds

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
    """Write the page, and its figures, tables and bibliography beside it.

    Args:
        path: File of the page.
        summary: The data, as in `report.json`.
        real: One real picture (3, S, S) uint8 for each caption.
        pages: Pictures and log of each system, by its name.
    """
    tables = report_tables(summary)
    figures = summary_figures(summary)
    losses = {name: figure for name in pages if (figure := loss_figure(pages[name].log))}
    page = rendered(
        "report.html",
        **summary,
        real=real,
        pages=pages,
        max_failures=MAX_FAILURES,
        visualised_caption=max(summary["captions"], key=len),
        figures={name: as_svg(figure) for name, figure in figures.items()},
        losses={name: as_svg(figure) for name, figure in losses.items()},
        wall=wall_time(summary),
        bars=bars(summary["scores"], summary["order"]),
        tables=tables,
        num_seeds=max(map(len, summary["run_seeds"].values())),
    )
    write_bytes(path, page)
    systems = summary["systems"]
    write_parts(
        path.parent,
        tables,
        {**figures, **{f"losses of {name}": figure for name, figure in losses.items()}},
        {name: system["title"] for name, system in systems.items()},
        [system["config"]["key"] for system in systems.values()],
    )


def rendered(template: str, **content: Any) -> bytes:
    """A page of this folder, filled in."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"seconds": as_seconds, "count": as_count, "embed": embed}
    source = resources.files("lineage.comparison").joinpath(template)
    page = environment.from_string(source.read_text(encoding="utf-8")).render(**content)
    return valid(page).encode()


def report_tables(summary: dict[str, Any]) -> list[ScoreTable]:
    """All tables of the page; a system that failed has a dash in each."""
    failed = [system["title"] for system in summary["failed"].values()]
    titles = {name: system["title"] for name, system in summary["systems"].items()}
    differences = [difference_table(summary["runs"], split, titles) for split in SPLITS]
    tables = [
        replace(table, rows={**table.rows, **{title: ["–"] * len(table.heads) for title in failed}})
        for table in (encoder_table(summary), *score_tables(summary["scores"]))
    ]
    return [*tables, *(table for table in differences if table is not None)]


def summary_figures(summary: dict[str, Any]) -> dict[str, Figure]:
    """Score against time of training, and against time of drawing, as far as they are known."""
    scores, curves = summary["scores"], summary["curves"]
    judged = "composition" in scores["real"]
    titles = {name: system["title"] for name, system in summary["systems"].items()}
    floor, ceiling = (
        row["composition"]["test"]["overall"]["value"]
        if judged
        else row.get("text_fit", {}).get("r_precision", {}).get("value")
        for row in (scores["shuffled"], scores["real"])
    )
    clock = "seconds" if summary["machine"]["gpu"] else "cpu_seconds"
    sampling = {
        name: (system["sampling"]["sampling_seconds_per_picture_at_16"], curves[name][-1]["score"])
        for name, system in summary["systems"].items()
        if curves.get(name)
    }
    figures = {
        "score over time": score_over_time(
            curves, titles, score_name(judged), floor, ceiling, clock
        ),
        "score over flops": score_over_time(
            curves, titles, score_name(judged), floor, ceiling, "flops"
        )
        if all("flops" in point for points in curves.values() for point in points)
        else None,
        "score over drawing": score_over_sampling(sampling, titles, score_name(judged)),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


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
    """Seconds of training of all runs together."""
    runs = [run for own in summary["runs"].values() for run in own]
    return sum(stage["seconds"] for run in runs for stage in run["cost"]["training"].values())


def embed(image: Tensor) -> str:
    """(3, S, S) uint8 -> a data URL of a PNG."""
    return data_url(picture(image))
