"""`lineage verify`, `lineage import-weights` and `lineage export-adapter`."""

from __future__ import annotations

from typing import Literal

from lineage.characters import plain
from lineage.cli.arguments import Flag, Key, PathName, RunName
from lineage.errors import say


def verify(files: list[PathName], /, *, json: Flag = False) -> int:
    """Check our classes against numbers computed by the official code.

    Args:
        files: Reference files.
        json: If true, print one JSON document.
    """
    from lineage.official.verify import run

    return run(files, json_output=json)


def import_weights(key: Key, files: list[PathName], /, *, out: PathName) -> None:
    """Turn published weights into a run folder.

    Args:
        key: System, as in `lineage list`.
        files: Published files, recognised by their content; attngan also takes a .txt of words.
        out: Run folder to write.
    """
    from lineage.official.importing import import_weights

    if note := import_weights(key, files, out):
        say(note)
    print(plain(out))


def export_adapter(
    run: RunName, /, *, out: PathName, form: Literal["kohya", "diffusers", "peft"] = "kohya"
) -> None:
    """Write the adapter of a run as a file that other programs read.

    Args:
        run: Run folder of an adapter, as of lora.
        out: Safetensors file to write; for peft a folder.
        form: Names in the file: kohya's (also AUTOMATIC1111's and ComfyUI's), diffusers' or peft's.
    """
    from lineage.official.adapters import export_adapter as export

    print(plain(export(run, out, form)))
