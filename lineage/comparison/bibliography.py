"""BibTeX of the systems of a comparison, from the catalogue."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lineage.catalog import CATALOG, Row

_PAPER = re.compile(
    r"(?P<authors>.+? et al\.|.+? and [^,]+|[^,]+), (?P<title>.+), (?P<place>[^,]+?)(?: \(.*\))?"
)
"""Authors, title and place of `Row.paper`; a remark in brackets follows some."""


def bibtex(keys: Sequence[str]) -> str:
    """Entries of some systems."""
    return "\n".join(entry(CATALOG[key]) for key in dict.fromkeys(keys))


def entry(row: Row) -> str:
    """The entry of one system; its key is the system's."""
    match = _PAPER.fullmatch(row.paper)
    assert match is not None, row.paper
    authors = match["authors"].replace(" et al.", " and others").replace(", ", " and ")
    place, year = match["place"], str(row.year)
    fields = {"author": authors, "title": f"{{{match['title']}}}"}
    if arxiv := re.fullmatch(r"arXiv:(\d\d)(\d\d\.\d+)", place):
        year = f"20{arxiv[1]}"
        fields |= {"eprint": place.removeprefix("arXiv:"), "archivePrefix": "arXiv"}
    else:
        fields["booktitle"] = place.removesuffix(f" {year}")
    fields["year"] = year
    kind = "misc" if "eprint" in fields else "inproceedings"
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{row.key},", *lines, "}", ""])
