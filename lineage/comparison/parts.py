"""The parts of a comparison as files, for a student's own report.

OUT/figures/NAME.svg, .png    the figures of the page, on white
OUT/tables/NAME.csv, .tex     its tables
OUT/systems.bib               the papers of the systems
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lineage.comparison.bibliography import bibtex
from lineage.comparison.figures import save_figure
from lineage.evaluation.table import ScoreTable
from lineage.files import write_bytes

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""What LaTeX reads in place of characters that it takes for commands."""


def write_parts(
    folder: Path,
    tables: Sequence[ScoreTable],
    figures: Mapping[str, Figure],
    titles: Mapping[str, str],
    keys: Sequence[str],
) -> None:
    """Write all parts.

    Args:
        folder: Folder of the comparison.
        tables: Tables of the page.
        figures: Figures by the name of their file.
        titles: Names of the systems for the reader.
        keys: Keys of the systems.
    """
    for table in tables:
        name = file_name(table.title)
        write_bytes(folder / "tables" / f"{name}.csv", as_csv(table, titles).encode())
        write_bytes(folder / "tables" / f"{name}.tex", as_tex(table, titles).encode())
    for name, figure in figures.items():
        save_figure(figure, folder / "figures" / file_name(name))
    write_bytes(folder / "systems.bib", bibtex(keys).encode())


def file_name(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def as_csv(table: ScoreTable, titles: Mapping[str, str]) -> str:
    """A table for a spreadsheet: a row a system, a score and its half interval in two columns."""
    lines = [["system", *_split_heads(table)]]
    for name, cells in table.rows.items():
        line = [titles.get(name, name)]
        for index, cell in enumerate(cells):
            value, _, half = cell.partition(" ±")
            line += [value, half] if _has_interval(table, index) else [cell]
        lines.append(["" if cell == "–" else cell for cell in line])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[_inert(c) for c in line] for line in lines])
    return buffer.getvalue()


def _split_heads(table: ScoreTable) -> list[str]:
    heads: list[str] = []
    for index, head in enumerate(table.heads):
        heads += [head, f"{head} ±"] if _has_interval(table, index) else [head]
    return heads


def _has_interval(table: ScoreTable, index: int) -> bool:
    return any(" ±" in cells[index] for cells in table.rows.values())


def _inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    is_formula = cell[:1] in ("=", "@") or (cell[:1] in "+-" and not re.match(r"[+-]?[\d.]", cell))
    return f"'{cell}" if cell and is_formula else cell


def as_tex(table: ScoreTable, titles: Mapping[str, str]) -> str:
    """A table for LaTeX with the package booktabs, and its note as a caption."""
    heads = " & ".join(["", *map(tex, table.heads)])
    rows = [
        " & ".join([tex(titles.get(name, name)), *map(tex, cells)]) + r" \\"
        for name, cells in table.rows.items()
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{tex(table.title)} ({tex(table.note)}).}}",
            rf"  \begin{{tabular}}{{l{'r' * len(table.heads)}}}",
            r"    \toprule",
            rf"    {heads} \\",
            r"    \midrule",
            *(f"    {row}" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def tex(text: str) -> str:
    """A text with LaTeX's own characters escaped."""
    return "".join(_TEX.get(character, character) for character in text)
