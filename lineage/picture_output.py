"""Picture files that the user names: checked before the work, then written whole."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from lineage.characters import plain
from lineage.errors import UserError
from lineage.files import check_output, write_bytes


def check_picture(path: Path) -> None:
    """Check that a picture can be written to `path`, before the work whose result it shows.

    Raises:
        UserError: its ending is not one of a picture, or the file cannot be written.
    """
    check_output(path)
    probe = Image.new("RGB", (300, 2))
    try:
        with Image.open(io.BytesIO(_encoded(probe, path))) as read:
            kept = read.size == probe.size  # icons are made smaller
    except Exception:  # of many kinds: unknown endings, formats without writer or without colours
        kept = False
    if not kept:
        raise UserError(
            f"{plain(path)} does not end like a picture file that can be written; try "
            f"{plain(path.with_suffix('.png'))}."
        )


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture, all of it or nothing, in the format of the path's ending.

    Raises:
        UserError: the file cannot be written, or its format has no room for so large a picture.
    """
    try:
        data = _encoded(image, path)
    except Exception as error:  # of many kinds: each format has its own limits
        raise UserError(
            f"A sheet of {image.width:,} x {image.height:,} pixels does not fit into "
            f"{plain(path)} ({error}): write it to {plain(path.with_suffix('.png'))}, or draw "
            "fewer pictures."
        ) from error
    write_bytes(path, data)


def _encoded(image: Image.Image, path: Path) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[path.suffix.lower()])
    return file.getvalue()
