"""The command line: every fault is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from PIL import Image

from lineage.catalog import CATALOG
from lineage.training.store import load_tensors, read_json, save_tensors

SMOKE = ["--preset", "smoke"]


Call = Callable[..., Answer]


@pytest.fixture
def run_folder(smoke_run: Callable[[str], Any], tmp_path: Path) -> Path:
    """A finished run of `ddpm`, to be damaged at will."""
    return Path(shutil.copytree(smoke_run("ddpm").folder, tmp_path / "finished"))


def assert_refused(answer: Answer, *words: str, code: int = 2) -> None:
    """One sentence on standard error that holds `words`; nothing on standard output."""
    assert answer.code == code, answer
    assert answer.out == ""
    lines = [line for line in answer.errors.splitlines() if line.strip()]
    assert len(lines) == 1, answer.errors
    assert lines[0].startswith("lineage: ")
    assert "Traceback" not in answer.errors
    for word in words:
        assert word in lines[0], lines[0]


# --- list -------------------------------------------------------------------------------------


def test_list(call: Call) -> None:
    for flags in ([], ["--tree"]):
        answer = call("list", *flags)
        assert answer.code == 0 and answer.errors == ""
        assert all(key in answer.out for key in CATALOG)


def test_list_as_json_is_one_document(call: Call) -> None:
    answer = call("list", "--json")
    assert answer.code == 0 and answer.errors == ""
    assert [row["key"] for row in json.loads(answer.out)] == list(CATALOG)


def test_list_imports_nothing_heavy() -> None:
    """It is the first thing a student types; three seconds of imports are a bad welcome."""
    code = (
        "import sys; from lineage.cli import main; main(['list']); main(['list', '--json']);"
        "print([m for m in ('torch', 'numpy', 'PIL', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_and_version(call: Call) -> None:
    assert "train" in call("--help").out
    assert call("--version").out.startswith("lineage ")
    commands = ("list", "train", "sample", "evaluate", "compare", "verify", "import-weights")
    for command in commands:
        assert call(command, "--help").code == 0


# --- what cannot be done ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "ddpm"], ["'trian'", "'train'"]),
        (["xyzzy"], ["'xyzzy'"]),
        ([], []),
        (["list", "--jsn"], ["--jsn"]),
        (["train"], ["key"]),
        (["train", "ddmp"], ["'ddmp'", "'ddpm'"]),
        (["train", "glide"], ["'glide'", "planned"]),
        (["train", "ddpm", "--preset", "tinny"], ["'tinny'", "'tiny'"]),
        (["train", "retrieval", "--preset", "paper"], ["'paper'", "smoke"]),
        (["train", "ddpm", *SMOKE, "--set", "optim.lrr=1"], ["'optim.lrr'", "'optim.lr'"]),
        (["train", "ddpm", *SMOKE, "--set", "train.step=1"], ["'train.step'", "'train.steps'"]),
        (["train", "ddpm", *SMOKE, "--set", "optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["train", "ddpm", *SMOKE, "--set", "optim.lr"], ["name=value"]),
        (["train", "ddpm", *SMOKE, "--steps", "few"], ["--steps", "few"]),
        (["train", "ddpm", *SMOKE, "--steps", "0"], ["steps"]),
        (["train", "ddpm", *SMOKE, "--minutes", "-1"], ["minutes"]),
        (["train", "ddpm", *SMOKE, "--data", "nowhere/at/all"], ["nowhere/at/all"]),
        (["train", "ddpm", *SMOKE, "--data", "shaps"], ["shaps"]),
        (["train", "ddpm", *SMOKE, "--data", "shapes:esy"], ["esy"]),
        (["train", "ddpm", *SMOKE, "--set", "text=lstn"], ["'lstn'", "'lstm'"]),
        (["train", "ddpm", *SMOKE, "--set", "size=17"], ["17"]),
        (["train", "gan_int_cls", *SMOKE, "--set", "size=24"], ["24"]),
        (["train", "ddpm", *SMOKE, "--set", "model.unet.heads=3"], ["heads"]),
        (["train", "ddpm", *SMOKE, "--set", "encoder.words=0"], ["words"]),
        (["train", "ddpm", *SMOKE, "--device", "tpu"], ["tpu"]),
        (["train", "ddpm", *SMOKE, "--device", "meta"], ["meta"]),
        (["sample", "nowhere", "a red circle"], ["nowhere"]),
        (["sample", "."], ["CAPTION"]),
        (["sample", ".", "a red circle"], ["config.json"]),
        (["data", "check", "nowhere"], ["nowhere"]),
        (["data", "check", "shaps"], ["shaps"]),
        (["data", "show", "shapes", "--split", "trane"], ["trane"]),
        (["data", "show", "shapes", "--size", "0"], ["--size"]),
        (["train", "stackgan", *SMOKE, "--set", "size=24"], ["24"]),
        (["train", "stackgan", *SMOKE, "--set", "recipe=modren"], ["'modren'", "'modern'"]),
        (["train", "ddpm", *SMOKE, "--set", "recipe=paper"], ["'recipe'"]),
        (["train", "gan_int_cls", *SMOKE, "--set", "encoder.letters=20"], ["encoder.letters=20"]),
        (["evaluate"], ["RUN"]),
        (["evalute", "runs/x"], ["'evaluate'"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["evaluate", "."], ["config.json"]),
        (["evaluate", ".", "--pictures", "0"], ["--pictures"]),
        (["evaluate", ".", "--batch", "few"], ["--batch", "few"]),
        (["compare", "ddpm", *SMOKE, "--pictures", "0"], ["--pictures"]),
        (["compare", "ddpm", "ddmp", *SMOKE], ["'ddpm'"]),
        (["compare", "glide", *SMOKE], ["planned"]),
        (["verify", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["verify"], ["FILE"]),
        (["import-weights"], ["KEY"]),
        (["import-wieghts", "stackgan"], ["'import-weights'"]),
        (["import-weights", "stackgan", "netG.pth"], ["--out"]),
        (["import-weights", "stackgn", "netG.pth", "--out", "runs/a"], ["'stackgn'", "'stackgan'"]),
        (["import-weights", "ddpm", "netG.pth", "--out", "runs/a"], ["'ddpm'", "stackgan"]),
        (["import-weights", "stackgan", "nowhere.pth", "--out", "runs/a"], ["nowhere.pth"]),
        (["import-weights", "stackgan", ".", "--out", "runs/a"], ["."]),
        (["import-weights", "stackgan", "n.safetensors", "--out", "runs/a"], ["n.safetensors"]),
        (["import-weights", "attngan", "a.pth", "b.pth", "w.txt", "--out", "runs/a"], ["a.pth"]),
        (["import-weights", "attngan", "w.txt", "a.pth", "--out", "runs/a"], ["w.txt"]),
        (["train", "attngan", *SMOKE, "--set", "model.scales=3"], ["scales", "size"]),
        (["train", "attngan", *SMOKE, "--set", "damsm.grid=16"], ["damsm.grid=16"]),
        (["train", "attngan", *SMOKE, "--set", "damsm.regions=convs"], ["'convs'", "'conv'"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_faults_are_one_sentence(
    arguments: list[str], words: list[str], call: Call, tmp_path: Path
) -> None:
    assert_refused(call(*arguments), *words)
    assert not list(tmp_path.glob("runs/*/model.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told(call: Call, run_folder: Path) -> None:
    assert_refused(call("train", "ddpm", *SMOKE, "--device", "cuda"), "'cuda'", "--device cpu")
    assert_refused(call("sample", run_folder, "a star", "--device", "cuda"), "'cuda'")


@pytest.mark.parametrize("mistake", ["text=lstn", "size=17", "encoder.tokenizer=wrod"])
def test_after_a_mistake_the_corrected_command_works(
    mistake: str, call: Call, tmp_path: Path
) -> None:
    """A refused start must not leave a folder behind that refuses the next one."""
    start = ["train", "ddpm", *SMOKE, "--steps", 1, "--out", tmp_path / "run"]
    assert_refused(call(*start, "--set", mistake))
    answer = call(*start)
    assert answer.code == 0, answer.errors


def test_a_negative_seed_trains_or_is_told(call: Call, tmp_path: Path) -> None:
    """On data from a disk as well, where the seed orders the pictures."""
    pictures = tmp_path / "pictures"
    assert call("data", "export", "shapes", "--count", 8, "--size", 16, "--out", pictures).code == 0
    answer = call("train", "ddpm", *SMOKE, "--steps", 1, "--seed", -1, "--data", pictures)
    assert "Traceback" not in answer.errors and answer.code in (0, 2)


def test_a_file_in_the_way_of_the_run_folder_is_told(call: Call, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert_refused(call("train", "ddpm", *SMOKE, "--out", "taken"), "taken")
    assert_refused(call("train", "ddpm", *SMOKE, "--out", "taken/run"), "taken")
    answer = call("compare", "retrieval", *SMOKE, "--out", "taken")
    assert answer.code == 2 and "taken" in answer.errors and "Traceback" not in answer.errors
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_empty_folder_is_not_a_data_set(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(call("train", "ddpm", *SMOKE, "--data", "empty"), "empty")
    assert_refused(call("train", "ddpm", *SMOKE, "--data", "folder:empty"), "empty")
    answer = call("data", "check", "empty")
    assert answer.code == 2 and "Traceback" not in answer.errors


# --- runs -------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(call: Call, run_folder: Path) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert_refused(call("train", "ddpm", *SMOKE, "--out", run_folder), "--resume", "finished")
    refused = call("train", "retrieval", *SMOKE, "--out", run_folder, "--resume")
    assert_refused(refused, "ddpm", "retrieval")
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


def test_a_run_is_not_overwritten_by_published_weights(call: Call, run_folder: Path) -> None:
    """Told before the file is looked at, which may be of gigabytes."""
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    Path("netG.pth").write_bytes(b"not a checkpoint")
    refused = call("import-weights", "stackgan", "netG.pth", "--out", run_folder)
    assert_refused(refused, "finished", "--out")
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


def test_a_file_that_is_no_checkpoint_is_told(call: Call, tmp_path: Path) -> None:
    """Code in a pickle is not run, and no folder is left behind."""
    Path("netG.pth").write_bytes(b"cos\nsystem\n(S'touch it_ran'\ntR.")
    refused = call("import-weights", "stackgan", "netG.pth", "--out", "runs/a")
    assert_refused(refused, "netG.pth", "tensors alone")
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "runs").exists()


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


def test_resume_without_a_run_begins_one(call: Call, tmp_path: Path) -> None:
    """So one command can stand in a script that is started again after every interruption."""
    start = ["train", "retrieval", *SMOKE, "--resume", "--out", tmp_path / "run"]
    assert call(*start).code == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_damaged_weights_are_told(call: Call, run_folder: Path) -> None:
    path = run_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(call("sample", run_folder, "a red circle"), "model.safetensors")
    path.unlink()
    assert_refused(call("sample", run_folder, "a red circle"), "model.safetensors")


def test_weights_of_another_network_are_told(
    call: Call, run_folder: Path, smoke_run: Callable[[str], Any]
) -> None:
    path = run_folder / "model.safetensors"
    tensors = load_tensors(path)
    other = load_tensors(smoke_run("gan_int_cls").folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    wrong = {name: torch.zeros(1, 2, 3)}
    for content in (other, {**tensors, **wrong}, {n: t for n, t in tensors.items() if n != name}):
        save_tensors(path, content)
        answer = call("sample", run_folder, "a red circle")
        assert_refused(answer, "model.safetensors", "DDPM")


def test_a_damaged_checkpoint_is_told(call: Call, run_folder: Path) -> None:
    (run_folder / "state.pt").write_bytes(b"not a checkpoint")
    refused = call("train", "ddpm", "--out", run_folder, "--resume", "--steps", 30)
    assert_refused(refused, "state.pt")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "3", '{"key": "ddpm"}', '{"kind": "word"}', "null"]
)
def test_damaged_settings_are_told(name: str, content: str, call: Call, run_folder: Path) -> None:
    (run_folder / name).write_text(content)
    assert_refused(call("sample", run_folder, "a red circle"))


def test_a_run_of_a_system_that_is_not_there_is_told(call: Call, run_folder: Path) -> None:
    """Made by a later version, or by somebody else's copy."""
    path = run_folder / "config.json"
    config = json.loads(path.read_text())
    for change, word in (
        ({"key": "glide"}, "glide"),
        ({"key": "mine"}, "mine"),
        ({"hue": 1}, "hue"),
        ({"key": 3}, "3"),
        ({"key": None}, "None"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert_refused(call("sample", run_folder, "a red circle"), word)


# --- sample -----------------------------------------------------------------------------------


def test_sample_writes_a_sheet_and_tells_unknown_words(call: Call, run_folder: Path) -> None:
    answer = call("sample", run_folder, "a red circle", "a zorp circle", "", "--out", "sheet.png")
    assert answer.code == 0
    assert answer.out.strip() == "sheet.png"
    assert "zorp" in answer.errors and "circle" not in answer.errors
    with Image.open("sheet.png") as sheet:
        assert sheet.width > sheet.height > 100
        assert len(set(sheet.convert("L").tobytes())) > 20
    assert call("sample", run_folder, "a red circle").errors == ""


def test_sample_writes_single_pictures(call: Call, run_folder: Path) -> None:
    answer = call(
        "sample",
        run_folder,
        "a red circle",
        "a blue circle",
        "--single",
        "--count",
        2,
        "--out",
        "p/x.png",
    )
    paths = answer.out.split()
    assert answer.code == 0 and len(paths) == 4
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (16, 16)
            pictures.append(picture.tobytes())
    assert len(set(pictures)) == 4


def test_sample_is_a_function_of_its_seed(call: Call, run_folder: Path) -> None:
    made = []
    for number, seed in enumerate((1, 1, 2)):
        out = f"{number}.png"
        assert call("sample", run_folder, "a red circle", "--seed", seed, "--out", out).code == 0
        made.append(Path(out).read_bytes())
    assert made[0] == made[1] != made[2]


def test_sample_takes_knobs(call: Call, run_folder: Path) -> None:
    out = []
    for flags in ([], ["--set", "guidance=8"], ["--set", "steps=1", "--set", "sampler=ddpm"]):
        assert call("sample", run_folder, "a red circle", *flags, "--out", "a.png").code == 0
        out.append(Path("a.png").read_bytes())
    assert len(set(out)) == 3


@pytest.fixture
def attended(smoke_run: Callable[[str], Any], tmp_path: Path) -> Path:
    """A finished run of `attngan`, which has an inside."""
    return Path(shutil.copytree(smoke_run("attngan").folder, tmp_path / "attended"))


def test_sample_shows_the_inside(call: Call, attended: Path) -> None:
    """Two scales, then a picture a word, in rows; of the first caption, by its seed."""
    asked = ["sample", attended, "a red circle above a zorp", "a ring", "--inside"]
    made = []
    for number, flags in enumerate(([], [], ["--seed", 1])):
        out = f"{number}.png"
        answer = call(*asked, *flags, "--out", out)
        assert answer.code == 0 and answer.out.strip() == out, answer
        assert "zorp" in answer.errors and "Traceback" not in answer.errors
        made.append(Path(out).read_bytes())
    assert made[0] == made[1] != made[2]
    with Image.open("0.png") as sheet:
        assert sheet.width > 6 * 128 and 2 * 128 < sheet.height < 3 * 128
        pixels = sheet.convert("RGB")
        assert len(set(pixels.convert("L").tobytes())) > 20
        blank = pixels.crop((10 + 138 * 2, 10, sheet.width, 138))  # right of the two scales
        assert set(blank.convert("L").tobytes()) == {255}


def test_a_system_without_an_inside_is_told(
    call: Call, smoke_run: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = smoke_run("gan_int_cls").folder
    refused = call("sample", folder, "a red circle", "--inside", "--out", "a.png")
    assert_refused(refused, "gan_int_cls", "no inside")
    assert not Path("a.png").exists()


def test_an_inside_that_cannot_be_written_is_told(call: Call, attended: Path) -> None:
    refused = call("sample", attended, "a red circle", "--inside", "--out", "a.xyz")
    assert_refused(refused, "a.xyz", "a.png")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--set", "truncaton=0.5"], "'truncation'"),
        (["--inside", "--set", "truncaton=0.5"], "trunc"),
        (["--set", "scale=3"], "scale=3"),
        (["--set", "scale=large"], "scale"),
        (["--set", "return_attention=true"], "return_attention"),
        (["--set", "seed=3"], "seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_knobs_of_attngan_that_cannot_be_are_told(
    flags: list[str], word: str, call: Call, attended: Path
) -> None:
    """What `generate` takes besides are no knobs, and none is passed over in silence."""
    assert_refused(call("sample", attended, "a red circle", *flags), word)


@pytest.mark.parametrize(
    ("knob", "word"),
    [
        ("gidance=3", "'guidance'"),
        ("guidance", "name=value"),
        ("steps=many", "steps"),
        ("steps=0", "steps"),
        ("steps=2.5", "steps"),
        ("steps=2000", "steps"),
        ("guidance=high", "guidance"),
        ("guidance=NaN", "guidance"),
        ("sampler=dimm", "'ddim'"),
        ("sampler=3", "sampler"),
    ],
)
def test_knobs_that_cannot_be_are_told(knob: str, word: str, call: Call, run_folder: Path) -> None:
    assert_refused(call("sample", run_folder, "a red circle", "--set", knob), word)


def test_a_negative_caption_may_be_a_number(call: Call, run_folder: Path) -> None:
    """Text that looks like a number is text where text is asked for."""
    assert call("sample", run_folder, "a red circle", "--set", "negative=3").code == 0


def test_captions_of_any_bytes_are_drawn(run_folder: Path, tmp_path: Path) -> None:
    """A terminal in another encoding hands over bytes that are no text at all."""
    captions = [b"a \xff ring", "👩‍👩‍👧 一个 \x01".encode(), b"word" * 500]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lineage",
            "sample",
            run_folder,
            *captions,
            "--out",
            tmp_path / "a.png",
        ],
        capture_output=True,
        timeout=60,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 and (tmp_path / "a.png").is_file()


def test_a_picture_that_cannot_be_written_is_told(call: Call, run_folder: Path) -> None:
    assert_refused(call("sample", run_folder, "a red circle", "--out", "a.xyz"), "a.xyz", "a.png")
    Path("taken").write_text("mine")
    assert_refused(call("sample", run_folder, "a red circle", "--out", "taken/a.png"), "taken")
    Path("folder.png").mkdir()
    assert_refused(call("sample", run_folder, "a red circle", "--out", "folder.png"), "folder.png")


# --- data -------------------------------------------------------------------------------------


def test_data_check_as_json_is_one_document(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red thing\na square\n")
    (folder / "broken.png").write_bytes(b"\x89PNG nonsense")
    (folder / "broken.txt").write_text("never seen")
    answer = call("data", "check", "--json", folder)
    report = json.loads(answer.out)
    assert answer.code == 0
    assert (report["loaded"], report["captions"]) == (2, 4)
    (skipped,) = report["skipped"]
    assert skipped["path"].endswith("broken.png") and skipped["reason"]
    told = call("data", "check", folder)
    assert "2 pictures" in told.out and "broken.png" in told.out and told.code == 0


def test_data_show_and_export(call: Call) -> None:
    assert call("data", "show", "shapes:hard", "--count", 6, "--out", "a.png").code == 0
    with Image.open("a.png") as sheet:
        assert sheet.width > 300
    exported = call("data", "export", "shapes", "--count", 5, "--out", "set")
    assert exported.code == 0 and "5 pictures" in exported.out
    report = json.loads(call("data", "check", "--json", "set").out)
    assert report["loaded"] == 5 and report["skipped"] == []


# --- as a program -----------------------------------------------------------------------------


def test_as_a_program_the_exit_code_and_streams_are_the_same(command: Callable[..., Any]) -> None:
    process = command("train", "ddmp")
    out, errors = process.communicate(timeout=60)
    assert_refused(Answer(process.returncode, out, errors), "'ddpm'")


def test_a_reader_that_has_enough_is_no_error(command: Callable[..., Any]) -> None:
    """`lineage list | head -1`."""
    process = command("list", "--json")
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and "Exception" not in errors
