"""`lineage data`: show, check, count and export data sets; the cache of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App, Group

from lineage.characters import plain
from lineage.cli.arguments import Count, Flag, PathName, Seed, SheetCount, print_json
from lineage.errors import UserError

GROUP = Group("Data", sort_key=1)
data = App(
    "data",
    help="Show, check and export data sets; the cache of pictures.",
    group=GROUP,
    group_commands=GROUP,
)


@data.command(name="show")
def data_show(
    spec: str,
    /,
    *,
    out: PathName = Path("data.png"),
    count: SheetCount = 24,
    columns: SheetCount = 6,
    size: Count = 32,
    split: str = "train",
    seed: Seed = 0,
) -> None:
    """Draw a contact sheet with captions.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, coco or cub.
        out: Picture to write.
        count: Number of pictures.
        columns: Number of pictures in a row.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...
        seed: Seed of an endless data set.
    """
    from lineage.data import load_dataset
    from lineage.data.tools import contact_sheet
    from lineage.sheets import check_picture, save_picture

    check_picture(out)
    dataset = load_dataset(spec, split, size, seed)
    save_picture(contact_sheet(dataset, count, columns), out)
    print(plain(f"{out}: {min(count, len(dataset))} of {len(dataset):,} pictures of {spec}"))


@data.command(name="check")
def data_check(spec: str, /, *, size: Count = 32, json: Flag = False) -> None:
    """Count pictures and captions, and name every rejected file with its reason.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, coco or cub.
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
    """Count captions, words, sizes, colours and labels; as a page with --out.

    Args:
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, coco or cub.
        out: Page to write, in HTML.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...; all of them if left out (train of shapes).
        seed: Seed of an endless data set.
        json: If true, print one JSON document.
    """
    from lineage.data import ENDLESS, load_dataset, parse_spec
    from lineage.data.stats import lines, page, statistics
    from lineage.data.tools import contact_sheet
    from lineage.files import check_output, write_bytes
    from lineage.sheets import data_url

    if out is not None:
        check_output(out)
    if split == "all" and parse_spec(spec)[0] in ENDLESS:
        split = "train"
    dataset = load_dataset(spec, split, size, seed)
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
        spec: Data set: shapes, shapes:hard, a path, or KIND:PATH, such as folder, coco or cub.
        out: Folder to write.
        count: Largest number of pictures; all if left out.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...
        seed: Seed of an endless data set.
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
        clear: If true, delete them. They are decoded again when they are needed.
    """
    from lineage.data.pixels import limit, remove, stores

    all_stores = stores()
    if not all_stores:
        print("The cache of pictures holds nothing.")
        return
    for folder, size, _ in all_stores:
        print(plain(f"{folder}: {size / 1e6:,.1f} MB"))
    total, number = sum(size for _, size, _ in all_stores), len(all_stores)
    sets = f"{number:,} data set{'' if number == 1 else 's'} of one size each"
    print(f"{sets}, {total / 1e6:,.1f} MB; at most {limit() / 1e6:,.0f} MB (LINEAGE_PIXELS_GB).")
    if clear:
        left = [folder for folder, _, _ in all_stores if not remove(folder)]
        for folder in left:
            print(plain(f"{folder} cannot be deleted; is it in use?"))
        print(f"{number - len(left):,} deleted.")
