"""`lineage data`: show, check, count, clean and export data sets; the cache of pictures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App, Group

from lineage.characters import plain
from lineage.cli.arguments import Count, Flag, PathName, RunName, Seed, SheetCount, print_json
from lineage.cli.imports import large_imports
from lineage.errors import UserError
from lineage.pretrained import run_name

if TYPE_CHECKING:
    from lineage.data.cleaning import Similarity

GROUP = Group("Data", sort_key=1)
data = App(
    "data",
    help="Show, check, count, clean and export data sets; the cache of pictures.",
    group=GROUP,
    group_commands=GROUP,
)


@data.command(name="show")
def data_show(
    spec: str,
    /,
    *,
    out: PathName = Path("data.png"),
    count: SheetCount | None = None,
    columns: SheetCount | None = None,
    size: Count | None = None,
    split: str = "train",
    seed: Seed = 0,
    run: list[RunName] | None = None,
) -> None:
    """Draw a contact sheet with captions, or what systems receive of the pictures.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, cub or hub.
        out: Picture to write.
        count: Number of pictures; 24 if left out, or 6 with --run, which has a row for each.
        columns: Number of pictures in a row; 6 if left out. Not with --run.
        size: Side of the pictures in pixels; 32 if left out. Not with --run.
        split: train, validation, test, ...
        seed: Seed of shapes; files do not depend on it.
        run: Run folder, or pretrained:KEY. Beside each picture stands what this system makes of it
            before the first loss: smaller sizes (stackgan, attngan), codes (vqvae, dalle), latents
            (ldm). May be given several times.
    """
    from lineage.data import load_dataset
    from lineage.data.tools import contact_sheet
    from lineage.sheets import check_picture, save_picture

    check_picture(out)
    if run:
        for name, value in (("columns", columns), ("size", size)):
            if value is not None:
                raise UserError(f"--{name} has no effect with --run: leave it out.")
        with large_imports():
            from lineage.model_inputs import inputs_sheet
            from lineage.plan import read_config
        save_picture(inputs_sheet(spec, run, count or 6, split, seed), out)
        print(plain(f"{out}: a row for each picture; each code has a colour of its own."))
        for folder in run:
            data = read_config(folder).data
            if data.removesuffix(":easy") != spec.removesuffix(":easy"):
                print(plain(f"  {run_name(folder)} was trained on {data}, and may fail on others."))
        return
    dataset = load_dataset(spec, split, size or 32, seed)
    count = count or 24
    save_picture(contact_sheet(dataset, count, columns or 6), out)
    print(plain(f"{out}: {min(count, len(dataset))} of {len(dataset):,} pictures of {spec}"))


@data.command(name="check")
def data_check(spec: str, /, *, size: Count = 32, json: Flag = False) -> None:
    """Count pictures and captions, and name every rejected file with its reason.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, cub or hub.
        size: Side of the pictures in pixels.
        json: If true, print one JSON document.
    """
    from lineage.data.tools import check
    from lineage.text.tokenizer import default_limits

    report = check(spec, size, default_limits())
    if json:
        print_json(report)
    else:
        print(f"{plain(spec)}: {report['loaded']:,} pictures, {report['captions']:,} captions")
        for limit, number in report["cut"].items():
            if number:
                print(f"  longer than {limit}, which is all that encoders read: {number:,}")
        for skipped in report["skipped"]:
            print(plain(f"  left out {skipped['path']}: {skipped['reason']}"))
    if not report["loaded"]:
        raise UserError(f"{spec} holds no picture with a caption that can be read.")


@data.command(name="stats")
def data_stats(
    spec: str,
    /,
    *,
    out: PathName | None = None,
    size: Count = 32,
    split: str = "all",
    seed: Seed = 0,
    json: Flag = False,
) -> None:
    """Count captions, words, sizes, colours and labels. With --out, write a page about them.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, cub or hub.
        out: Page to write, in HTML.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...; all of them if left out (train of shapes).
        seed: Seed of shapes; files do not depend on it.
        json: If true, print one JSON document.
    """
    from lineage.data import load_dataset
    from lineage.data.stats import lines, page, statistics
    from lineage.data.tools import contact_sheet
    from lineage.files import check_output, write_bytes
    from lineage.sheets import data_url

    if out is not None:
        check_output(out)
    dataset = load_dataset(spec, _whole(spec, split), size, seed)
    numbers = statistics(dataset)
    if out is not None:
        sheet = data_url(contact_sheet(dataset, 24, 8))
        write_bytes(out, page(numbers, sheet).encode("utf-8", "backslashreplace"))
    if json:
        print_json(numbers)
    else:
        print("\n".join(lines(numbers)))
        if out is not None:
            print(plain(f"Open {out}"))


@data.command(name="filter")
def data_filter(
    spec: str,
    /,
    *,
    out: PathName | None = None,
    min_side: Count | None = None,
    max_aspect: float | None = None,
    min_words: Count | None = None,
    max_words: Count | None = None,
    min_letters: Count | None = None,
    max_letters: Count | None = None,
    script: list[str] | None = None,
    max_pictures: Count | None = None,
    duplicates: Literal["none", "exact", "near"] = "exact",
    leaks: Flag = False,
    near: float | None = None,
    clip: RunName | None = None,
    min_similarity: float | None = None,
    worst: float | None = None,
    count: Count | None = None,
    size: Count = 32,
    split: str = "all",
    seed: Seed = 0,
    json: Flag = False,
) -> None:
    """Remove bad pictures and captions, and write the rest with a page about both.

    Without --out nothing is written: the numbers show what the rules would do. A picture without
    captions is removed. Among copies, one in test or validation is kept, otherwise the largest.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, cub or hub.
        out: Folder to write: an imagefolder, removed.jsonl, cleaning.json and cleaning.html.
        min_side: Smallest shorter side of a picture in its file, in pixels.
        max_aspect: Largest ratio of a picture's longer side to its shorter one.
        min_words: Smallest number of words of a caption.
        max_words: Largest number of words of a caption.
        min_letters: Smallest number of characters of a caption, blanks among them.
        max_letters: Largest number of characters of a caption.
        script: Keep captions most of whose letters are in this script, such as latin, cyrillic or
            cjk (Chinese). Given several times, in one of these scripts.
        max_pictures: Largest number of pictures that may have the same caption.
        duplicates: exact: remove copies with the same pixels in the same split; near: also those
            that differ by little.
        leaks: If true, remove what is nearly the same as a picture of another split: those of test
            stay before those of validation, and these before all others.
        near: Largest difference of pictures that are nearly the same, for --duplicates near and
            --leaks, in levels of 0 to 255; 4 if left out. Fine detail, such as text, does not
            count: look at the page.
        clip: Run folder of clip, or pretrained:clip, that compares captions with pictures.
        min_similarity: Smallest cosine of a caption and its picture by --clip. Without --out, the
            percentiles show which number removes how much.
        worst: Share of the captions, 0 to 1, that is removed: those with the lowest cosines by
            --clip.
        count: Number of pictures that are read, the first of the data set; all if left out.
        size: Side of the pictures in pixels at which copies and captions are compared.
        split: train, validation, test, ...; all of them if left out (train of shapes).
        seed: Seed of shapes; files do not depend on it.
        json: If true, print one JSON document.
    """
    from lineage.data import load_dataset
    from lineage.data.cleaning import clean
    from lineage.data.cleaning_output import lines, write
    from lineage.data.cleaning_rules import Rules
    from lineage.data.tools import check_new_folder
    from lineage.files import check_output

    rules = Rules(
        min_side=min_side,
        max_aspect=max_aspect,
        min_words=min_words,
        max_words=max_words,
        min_letters=min_letters,
        max_letters=max_letters,
        scripts=tuple(name.lower() for name in script or ()),
        max_pictures=max_pictures,
        duplicates=duplicates,
        leaks=leaks,
        near=near,
        min_similarity=min_similarity,
        worst=worst,
    )
    if (clip is not None) != rules.need_similarity:
        raise UserError(
            "--clip, and --min-similarity or --worst, go together: a run of CLIP, such as "
            "pretrained:clip, and what is removed for a low cosine."
        )
    if out is not None:
        check_output(out, folder=True)
        check_new_folder(out)
    similarity = None if clip is None else _similarity_of(clip, size)
    dataset = load_dataset(spec, _whole(spec, split), size, seed)
    if out is not None:
        check_new_folder(out, dataset)
    result = clean(dataset, rules, similarity, count)
    if out is not None:
        write(result, out)
    if json:
        print_json(result.summary())
        return
    print("\n".join(lines(result)))
    if out is not None:
        print(plain(f"Open {out / 'cleaning.html'}"))


def _whole(spec: str, split: str) -> str:
    """The split `all` as a data set has it: an endless one has only `train` to train on."""
    from lineage.data import ENDLESS, parse_spec

    return "train" if split == "all" and parse_spec(spec)[0] in ENDLESS else split


def _similarity_of(run: Path, size: int) -> Similarity:
    """Cosines by a run of CLIP."""
    with large_imports():
        from lineage import runs
        from lineage.search import similarity

    model = runs.load_comparer(run, "auto")
    if model.size != size:
        raise UserError(f"{run} takes pictures of {model.size} pixels: add --size {model.size}.")
    return functools.partial(similarity, model)


@data.command(name="export")
def data_export(
    spec: str,
    /,
    *,
    out: PathName,
    count: Count | None = None,
    size: Count = 32,
    split: str = "train",
    seed: Seed = 0,
    form: Literal["imagefolder", "wds"] = "imagefolder",
) -> None:
    """Write a data set as an imagefolder, or as the shards of a WebDataset.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, cub or hub.
        out: Folder to write.
        count: Largest number of pictures; all if left out.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...
        seed: Seed of shapes; files do not depend on it.
        form: imagefolder or wds.
    """
    from lineage.data import load_dataset
    from lineage.data.tools import export
    from lineage.files import check_output

    check_output(out, folder=True)
    written = export(load_dataset(spec, split, size, seed), out, count, form)
    print(plain(f"{out}: {written:,} pictures in {form} form"))


@data.command(name="cache")
def data_cache(*, clear: Flag = False) -> None:
    """List the decoded pictures on the disk; each data set is decoded once for each size.

    Args:
        clear: If true, delete them, and the indexes of shards. They are made again when needed.
    """
    from lineage.data.pixels import limit, remove, stores
    from lineage.data.shard_index import indexes

    all_stores, all_indexes = stores(), indexes()
    if not all_stores and not all_indexes:
        print("The cache of pictures holds nothing.")
        return
    for folder, size, _ in all_stores:
        print(plain(f"{folder}: {size / 1e6:,.1f} MB"))
    total, number = sum(size for _, size, _ in all_stores), len(all_stores)
    sets = f"{number:,} data set{'' if number == 1 else 's'} of one size each"
    print(f"{sets}, {total / 1e6:,.1f} MB; at most {limit() / 1e6:,.0f} MB (LINEAGE_PIXELS_GB).")
    if all_indexes:
        total = sum(size for _, size, _ in all_indexes)
        print(f"Indexes of shards: {len(all_indexes):,}, {total / 1e6:,.1f} MB.")
    if clear:
        left = [folder for folder, _, _ in all_stores if not remove(folder)]
        left += [path for path, _, _ in all_indexes if not remove(path)]
        for folder in left:
            print(plain(f"{folder} cannot be deleted; is it in use?"))
        print(f"{number + len(all_indexes) - len(left):,} deleted.")
