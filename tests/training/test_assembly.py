"""A stage that trains nothing, put together from trained ones: runs of clipdraw, and of clip."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from torch import Tensor

import lineage
from lineage import runs
from lineage.clip.clipdraw import CLIPDraw
from lineage.config import OptimConfig, TrainConfig
from lineage.errors import Interrupted, UserError
from lineage.recipes import find_recipe, preset
from lineage.text.tokenizer import WordTokenizer
from lineage.training.log import read_log
from lineage.training.loop import Trainer
from lineage.training.stage import Assembly
from lineage.training.store import load_state, load_tensors, read_json, save_tensors

QUICK = {"train.log_every": 1, "train.batch_size": 4, "train.checkpoint_every": 2,
         "train.sample_every": 0, "model.num_steps": 1}  # fmt: skip
CAPTIONS = ["a red circle", ""]
TrainRun = Callable[..., Any]
Call = Callable[..., Answer]


@pytest.fixture(autouse=True)
def sheets(monkeypatch: pytest.MonkeyPatch, tokenizer: WordTokenizer) -> list[str]:
    """Names of the sheets; no vocabulary from 20,000 pictures, no sheet of sixteen captions."""
    drawn: list[str] = []
    monkeypatch.setattr(runs, "make_tokenizer", lambda *arguments: tokenizer)
    monkeypatch.setattr(runs, "sample_sheet", lambda s, e, path: drawn.append(path.name))
    monkeypatch.setattr(runs, "matches_sheet", lambda *arguments: None)
    monkeypatch.setattr(runs, "save_picture", lambda image, path: drawn.append(path.name))
    return drawn


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stages of all steps taken, with a cache of the test's own."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    stages: list[str] = []
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        stages.append(trainer.stage)
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "advance", advance)
    return stages


@pytest.fixture(scope="module")
def first(train_run: TrainRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """key -> folder of a finished run of few steps. Copy it before changing it."""
    folders: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in folders:
            folder = tmp_path_factory.mktemp("first") / key
            own = {k: v for k, v in QUICK.items() if key == "clipdraw" or "model" not in k}
            folders[key] = train_run(folder, key, own, steps=4).folder
        return folders[key]

    return get


def clip_of(run: Path) -> dict[str, Tensor]:
    tensors = load_tensors(run / "model.safetensors")
    return {n.removeprefix("clip."): t for n, t in tensors.items() if n.startswith("clip.")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a run ----------------------------------------------------------------------------------------


def test_the_budget_is_that_of_the_trained_stages(
    train_run: TrainRun, steps: list[str], sheets: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = train_run(run, "clipdraw", QUICK, steps=4)
    assert steps == ["clip"] * 4 and isinstance(trained.system, CLIPDraw)
    assert not trained.system.training
    assert sheets == ["drawing_000000.png"]  # of the drawing alone: a CLIP within draws none
    cost = read_json(run / "cost.json")
    assert set(cost) == {"clip"} and cost["clip"]["steps"] == 4 and cost["clip"]["finished"]
    assert {line["stage"] for line in read_log(run / "metrics.jsonl")} == {"clip"}
    config = read_json(run / "config.json")
    assert config["key"] == "clipdraw" and config["model"]["num_steps"] == 1
    assert not (run / "state.pt").exists()
    assert load_state(run / "stages" / "clip" / "state.pt")["step"] == 4
    own = load_tensors(run / "stages" / "clip" / "model.safetensors")
    assert same(clip_of(run), own)  # averaged weights, which the last stage holds
    loaded = lineage.load(run, device="cpu")
    assert torch.equal(loaded.generate(CAPTIONS, seed=1), trained.system.generate(CAPTIONS, seed=1))


def test_a_finished_run_is_not_touched_again(
    first: Callable[[str], Path], steps: list[str], sheets: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(first("clipdraw"), tmp_path / "run"))
    steps.clear()
    sheets.clear()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    written = (run / "model.safetensors").stat().st_mtime_ns
    runs.train("clipdraw", out=run, resume=True)
    assert steps == [] and sheets == []
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert (run / "model.safetensors").stat().st_mtime_ns == written


def test_a_lost_drawing_is_put_together_again(
    first: Callable[[str], Path], steps: list[str], sheets: list[str], tmp_path: Path
) -> None:
    """As after a kill between the last step and the assembly."""
    run = Path(shutil.copytree(first("clipdraw"), tmp_path / "run"))
    expected = load_tensors(run / "model.safetensors")
    steps.clear()
    sheets.clear()
    (run / "model.safetensors").unlink()
    runs.train("clipdraw", out=run, resume=True)
    assert steps == [] and same(load_tensors(run / "model.safetensors"), expected)
    assert sheets == ["drawing_000000.png"]


def test_a_larger_budget_trains_the_clip_on(
    first: Callable[[str], Path], steps: list[str], sheets: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(first("clipdraw"), tmp_path / "run"))
    before = clip_of(run)
    steps.clear()
    sheets.clear()
    runs.train("clipdraw", out=run, resume=True, steps=6)
    assert steps == ["clip"] * 2 and not same(clip_of(run), before)
    assert same(clip_of(run), load_tensors(run / "stages" / "clip" / "model.safetensors"))
    assert sheets == ["drawing_000000.png"]


def stop_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Ask to stop after some steps of the CLIP."""
    original = Trainer.advance

    def advance(trainer: Trainer, *arguments: Any) -> dict[str, Tensor]:
        values = original(trainer, *arguments)
        trainer._stop_requested |= trainer.step == number
        return values

    patch.setattr(Trainer, "advance", advance)


@pytest.mark.parametrize("number", [3, 4])
def test_a_stopped_run_ends_like_an_unbroken_one(
    number: int,
    first: Callable[[str], Path],
    train_run: TrainRun,
    steps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two steps, and behind the last, before the drawing is put together."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(number, patch)
        with pytest.raises(Interrupted, match="--resume"):
            train_run(run, "clipdraw", QUICK, steps=4)
    assert not (run / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        lineage.load(run)
    train_run(run, "clipdraw", {}, resume=True)
    assert steps == ["clip"] * 4
    whole = first("clipdraw") / "model.safetensors"
    assert (run / "model.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"optim.lr": 0.1}, {}, "spent its budget"),
        ({"model.num_steps": 2}, {}, r"model\.num_steps=2 does not fit"),
        ({"clip.projection_dim": 8}, {}, r"clip\.projection_dim=8 does not fit"),
        ({}, {"preset": "tiny"}, "--preset tiny does not fit"),
        ({}, {"steps": 3}, "spent its budget"),
    ],
    ids=str,
)
def test_other_settings_of_a_finished_run_are_refused(
    settings: dict[str, Any], options: dict[str, Any], reason: str,
    first: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    run = Path(shutil.copytree(first("clipdraw"), tmp_path / "run"))
    with pytest.raises(UserError, match=reason) as caught:
        runs.train("clipdraw", out=run, resume=True, settings=settings, **options)
    assert "\n" not in str(caught.value)


# --- with a CLIP of another run -------------------------------------------------------------------


def test_a_taken_clip_leaves_nothing_to_train(
    first: Callable[[str], Path], steps: list[str], sheets: list[str], tmp_path: Path
) -> None:
    """The run is finished at once, and needs the other folder no more."""
    source, run = Path(shutil.copytree(first("clip"), tmp_path / "clip")), tmp_path / "run"
    steps.clear()
    sheets.clear()
    settings = {"model.num_steps": 1}
    runs.train("clipdraw", preset="smoke", out=run, settings=settings, stages_from={"clip": source})
    assert steps == [] and sheets == ["drawing_000000.png"]
    assert same(clip_of(run), load_tensors(source / "model.safetensors"))
    pictures = lineage.load(run, device="cpu").generate(CAPTIONS, seed=2)
    shutil.rmtree(source)
    assert torch.equal(lineage.load(run, device="cpu").generate(CAPTIONS, seed=2), pictures)
    runs.train("clipdraw", out=run, resume=True)
    assert steps == []
    assert same(clip_of(run), load_tensors(run / "stages" / "clip" / "model.safetensors"))


def test_a_clip_of_a_drawing_is_taken_in_turn(
    first: Callable[[str], Path], steps: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    source = first("clipdraw")
    steps.clear()
    settings = {"model.num_steps": 1, "model.num_paths": 3}
    runs.train(
        "clipdraw", preset="smoke", out=run, settings=settings,
        stages_from={"clip": source},
    )  # fmt: skip
    assert steps == [] and same(clip_of(run), clip_of(first("clipdraw")))


@pytest.mark.parametrize(
    ("key", "stage", "source", "reason"),
    [
        ("clipdraw", "clip", "retrieval", "no stage 'clip'"),
        ("clipdraw", "drawing", "clipdraw", "nothing would be left to train"),
        ("clipdraw", "zorp", "clip", "has no stage 'zorp'"),
        ("clip", "clip", "clip", "nothing would be left to train"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_a_sentence(
    key: str, stage: str, source: str, reason: str, first: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        runs.train(key, preset="smoke", out=tmp_path / "run", stages_from={stage: first(source)})
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# --- the stage ------------------------------------------------------------------------------------


def test_an_assembly_has_no_budget_and_a_key_of_its_parts(tokenizer: WordTokenizer) -> None:
    """Its key changes with the stage that it holds, and with its own settings alone."""
    data = {"data": "shapes", "size": 16, "seed": 0}
    config: Any = preset("clipdraw", "smoke")

    def keys(**settings: Any) -> tuple[str, ...]:
        changed = runs.configure("clipdraw", preset_name="smoke", settings=settings)
        stages = find_recipe("clipdraw").stages(changed, tokenizer)
        return tuple(stage.key(data) for stage in stages)

    clip, drawing = find_recipe("clipdraw").stages(config, tokenizer)
    assert isinstance(drawing, Assembly) and not drawing.trains and clip.trains
    assert (clip.share, drawing.share) == (1.0, 0.0) and drawing.earlier() == [clip]
    assert drawing.budgeted() == TrainConfig(device=config.train.device)
    assert drawing.optim == OptimConfig()
    (clip_key, key), (other_clip, other) = keys(), keys(**{"model.num_steps": 7})
    assert clip_key == other_clip and key != other
    (other_clip, other) = keys(**{"optim.lr": 0.5})
    assert clip_key != other_clip and key != other


# --- a run that is no System ----------------------------------------------------------------------


def test_a_run_of_clip_has_sheets_of_what_it_matches(
    train_run: TrainRun, tmp_path: Path, sheets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(tmp_path / "run", "clip", {**_own(), "train.sample_every": 2}, steps=4)
    assert list(dict.fromkeys(sheets)) == ["clip_000002.png", "clip_000004.png"]


def _own() -> dict[str, Any]:
    return {name: value for name, value in QUICK.items() if not name.startswith("model.")}


def test_a_run_of_clip_draws_no_pictures(
    call: Call, first: Callable[[str], Path], tmp_path: Path
) -> None:
    """What it is for is told instead, in one sentence."""
    for command in (["sample", first("clip"), "a red circle"], ["sample", first("clip"), "a",
                    "--visualise"]):  # fmt: skip
        answer = call(*command)
        assert answer.code == 2 and answer.out == ""
        (line,) = answer.errors.strip().splitlines()
        assert "is a run of clip, which draws no pictures" in line
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(UserError, match="draws no pictures"):
        runs.load_system(first("clip"))
    assert hasattr(lineage.load(first("clip"), device="cpu"), "encode_image")


def test_a_comparison_leaves_out_what_draws_no_pictures(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without keys silently; by name in a sentence, before anything is trained."""
    from lineage.catalog import drawing, working
    from lineage.comparison import run

    assert "clip" in working() and "clip" not in drawing() and "clipdraw" in drawing()
    for keys in (["clip"], ["retrieval", "clip"]):
        answer = call("compare", *keys, "--steps", 1, "--preset", "smoke", "--out", "report")
        assert answer.code == 2
        (line,) = answer.errors.strip().splitlines()
        assert "clip draws no pictures" in line

    compared: list[str] = []

    def configure(key: str, **options: Any) -> Any:
        compared.append(key)
        raise UserError("far enough")

    monkeypatch.setattr(run, "configure", configure)
    assert call("compare", "--steps", 1, "--preset", "smoke").code == 2
    assert compared == drawing()[:1]


def test_weights_of_a_run_of_clip_are_checked(first: Callable[[str], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(first("clip"), tmp_path / "run"))
    tensors = load_tensors(run / "model.safetensors")
    tensors["logit_scale"] = torch.tensor(float("nan"))
    save_tensors(run / "model.safetensors", tensors)
    with pytest.raises(UserError, match="logit_scale"):
        lineage.load(run)
