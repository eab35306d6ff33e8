"""Runs on the page of `lineage app`: what each is called and what it offers, known before its
weights are read.

    open_runs    names of runs -> those that can be used, and a sentence about each other one
    AppRun       a run; its system is loaded when it first draws, and kept
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lineage import runs
from lineage.catalog import CATALOG
from lineage.config import flat
from lineage.data import NO_PATH, load_dataset
from lineage.errors import UserError
from lineage.plan import build, read_config, saved_stages
from lineage.pretrained import PREFIX, pretrained, run_folder, run_name
from lineage.system import HasFrames, Option, System, Visualises

NUM_EXAMPLES = 8  # captions to choose from


@dataclass(eq=False)
class AppRun:
    """One run.

    Attributes:
        folder: Run folder.
        device: Name of the device that it draws on.
        title: Name of the system, and the run's where several are of one system.
        year: Year in which the system was first public.
        data: Spec of the data that the run was trained on.
        size: Side of the pictures in pixels.
        options: Options of the system, by name.
        defaults: Values that the run's configuration has for options that are None by default.
        shows_how: If true, the system can show how a picture came about.
    """

    folder: Path
    device: str
    title: str
    year: int
    data: str
    size: int
    options: dict[str, Option]
    defaults: dict[str, Any]
    shows_how: bool
    _system: System | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def system(self) -> System:
        """The system, loaded at the first use. Raises `UserError` if a file is damaged."""
        with self._loading:
            if self._system is None:
                self._system = runs.load_system(self.folder, self.device)
            return self._system

    @property
    def label(self) -> str:
        return f"{self.title} ({self.year})"

    @property
    def inpaints(self) -> bool:
        """Whether the system repaints the masked part of a picture."""
        return self.options.keys() >= {"image", "mask"}

    @property
    def continues(self) -> bool:
        """Whether the system continues the upper part of a picture."""
        return self.options.keys() >= {"image", "keep"}


def packaged_runs() -> list[Path]:
    """Folders of the pretrained systems that draw, oldest first."""
    return [run_folder(f"{PREFIX}{key}") for key in pretrained() if CATALOG[key].draws]


def open_runs(folders: Sequence[Path], device: str = "auto") -> tuple[list[AppRun], list[str]]:
    """The runs that can be used, oldest first, and a sentence about each that cannot.

    Raises:
        UserError: a folder does not exist, or no run can be used.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no run folder {folder}.")
    opened, faults = [], []
    for folder in dict.fromkeys(folders):
        try:
            opened.append(_opened(folder, device))
        except UserError as error:
            faults.append(str(error))
    if not opened:
        raise UserError(faults[0] if faults else "There is no run to draw with: name one.")
    titles = [run.title for run in opened]
    for run in opened:
        if titles.count(run.title) > 1:
            run.title = f"{run.title}, {run_name(run.folder)}"
    return sorted(opened, key=lambda run: run.year), faults


def _opened(folder: Path, device: str) -> AppRun:
    """A run, from everything but its weights."""
    config = read_config(folder).without_files()
    with torch.device("meta"):  # sizes without numbers
        system = build(saved_stages(folder))
    row = CATALOG[config.key]
    if not isinstance(system, System):
        raise UserError(f"{run_name(folder)} is a run of {config.key}, which draws no pictures.")
    options = system.options()
    return AppRun(
        folder=folder,
        device=device,
        title=row.title,
        year=row.year,
        data=config.data,
        size=system.size,
        options=options,
        defaults=_configured(getattr(system, "config", None), options),
        shows_how=isinstance(system, (HasFrames, Visualises)),
    )


def _configured(config: Any, options: Mapping[str, Option]) -> dict[str, Any]:
    """Values of a configuration's fields that are called as an option is."""
    values = {} if config is None else flat(config)
    leaves = {path.rpartition(".")[2]: value for path, value in values.items()}
    return {name: leaves[name] for name in options if name in leaves}


def example_captions(opened: Sequence[AppRun]) -> list[str]:
    """Captions of the data that the runs were trained on, as far as it needs no path."""
    captions: list[str] = []
    specs = dict.fromkeys(run.data for run in opened)
    here = [spec for spec in specs if spec.partition(":")[0].partition("?")[0] in NO_PATH]
    for spec in here:
        try:
            showcase = load_dataset(spec, "validation", 32).showcase(NUM_EXAMPLES)
        except UserError:  # no font has emoji
            continue
        captions += [example.captions[0] for example in showcase]
    step = max(1, len(captions) // NUM_EXAMPLES)
    return list(dict.fromkeys(captions[::step]))[:NUM_EXAMPLES]
