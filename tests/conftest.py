"""Fixtures of several test folders: a private cache, a small tokeniser, smoke systems and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineage import runs
from lineage.cli import main
from lineage.config import RunConfig
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset
from lineage.official.verify import FileCheck, verify
from lineage.recipes import find_recipe
from lineage.system import System
from lineage.text.tokenizer import WordTokenizer
from lineage.training.run_stages import RunStages

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16  # side of the pictures at preset smoke


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


Tree = dict[Path, tuple[bytes, int]]


def tree(*folders: Path) -> Tree:
    """Bytes and time of change of every file below some folders; folders and pipes have none."""
    files: Tree = {}
    for path in [path for folder in folders for path in (folder, *folder.rglob("*"))]:
        regular = path.is_file()
        content = path.read_bytes() if regular else b""
        files[path] = (content, path.lstat().st_mtime_ns if regular else 0)
    return files


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Answer]:
    """Run one command in this process, in a folder of its own.

    A command that is refused (exit code 2) must have changed no file there, and none in a folder
    that it was given.
    """
    monkeypatch.chdir(tmp_path)
    base = tmp_path_factory.getbasetemp()

    def run(*arguments: object) -> Answer:
        given = [Path(str(a)).absolute() for a in arguments]
        inside = [path for path in given if base in path.parents and path.is_dir()]
        folders = [tmp_path, Path.cwd(), *inside]
        before = tree(*folders)
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
        answer = Answer(code, *capfd.readouterr())
        if code == 2:
            after = tree(*folders)
            changed = {path for path, _ in before.items() ^ after.items()}
            assert not changed, f"{answer.errors}changed {', '.join(map(str, sorted(changed)))}"
        return answer

    return run


@pytest.fixture
def sample(call: Callable[..., Answer], smoke_run: Callable[[str], Any]) -> Callable[..., Answer]:
    """(key, options) -> what `lineage sample` of that smoke run answers, in a folder of its own."""
    return lambda key, *options: call("sample", smoke_run(key).folder, *options)


# --- reference files of the official code -----------------------------------------------------


@pytest.fixture(scope="session")
def reference_file() -> Callable[[str], Path]:
    """Name -> path of a reference file, of `tests/parity` or beside the repository; a test whose
    file is at neither place is skipped.
    """

    def find(name: str) -> Path:
        for folder in (ROOT / "tests" / "parity", ROOT.parent / "shared" / "reference"):
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"there is no {name} beside the repository")

    return find


@pytest.fixture
def changed_copy(reference_file: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """(name, change) -> a copy of a reference file; `change` changes its tensors and metadata in
    place.
    """

    def copy(name: str, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
        with safe_open(reference_file(f"{name}.safetensors"), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        change(tensors, metadata)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, tmp_path / "changed.safetensors", metadata)
        return tmp_path / "changed.safetensors"

    return copy


@pytest.fixture
def changed(changed_copy: Callable[..., Path]) -> Callable[..., FileCheck]:
    """Verify a copy of a reference file in which some tensors or settings are changed.

    `change` takes a tensor's full name and its value, and returns the new value, or None to leave
    the tensor out; further keywords are settings of the file's config.
    """

    def check(
        name: str,
        change: Callable[[str, Tensor], Tensor | None] = lambda _, tensor: tensor,
        **settings: Any,
    ) -> FileCheck:
        def apply(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
            for key in list(tensors):
                if (new := change(key, tensors.pop(key))) is not None:
                    tensors[key] = new
            metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})

        (checked,) = verify([changed_copy(name, apply)])
        assert checked.system == name
        return checked

    return check
