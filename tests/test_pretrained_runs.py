"""Runs that come with the package: small, complete, and named `pretrained:KEY` everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lineage
from lineage.catalog import CATALOG, working
from lineage.cli import main
from lineage.errors import UserError
from lineage.evaluation import cost
from lineage.pretrained import FOLDER, other_worlds, pretrained, run_folder, run_name
from lineage.runs import load_system, read_config
from lineage.training.store import load_tensors

RESULTS = Path(__file__).parents[1] / "results" / "pretrained"
LARGEST = 3_000_000


def test_every_working_system_has_one() -> None:
    """But for adapters, which are of a style or a subject, and not of `shapes`."""
    assert pretrained() == [key for key in working() if not CATALOG[key].adapts]


@pytest.mark.parametrize("key", [*pretrained(), *other_worlds()])
def test_a_run_is_small_and_half_precise(key: str) -> None:
    path = FOLDER / key / "model.safetensors"
    assert path.stat().st_size <= LARGEST
    assert {file.name for file in path.parent.iterdir()} == {
        "config.json",
        "cost.json",
        "model.safetensors",
        "tokenizer.json",
    }
    for name, tensor in load_tensors(path).items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            assert tensor.dtype == torch.float16, name


@pytest.mark.parametrize("key", [*pretrained(), *other_worlds()])
def test_a_run_is_loaded_in_full_precision_and_draws(key: str) -> None:
    system = lineage.load(f"pretrained:{key}")
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    if CATALOG[read_config(FOLDER / key).key].draws:
        assert system.generate(["a red circle"], seed=1).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("key", [*pretrained(), *other_worlds()])
def test_its_results_say_how_it_was_made(key: str) -> None:
    run = json.loads((RESULTS / key / "run.json").read_text())
    config = read_config(FOLDER / key)
    assert run["command"].startswith(f"lineage train {config.key} ")
    assert key == config.key or key == f"{config.key}_{config.data}"
    assert run["machine"]["commit"] and run["machine"]["clean"]
    assert run["seed"] == config.seed
    scores = json.loads((RESULTS / key / "scores.json").read_text())
    assert scores["runs"][0]["run"] == f"pretrained:{key}"
    assert str(Path.home()) not in (FOLDER / key / "config.json").read_text()


def test_the_command_line_draws_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["sample", "pretrained:gan_int_cls", "a red circle", "--out", str(out)]) == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pretrained:ddmp", "did you mean 'ddpm'"),
        ("pretrained:", "no trained run ''"),
        ("pretrained:sd3", "is planned"),
    ],
)
def test_an_unknown_one_is_refused(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", name, "x", "--out", str(tmp_path / "a.png")]) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(UserError, match=words):
        lineage.load(name)


def test_a_system_without_one_says_how_to_train_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lineage.pretrained.pretrained", lambda: ["ldm"])
    with pytest.raises(UserError, match="lineage train ddpm"):
        run_folder("pretrained:ddpm")


def test_names_lead_to_folders_and_back() -> None:
    assert run_folder("pretrained:ddpm") == FOLDER / "ddpm"
    assert run_name(FOLDER / "ddpm") == "pretrained:ddpm"
    assert run_name(Path("runs/ddpm")) == "runs/ddpm" == str(run_folder("runs/ddpm"))


def test_no_run_is_trained_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "ddpm", "--steps", "1", "--out", "pretrained:ddpm"]) == 2
    assert "folder of your own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "stage", "source"),
    [("vqvae", "codec", "vqvae"), ("dalle", "codec", "dalle"), ("dit", "autoencoder", "ldm")],
)
def test_an_earlier_stage_is_taken_out_of_the_last_ones_weights(
    key: str, stage: str, source: str, tmp_path: Path
) -> None:
    taken = ["--from", f"{stage}=pretrained:{source}"]
    assert main(["train", key, "--steps", "1", *taken, "--out", str(tmp_path / "run")]) == 0
    run, packaged = load_system(tmp_path / "run", "cpu"), load_system(f"pretrained:{source}", "cpu")
    prefix = {"codec": "codec.", "autoencoder": "space.autoencoder."}[stage]
    weights = {n: t for n, t in packaged.state_dict().items() if n.startswith(prefix)}
    assert weights
    assert all(torch.equal(run.state_dict()[name], value) for name, value in weights.items())


def test_a_stage_that_a_run_holds_in_part_cannot_be_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = ["--from", "stage1=pretrained:stackgan"]
    assert main(["train", "stackgan", "--steps", "1", *taken, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "pretrained:stackgan holds only a part of its stage stage1" in error
    assert not (tmp_path / "run").exists()


def test_scoring_writes_nothing_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path))
    written: list[Path] = []
    monkeypatch.setattr(cost, "measure", lambda *_: {})
    monkeypatch.setattr(cost, "write_json", lambda path, _: written.append(path))
    cost.cached_cost(FOLDER / "ddpm", ["a red circle"], "cpu")
    assert len(written) == 1 and tmp_path in written[0].parents
