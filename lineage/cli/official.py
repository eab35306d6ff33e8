"""`lineage verify` and `lineage import-weights`."""

from __future__ import annotations

from lineage.characters import plain
from lineage.cli.arguments import Flag, Key, PathName
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
