"""The report of a comparison: one HTML file with everything in it, readable on a phone and on a
wide screen, in light and in dark. The page is `report.html` in this folder, a Jinja2 template; here
its pieces are made.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from lineage.evaluation.judge import PARTS
from lineage.evaluation.table import cell
from lineage.sheets import picture
from lineage.system import Named
from lineage.training.store import write_bytes
from lineage.units import as_bytes, as_count, as_seconds

_INK = "#0a0b0c"  # stands for the page's own text colour, whatever that is
_LINES = ("#3b7ddd", "#d9822b", "#2f9e6e", "#b0569f", "#8a8f2a", "#7a5cc9")

TERMS = 12  # curves in one figure, at most; beyond, the sum of each group's
MISSES = 12  # failed pictures of a system on the page

Columns = Mapping[str, list[list[Tensor]]]


def write_report(
    path: Path,
    summary: dict[str, Any],
    real: list[Tensor],
    columns: Columns,
    inside: Mapping[str, list[list[Named]]],
    logs: Mapping[str, list[dict[str, Any]]],
    failed: Mapping[str, list[tuple[str, str, str, Tensor]]],
) -> None:
    """Write the page.

    Args:
        summary: the facts, as in `report.json`.
        real: one picture (3, S, S) uint8 a caption.
        columns: of each system, [caption][seed] pictures of the same kind.
        inside: of each system, rows of pictures (3, S, S) uint8 with their names, or none.
        logs: of each system, the lines of its `metrics.jsonl`.
        failed: of each system, (task, caption, what the judge sees, picture) where it failed.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"count": as_count, "seconds": as_seconds, "bytes": as_bytes}
    template = environment.from_string(
        resources.files("lineage.comparison").joinpath("report.html").read_text(encoding="utf-8")
    )
    rows = [
        {
            "caption": caption,
            "real": embed(real[i]),
            "systems": [
                {"key": key, "pictures": [embed(p) for p in columns[key][i]]}
                for key in summary["order"]
            ],
        }
        for i, caption in enumerate(summary["captions"])
    ]
    curves = {key: figure for key, log in logs.items() if (figure := curve(log)) is not None}
    misses = {
        key: [
            {"prompt": prompt, "seen": seen, "picture": embed(image)}
            for _, prompt, seen, image in of[:MISSES]
        ]
        for key, of in failed.items()
    }
    page = template.render(
        **summary,
        rows=rows,
        curves=curves,
        wall=wall_time(summary),
        bars=bars(summary["scores"], summary["order"]),
        lines=score_lines(summary["scores"]),
        misses=misses,
        inside={
            key: [[(name, embed(image)) for name, image in row] for row in of]
            for key, of in inside.items()
            if of
        },
        inside_caption=max(summary["captions"], key=len),
    )
    write_bytes(path, page.encode())


def bars(scores: dict[str, Any], order: list[str]) -> list[dict[str, Any]]:
    """The strict shares as bars: a panel for each split, in it the tasks, in each the systems."""
    panels = []
    titles = {"test": "Combinations that training shows", "heldout": "Combinations it never shows"}
    for split, title in titles.items():
        if split not in scores["real"].get("composition", {}):
            continue
        real, floor = (scores[row]["composition"][split] for row in ("real", "shuffled"))
        runs = [run["composition"][split] for run in scores["runs"]]
        tasks = [
            {
                "name": name.replace("_", " "),
                "bars": [
                    {"key": key, **_of(run, name)} for key, run in zip(order, runs, strict=True)
                ],
                "real": _of(real, name)["value"],
                "floor": _of(floor, name)["value"],
            }
            for name in [*real["tasks"], "overall"]
        ]
        panels.append({"title": title, "tasks": tasks})
    return panels


def _of(composition: dict[str, Any], task: str) -> dict[str, Any]:
    return dict(composition["overall"] if task == "overall" else composition["tasks"][task])


def score_lines(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The other scores: a line for each, with a cell for each run, then real and shuffled."""
    rows = [*scores["runs"], scores["real"], scores["shuffled"]]
    wanted: list[tuple[tuple[str, ...], str]] = [
        (("composition", "test", "parts", part), f"{part} right, of those asked for")
        for part in PARTS
    ]
    wanted += [
        (("quality", "fid"), "FID ↓"),
        (("quality", "kid"), "KID ↓"),
        (("quality", "precision"), "precision"),
        (("quality", "recall"), "recall"),
        (("quality", "density"), "density"),
        (("quality", "coverage"), "coverage"),
        (("diversity", "spread_against_real"), "spread of one caption's samples, real = 1"),
        (("diversity", "spread"), "spread of one caption's samples"),
        (("memorisation", "nearer_than_unseen_real"), "nearer to training than unseen real"),
        (("stages", "reconstruction", "test", "overall"), "codec alone: right when decoded"),
        (("stages", "psnr"), "codec alone: PSNR, dB"),
        (("stages", "nats_per_code"), "prior alone: nats per code ↓"),
        (("stages", "accuracy"), "prior alone: accuracy, true codes before"),
        (("stages", "bits_per_dim"), "codec and prior: bits per dimension ↓"),
        (("text_fit", "r_precision"), "R-precision"),
        (("text_fit", "clip_score"), "CLIP score"),
    ]
    lines = []
    for path, name in wanted:
        found = [_at(row, path) for row in rows]
        if any(score is not None for score in found):
            lines.append({"name": name, "cells": [cell(score) for score in found]})
    return lines


def _at(row: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """What stands in nested dicts at `path`, or None."""
    at: Any = row
    for name in path:
        at = at.get(name, {}) if isinstance(at, dict) else {}
    return at or None


def wall_time(summary: dict[str, Any]) -> float:
    """Seconds of training, all systems together."""
    return sum(
        s["seconds"] for facts in summary["systems"].values() for s in facts["training"].values()
    )


def embed(image: Tensor) -> str:
    """(3, S, S) uint8 -> a data URL of a PNG."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(log: list[dict[str, Any]]) -> Markup | None:
    """The loss terms of a log over the minutes of training, as SVG that takes the page's colours.

    None for a log without losses.
    """
    minutes = _minutes(log)
    names = [name for name in dict.fromkeys(n for line in log for n in line) if "/" in name]
    names = [name for name in names if not name.startswith(("gradient/", "health/"))]
    if not names:
        return None
    if len(names) > TERMS:
        log, names = _summed(log, names)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lineage", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for name, colour in zip(names, _LINES * 9, strict=False):
            points = [(m, line[name]) for m, line in zip(minutes, log, strict=True) if name in line]
            axes.plot(*zip(*_thinned(points), strict=True), label=name, color=colour, linewidth=1.2)
        if all(line.get(name, 1) > 0 for line in log for name in names):
            axes.set_yscale("log")
        axes.set_xlabel("minutes of training", color=_INK)
        axes.tick_params(colors=_INK, which="both")
        axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=_INK, fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def _summed(log: list[dict[str, Any]], names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The log with the sum of each group's terms in place of the terms, and the groups."""
    groups = list(dict.fromkeys(name.split("/")[0] for name in names))
    lines = []
    for line in log:
        terms = {g: [line[n] for n in names if n in line and n.split("/")[0] == g] for g in groups}
        lines.append({**line, **{g: sum(values) for g, values in terms.items() if values}})
    return lines, groups


def _minutes(log: list[dict[str, Any]]) -> list[float]:
    """When each line was written, in minutes of training of all stages together."""
    minutes: list[float] = []
    before, stage, seconds = 0.0, None, 0.0
    for line in log:
        if line["stage"] != stage:
            before += seconds
        stage, seconds = line["stage"], line["seconds"]
        minutes.append((before + seconds) / 60)
    return minutes


def _thinned(points: list[tuple[float, float]], most: int = 120) -> list[tuple[float, float]]:
    """At most about `most` points: means of neighbours."""
    size = max(1, len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
