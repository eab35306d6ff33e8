"""`lineage data`: show, check and export data sets."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App, Group

from lineage.characters import plain
from lineage.cli.arguments import Count, Flag, PathName, Seed, SheetCount, print_json
from lineage.errors import UserError

GROUP = Group("Data", sort_key=1)
data = App("data", help="Show, check and export data sets.", group=GROUP, group_commands=GROUP)


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
        spec: Data set: shapes, shapes:hard, shapes:easy:zh, PATH, folder:PATH or imagefolder:PATH.
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
        spec: Data set: shapes, shapes:hard, shapes:easy:zh, PATH, folder:PATH or imagefolder:PATH.
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
) -> None:
    """Write a data set as an imagefolder.

    Args:
        spec: Data set: shapes, shapes:hard, shapes:easy:zh, PATH, folder:PATH or imagefolder:PATH.
        out: Folder to write.
        count: Largest number of pictures; all if left out.
        size: Side of the pictures in pixels.
        split: train, validation, test, ...
        seed: Seed of an endless data set.
    """
    from lineage.data import load_dataset
    from lineage.data.tools import export
    from lineage.files import check_output

    check_output(out, folder=True)
    written = export(load_dataset(spec, split, size, seed), out, count)
    print(plain(f"{out}: {written:,} pictures in imagefolder form"))
