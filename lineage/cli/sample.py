"""`lineage sample`: from options of the command line to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineage.characters import plain
from lineage.cli.arguments import (
    Flag,
    PathName,
    RunName,
    Seed,
    Settings,
    SheetCount,
    Threads,
    settings_of,
)
from lineage.cli.imports import large_imports
from lineage.errors import UserError, say

SHEET = Path("sample.png")


def sample(
    run: RunName,
    captions: list[str] | None = None,
    /,
    *,
    prompts: PathName | None = None,
    out: PathName = SHEET,
    count: SheetCount = 1,
    single: Flag = False,
    image: PathName | None = None,
    mask: PathName | None = None,
    control: PathName | None = None,
    reference: PathName | None = None,
    options: Settings | None = None,
    adapter: list[str] | None = None,
    best_of: SheetCount | None = None,
    scorer: str | None = None,
    visualise: Flag = False,
    seed: Seed = 0,
    device: str = "auto",
    threads: Threads | None = None,
) -> None:
    """Draw captions with a trained system.

    Args:
        run: Run folder, or pretrained:KEY.
        captions: Captions to draw.
        prompts: File of `lineage prompts`; a picture of each line is drawn into the folder --out.
        out: Sheet to write, or an SVG file, for a system that draws strokes.
        count: Number of pictures of each caption.
        single: If true, write one file for each picture, without caption.
        image: Picture file to start from, where the system has that option.
        mask: Picture file that is white where --image is painted over.
        control: Picture file that guides the layout.
        reference: Picture file that the drawing should resemble, as of vqgan_clip.
        options: Option of the system, as in --set guidance=3; may be repeated.
        adapter: Adapter of the run, as in --adapter runs/style:0.8; may be repeated.
        best_of: Number of candidates of each picture, of which the best is kept.
        scorer: Scorer that ranks the candidates: hub:MODEL, damsm:RUN or auto.
        visualise: If true, draw how the first caption's picture comes about, as by attention.
        seed: Seed of the noise.
        device: cpu, cuda, mps or auto.
        threads: Number of threads on a CPU; as many as are free if left out.
    """
    with large_imports():
        from lineage import notes, runs
        from lineage.cli import drawing
        from lineage.files import check_output, write_bytes
        from lineage.sheets import check_picture, picture, save_picture
        from lineage.system import CAPTION_OPTIONS
        from lineage.threads import use_threads

    files = {"image": image, "mask": mask, "control": control, "reference": reference}
    if prompts is not None:
        others: dict[str, Any] = {"CAPTIONS": captions, "--count": count > 1, "--single": single}
        others |= {"--best-of": best_of, "--scorer": scorer, "--visualise": visualise}
        for name in (name for name, value in others.items() if value):
            raise UserError(f"--prompts draws one picture of each line: leave out {name}.")
        settings = settings_of(options)
        _sample_prompts(run, prompts, out, settings, files, adapter or [], seed, device, threads)
        return
    if not captions:
        raise UserError("sample needs CAPTIONS, or --prompts FILE; see lineage sample --help.")
    ending = out.suffix or ".png"
    first = out.with_name(f"{out.stem}_000{ending}") if single and out.name else out
    vectors = ending.lower() == ".svg" and not visualise
    (check_output if vectors else check_picture)(first)
    if vectors and best_of is not None:
        raise UserError(f"--best-of compares pixels: leave it out, or write to {out.stem}.png.")
    if vectors and not single and len(captions) * count > 1:
        raise UserError(f"{out} can hold one drawing: add --single for a file of each.")
    if visualise:
        others = {**files, "set": options, "best-of": best_of, "single": single, "count": count > 1}
        for name in (name for name, value in others.items() if value):
            raise UserError(f"--visualise shows one picture: leave out --{name}.")
    if scorer is not None and best_of is None:
        raise UserError("--scorer chooses among several pictures: add --best-of 8.")
    with use_threads(threads):
        system = runs.load_system(run, device, adapter or [])
        artist = drawing.draws_vectors(system, out) if vectors else None
        values = drawing.options_of(system, settings_of(options), files)
        texts = [*captions, *(values[name] for name in CAPTION_OPTIONS if name in values)]
        for sentence in notes.unread_text(system.text, system.texts(texts), system.text_len):
            say(sentence)
        if visualise:
            save_picture(drawing.visualisation(system, captions[0], seed=seed), out)
            print(plain(out))
            return
        for sentence in notes.idle_options(system, captions, values):
            say(sentence)
        captions = [caption for caption in captions for _ in range(count)]
        if artist is not None:
            for number, text in enumerate(artist.svg(captions, seed=seed, **values)):
                path = out.with_name(f"{out.stem}_{number:03d}{ending}") if single else out
                write_bytes(path, text.encode())
                print(plain(path))
            return
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
            path = out.with_name(f"{out.stem}_{number:03d}{ending}")
            save_picture(picture(one), path)
            print(plain(path))
    else:
        save_picture(drawing.caption_sheet(images, captions, count), out)
        print(plain(out))


def _sample_prompts(
    run: Path,
    prompts: Path,
    out: Path,
    settings: dict[str, str],
    files: dict[str, Path | None],
    adapters: list[str],
    seed: int,
    device: str,
    threads: int | None,
) -> None:
    """Draw each line of a file of prompts into the folder `out`."""
    with large_imports():
        from lineage import runs
        from lineage.cli.drawing import options_of
        from lineage.cli.prompt_drawing import check_free, draw_prompts
        from lineage.data.records import is_picture
        from lineage.evaluation.prompt_files import read_prompt_file
        from lineage.notes import idle_options, unread_text
        from lineage.threads import use_threads

    if is_picture(out.name):
        raise UserError(f"--prompts fills a folder, not {out}: add --out FOLDER.")
    file = read_prompt_file(prompts)
    if seed and any(line.seed is not None for line in file.lines):
        raise UserError(f"The lines of {prompts} have seeds of their own: leave out --seed.")
    check_free(file, out)
    with use_threads(threads):
        system = runs.load_system(run, device, adapters)
        values, texts = options_of(system, settings, files), [line.prompt for line in file.lines]
        for sentence in unread_text(system.text, system.texts(texts), system.text_len):
            say(sentence)
        for sentence in idle_options(system, texts, values):
            say(sentence)
        draw_prompts(system, file, values, seed=seed, out=out)
    print(plain(f"{out}: {len(file.lines):,} pictures"))
