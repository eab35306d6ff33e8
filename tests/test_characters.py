"""Text at the edges: what is written can be shown, and the standard streams take every text."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from lineage.characters import (
    OutputError,
    decoded,
    escaped,
    holds_unicode,
    plain,
    protect,
    valid,
    well_formed,
)
from lineage.cli.arguments import print_json

every_text = settings(max_examples=150, derandomize=True, deadline=None)
text = st.text(st.characters(), max_size=40)  # with lone surrogates and control characters

HOSTILE = "é\x1b[2J\x9b31m\u202e红\udcff\U0001f600\u2028\x00\x7f\n"


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("a red circle", "a red circle"),
        ("crème 红色 لون 😀", "crème 红色 لون 😀"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("caf\udce9", "caf\\xe9"),
        ("a\tb\nc\rd\0\x7f", "a\\tb\\nc\\rd\\x00\\x7f"),
        ("\u202eabc\u2066\u2028", "\\u202eabc\\u2066\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_plain_text_has_no_control_sequences(given_text: str, shown: str) -> None:
    assert plain(given_text) == shown


@every_text
@given(text)
def test_any_text_can_be_written(some: str) -> None:
    assert plain(plain(some)) == plain(some)
    assert escaped(some).isascii()
    for one in (well_formed(some), valid(some), plain(some)):
        one.encode("utf-8")
    assert well_formed(well_formed(some)) == well_formed(some)
    assert "\0" not in valid(some)


@every_text
@given(st.text(max_size=40))
def test_text_that_is_well_formed_is_not_changed(some: str) -> None:
    assert well_formed(some) == some
    lines = some.replace("\r\n", "\n").replace("\r", "\n")
    if not some.startswith("\0"):  # the mark of UTF-32 begins so
        assert decoded(b"\xff\xfe" + some.encode("utf-16-le")) == lines
    assert decoded(b"\xef\xbb\xbf" + some.encode()) == lines


# --- standard streams -----------------------------------------------------------------------------


class Pipe:
    """A stream whose reader can go."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.read, write = os.pipe()
        self.stream = os.fdopen(write, "w", encoding=encoding)

    def leave(self) -> None:
        os.close(self.read)

    def content(self) -> bytes:
        self.stream.flush()
        return os.read(self.read, 1 << 16)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    one = Pipe()
    yield one
    one.stream.close()


def test_a_lost_reader_of_standard_error_ends_nothing(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", pipe.stream)
    pipe.leave()
    with protect():
        for _ in range(3):
            print("step", "x" * 9000, file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()
    assert sys.stderr is pipe.stream


def test_a_progress_bar_ends_nothing(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal that has been closed."""
    pipe.stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", pipe.stream)
    pipe.leave()
    with protect(), tqdm(total=3, desc="drawing", mininterval=0, disable=None) as bar:
        bar.update()
        bar.set_postfix_str("loss 1")
        bar.refresh()
        assert bar.n == 1 and not bar.disable


def test_a_lost_reader_of_standard_output_is_told(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", pipe.stream)
    pipe.leave()
    with protect(), pytest.raises(OutputError) as caught:
        print("a", flush=True)
    assert caught.value.unread


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as out, open("/dev/full", "w") as errors:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        with protect():
            print("dropped", file=sys.stderr, flush=True)
            with pytest.raises(OutputError, match="space") as caught:
                print("a", flush=True)
        assert not caught.value.unread


def test_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None in their place."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with protect():
        print("dropped", file=sys.stderr)
        with pytest.raises(OutputError, match="closed") as caught:
            print("a")
    assert not caught.value.unread


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "utf-8", "utf-16"])
def test_every_encoding_takes_every_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(encoding)
    monkeypatch.setattr(sys, "stdout", pipe.stream)
    monkeypatch.setattr(sys, "stderr", pipe.stream)
    with protect():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
    assert b"31m" in pipe.content().replace(b"\0", b"")
    pipe.stream.close()
    pipe.leave()


@every_text
@given(st.dictionaries(text, st.one_of(text, st.integers(), st.lists(text)), max_size=3))
def test_json_is_valid_in_every_encoding_and_without_control_characters(value: object) -> None:
    for encoding in ("ascii", "cp437", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        before, sys.stdout = sys.stdout, stream
        try:
            with protect():
                print_json(value)
        finally:
            sys.stdout = before
        stream.flush()
        printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert json.loads(printed) == value
        assert all(plain(line) == line for line in printed.split("\n"))


def test_json_has_only_numbers_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), float("inf"), 0.5], "b": -float("inf")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 0.5], "b": None}


def test_json_keeps_letters_where_the_stream_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"caption": "красный \x1b круг"})
    assert "красный \\u001b круг" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("encoding", "whole"), [("utf-8", True), ("UTF-16", True), ("ascii", False), ("cp1252", False)]
)
def test_encodings_that_hold_unicode(encoding: str, whole: bool) -> None:
    assert holds_unicode(io.TextIOWrapper(io.BytesIO(), encoding)) is whole
