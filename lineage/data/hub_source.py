"""Opening what `hub:` names, with the library `datasets`: quietly, quickly, and running no code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from lineage.characters import plain
from lineage.errors import UserError
from lineage.files import expanded

TIMEOUT = 5.0
"""Number of seconds that the hub has to answer before it counts as out of reach."""
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Names that the hub can have."""
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder of `save_to_disk` is known."""


@dataclass
class Source:
    """An opened data set.

    Attributes:
        splits: `datasets.Dataset` of each split, by its name there.
        root: The folder itself, or, of a data set of the hub, that of the library's cache.
        caches: Folders of the library, without links, into which it unpacks pictures.
        is_local: If true, it is a folder of the user, whose links to other places are followed.
        is_saved: If true, it is a folder of `save_to_disk`, which can be written again in place.
    """

    splits: dict[str, Any]
    root: Path
    caches: list[str]
    is_local: bool = True
    is_saved: bool = False

    def fault(self, path: str | None) -> str:
        """Why the file that a row names is not opened; empty if it may be.

        Rows come from anywhere, so they name files of the data set only, not any of this machine.
        """
        if not path:
            return "the row has no picture"
        if "://" in path:
            return f"its picture is at the address {path[:100]}, and none is fetched from there"
        whole = os.path.abspath(os.path.join(self.root, path))
        real = os.path.realpath(whole)
        inside = self.is_local and _is_inside(whole, str(self.root))
        if inside or any(
            _is_inside(real, one) for one in (os.path.realpath(self.root), *self.caches)
        ):
            return ""
        return f"its picture {path[-100:]} is outside the data set"

    def relative(self, path: str) -> str:
        """A path relative to the root; one outside it, in another cache, stays whole."""
        whole = os.path.abspath(os.path.join(self.root, path))
        is_inside = _is_inside(whole, str(self.root))
        return os.path.relpath(whole, self.root).replace(os.sep, "/") if is_inside else whole


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def open_source(name: str, config: str | None = None) -> Source:
    """Open a folder, or a data set of the hub, with the library `datasets`.

    Raises:
        UserError: The library is not installed, or the data set cannot be loaded.
    """
    library = _library()
    path = Path(os.path.abspath(expanded(name)))
    is_local = os.path.exists(path)
    _check_name(library, name, path if is_local else None)
    is_saved = any((path / file).is_file() for file in SAVED)
    if is_saved and config is not None:
        raise UserError(f"{plain(name)} has no configurations: it is a folder of save_to_disk.")
    online = is_local or _is_online()
    try:
        with _quiet(library), contextlib.nullcontext() if online else _offline(library):
            if is_saved:
                loaded = library.load_from_disk(str(path))
            else:
                loaded = _loaded(library, str(path) if is_local else name, config)
    except Exception as error:  # the library raises errors of many kinds
        raise _unreadable(name, error, online) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {_own_split(loaded): loaded}
    cache = Path(os.path.realpath(library.config.HF_DATASETS_CACHE))
    caches = (cache, library.config.DOWNLOADED_DATASETS_PATH, _hub_cache())
    root = path if is_local else cache
    return Source(splits, root, [os.path.realpath(one) for one in caches], is_local, is_saved)


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError("hub: needs datasets: pip install 'lineage-t2i[hub]'.") from error
    return cast(ModuleType, datasets)


def _loaded(library: ModuleType, name: str, config: str | None) -> Any:
    """Every split; versions of the library that could run a data set's code are told not to."""
    could_run = hasattr(library.config, "HF_DATASETS_TRUST_REMOTE_CODE")
    more = {"trust_remote_code": False} if could_run else {}
    return library.load_dataset(name, config, **more)


def _own_split(data: Any) -> str:
    """Name of the split that a single table is: `train[:9]` -> `train`."""
    return str(data.split or "train").partition("[")[0]


def _check_name(library: ModuleType, name: str, path: Path | None) -> None:
    """Raise `UserError` for a name, of a folder if there is a path, that is no data set's."""
    shown = plain(name)
    readers = getattr(library.packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    if path is None and not NAME.fullmatch(name):
        raise UserError(f"There is no folder {shown!r}; check the spelling.")
    if path is None and name in readers:  # which would read the current folder
        raise UserError(f"{shown} is a kind of files, not a data set; name their folder: hub:PATH.")
    if path is not None and path.is_file() and path.suffix != ".py":
        raise UserError(f"{shown!r} is a file; name the folder that contains it.")
    place = path or Path(name)
    if place.suffix == ".py" or (place / f"{place.name}.py").is_file():
        raise UserError(_SCRIPT.format(shown))


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _is_online() -> bool:
    """Whether the hub answers; asked once, because the library would ask for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # errors of whatever library sends the request; or it is set to offline
        return False
    return True


@contextlib.contextmanager
def _offline(library: ModuleType) -> Iterator[None]:
    """Within this context, the library reads only its cache."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # the second in versions before 3
    before = {
        name: getattr(library.config, name) for name in names if hasattr(library.config, name)
    }
    for name in before:
        setattr(library.config, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(library.config, name, value)


@contextlib.contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Within this context, no remarks of the libraries, and bars only on a terminal."""
    from huggingface_hub import utils

    is_terminal = sys.stderr.isatty()
    bars = [b for b in (library, utils) if not (is_terminal or b.are_progress_bars_disabled())]
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for one in bars:
        one.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one in bars:
            one.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_SCRIPT = (
    "{} is a loading script, which is never run; look for a copy of the data set in Parquet, or "
    "export it to a folder of pictures."
)


def _unreadable(name: str, error: Exception, online: bool) -> UserError:
    """The sentence for a data set that the library does not load."""
    shown, text = plain(name), " ".join(str(error).split())[:300] or type(error).__name__
    if "script" in text or "trust_remote_code" in text:
        return UserError(_SCRIPT.format(shown))
    if not online:
        return UserError(
            f"There is no folder {shown!r}, no such data set in the cache of Hugging Face, and the "
            "hub cannot be reached; check the name and the connection."
        )
    if "onfig" in text and isinstance(error, ValueError):
        return UserError(f"hub:{shown} needs one of its configurations, ?config=NAME: {text}")
    if isinstance(error, FileNotFoundError):  # also the library's own error for an unknown name
        return UserError(
            f"There is no data set {shown!r} ({text}); check the spelling; a private one needs "
            "`hf auth login`."
        )
    return UserError(f"The data set {shown!r} cannot be loaded: {text}")
