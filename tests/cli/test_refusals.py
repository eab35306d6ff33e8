"""A refused command changes no byte of any file: of runs, data, a comparison, a folder of others.

The `call` fixture compares the files before and after every refusal; these commands are given a
place that holds everything that a command might write to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_commands
from conftest import SIZE, Answer
from refusal import assert_refused

from lineage import catalog, runs
from lineage.data import load_dataset
from lineage.data.tools import export
from lineage.errors import Interrupted, UserError
from lineage.training.loop import Trainer

Call = Callable[..., Answer]

SMOKE = "--preset smoke --steps 2"


@pytest.fixture(scope="module")
def place(smoke_run: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, one that was stopped, data, a comparison, a file, and a folder of others."""
    root = tmp_path_factory.mktemp("place")
    for name, key in (("finished", "ddpm"), ("two", "vqvae"), ("compare/ddpm", "ddpm")):
        shutil.copytree(smoke_run(key).folder, root / name)
    for name in ("report.html", "report.json", "sheet.png"):
        (root / "compare" / name).write_text("{}")
    export(load_dataset("shapes", "train", SIZE), root / "data", 8)
    (root / "taken").write_text("mine")
    (root / "others").mkdir()
    (root / "others" / "notes.txt").write_text("mine")
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> Any:
        trainer._stop_requested = trainer.step == 2
        return original(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "advance", advance)
        with pytest.raises(Interrupted):
            runs.train("ddpm", preset="smoke", out=root / "stopped")
    return root


REFUSED = [
    # a run is there
    f"train ddpm {SMOKE} --out finished",
    f"train ddpm {SMOKE} --out stopped",
    f"train retrieval {SMOKE} --out finished --resume",
    f"train ddpm {SMOKE} --out compare/ddpm",
    "import-weights stackgan finished/model.safetensors --out two",
    # settings that a run cannot change
    *[
        f"train ddpm --out {run} --resume --set {change}"
        for run in ("finished", "stopped", "compare/ddpm")
        for change in (
            "model.unet.channels=64",
            "model.unet.num_heads=3",
            "size=32",
            "size=17",
            "text=lstm",
            "encoder.width=32",
            "seed=3",
            "data=data",
            "key=dit",
            "preset=paper",
            "optim.lrr=1",
            "optim.lr=fast",
            "train.device=tpu",
        )
    ],
    "train ddpm --out finished --resume --set optim.lr=0.5",  # nothing is left to train
    "train ddpm --out finished --resume --preset tiny",
    "train ddpm --out stopped --resume --preset tiny",
    "train ddpm --out stopped --resume --data data",
    "train ddpm --out stopped --resume --seed 3",
    "train ddpm --out stopped --resume --device tpu",
    "train ddpm --out stopped --resume --from codec=two",
    "train vqvae --out two --resume --from codec=finished",
    "train vqvae --out two --resume --set codec.channels=5",
    # stages of other runs
    f"train vqvae {SMOKE} --out new --from codec=finished",
    f"train vqvae {SMOKE} --out new --from codc=two",
    f"train vqvae {SMOKE} --out new --from prior=two",
    f"train vqvae {SMOKE} --out others/new --from codec=two --set codec.channels=5",
    # where nothing can be written
    f"train ddpm {SMOKE} --out taken",
    f"train ddpm {SMOKE} --out taken/run",
    "sample finished circle --out taken/a.png",
    "sample finished circle --out a.unknown",
    "sample finished circle --out data",
    "evaluate finished --pictures 2 --out taken/scores",
    "evaluate finished --pictures 2 --out /proc/x",
    "data export shapes --count 2 --out taken",
    "data export shapes --count 2 --out data",
    # what is no run, no data, no picture
    "sample data circle",
    "sample others circle",
    "evaluate data",
    "evaluate finished others",
    "evaluate finished --prompts nowhere",
    "evaluate finished --prompts taken",
    "evaluate finished --data others",
    "data show others",
    f"train ddpm {SMOKE} --data others --out new",
    "sample finished circle --image taken",
    "sample finished circle --set guidance=big",
    "sample finished circle --seed 18446744073709551616",
    "import-weights stackgan finished/model.safetensors --out new",
    "import-weights stackgan data --out new",
    "verify taken",
    f"compare ddpm retreival {SMOKE} --out compare",
    f"compare ddpm {SMOKE} --data others --out compare",
    f"compare ddpm {SMOKE} --set optim.lrr=1 --out compare",
    f"compare ddpm {SMOKE} --set model.unet.num_heads=3 --out compare",
]


@pytest.mark.parametrize("command", REFUSED)
def test_a_refused_command_changes_nothing(
    command: str, call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert_refused(call(*command.split()))


@pytest.mark.parametrize("out", ["", "a\0b"], ids=["empty", "zero byte"])
def test_an_impossible_name_changes_nothing(out: str, call: Call) -> None:
    assert_refused(call("train", "ddpm", *SMOKE.split(), "--out", out))


(ROWS,) = [mark.args[1] for mark in test_commands.test_a_fault_is_one_sentence.pytestmark]


def test_no_refusal_of_the_command_line_changes_a_file(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faults of the other page, given beside runs and data."""
    monkeypatch.chdir(place)
    for arguments, words in ROWS:
        assert_refused(call(*arguments), *words)


def test_a_refusal_that_changes_a_file_is_noticed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above would otherwise hold nothing."""

    def write_and_refuse() -> str:
        (tmp_path / "trace").write_text("written")
        raise UserError("Refused.")

    monkeypatch.setattr(catalog, "as_table", write_and_refuse)
    with pytest.raises(AssertionError, match="trace"):
        call("list")
