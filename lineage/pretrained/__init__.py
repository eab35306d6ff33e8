"""Trained runs that come with the package, at preset tiny.

`pretrained:KEY` stands for the run folder of a system, wherever one is asked for. It was trained on
`shapes`, `pretrained:KEY_emoji` on captioned emoji. Weights are in half precision. `make
pretrained` trains them again, and `results/pretrained` has their scores.
"""

from __future__ import annotations

from pathlib import Path

from lineage.catalog import CATALOG, lookup
from lineage.errors import UserError, nearest
from lineage.files import expanded

PREFIX = "pretrained:"
FOLDER = Path(__file__).parent


def pretrained() -> list[str]:
    """Keys of the systems with a run that was trained on `shapes`, oldest first."""
    return [key for key in CATALOG if (FOLDER / key / "config.json").is_file()]


def other_worlds() -> list[str]:
    """Names of the runs that were trained on other data, such as `ldm_emoji`."""
    names = sorted(file.parent.name for file in FOLDER.glob("*/config.json"))
    return [name for name in names if name not in CATALOG]


def run_folder(run: str | Path, name: str = "The run") -> Path:
    """The folder that a run's name stands for: `pretrained:KEY`, or a path.

    Args:
        run: Name of the run.
        name: Name of the option that holds it.

    Raises:
        UserError: the package has no such run, or the path is none.
    """
    if not str(run).startswith(PREFIX):
        return expanded(run, name)
    key, keys = str(run).removeprefix(PREFIX), [*pretrained(), *other_worlds()]
    if key in keys:
        return FOLDER / key
    if key in CATALOG:
        lookup(key)
        raise UserError(
            f"The package has no trained run of {key!r}, only of {', '.join(keys)}: train it with "
            f"`lineage train {key}`."
        )
    raise UserError(f"The package has no trained run {key!r}: {nearest(key, keys)}")


def is_packaged(folder: Path) -> bool:
    """Whether a run's folder is one of the package, where nothing may be written."""
    return folder.parent == FOLDER


def run_name(folder: Path) -> str:
    """The name of a run's folder for people: `pretrained:KEY`, or its path."""
    return f"{PREFIX}{folder.name}" if is_packaged(folder) else str(folder)
