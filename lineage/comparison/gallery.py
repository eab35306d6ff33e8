"""A page of what the systems that come with the package draw: `make demo` shows it at once, while
it trains others.

    python -m lineage.comparison.gallery demo/pretrained.html

The same captions for all, two pictures each, the first seeds; the judge's verdict is a frame around
each picture and a word below it. Systems that optimise every picture (VQGAN+CLIP, CLIPDraw) are
left out: they take tens of seconds for one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lineage.catalog import CATALOG
from lineage.characters import plain, protect
from lineage.comparison.report import embed, rendered
from lineage.data.contract import to_bytes
from lineage.errors import Interrupted, UserError, say
from lineage.evaluation.judge import Judge
from lineage.evaluation.prompts import TASKS, make_prompts
from lineage.evaluation.real import PromptSet
from lineage.files import check_output, write_bytes
from lineage.pretrained import PREFIX, pretrained, run_folder
from lineage.runs import load_system
from lineage.threads import use_free_threads
from lineage.training.cost import read_cost

SEEDS = (0, 1)
OF_TASK = 2
"""Number of captions of each task."""


class Drawing(NamedTuple):
    """A picture as a data URL, and whether the judge accepts it."""

    url: str
    is_right: bool


def systems() -> list[str]:
    """Keys of the systems on the page, oldest first."""
    return [key for key in pretrained() if CATALOG[key].draws and CATALOG[key].family != "clip"]


@use_free_threads()
def gallery() -> dict[str, Any]:
    """What the page shows: captions, and for each system its row, training time and pictures."""
    known = [prompt for prompt in make_prompts("easy") if prompt.split == "test"]
    of_task = ([prompt for prompt in known if prompt.tag == task] for task in TASKS)
    prompts = [prompt for own in of_task for prompt in own[:OF_TASK]]
    captions = [prompt.prompt for prompt in prompts]
    judge = PromptSet(Judge.load(), prompts, "the page", 32, seed=0)
    columns = []
    for key in tqdm(systems(), "drawing", unit=" systems", leave=False, disable=None):
        system = load_system(PREFIX + key)
        drawn = [to_bytes(system.generate(captions, seed=seed)).cpu() for seed in SEEDS]
        verdicts = [judge.verdicts(judge.judge.detect(pictures)) for pictures in drawn]
        cost = read_cost(run_folder(PREFIX + key)).values()
        columns.append(
            {
                "row": CATALOG[key],
                "minutes": sum(stage["cpu_seconds"] for stage in cost) / 60,
                "right": sum(one["strict"] for own in verdicts for one in own),
                "drawings": [
                    [
                        Drawing(embed(pictures[i]), own[i]["strict"])
                        for pictures, own in zip(drawn, verdicts, strict=True)
                    ]
                    for i in range(len(captions))
                ],
            }
        )
    return {"captions": captions, "systems": columns, "total": len(captions) * len(SEEDS)}


def write_gallery(path: Path) -> None:
    """Draw, and write the page.

    Raises:
        UserError: the file cannot be written.
    """
    check_output(path)
    write_bytes(path, rendered("gallery.html", **gallery()))


def main() -> int:
    """Write the page to the path that the command line names, or to `pretrained.html`; returns the
    exit code.
    """
    with protect():
        path = Path(sys.argv[1] if len(sys.argv) > 1 else "pretrained.html")
        try:
            write_gallery(path)
        except UserError as error:
            say(error)
            return error.exit_code
        except KeyboardInterrupt:
            return Interrupted.exit_code
        print(plain(f"{path}: what the systems that come with the package draw"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
