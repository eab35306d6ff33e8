"""What commands print: in every encoding, without control sequences, and when nobody reads it."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusal import assert_refused

from lineage import catalog, cli
from lineage.catalog import CATALOG
from lineage.errors import UserError

Call = Callable[..., Answer]

HEBREW, ESCAPE = "עיגול", "\x1b[31m"
REFUSED = ["lst"]
PRINTING = [["list"], ["list", "--json"], ["--help"], ["train", "--help"], ["--version"]]


def shell(arguments: list[str], redirection: str) -> tuple[int, str, str]:
    """Code, output and errors of `python -m lineage ARGUMENTS REDIRECTION`."""
    line = shlex.join([sys.executable, "-m", "lineage", *arguments])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {redirection}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set whose names and captions are hard to print."""
    root = tmp_path / f"{HEBREW}{ESCAPE}"
    root.mkdir()
    for name, caption in {HEBREW: "a red circle", "a": f"{HEBREW} 😀 {ESCAPE}"}.items():
        Image.new("RGB", (16, 16)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(caption, encoding="utf-8")
    Image.new("RGB", (16, 16)).save(root / f"{HEBREW}{ESCAPE}é.png")
    return root


# --- streams that nobody reads --------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")


@posix
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_enough_is_no_fault(arguments: list[str]) -> None:
    assert shell(arguments, "| true") == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_an_output_that_cannot_be_written_is_told(arguments: list[str]) -> None:
    answer = Answer(*shell(arguments, "> /dev/full"))
    assert_refused(answer, "Standard output", "No space left")


@posix
@pytest.mark.parametrize("arguments", [["list"], ["--help"]], ids=" ".join)
def test_a_closed_output_is_told(arguments: list[str]) -> None:
    assert_refused(Answer(*shell(arguments, ">&-")), "Standard output", "closed")


@posix
@pytest.mark.parametrize("redirection", ["2>&-", "2> >(true)", "2> /dev/full"])
def test_without_a_reader_of_errors_the_work_is_done(redirection: str) -> None:
    code, out, _ = shell(["list"], redirection)
    assert code == 0 and all(key in out for key in CATALOG)
    code, out, _ = shell(REFUSED, redirection)
    assert code == 2 and out == ""


@posix
def test_a_file_that_is_opened_does_not_become_standard_error(tmp_path: Path) -> None:
    code = (
        "import os, sys; from lineage import catalog, cli;"
        f"catalog.as_table = lambda: os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR);"
        "raise SystemExit(cli.main(['list']))"
    )
    line = shlex.join([sys.executable, "-c", code])
    done = subprocess.run(["bash", "-c", f"{line} 2>&- <&-"], capture_output=True, timeout=60)
    assert int(done.stdout) > 2


def test_a_fault_is_told_even_if_what_was_printed_is_not_read(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        print("a part")
        raise UserError("It is wrong.")

    monkeypatch.setattr(catalog, "as_table", fail)
    answer = call("list")
    assert answer == Answer(2, "a part\n", "lineage: It is wrong.\n")


# --- encodings and control sequences --------------------------------------------------------------


def printed_in(encoding: str, *arguments: object) -> tuple[int, str]:
    """Code and output of a command whose terminal has another encoding."""
    before = sys.stdout, sys.stderr
    sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding)
    try:
        code = cli.main([str(a) for a in arguments])
        sys.stdout.flush()
        return code, sys.stdout.buffer.getvalue().decode(encoding)
    finally:
        sys.stdout, sys.stderr = before


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_every_encoding_shows_names(encoding: str, folder: Path) -> None:
    code, out = printed_in(encoding, "data", "check", folder, "--size", 16)
    assert code == 0 and "2 pictures" in out and "\x1b" not in out and "\\x1b" in out
    assert (HEBREW in out) == (encoding == "utf-8")
    code, out = printed_in(encoding, "data", "check", folder, "--size", 16, "--json")
    report = json.loads(out)
    assert code == 0 and report["skipped"][0]["path"] == f"{HEBREW}\\x1b[31mé.png"
    assert "\x1b" not in out


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
@pytest.mark.parametrize(
    "arguments", [["list", "--tree"], ["list"], ["list", "--json"], ["--help"]], ids=" ".join
)
def test_every_encoding_shows_lists_and_help(encoding: str, arguments: list[str]) -> None:
    code, out = printed_in(encoding, *arguments)
    assert code == 0 and ("Usage" in out or all(key in out for key in CATALOG))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"ddpm{ESCAPE}"],
        ["data", "check", f"no{ESCAPE}where"],
        ["data", "show", f"shapes{ESCAPE}"],
        ["sample", f"no{ESCAPE}where", "a"],
        ["sample", "no\nwhere", "a"],
        ["evaluate", f"no{ESCAPE}where\x9b"],
        [f"li{ESCAPE}st"],
        ["list", f"--tr{ESCAPE}ee"],
        ["train", "ddpm", "--set", f"optim{ESCAPE}=1"],
        ["train", "ddpm", "--data", f"no{ESCAPE}where"],
        ["verify", f"no{ESCAPE}where"],
    ],
    ids=lambda arguments: (
        " ".join(arguments).replace("\x1b", "ESC").encode("unicode_escape").decode()
    ),
)
def test_no_control_sequence_reaches_the_terminal(arguments: list[str], call: Call) -> None:
    answer = call(*arguments)
    assert_refused(answer)
    assert answer.errors[:-1].isprintable()


def test_the_next_command_can_be_pasted(call: Call) -> None:
    name = "it's a run"
    answer = call("train", "ddpm", "--preset", "smoke", "--steps", 1, "--out", name)
    pasted = shlex.split(answer.out.partition("draw with: ")[2])
    assert pasted == ["lineage", "sample", name, "a caption"]


# --- captions that are not read -------------------------------------------------------------------

WORDS = "red " * 40


@pytest.mark.parametrize(
    ("key", "caption", "notes"),
    [
        ("ddpm", "red " * 32 + "zorp blue square", ["not read, beyond 32 words: zorp blue square"]),
        ("ddpm", "a zorp circle \udcff", ["unknown words: zorp, �"]),
        ("vqvae", "red " * 8 + "zorp", ["not read, beyond 8 words: zorp"]),
        ("gan_int_cls", "x" * 100 + " zorp", ["not read, beyond 100 characters: zorp"]),
        ("gan_int_cls", "红色的圆", ["unknown words: 红, 色, 的, 圆"]),
        ("ddpm", f"red{ESCAPE}", ["unknown words: \\x1b, [, 31m"]),
        ("ddpm", "a red circle", []),
        ("gan_int_cls", "a zorp", []),
    ],
)
def test_what_is_not_read_is_named(
    key: str, caption: str, notes: list[str], sample: Callable[..., Answer]
) -> None:
    answer = sample(key, caption, caption)
    assert answer.code == 0 and answer.out == "sample.png\n"
    assert answer.errors.splitlines() == [f"lineage: {note}" for note in notes]


def test_long_captions_are_counted(tmp_path: Path, call: Call) -> None:
    for name, caption in {"a": "a red circle", "b": WORDS, "c": WORDS + "x" * 200}.items():
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    answer = call("data", "check", tmp_path)
    assert "longer than 32 words, which is all that encoders read: 2\n" in answer.out
    assert "longer than 201 characters, which is all that encoders read: 1\n" in answer.out
    report = json.loads(call("data", "check", tmp_path, "--json").out)
    assert report["cut"] == {"32 words": 2, "201 characters": 1}


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=30), min_size=1, max_size=3))
def test_any_caption_is_drawn(smoke_run: Callable[[str], Any], captions: list[str]) -> None:
    from lineage import notes
    from lineage.data.contract import to_bytes
    from lineage.sheets import sheet

    system = smoke_run("ddpm").system
    sentences = notes.unread_text(system.text, captions, system.text_len)
    assert all(isinstance(sentence, str) for sentence in sentences)
    pictures = to_bytes(system.generate(captions))
    assert sheet(list(pictures), captions).width > 0
