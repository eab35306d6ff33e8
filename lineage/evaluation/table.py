"""The scores as tables for a terminal: one a section, each between its ceiling and its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lineage.evaluation.judge import PARTS
from lineage.evaluation.prompts import TASKS
from lineage.units import as_bytes, as_count, as_seconds

Row = dict[str, Any]


def tables(document: Row) -> str:
    """The whole document as text."""
    rows = [(_name(document, run), run) for run in document["runs"]]
    rows += [("real pictures", document["real"]), ("shuffled captions", document["shuffled"])]
    parts = [
        *(_composition(document, rows, split) for split in ("test", "heldout")),
        _quality(document, rows),
        _stages(document),
        _text_fit(document, rows),
        _cost(rows),
        *(f"Note: {warning}" for warning in document["warnings"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _name(document: Row, run: Row) -> str:
    """A run's system, or its folder where several are of one system."""
    systems = [r["system"] for r in document["runs"]]
    return str(run["system"] if systems.count(run["system"]) == 1 else run["run"])


def _composition(document: Row, rows: Sequence[tuple[str, Row]], split: str) -> str:
    if "composition" not in document["real"] or split not in document["real"]["composition"]:
        return ""
    protocol = document["protocol"]["composition"]
    tasks = document["real"]["composition"][split]["tasks"]
    exam = document["judge"]
    names = [task for task in TASKS if task in tasks] + [t for t in tasks if t not in TASKS]

    def task_cells(run: Row) -> list[str]:
        of = run["composition"][split]
        return [cell(of["tasks"].get(task)) for task in names] + [cell(of["overall"])]

    def part_cells(run: Row) -> list[str]:
        return [cell(run["composition"][split]["parts"].get(part)) for part in PARTS]

    title = "seen in training" if split == "test" else "never shown in training"
    worst = min(exam["accepted"].values()), max(exam["near_misses"].values())
    tasks_table = _table(
        f"Exactly what was asked for, combinations {title}",
        [*names, "overall"],
        rows,
        task_cells,
        f"{sum(t['n'] for t in tasks.values())} prompts of level {protocol['level']}, one picture "
        f"each; judge {protocol['judge']}: accepts {worst[0]:.3f} or more of real pictures of each "
        f"task and {worst[1]:.3f} or less of those with one attribute wrong",
    )
    parts_table = _table(
        f"In parts, combinations {title}", PARTS, rows, part_cells, "of the prompts that ask for it"
    )
    return f"{tasks_table}\n\n{parts_table}"


def _quality(document: Row, rows: Sequence[tuple[str, Row]]) -> str:
    names = ("fid", "kid", "precision", "recall", "density", "coverage")
    protocol = document["protocol"]["quality"]

    def cells(run: Row) -> list[str]:
        quality, diversity = run.get("quality", {}), run.get("diversity", {})
        return [
            *(cell(quality.get(name)) for name in names),
            cell(diversity.get("spread_against_real", diversity.get("spread"))),
            cell(run.get("memorisation", {}).get("nearer_than_unseen_real")),
        ]

    relative = all("spread_against_real" in run["diversity"] for run in document["runs"])
    return _table(
        "Quality, diversity and memorisation",
        [*(n.upper() if len(n) == 3 else n for n in names), "spread", "copying"],
        rows,
        cells,
        f"{protocol['real']} real ({protocol['real_split']}) and {protocol['generated']} generated "
        f"pictures; features of the {protocol['features']}, {protocol['width']} wide; spread: of "
        f"samples of one caption{', 1 as real ones' if relative else ''}; copying: 0.5 as near to "
        "training pictures as unseen real ones, 1 copies",
    )


def _stages(document: Row) -> str:
    """Codec and prior apart; empty if no run has them."""
    rows = [(_name(document, run), run) for run in document["runs"] if "stages" in run]
    if not rows:
        return ""
    heads = {
        "psnr": "PSNR",
        "nats_per_code": "nats/code",
        "accuracy": "accuracy",
        "bits_per_dim": "bits/dim",
    }

    def cells(run: Row) -> list[str]:
        of = run["stages"]
        judged = of.get("reconstruction", {})
        splits = [judged.get(split, {}).get("overall") for split in ("test", "heldout")]
        return [cell(score) for score in (*splits, *(of.get(name) for name in heads))]

    return _table(
        "Codec and prior apart",
        ["reconstructed", "held out", *heads.values()],
        rows,
        cells,
        "real pictures of the prompts after encoding and decoding, as the judge reads them; the "
        "rest of unseen real pictures: PSNR in dB; the prior's loss and accuracy with the true "
        "codes before each; bits of codes and pixels together",
    )


def _text_fit(document: Row, rows: Sequence[tuple[str, Row]]) -> str:
    if "text_fit" not in document["real"]:
        return ""
    protocol, real = document["protocol"]["text_fit"], document["real"]["text_fit"]
    names = [name for name in ("r_precision", "clip_score") if name in real]

    def cells(run: Row) -> list[str]:
        return [cell(run.get("text_fit", {}).get(name)) for name in names]

    return _table(
        "Text fit",
        [{"r_precision": "R-precision", "clip_score": "CLIP score"}[name] for name in names],
        rows,
        cells,
        f"judged by {protocol['scorer']}; the true caption among {real.get('pool', 0)}",
    )


def _cost(rows: Sequence[tuple[str, Row]]) -> str:
    def cells(run: Row) -> list[str]:
        training, sampling = run["cost"]["training"].values(), run["cost"]["sampling"]
        return [
            as_count(sampling["parameters"]["all"]),
            as_count(sampling["flops_per_picture"]),
            " / ".join(f"{stage['pictures_per_second']:.0f}" for stage in training),
            as_seconds(sampling["sampling_seconds_per_picture_at_1"]),
            as_seconds(sampling["sampling_seconds_per_picture_at_16"]),
            as_bytes(max((stage["peak_memory_bytes"] for stage in training), default=0)),
            as_bytes(sampling["sampling_peak_memory_bytes"]),
            as_bytes(sampling["model_bytes"]),
        ]

    heads = ["parameters", "FLOPs", "trained/s", "alone", "of 16", "training", "drawing", "file"]
    runs = [(name, run) for name, run in rows if "cost" in run]
    return _table(
        "Cost",
        heads,
        runs,
        cells,
        "FLOPs and seconds of one picture; pictures a second in training; peak memory of training "
        "and of drawing; model file",
    )


def cell(score: Row | None) -> str:
    """A score as `0.93 ±0.02`: half the width of the interval; a dash where there is no number."""
    if not score or score.get("value") is None:
        return "–"
    low, high = score["interval"]
    return f"{_short(score['value'])} ±{_short((high - low) / 2)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Row]],
    cells: Callable[[Row], list[str]],
    note: str,
) -> str:
    """Aligned columns under a title, a note below; rows without any number are left out."""
    lines = [["", *heads]]
    for name, run in rows:
        row = cells(run)
        if any(text != "–" for text in row):
            lines.append([name, *row])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *aligned, f"({note})"])
