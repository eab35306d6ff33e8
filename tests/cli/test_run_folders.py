"""Run folders: none is overwritten, a finished one is resumed, and damage is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from refusal import assert_refused

from lineage.training.store import load_tensors, read_json, save_tensors

SMOKE = ["--preset", "smoke"]

Call = Callable[..., Answer]


@pytest.fixture
def run_folder(smoke_run: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of a finished run of `ddpm`, which a test may damage."""
    return Path(shutil.copytree(smoke_run("ddpm").folder, tmp_path / "finished"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- nothing is overwritten -----------------------------------------------------------------------


def test_a_run_is_not_overwritten(call: Call, run_folder: Path) -> None:
    before = contents(run_folder)
    assert_refused(call("train", "ddpm", *SMOKE, "--out", run_folder), "--resume", "finished")
    other_key = call("train", "retrieval", *SMOKE, "--out", run_folder, "--resume")
    assert_refused(other_key, "ddpm", "retrieval")
    assert contents(run_folder) == before


def test_a_run_is_not_overwritten_by_published_weights(call: Call, run_folder: Path) -> None:
    """The refusal comes before the file is read, which may have gigabytes."""
    before = contents(run_folder)
    Path("netG.pth").write_bytes(b"not a checkpoint")
    refused = call("import-weights", "stackgan", "netG.pth", "--out", run_folder)
    assert_refused(refused, "finished", "--out")
    assert contents(run_folder) == before


def test_a_file_that_is_no_checkpoint_is_refused(call: Call, tmp_path: Path) -> None:
    """Code in a pickle is not run, and no folder is left behind."""
    Path("netG.pth").write_bytes(b"cos\nsystem\n(S'touch it_ran'\ntR.")
    refused = call("import-weights", "stackgan", "netG.pth", "--out", "runs/a")
    assert_refused(refused, "netG.pth", "is text")
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "runs").exists()


def test_a_file_in_place_of_the_run_folder_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert_refused(call("train", "ddpm", *SMOKE, "--out", "taken"), "taken")
    assert_refused(call("train", "ddpm", *SMOKE, "--out", "taken/run"), "taken")
    answer = call("compare", "retrieval", *SMOKE, "--out", "taken")
    assert answer.code == 2 and "taken" in answer.errors and "Traceback" not in answer.errors
    assert (tmp_path / "taken").read_text() == "mine"


# --- resuming -------------------------------------------------------------------------------------


def test_a_finished_run_is_resumed_without_training(call: Call, run_folder: Path) -> None:
    before = (run_folder / "model.safetensors").read_bytes()
    assert call("train", "ddpm", "--out", run_folder, "--resume").code == 0
    assert (run_folder / "model.safetensors").read_bytes() == before
    assert read_json(run_folder / "cost.json")["denoiser"]["steps"] == 20


def test_a_finished_run_goes_on_with_a_larger_budget(call: Call, run_folder: Path) -> None:
    before = (run_folder / "model.safetensors").read_bytes()
    assert call("train", "ddpm", "--out", run_folder, "--resume", "--steps", 23).code == 0
    assert (run_folder / "model.safetensors").read_bytes() != before
    assert read_json(run_folder / "cost.json")["denoiser"]["steps"] == 23


def test_resume_without_a_run_starts_one(call: Call, tmp_path: Path) -> None:
    """One command can stand in a script that is started again after every interruption."""
    start = ["train", "retrieval", *SMOKE, "--resume", "--out", tmp_path / "run"]
    assert call(*start).code == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_stage_is_taken_from_another_run(
    call: Call, smoke_run: Callable[[str], Any], tmp_path: Path
) -> None:
    """`--from` may stand beside --set, and reaches `lineage.train` by the stage's name."""
    source = smoke_run("vqvae").folder
    start = ["train", "vqvae", *SMOKE, "--steps", 2, "--set", "seed=1", "--out", "run"]
    answer = call(*start, "--from", f"codec={source}")
    assert answer.code == 0, answer.errors
    assert read_json(Path("run/config.json"))["stages_from"]["codec"]["run"] == str(source)
    assert_refused(call(*start[:-1], "b", "--from", f"codc={source}"), "'codc'", "'codec'")


# --- damage ---------------------------------------------------------------------------------------


def test_damaged_weights_are_refused(call: Call, run_folder: Path) -> None:
    path = run_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(call("sample", run_folder, "a red circle"), "model.safetensors")
    path.unlink()
    assert_refused(call("sample", run_folder, "a red circle"), "model.safetensors")


def test_weights_of_another_network_are_refused(
    call: Call, run_folder: Path, smoke_run: Callable[[str], Any]
) -> None:
    path = run_folder / "model.safetensors"
    tensors = load_tensors(path)
    other = load_tensors(smoke_run("gan_int_cls").folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    reshaped = {**tensors, name: torch.zeros(1, 2, 3)}
    incomplete = {key: tensor for key, tensor in tensors.items() if key != name}
    for content in (other, reshaped, incomplete):
        save_tensors(path, content)
        answer = call("sample", run_folder, "a red circle")
        assert_refused(answer, "model.safetensors", "DiffusionModel")


def test_a_damaged_checkpoint_is_refused(call: Call, run_folder: Path) -> None:
    (run_folder / "state.pt").write_bytes(b"not a checkpoint")
    refused = call("train", "ddpm", "--out", run_folder, "--resume", "--steps", 30)
    assert_refused(refused, "state.pt")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "3", '{"key": "ddpm"}', '{"kind": "word"}', "null"]
)
def test_damaged_settings_are_refused(
    name: str, content: str, call: Call, run_folder: Path
) -> None:
    (run_folder / name).write_text(content)
    assert_refused(call("sample", run_folder, "a red circle"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"key": "glide"}, "glide"),
        ({"key": "mine"}, "mine"),
        ({"hue": 1}, "hue"),
        ({"key": 3}, "3"),
        ({"key": None}, "None"),
    ],
)
def test_a_run_of_an_unknown_system_is_refused(
    change: dict[str, Any], word: str, call: Call, run_folder: Path
) -> None:
    """It may come from a later version, or from somebody else's copy."""
    path = run_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(call("sample", run_folder, "a red circle"), word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_reported_by_sample(call: Call, run_folder: Path) -> None:
    assert_refused(call("sample", run_folder, "a star", "--device", "cuda"), "'cuda'")
