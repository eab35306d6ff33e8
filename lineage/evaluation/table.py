"""The scores as tables, for a terminal and for the report: one for each section of the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lineage.characters import plain
from lineage.evaluation.judge import PARTS
from lineage.units import as_bytes, as_count, as_seconds

Row = dict[str, Any]
Path = tuple[str, ...]
ROWS = ("real pictures", "shuffled captions")
QUALITY = ("fid", "kid", "precision", "recall", "density", "coverage")
COST = (
    *("parameters", "FLOPs", "seconds", "CPU seconds", "steps", "trained/s", "alone", "of 16"),
    *("training", "sampling", "file"),
)


@dataclass(frozen=True)
class ScoreTable:
    """A table as text.

    Attributes:
        heads: Names of the scores.
        rows: Cells by the row's name: a system, or a run folder if several runs are of one system,
            then real pictures.
        note: What the scores mean.
    """

    title: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    note: str

    def __str__(self) -> str:
        lines = [["", *self.heads], *([name, *cells] for name, cells in self.rows.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *aligned, f"({self.note})"])


def tables(document: Row) -> str:
    """The whole document as text."""
    notes = [f"Note: {plain(warning)}" for warning in document["warnings"]]
    parts = [*map(str, score_tables(document)), *notes]
    return "\n\n".join(parts)


def score_tables(document: Row) -> list[ScoreTable]:
    """The tables of a document; those without any score of a run are left out."""
    systems = [*ROWS, *(run["system"] for run in document["runs"])]
    runs = {
        plain(run["system"] if systems.count(run["system"]) == 1 else run["run"]): run
        for run in document["runs"]
    }
    rows = {**runs, **dict(zip(ROWS, (document["real"], document["shuffled"]), strict=True))}
    every = [
        *(table for split in ("test", "heldout") for table in _composition(document, rows, split)),
        *([_quality(document, rows)] if "quality" in document["protocol"] else []),
        _stages(rows),
        _text_fit(document, rows),
        _cost(runs, document["protocol"]["cost"]["machine"]),
    ]
    return [table for table in every if runs.keys() & table.rows.keys()]


def _composition(document: Row, rows: Mapping[str, Row], split: str) -> list[ScoreTable]:
    at: Path = ("composition", split)
    if not (real := value_at(document["real"], at)):
        return []
    protocol, exam = document["protocol"]["composition"], document["judge"]
    title = "in training" if split == "test" else "never in training"
    accepted, missed = min(exam["accepted"].values()), max(exam["near_misses"].values())
    strict = _score_table(
        f"Exactly the prompt's scene, combinations {title}",
        {**{task: (*at, "tasks", task) for task in real["tasks"]}, "overall": (*at, "overall")},
        rows,
        f"{sum(task['n'] for task in real['tasks'].values())} prompts of level "
        f"{protocol['level']}, one picture each; judge {protocol['judge']}: accepts "
        f"{accepted:.3f} or more of real pictures of each task and {missed:.3f} or less of those "
        "with one attribute wrong",
    )
    columns = {part: (*at, "parts", part) for part in PARTS}
    note = "of the prompts that mention it"
    return [strict, _score_table(f"In parts, combinations {title}", columns, rows, note)]


def _quality(document: Row, rows: Mapping[str, Row]) -> ScoreTable:
    protocol = document["protocol"]["quality"]
    diversity = [run["diversity"] for run in document["runs"] if "diversity" in run]
    relative = all("spread_against_real" in section for section in diversity)
    return _score_table(
        "Quality, diversity and memorisation",
        {
            **{name.upper() if len(name) == 3 else name: ("quality", name) for name in QUALITY},
            "spread": ("diversity", "spread_against_real" if relative else "spread"),
            "copying": ("memorisation", "nearer_than_unseen_real"),
        },
        rows,
        f"{protocol['real']} real ({protocol['real_split']}) and {protocol['generated']} generated "
        f"pictures; features of the {protocol['features']}, {protocol['width']} wide; spread: of "
        f"samples of one caption{', 1 as real ones' if relative else ''}; copying: 0.5 as near to "
        "training pictures as unseen real ones, 1 copies",
    )


def _stages(rows: Mapping[str, Row]) -> ScoreTable:
    return _score_table(
        "Codec and prior apart",
        {
            "reconstructed": ("stages", "reconstruction", "test", "overall"),
            "held out": ("stages", "reconstruction", "heldout", "overall"),
            "PSNR": ("stages", "psnr"),
            "nats/code": ("stages", "nats_per_code"),
            "accuracy": ("stages", "accuracy"),
            "bits/dim": ("stages", "bits_per_dim"),
        },
        rows,
        "share of real pictures of the prompts that the judge accepts after encoding and decoding; "
        "the rest of unseen real pictures: PSNR in dB; the prior's loss and accuracy with the true "
        "codes before each; bits of codes and pixels together",
    )


def _text_fit(document: Row, rows: Mapping[str, Row]) -> ScoreTable:
    real = document["real"].get("text_fit", {})
    scorer = document["protocol"].get("text_fit", {}).get("scorer")
    names = {"r_precision": "R-precision", "clip_score": "CLIP score"}
    return _score_table(
        "Text fit",
        {head: ("text_fit", name) for name, head in names.items() if name in real},
        rows,
        f"measured by {scorer}, which is not used in training; the true caption among "
        f"{real.get('pool', 0)}",
    )


def _cost(runs: Mapping[str, Row], machine: Row) -> ScoreTable:
    memory = "of the GPU's allocator" if machine["gpu"] else "of a process of its own, with PyTorch"
    return ScoreTable(
        "Cost",
        COST,
        {
            name: _cost_cells(run["cost"]) if "cost" in run else ["–"] * len(COST)
            for name, run in runs.items()
        },
        "FLOPs of matrix products, convolutions and attention for one picture; seconds, steps and "
        "pictures a second of training; seconds for one picture alone and among 16; peak memory "
        f"of training and of sampling, {memory}; model file",
    )


def _cost_cells(cost: Row) -> list[str]:
    """The cells of `COST`."""
    training, sampling = cost["training"].values(), cost["sampling"]
    peak = max((stage["peak_memory_bytes"] for stage in training), default=0)
    return [
        as_count(sampling["parameters"]["all"]),
        as_count(sampling["flops_per_picture"]),
        f"{sum(stage['seconds'] for stage in training):.1f}",
        f"{sum(stage['cpu_seconds'] for stage in training):.1f}",
        str(sum(stage["steps"] for stage in training)),
        " / ".join(f"{s['pictures_per_second']:.0f}" for s in training),
        as_seconds(sampling["sampling_seconds_per_picture_at_1"]),
        as_seconds(sampling["sampling_seconds_per_picture_at_16"]),
        as_bytes(peak) if peak else "–",
        as_bytes(sampling["sampling_peak_memory_bytes"]),
        as_bytes(sampling["model_bytes"]),
    ]


def value_at(row: Row, path: Path) -> Row | None:
    """The value of nested dicts at `path`, or None."""
    value: Any = row
    for name in path:
        value = value.get(name, {}) if isinstance(value, dict) else {}
    return value or None


def cell(score: Row | None) -> str:
    """A score as `0.93 ±0.02`: half the width of the interval; a dash if there is no number."""
    if not score or score.get("value") is None:
        return "–"
    low, high = score["interval"]
    return f"{_short(score['value'])} ±{_short((high - low) / 2)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def _score_table(
    title: str, columns: Mapping[str, Path], rows: Mapping[str, Row], note: str
) -> ScoreTable:
    """The scores at some paths; a row without any score is left out."""
    cells = {
        name: [cell(value_at(row, at)) for at in columns.values()] for name, row in rows.items()
    }
    with_scores = {name: line for name, line in cells.items() if set(line) - {"–"}}
    return ScoreTable(title, list(columns), with_scores, note)
