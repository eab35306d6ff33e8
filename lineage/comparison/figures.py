"""Figures of a comparison: for its page, as SVG in the colours of the page, and for a student's own
report, as SVG and PNG on white.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lineage.comparison.curves import Point
from lineage.files import write_bytes

_INK = "#0a0b0c"  # replaced by the page's own text colour
_COLOURS = ("#3b7ddd", "#d9822b", "#2f9e6e", "#b0569f", "#8a8f2a", "#7a5cc9")
_DASHES = ("-", "--", ":", "-.")
_RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "lineage", "font.size": 9}

MAX_TERMS = 12  # curves in one figure; beyond, the sum of each group's terms


def as_svg(figure: Figure) -> Markup:
    """A figure for the page: transparent, its ink in the page's own colour."""
    with matplotlib.rc_context(_RC):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure on white as `path` with the suffixes .svg and .png."""
    forms: dict[str, Any] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 200}}
    for form, options in forms.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(_RC):
            figure.savefig(buffer, format=form, facecolor="white", **options)
        write_bytes(path.with_suffix(f".{form}"), buffer.getvalue())


def _axes(width: float = 4.6, height: float = 2.7) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in ink."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=_INK, which="both")
    axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    return figure, axes


def _legend(figure: Figure, names: Sequence[str], width: float) -> None:
    """A legend above the axes, in as many columns as fit."""
    points = 72 * width
    longest = max(map(len, names))  # a letter needs about 4.5 points and a line 45
    figure.legend(
        loc="outside upper left",
        ncols=min(3, max(1, round(points // (45 + 4.5 * longest)))),
        handlelength=3,
        frameon=False,
        labelcolor=_INK,
        fontsize=7,
    )


CLOCKS = {
    "cpu_seconds": (60, "minutes of processor time"),
    "seconds": (60, "minutes of training"),
    "flops": (1e12, "teraFLOPs of training"),
}
"""Unit and name of what a score is drawn against."""


# --- scores -----------------------------------------------------------------------------------


def score_over_time(
    curves: Mapping[str, Sequence[Point]],
    titles: Mapping[str, str],
    label: str,
    floor: float | None,
    ceiling: float | None,
    clock: str = "cpu_seconds",
) -> Figure | None:
    """The summary: score against minutes or operations of training, a line a system.

    The shade is the 95 % interval: over runs and prompts where there are several seeds, over
    prompts for one. None if nothing was scored.

    Args:
        curves: Points of each system.
        titles: Names of the systems for the reader.
        label: What the score is.
        floor, ceiling: Scores of shuffled and of real pictures, if known.
        clock: What the score is drawn against, of `CLOCKS`.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    unit, clock_name = CLOCKS[clock]
    figure, axes = _axes(7.2, 3.6)
    for number, (name, points) in enumerate(curves.items()):
        colour, dash = line_style(number)
        times = [point[clock] / unit for point in points]
        axes.plot(
            times,
            [point["score"]["value"] for point in points],
            dash,
            marker="o",
            markersize=3.5,
            color=colour,
            lw=1.4,
            label=titles[name],
        )
        low, high = zip(*(point["score"]["interval"] for point in points), strict=True)
        if len(points) > 1:
            axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(times, low, high, color=colour, lw=1.2)
    for value, name in ((floor, "floor: other captions"), (ceiling, "real pictures")):
        if value is not None:
            axes.axhline(value, color=_INK, lw=0.8, ls=(0, (1, 3)))
            axes.annotate(
                name,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, -2 if value > 0.5 else 2),
                textcoords="offset points",
                ha="right",
                va="top" if value > 0.5 else "bottom",
                fontsize=7,
                color=_INK,
            )
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(clock_name, color=_INK)
    axes.set_ylabel(label, color=_INK)
    _legend(figure, [titles[name] for name in curves], 7.2)
    return figure


def score_over_sampling(
    points: Mapping[str, tuple[float, dict[str, Any]]], titles: Mapping[str, str], label: str
) -> Figure | None:
    """Score against the time of drawing one picture, a mark a system.

    Args:
        points: (seconds a picture, score) of each system.
    """
    known = {name: point for name, point in points.items() if point[0] > 0}
    if not known:
        return None
    figure, axes = _axes(7.2, 3.2)
    for number, (name, (seconds, score)) in enumerate(known.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        low, high = score["interval"]
        milliseconds = 1000 * seconds
        axes.vlines(milliseconds, low, high, color=colour, lw=1.2)
        axes.plot(
            [milliseconds], [score["value"]], "os^Dv"[number % 5], color=colour, label=titles[name]
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("milliseconds for one picture of 16", color=_INK)
    axes.set_ylabel(label, color=_INK)
    _legend(figure, [titles[name] for name in known], 7.2)
    return figure


# --- losses -----------------------------------------------------------------------------------


def loss_figure(log: list[dict[str, Any]]) -> Figure | None:
    """The loss terms of a log over the minutes of training; None for a log without losses."""
    minutes = _minutes(log)
    names = [name for name in dict.fromkeys(n for line in log for n in line) if "/" in name]
    names = [name for name in names if not name.startswith(("gradient/", "metric/"))]
    if not names:
        return None
    if len(names) > MAX_TERMS:
        log, names = _group_sums(log, names)
    figure, axes = _axes()
    for number, name in enumerate(names):
        points = [(m, line[name]) for m, line in zip(minutes, log, strict=True) if name in line]
        colour, dash = line_style(number)
        axes.plot(*zip(*thinned(points), strict=True), dash, label=name, color=colour, lw=1.2)
    if all(line.get(name, 1) > 0 for line in log for name in names):
        axes.set_yscale("log")
    axes.set_xlabel("minutes of training", color=_INK)
    _legend(figure, names, 4.6)
    return figure


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
