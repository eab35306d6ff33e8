"""`lineage sample`: from options of the command line to pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from lineage.characters import plain
from lineage.cli.arguments import Count, Flag, Settings, Whole, settings_of
from lineage.errors import UserError


def sample(
    run: Path,
    captions: list[str],
    /,
    *,
    out: Path = Path("sample.png"),
    count: Count = 1,
    single: Flag = False,
    image: Path | None = None,
    mask: Path | None = None,
    control: Path | None = None,
    options: Settings | None = None,
    best_of: Count | None = None,
    scorer: str | None = None,
    visualise: Flag = False,
    seed: Whole = 0,
    device: str = "auto",
) -> None:
    """Draw captions with a trained system.

    Args:
        run: Run folder.
        captions: Captions to draw.
        out: Sheet to write.
        count: Number of pictures of each caption.
        single: If true, write one file for each picture, without caption.
        image: Picture file to start from, where the system has that option.
        mask: Picture file that is white where --image is painted over.
        control: Picture file that guides the layout.
        options: Option of the system, as in --set guidance=3; may be repeated.
        best_of: Number of candidates of each picture, of which the best is kept.
        scorer: Scorer that ranks the candidates: hub:MODEL, damsm:RUN or auto.
        visualise: If true, draw how the first caption's picture comes about, as by attention.
        seed: Seed of the noise.
        device: cpu, cuda, mps or auto.
    """
    from lineage import runs
    from lineage.cli import drawing
    from lineage.sheets import picture, sheet

    files = {"image": image, "mask": mask, "control": control}
    if visualise:
        others = {**files, "set": options, "best-of": best_of, "single": single, "count": count > 1}
        for name in (name for name, value in others.items() if value):
            raise UserError(f"--visualise shows one picture: leave out --{name}.")
    if scorer is not None and best_of is None:
        raise UserError("--scorer chooses among several pictures: add --best-of 8.")
    system = runs.load(run, device)
    for sentence in drawing.unread_text(system, captions):
        print(f"lineage: {plain(sentence)}", file=sys.stderr)
    if visualise:
        runs.save_picture(drawing.visualisation(system, captions[0], seed=seed), out)
        print(plain(out))
        return
    values = drawing.options_of(system, settings_of(options), files)
    captions = [caption for caption in captions for _ in range(count)]
    images = drawing.draw(
        system,
        captions,
        values,
        seed=seed,
        run=run,
        candidates=best_of or 1,
        scorer="auto" if scorer is None else scorer,
    )
    if single:
        for number, one in enumerate(images):
            path = out.with_name(f"{out.stem}_{number:03d}{out.suffix or '.png'}")
            runs.save_picture(picture(one), path)
            print(plain(path))
    else:
        runs.save_picture(sheet(list(images), captions, count if count > 1 else 8), out)
        print(plain(out))
