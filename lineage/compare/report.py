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

from lineage.sheets import picture
from lineage.train.store import write_bytes

_INK = "#0a0b0c"  # stands for the page's own text colour, whatever that is
_LINES = ("#3b7ddd", "#d9822b", "#2f9e6e", "#b0569f", "#8a8f2a", "#7a5cc9")

Columns = Mapping[str, list[list[Tensor]]]


def write_report(
    path: Path,
    summary: dict[str, Any],
    real: list[Tensor],
    columns: Columns,
    logs: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Write the page.

    Args:
        summary: the facts, as in `report.json`.
        real: one picture (3, S, S) uint8 a caption.
        columns: of each system, [caption][seed] pictures of the same kind.
        logs: of each system, the lines of its `metrics.jsonl`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"count": as_count, "seconds": as_seconds, "bytes": as_bytes}
    template = environment.from_string(
        resources.files("lineage.compare").joinpath("report.html").read_text(encoding="utf-8")
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
    page = template.render(**summary, rows=rows, curves=curves, wall=wall_time(summary))
    write_bytes(path, page.encode())


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
    """Every loss term of a log over the minutes of training, as SVG that takes the page's colours.

    None for a log without losses.
    """
    minutes = _minutes(log)
    names = [name for name in dict.fromkeys(n for line in log for n in line) if "/" in name]
    names = [name for name in names if not name.startswith("gradient/")]
    if not names:
        return None
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


def _with_unit(value: float, units: tuple[str, ...]) -> str:
    """Three digits and a unit, each a thousand times the one before it."""
    power = 0
    while float(f"{value:.3g}") >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if float(f"{value:.3g}") >= 1000 else f"{value:.3g}"
    return f"{digits} {units[power]}".strip()


def as_count(value: float) -> str:
    """1234567 -> `1.23 M`."""
    return _with_unit(value, ("", "k", "M", "G", "T"))


def as_seconds(value: float) -> str:
    """0.0123 -> `12.3 ms`."""
    return _with_unit(value * 1e3, ("ms", "s"))


def as_bytes(value: float) -> str:
    """1234567 -> `1.23 MB`."""
    return _with_unit(value, ("B", "kB", "MB", "GB", "TB"))
