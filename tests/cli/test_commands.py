"""Commands, help and completion; every fault is one sentence and an exit code, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Answer
from refusal import assert_refused

from lineage import catalog, cli
from lineage.catalog import CATALOG

SMOKE = ["--preset", "smoke"]
COMMANDS = (
    *("list", "data", "train", "sample", "app", "evaluate", "prompts", "compare", "verify"),
    "import-weights",
)

Call = Callable[..., Answer]


# --- list, help, completion -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--tree"]])
def test_list(flags: list[str], call: Call) -> None:
    answer = call("list", *flags)
    assert answer.code == 0 and answer.errors == ""
    assert all(key in answer.out for key in CATALOG)


def test_list_as_json_is_one_document(call: Call) -> None:
    answer = call("list", "--json")
    assert answer.code == 0 and answer.errors == ""
    assert [row["key"] for row in json.loads(answer.out)] == list(CATALOG)


def test_list_and_help_import_nothing_heavy() -> None:
    """They are the first things that a student types."""
    code = (
        "import sys; from lineage.cli import main;"
        "[main(a) for a in (['list'], ['list', '--json'], ['--help'], ['sample', '--help'])];"
        "heavy = ('torch', 'numpy', 'PIL', 'matplotlib', 'pydantic');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_the_commands_in_groups(call: Call) -> None:
    answer = call("--help")
    assert answer.code == 0 and answer.errors == ""
    groups = ("See", "Data", "Train and draw", "Score", "Official code and weights", "Help")
    places = [answer.out.index(f" {name} ") for name in groups]
    assert places == sorted(places)
    for name in COMMANDS:
        assert f" {name} " in answer.out


@pytest.mark.parametrize(
    "command", [*COMMANDS, "data show", "data check", "data export"], ids=lambda name: name
)
def test_every_command_has_help(command: str, call: Call) -> None:
    answer = call(*command.split(), "--help")
    assert answer.code == 0 and f"Usage: lineage {command}" in answer.out


@pytest.mark.parametrize(
    "command",
    ["data show", "data check", "data export", *[name for name in COMMANDS if name != "data"]],
    ids=lambda name: name,
)
def test_every_parameter_has_a_sentence(command: str) -> None:
    app = cli.app
    for name in command.split():
        app = app[name]
    for argument in app.assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, argument.name


def test_version(call: Call) -> None:
    answer = call("--version")
    assert answer.code == 0 and answer.out.startswith("lineage ")


def test_the_shell_completes_commands_keys_and_presets(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    answer = call("--install-completion", "--shell", "bash")
    assert answer.code == 0 and answer.errors == ""
    script = Path(answer.out.partition(":")[0]).read_text()
    words = [*COMMANDS, *catalog.working(), *catalog.PRESETS, "--best-of", "--from"]
    assert all(word in script for word in words)
    assert "glide" not in script  # planned


@pytest.mark.parametrize("arguments", [["--shell", "basic"], ["--shell"]])
def test_an_unknown_shell_is_refused(arguments: list[str], call: Call) -> None:
    assert_refused(call("--install-completion", *arguments), "--shell")


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # commands and options
        (["trian", "ddpm"], ["'trian'", "'train'"]),
        (["evalute", "runs/x"], ["'evalute'", "'evaluate'"]),
        (["import-wieghts", "stackgan"], ["'import-weights'"]),
        (["xyzzy"], ["'xyzzy'"]),
        (["data", "shw", "shapes"], ["'shw'", "'show'"]),
        ([], ["list", "import-weights"]),
        (["data"], ["show", "check", "export"]),
        (["--verson"], ["'--verson'", "'--version'"]),
        (["list", "--jsn"], ["--jsn", "'--json'"]),
        (["list", "extra"], ["'extra'"]),
        (["train", "ddpm", "--mintues", "3"], ["--mintues", "'--minutes'"]),
        (["train", "ddpm", "--mintues=3"], ["--mintues", "'--minutes'"]),
        (["train", "ddpm", "ldm"], ["'ldm'"]),
        (["train", "ddpm", "--resume=maybe"], ["--resume", "maybe"]),
        (["train", "ddpm", "--out", "a", "--out", "b"], ["--out"]),
        (["sample", ".", "a star", "--init", "a.png"], ["--init"]),
        (["compare", "ddpm", "--from", "codec=runs/a"], ["--from"]),
        (["compare", "ddpm", "--resume"], ["--resume"]),
        # arguments that are missing
        (["train"], ["KEY"]),
        (["sample", "."], ["CAPTION"]),
        (["evaluate"], ["RUN"]),
        (["verify"], ["FILE"]),
        (["import-weights"], ["KEY"]),
        (["import-weights", "stackgan"], ["FILE"]),
        (["import-weights", "stackgan", "netG.pth"], ["--out"]),
        (["data", "show"], ["SPEC"]),
        (["data", "export", "shapes"], ["--out"]),
        (["train", "ddpm", "--steps"], ["--steps"]),
        # numbers
        (["train", "ddpm", *SMOKE, "--steps", "few"], ["--steps", "few"]),
        (["train", "ddpm", *SMOKE, "--steps", "0"], ["--steps"]),
        (["train", "ddpm", *SMOKE, "--steps", "2.5"], ["--steps", "2.5"]),
        (["train", "ddpm", *SMOKE, "--minutes", "-1"], ["--minutes"]),
        (["train", "ddpm", *SMOKE, "--minutes", "nan"], ["--minutes"]),
        (["train", "ddpm", *SMOKE, "--seed", "x"], ["--seed"]),
        *[
            ([*command, "--seed", seed], [f"--seed={seed} must be at", bound])
            for command in (
                ["train", "ddpm", *SMOKE],
                ["compare", "ddpm", *SMOKE],
                ["evaluate", "."],
                ["sample", ".", "a star"],
                ["data", "show", "shapes"],
                ["data", "export", "shapes", "--out", "runs/a"],
            )
            for seed, bound in (("-1", "least 0"), (str(2**63), f"most {2**63 - 1}"))
        ],
        (["train", "ddpm", *SMOKE, "--steps", "1e30"], ["--steps", "1000000000000"]),
        (["sample", ".", "a star", "--count", "1e9"], ["--count", "10000"]),
        (["data", "show", "shapes", "--columns", "1e9"], ["--columns", "10000"]),
        # paths
        *[
            (command, ["empty"])
            for command in (
                ["train", "ddpm", *SMOKE, "--out", ""],
                ["train", "vqvae", *SMOKE, "--from", "codec="],
                ["sample", "", "a star"],
                ["sample", ".", "a star", "--out", ""],
                ["evaluate", ""],
                ["evaluate", ".", "--out", ""],
                ["compare", "ddpm", *SMOKE, "--out", " "],
                ["data", "export", "shapes", "--out", ""],
                ["import-weights", "vqgan", "a.pt", "--out", ""],
                ["verify", ""],
            )
        ],
        *[
            (command, ["~nosuchuser/x", "whole path"])
            for command in (
                ["train", "ddpm", *SMOKE, "--out", "~nosuchuser/x"],
                ["train", "ddpm", *SMOKE, "--data", "~nosuchuser/x"],
                ["train", "ddpm", *SMOKE, "--data", "folder:~nosuchuser/x"],
                ["train", "vqvae", *SMOKE, "--from", "codec=~nosuchuser/x"],
                ["evaluate", "runs/a", "~nosuchuser/x"],
                ["verify", "~nosuchuser/x"],
            )
        ],
        (["train", "ddpm", *SMOKE, "--data", ""], ["''"]),
        (["train", "ddpm", *SMOKE, "--set", "text="], ["''"]),
        (["train", "ddpm", *SMOKE, "--set", "x="], ["'x'"]),
        (["train", "ddpm", *SMOKE, "--set", "key=dit"], ["key=dit", "lineage train dit"]),
        (["train", "ddpm", *SMOKE, "--set", "preset=paper"], ["preset=paper", "--preset"]),
        (["sample", ".", "a star", "--count", "0"], ["--count"]),
        (["evaluate", ".", "--pictures", "0"], ["--pictures"]),
        (["evaluate", ".", "--batch", "few"], ["--batch", "few"]),
        (["compare", "ddpm", *SMOKE, "--pictures", "0"], ["--pictures"]),
        (["data", "show", "shapes", "--size", "0"], ["--size"]),
        (["data", "show", "shapes", "--columns", "0"], ["--columns"]),
        # systems and presets
        (["train", "ddmp"], ["'ddmp'", "'ddpm'"]),
        (["train", "glide"], ["'glide'", "planned"]),
        (["train", "ddpm", "--preset", "tinny"], ["'tinny'", "'tiny'"]),
        (["train", "retrieval", "--preset", "paper"], ["'paper'", "smoke"]),
        (["compare", "ddpm", "ddmp", *SMOKE], ["'ddpm'"]),
        (["compare", "glide", *SMOKE], ["planned"]),
        (["compare", "ddpm", *SMOKE, "--text", "lstn"], ["'lstn'", "'lstm'"]),
        (["import-weights", "stackgn", "netG.pth", "--out", "runs/a"], ["'stackgn'", "'stackgan'"]),
        (["import-weights", "ddpm", "netG.pth", "--out", "runs/a"], ["'ddpm'", "stackgan"]),
        # settings
        (["train", "ddpm", *SMOKE, "--set", "optim.lrr=1"], ["'optim.lrr'", "'optim.lr'"]),
        (["train", "ddpm", *SMOKE, "--set", "train.max_step=1"], ["'train.max_steps'"]),
        (["train", "ddpm", *SMOKE, "--set", "optim.lr=fast"], ["optim.lr", "'fast'"]),
        (["train", "ddpm", *SMOKE, "--set", "optim.lr"], ["name=value"]),
        (["train", "ddpm", *SMOKE, "--set", "=3"], ["name=value"]),
        (["train", "ddpm", *SMOKE, "--set"], ["--set"]),
        (["train", "ddpm", *SMOKE, "--set", "text=lstn"], ["'lstn'", "'lstm'"]),
        (["train", "ddpm", *SMOKE, "--set", "size=17"], ["17"]),
        (["train", "gan_int_cls", *SMOKE, "--set", "size=24"], ["24"]),
        (["train", "ddpm", *SMOKE, "--set", "model.unet.num_heads=3"], ["3 heads"]),
        (["train", "ddpm", *SMOKE, "--set", "encoder.max_words=0"], ["encoder.max_words"]),
        (["train", "stackgan", *SMOKE, "--set", "size=24"], ["24"]),
        (["train", "stackgan", *SMOKE, "--set", "recipe=modren"], ["'modren'", "'modern'"]),
        (["train", "ddpm", *SMOKE, "--set", "recipe=paper"], ["'recipe'"]),
        (["train", "gan_int_cls", *SMOKE, "--set", "encoder.max_chars=20"], ["max_chars=20"]),
        (["train", "attngan", *SMOKE, "--set", "model.num_scales=3"], ["num_scales", "size"]),
        (["train", "attngan", *SMOKE, "--set", "damsm.grid_size=16"], ["damsm.grid_size=16"]),
        (["train", "attngan", *SMOKE, "--set", "damsm.image_encoder=convs"], ["'convs'", "'conv'"]),
        # data, devices, runs
        (["train", "ddpm", *SMOKE, "--data", "nowhere/at/all"], ["nowhere/at/all"]),
        (["train", "ddpm", *SMOKE, "--data", "shaps"], ["shaps"]),
        (["train", "ddpm", *SMOKE, "--data", "shapes:esy"], ["esy"]),
        (["train", "ddpm", *SMOKE, "--device", "tpu"], ["tpu"]),
        (["train", "ddpm", *SMOKE, "--device", "meta"], ["meta"]),
        (["train", "vqvae", *SMOKE, "--from", "codec"], ["STAGE=RUN"]),
        (["train", "vqvae", *SMOKE, "--from", "codec=nowhere"], ["nowhere"]),
        (["data", "check", "nowhere"], ["nowhere"]),
        (["data", "check", "shaps"], ["shaps"]),
        (["data", "show", "shapes", "--split", "trane"], ["trane"]),
        (["sample", "nowhere", "a red circle"], ["nowhere"]),
        (["sample", ".", "a red circle"], ["config.json"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["evaluate", "."], ["config.json"]),
        (["verify", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["import-weights", "stackgan", "nowhere.pth", "--out", "runs/a"], ["nowhere.pth"]),
        (["import-weights", "stackgan", ".", "--out", "runs/a"], ["."]),
        (["import-weights", "stackgan", "n.safetensors", "--out", "runs/a"], ["n.safetensors"]),
        (["import-weights", "attngan", "a.pth", "b.pth", "w.txt", "--out", "runs/a"], ["a.pth"]),
        (["import-weights", "attngan", "w.txt", "a.pth", "--out", "runs/a"], ["w.txt"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_fault_is_one_sentence(
    arguments: list[str], words: list[str], call: Call, tmp_path: Path
) -> None:
    assert_refused(call(*arguments), *words)
    assert not list(tmp_path.glob("runs/*/model.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_reported(call: Call) -> None:
    assert_refused(call("train", "ddpm", *SMOKE, "--device", "cuda"), "'cuda'", "--device cpu")


@pytest.mark.parametrize("mistake", ["text=lstn", "size=17", "encoder.tokenizer=wrod"])
def test_after_a_mistake_the_corrected_command_works(
    mistake: str, call: Call, tmp_path: Path
) -> None:
    """A refused start leaves no folder behind that refuses the next one."""
    start = ["train", "ddpm", *SMOKE, "--steps", 1, "--out", tmp_path / "run"]
    assert_refused(call(*start, "--set", mistake))
    answer = call(*start)
    assert answer.code == 0, answer.errors


def test_a_negative_seed_trains_or_is_refused(call: Call, tmp_path: Path) -> None:
    """On data from a disk as well, where the seed orders the pictures."""
    pictures = tmp_path / "pictures"
    assert call("data", "export", "shapes", "--count", 8, "--size", 16, "--out", pictures).code == 0
    answer = call("train", "ddpm", *SMOKE, "--steps", 1, "--seed", -1, "--data", pictures)
    assert "Traceback" not in answer.errors and answer.code in (0, 2)


def test_an_empty_folder_is_not_a_data_set(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(call("train", "ddpm", *SMOKE, "--data", "empty"), "empty")
    assert_refused(call("train", "ddpm", *SMOKE, "--data", "folder:empty"), "empty")
    answer = call("data", "check", "empty")
    assert answer.code == 2 and "Traceback" not in answer.errors


# --- what is no fault of the command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (OSError(28, "No space left on device", "runs/a"), 2, ["No space left", "runs/a"]),
        (OSError("no such socket"), 2, ["no such socket"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_interruption_and_a_full_disk_are_one_sentence(
    error: BaseException, code: int, words: list[str], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(catalog, "as_table", fail)
    assert_refused(call("list"), *words, code=code)


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_closed_pipe_is_no_fault(flags: list[str]) -> None:
    """As in `lineage list | head -1`."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, *flags, "-m", "lineage", "list"],
        cwd=Path(cli.__file__).parents[2],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_ends_with_130() -> None:
    code = (  # the handler is set because a shell's background jobs ignore the signal
        "import os, signal; from lineage import catalog, cli;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "catalog.as_table = lambda: os.kill(os.getpid(), signal.SIGINT);"
        "raise SystemExit(cli.main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.count("\n") == 1 and "interrupted" in done.stderr
