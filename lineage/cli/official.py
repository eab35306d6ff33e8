"""`lineage verify` and `lineage import-weights`."""

from __future__ import annotations

import sys
from pathlib import Path

from lineage.characters import plain
from lineage.cli.arguments import Flag, Key


def verify(files: list[Path], /, *, json: Flag = False) -> int:
    """Check our classes against numbers computed by the official code.

    Args:
        files: Reference files.
        json: If true, print one JSON document.
    """
    from lineage.official.verify import run

    return run(files, json_output=json)


def import_weights(key: Key, files: list[Path], /, *, out: Path) -> None:
    """Turn published weights into a run folder.

    Args:
        key: System, as in `lineage list`.
        files: Published .pth, .pt or .safetensors files; attngan also takes a .txt of words.
        out: Run folder to write.
    """
    from lineage.official.importing import import_weights

    if note := import_weights(key, files, out):
        print(f"lineage: {plain(note)}", file=sys.stderr)
    print(plain(out))
