"""Fixtures of several test folders: a private cache, a small tokeniser, smoke systems and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lineage import runs
from lineage.cli import main
from lineage.config import RunConfig
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.recipes import find_recipe
from lineage.system import System
from lineage.text.tokenizer import WordTokenizer
from lineage.training.stage import RunStages

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16  # side of the pictures at preset smoke


def reference(name: str) -> Path:
    """Path of a reference file of the official code, of `tests/parity` or beside the repository;
    without it, the test is skipped.
    """
    folders = (ROOT / "tests" / "parity", ROOT.parent / "shared" / "reference")
    for path in (folder / f"{name}.safetensors" for folder in folders):
        if path.is_file():
            return path
    pytest.skip(f"{name}.safetensors is not beside the repository", allow_module_level=True)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, so that no stage of an earlier run replaces training."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LINEAGE_CACHE")
    os.environ["LINEAGE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LINEAGE_CACHE"]
    else:
        os.environ["LINEAGE_CACHE"] = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """One random state for every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes() -> CaptionedDataset:
    """The procedural world at the size of preset smoke."""
    return load_dataset("shapes", "train", SIZE)


@pytest.fixture(scope="session")
def tokenizer(shapes: CaptionedDataset) -> WordTokenizer:
    """The words of the procedural world."""
    return WordTokenizer.train(shapes.all_captions(500), 512)


MakeSystem = Callable[..., tuple[System, RunConfig]]


@pytest.fixture(scope="session")
def make_system(tokenizer: WordTokenizer) -> MakeSystem:
    """(key, settings) -> an untrained system at preset smoke, and its configuration."""

    def make(key: str, **settings: Any) -> tuple[System, RunConfig]:
        dotted = {name.replace("__", "."): value for name, value in settings.items()}
        config = runs.configure(key, preset_name="smoke", settings=dotted)
        torch.manual_seed(1)
        return runs.build(find_recipe(key).stages(config, tokenizer)), config

    return make


class Trained(NamedTuple):
    """A finished run: its folder, and the system as it was at the end of training."""

    folder: Path
    system: System


def train_here(folder: Path, key: str, settings: Mapping[str, Any], **options: Any) -> Trained:
    """`lineage.train` in this process, which also hands out the system it trained."""
    systems: list[System] = []
    original = RunStages.run

    def run(self: RunStages) -> System:
        systems.append(original(self))
        return systems[-1]

    RunStages.run = run  # type: ignore[method-assign]
    try:
        runs.train(key, preset="smoke", out=folder, settings=settings, **options)
    finally:
        RunStages.run = original  # type: ignore[method-assign]
    return Trained(folder, systems[-1])


@pytest.fixture(scope="session")
def train_run() -> Callable[..., Trained]:
    """`train_here`, for tests that need a run with settings of their own."""
    return train_here


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """key -> a finished run at preset smoke, trained once a session. Copy it before changing it."""
    done: dict[str, Trained] = {}

    def get(key: str) -> Trained:
        if key not in done:
            done[key] = train_here(tmp_path_factory.mktemp("runs") / key, key, {})
        return done[key]

    return get


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    """Start `python -m lineage ...` as a user would, in a process of its own."""

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "lineage", *map(str, arguments)],
            cwd=options.pop("cwd", ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


class Answer(NamedTuple):
    code: int
    out: str
    errors: str


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run one command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture
def sample(call: Callable[..., Answer], smoke_run: Callable[[str], Any]) -> Callable[..., Answer]:
    """(key, options) -> what `lineage sample` of that smoke run answers, in a folder of its own."""
    return lambda key, *options: call("sample", smoke_run(key).folder, *options)
