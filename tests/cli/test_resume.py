"""Going on with a run: what fits goes on and is recorded, what does not changes no byte."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from refusal import assert_refused

import lineage
from lineage.errors import Interrupted, UserError
from lineage.evaluation.prompts import make_prompts, to_lines
from lineage.files import claimed
from lineage.training.cost import read_cost
from lineage.training.loop import Trainer
from lineage.training.store import load_tensors, read_json, save_tensors, write_json

Call = Callable[..., Answer]


@pytest.fixture
def finished(smoke_run: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of a finished run of `ddpm`, 20 steps at preset smoke."""
    return Path(shutil.copytree(smoke_run("ddpm").folder, tmp_path / "finished"))


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of `ddpm` that was stopped after 3 of 6 steps."""
    advance = Trainer.advance

    def stop_at_3(self: Trainer, *arguments: Any) -> Any:
        if self.step == 2:
            self._stop_requested = True
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stop_at_3)
        with pytest.raises(Interrupted):
            lineage.train("ddpm", preset="smoke", steps=6, out=tmp_path / "stopped")
    return tmp_path / "stopped"


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Bytes and time of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "encoder.width=64"], ["encoder.width=64", "--out"]),
        (["--set", "model.guidance=7"], ["model.guidance=7.0", "leave it out"]),
        (["--seed", "5"], ["seed=5", "has seed=0"]),
        (["--data", "shapes:hard"], ["data=shapes:hard", "has data=shapes"]),
        (["--set", "size=32"], ["size=32"]),
        (["--set", "text=transformer"], ["text=transformer"]),
        (["--preset", "tiny"], ["--preset tiny", "smoke"]),
        (["--set", "optim.lr=0.01"], ["optim.lr=0.01", "20 steps", "budget"]),
        (["--set", "train.batch_size=4"], ["train.batch_size=4", "20 steps"]),
        (["--steps", "10"], ["train.max_steps=10", "20 steps"]),
        (["--from", "codec=nowhere"], ["--from codec=nowhere"]),
    ],
)
def test_what_does_not_fit_a_finished_run_changes_no_byte(
    arguments: list[str], words: list[str], call: Call, finished: Path
) -> None:
    before = contents(finished)
    answer = call("train", "ddpm", "--out", finished, "--resume", *arguments)
    assert_refused(answer, *words)
    assert contents(finished) == before


def test_changes_of_a_run_are_recorded(call: Call, stopped: Path) -> None:
    """A rate may be lowered on the way; the report can then tell what trained which steps."""
    before = read_json(stopped / "config.json")
    start = ("train", "ddpm", "--out", stopped, "--resume")
    assert call(*start, "--set", "optim.lr=0.0005", "--preset", "smoke").code == 0
    saved = read_json(stopped / "config.json")
    change = {"stage": "denoiser", "step": 3, "fields": {"optim.lr": [0.002, 0.0005]}}
    assert saved["changes"] == [change] and saved["optim"]["lr"] == 0.0005
    assert saved["made_with"] == before["made_with"]
    assert call(*start, "--steps", 8).code == 0
    assert [c["step"] for c in read_json(stopped / "config.json")["changes"]] == [3, 6]
    assert call(*start, "--set", "train.log_every=7").code == 0  # the result does not depend on it
    assert len(read_json(stopped / "config.json")["changes"]) == 2


def test_another_number_of_threads_is_reported(
    call: Call, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped / "config.json"
    saved = read_json(config)
    saved["made_with"]["threads"] = 61
    write_json(config, saved)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    answer = call("train", "ddpm", "--out", stopped, "--resume")
    assert answer.code == 0 and "OMP_NUM_THREADS=61" in answer.errors


def test_one_process_trains_in_a_folder(call: Call, finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    with claimed(finished):
        refused = call("train", "ddpm", "--out", finished, "--resume", "--steps", 30)
    assert_refused(refused, "Another process", "finished")
    assert contents(finished) == before
    (tmp_path / "new").mkdir()
    with claimed(tmp_path / "new"):
        refused = call("train", "ddpm", "--preset", "smoke", "--out", tmp_path / "new")
    assert_refused(refused, "Another process")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_refused_new_run_leaves_no_folder(call: Call, tmp_path: Path) -> None:
    answer = call("train", "ddpm", "--set", "size=20", "--out", tmp_path / "a" / "b")
    assert answer.code == 2 and not (tmp_path / "a").exists()


def test_partials_of_a_killed_process_are_removed(call: Call, finished: Path) -> None:
    partial = finished / "stages" / ".state.pt.77-abcd.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    assert call("train", "ddpm", "--out", finished, "--resume").code == 0
    assert not partial.exists()


def test_a_stopped_run_is_scored_with_its_cost_so_far(stopped: Path) -> None:
    cost = read_cost(stopped)["denoiser"]
    assert cost["steps"] == 3 and cost["seconds"] > 0 and not cost["finished"]
    for content in ("[]", "{", '{"denoiser": 3}', '{"denoiser": {"steps": "3"}}'):
        (stopped / "cost.json").write_text(content)
        assert read_cost(stopped)["denoiser"]["steps"] == 3  # from the log
    (stopped / "cost.json").unlink()
    line = next(text for text in to_lines(make_prompts("easy")).splitlines() if text)
    (stopped.parent / "one.jsonl").write_text(line)
    scores = lineage.evaluate(stopped, pictures=10, prompts=stopped.parent / "one.jsonl")
    assert scores["runs"][0]["cost"]["training"]["denoiser"]["steps"] == 3


def test_damaged_lines_of_the_log_stay(call: Call, stopped: Path) -> None:
    log = stopped / "metrics.jsonl"
    whole = log.read_bytes()
    junk = b'[1, 2]\n[not json\n\xff\xfe\n{"stage": 3}\n' + b"[" * 100_000 + b"\n"
    log.write_bytes(junk + whole + b'{"stage": "denoiser", "st')
    assert call("train", "ddpm", "--out", stopped, "--resume").code == 0
    after = log.read_bytes()
    assert after.startswith(junk + whole) and b'"st\n' not in after
    assert after.count(b"\n") > (junk + whole).count(b"\n")


def test_weights_that_are_no_numbers_are_reported(call: Call, finished: Path) -> None:
    path = finished / "model.safetensors"
    tensors = load_tensors(path)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    save_tensors(path, {**tensors, name: torch.full_like(tensors[name], torch.nan)})
    assert_refused(call("sample", finished, "a red circle"), "model.safetensors", "no numbers")


@pytest.mark.parametrize("place", ["file/cache", "/proc/no/cache"])
def test_a_cache_is_no_requirement(
    place: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / place))  # an absolute one stays absolute
    run = tmp_path / f"run-{Path(place).parts[0].strip('/')}"
    answer = call("train", "gan_int_cls", "--preset", "smoke", "--steps", 2, "--out", run)
    assert answer.code == 0 and answer.errors.count("LINEAGE_CACHE") == 1
    assert (run / "model.safetensors").is_file()


def test_an_unfinished_run_is_not_taken_as_a_stage(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        lineage.train("ddpm", out=tmp_path / "b", stages_from={"denoiser": stopped})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_outside_of_training_ends_with_one_sentence(
    number: int, finished: Path, tmp_path: Path
) -> None:
    """Here while a run is loaded."""
    program = (
        "import sys, lineage.runs; from lineage.cli import main\n"
        "def slow(*arguments): print('loading', flush=True); import time; time.sleep(60)\n"
        "lineage.runs.load = slow; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "sample", str(finished), "a circle"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.count("\n") == 1 and "interrupted" in errors


def test_a_rate_of_a_finished_stage_is_refused(call: Call, tmp_path: Path) -> None:
    """Its weights are made; the rate would be reported as theirs."""
    start = ("train", "vqvae", "--preset", "smoke", "--steps", 6, "--out", tmp_path / "run")
    assert call(*start).code == 0
    refused = call(*start[:4], "--steps", 9, *start[6:], "--resume", "--set", "codec_optim.lr=0.1")
    assert_refused(refused, "codec_optim.lr=0.1", "stage codec")


@pytest.mark.parametrize("how", ["option", "edited"])
def test_a_stage_trained_with_several_rates_is_not_cached(
    how: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that asks for the second rate alone must not be given its weights."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    advance = Trainer.advance

    def stop_in_the_codec(self: Trainer, *arguments: Any) -> Any:
        if self.stage == "codec" and self.step == 1:
            self._stop_requested = True
        return advance(self, *arguments)

    run = ("train", "vqvae", "--preset", "smoke", "--steps", "12", "--set", "seed=77")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stop_in_the_codec)
        assert call(*run, "--out", tmp_path / "mixed").code == 130
    rate = ("--set", "codec_optim.lr=0.0123")
    again = ("train", "vqvae", "--out", tmp_path / "mixed", "--resume")
    if how == "option":
        assert call(*again, *rate).code == 0
    else:  # by hand, in config.json
        config = read_json(tmp_path / "mixed" / "config.json")
        config["codec_optim"]["lr"] = 0.0123
        write_json(tmp_path / "mixed" / "config.json", config)
        assert call(*again).code == 0
    assert call(*run, "--out", tmp_path / "plain", *rate).code == 0
    codecs = [
        load_tensors(tmp_path / n / "stages/codec/model.safetensors") for n in ("mixed", "plain")
    ]
    assert any(not torch.equal(codecs[0][name], codecs[1][name]) for name in codecs[0])


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "stages"])
def test_a_run_without_its_settings_is_not_trained_over(
    name: str, call: Call, finished: Path
) -> None:
    """Its weights would be reported under other settings."""
    (finished / "stages").mkdir()
    for path in list(finished.iterdir()):
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for flags in ([], ["--resume"]):
        refused = call("train", "ddpm", "--preset", "smoke", "--out", finished, *flags)
        assert_refused(refused, name, "config.json")


@pytest.mark.parametrize("name", ["model.safetensors", "cost.json", "metrics.jsonl", "samples"])
def test_what_stands_in_the_way_of_a_run_is_named_first(
    name: str, call: Call, finished: Path
) -> None:
    path = finished / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("x") if name == "samples" else path.mkdir()
    refused = call("train", "ddpm", "--out", finished, "--resume", "--steps", 30)
    assert_refused(refused, name, "remove it")


@pytest.mark.parametrize(
    "change",
    [
        {"made_with": None},
        {"made_with": 5},
        {"stages_from": "x"},
        {"changes": 3},
        {"stages_from": {"a": 1}},
    ],
    ids=str,
)
def test_entries_of_other_types_in_the_settings_are_refused(
    change: dict[str, Any], call: Call, finished: Path
) -> None:
    config = finished / "config.json"
    write_json(config, {**read_json(config), **change})
    for command in (
        ("train", "ddpm", "--out", finished, "--resume"),
        ("sample", finished, "a star"),
    ):
        assert_refused(call(*command), "config.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.max_steps=none"], ["budget"]),
        (["model.sampling_steps=1001"], ["model.sampling_steps=1001", "num_timesteps"]),
        (["model.process.num_timesteps=2"], ["num_timesteps=2"]),
    ],
    ids=["budget", "steps", "timesteps"],
)
def test_what_would_fail_after_training_is_refused_before(
    settings: list[str], words: list[str], call: Call, tmp_path: Path
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    answer = call("train", "ddpm", "--preset", "smoke", "--out", tmp_path / "run", *flags)
    assert_refused(answer, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "stage"), [("stackgan", "stage1"), ("attngan", "damsm")])
def test_a_stage_that_a_class_is_built_from_is_taken(
    key: str, stage: str, call: Call, smoke_run: Callable[[str], Any], tmp_path: Path
) -> None:
    start = ("train", key, "--preset", "smoke", "--steps", 2, "--out", tmp_path / "run")
    answer = call(*start, "--from", f"{stage}={smoke_run(key).folder}")
    assert answer.code == 0, answer.errors


def test_a_comparison_that_alone_is_interrupted_stops_its_child(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lineage", "compare", "ddpm", "--preset", "smoke"]
    command += ["--steps", "200000", "--out", str(tmp_path / "out")]
    log = tmp_path / "out" / "ddpm" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(300):
                if log.exists():
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "give the same command again" in errors
