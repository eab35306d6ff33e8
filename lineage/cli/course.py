"""`lineage grade` and `lineage course`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lineage.characters import plain
from lineage.cli.arguments import Flag, PathName, Seconds, print_json
from lineage.cli.imports import large_imports
from lineage.files import check_output, write_bytes


def grade(
    notebooks: Annotated[list[PathName], Parameter(name="NOTEBOOK")],
    /,
    *,
    csv: PathName | None = None,
    json: Flag = False,
    seconds: Seconds = 20.0,
) -> None:
    """Grade notebooks that students have handed in.

    Each runs in a process of its own, without network, with limits of time and memory. That guards
    against accidents and simple tricks: run strangers' notebooks in a container.

    Args:
        notebooks: Notebooks, or folders of them.
        csv: Table to write, a row for each notebook.
        json: If true, print one JSON document.
        seconds: Seconds that one cell or one check may take.
    """
    with large_imports():
        from tqdm import tqdm

        from lineage.course import grading

    if csv is not None:
        check_output(csv)
    paths = grading.submissions(notebooks)
    graded: list[grading.Graded] = []
    try:
        for path in tqdm(paths, desc="grading", unit=" notebooks", leave=False, disable=None):
            graded.append(grading.grade(path, seconds))
    finally:  # also of those that were graded before Ctrl-C
        if csv is not None and graded:
            write_bytes(csv, grading.as_csv(graded).encode())
        if json:
            print_json([one.to_json() for one in graded])
        else:
            for line in grading.as_text(graded).splitlines():
                print(plain(line))


def course(folder: PathName, /) -> None:
    """Write a folder to hand out: notebooks, requirements, instructions and a schedule.

    Args:
        folder: Folder to write.
    """
    with large_imports():
        from lineage.course.handout import write_course

    for path in write_course(Path(folder)):
        print(plain(path))
