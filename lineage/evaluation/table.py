"""The scores as tables for a terminal: one for each section, with rows of real pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lineage.evaluation.judge import PARTS
from lineage.units import as_bytes, as_count, as_seconds

Row = dict[str, Any]
Path = tuple[str, ...]


def tables(document: Row) -> str:
    """The whole document as text."""
    systems = [run["system"] for run in document["runs"]]
    names = [  # a run's system, or its folder if several runs have one system
        str(run["system"] if systems.count(run["system"]) == 1 else run["run"])
        for run in document["runs"]
    ]
    runs = dict(zip(names, document["runs"], strict=True))
    rows = {**runs, "real pictures": document["real"], "shuffled captions": document["shuffled"]}
    parts = [
        *(_composition(document, rows, split) for split in ("test", "heldout")),
        _quality(document, rows),
        _stages(runs),
        _text_fit(document, rows),
        _cost(runs),
        *(f"Note: {warning}" for warning in document["warnings"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _composition(document: Row, rows: Mapping[str, Row], split: str) -> str:
    at: Path = ("composition", split)
    if not (real := lookup(document["real"], at)):
        return ""
    protocol, exam = document["protocol"]["composition"], document["judge"]
    title = "seen in training" if split == "test" else "never shown in training"
    accepted, missed = min(exam["accepted"].values()), max(exam["near_misses"].values())
    columns = {task: (*at, "tasks", task) for task in real["tasks"]}
    strict = _score_table(
        f"Exactly the prompt's scene, combinations {title}",
        {**columns, "overall": (*at, "overall")},
        rows,
        f"{sum(task['n'] for task in real['tasks'].values())} prompts of level "
        f"{protocol['level']}, one picture each; judge {protocol['judge']}: accepts "
        f"{accepted:.3f} or more of real pictures of each task and {missed:.3f} or less of those "
        "with one attribute wrong",
    )
    parts = _score_table(
        f"In parts, combinations {title}",
        {part: (*at, "parts", part) for part in PARTS},
        rows,
        "of the prompts that mention it",
    )
    return f"{strict}\n\n{parts}"


def _quality(document: Row, rows: Mapping[str, Row]) -> str:
    protocol = document["protocol"]["quality"]
    relative = all("spread_against_real" in run["diversity"] for run in document["runs"])
    names = ("FID", "KID", "precision", "recall", "density", "coverage")
    return _score_table(
        "Quality, diversity and memorisation",
        {
            **{name: ("quality", name.lower()) for name in names},
            "spread": ("diversity", "spread_against_real" if relative else "spread"),
            "copying": ("memorisation", "nearer_than_unseen_real"),
        },
        rows,
        f"{protocol['real']} real ({protocol['real_split']}) and {protocol['generated']} generated "
        f"pictures; features of the {protocol['features']}, {protocol['width']} wide; spread: of "
        f"samples of one caption{', 1 as real ones' if relative else ''}; copying: 0.5 as near to "
        "training pictures as unseen real ones, 1 copies",
    )


def _stages(runs: Mapping[str, Row]) -> str:
    """Codec and prior apart; empty if no run has them."""
    if not any("stages" in run for run in runs.values()):
        return ""
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
        runs,
        "share of real pictures of the prompts that the judge accepts after encoding and decoding; "
        "the rest of unseen real pictures: PSNR in dB; the prior's loss and accuracy with the true "
        "codes before each; bits of codes and pixels together",
    )


def _text_fit(document: Row, rows: Mapping[str, Row]) -> str:
    if not (real := document["real"].get("text_fit")):
        return ""
    names = {"r_precision": "R-precision", "clip_score": "CLIP score"}
    return _score_table(
        "Text fit",
        {head: ("text_fit", name) for name, head in names.items() if name in real},
        rows,
        f"measured by {document['protocol']['text_fit']['scorer']}; the true caption among "
        f"{real.get('pool', 0)}",
    )


def _cost(runs: Mapping[str, Row]) -> str:
    lines = {}
    for name, run in runs.items():
        training, sampling = run["cost"]["training"].values(), run["cost"]["sampling"]
        lines[name] = [
            as_count(sampling["parameters"]["all"]),
            as_count(sampling["flops_per_picture"]),
            " / ".join(f"{stage['pictures_per_second']:.0f}" for stage in training),
            as_seconds(sampling["sampling_seconds_per_picture_at_1"]),
            as_seconds(sampling["sampling_seconds_per_picture_at_16"]),
            as_bytes(max((stage["peak_memory_bytes"] for stage in training), default=0)),
            as_bytes(sampling["sampling_peak_memory_bytes"]),
            as_bytes(sampling["model_bytes"]),
        ]
    return _table(
        "Cost",
        ["parameters", "FLOPs", "trained/s", "alone", "of 16", "training", "sampling", "file"],
        lines,
        "FLOPs and seconds for one picture; pictures a second in training; peak memory of training "
        "and of sampling; model file",
    )


def lookup(row: Row, path: Path) -> Row | None:
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
) -> str:
    """A table of the scores at some paths; a row without any score is left out."""
    lines = {name: [cell(lookup(row, at)) for at in columns.values()] for name, row in rows.items()}
    return _table(
        title, [*columns], {n: line for n, line in lines.items() if set(line) != {"–"}}, note
    )


def _table(title: str, heads: Sequence[str], lines: Mapping[str, Sequence[str]], note: str) -> str:
    """Aligned columns under a title, and a note below."""
    cells = [["", *heads], *([name, *line] for name, line in lines.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    ]
    return "\n".join([title, *aligned, f"({note})"])
