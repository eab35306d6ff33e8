"""Text at the edges: from file names, files and arguments, and to terminals and files.

    decoded      bytes of a text file -> text
    well_formed  any text -> text that can be written as UTF-8
    valid        the same, without the character 0
    plain        any text -> text that a terminal, a log or a page shows as it is
    escaped      any text -> ASCII
    same_name    the key by which two file names are one
    Names        file names that are found by it
    protect      while it holds, the standard streams take every text and survive a lost reader

Python holds the bytes of a name or an argument that is not UTF-8 as lone surrogates
(`surrogateescape`), and a terminal obeys control characters. Both end here.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_HIDDEN = frozenset(
    "\u2028\u2029\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Separators of lines and paragraphs, and marks that change the direction of what follows."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decoded(raw: bytes) -> str:
    """Text of a file in UTF-8, or UTF-16 or UTF-32 with a byte order mark; lines end in `\\n`.

    Raises:
        UnicodeDecodeError: the bytes are none of these; its `start` is the first wrong byte.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if raw.startswith(m)), (b"", "utf-8"))
    text = raw[len(mark) :].decode(encoding)
    if not mark and 4 * raw.count(0) > len(raw):  # UTF-16 or UTF-32 without a mark, or no text
        at = raw.find(0)
        raise UnicodeDecodeError(encoding, raw, at, at + 1, "a zero byte, which no text holds")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each character that UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def valid(text: str) -> str:
    """`well_formed` text without the character 0."""
    return well_formed(text).replace("\0", REPLACEMENT)


def plain(text: object) -> str:
    """`text` with `\\x1b` and the like for characters that a terminal obeys instead of showing.

    Bytes of a file name that are not UTF-8 become `\\xe9`. Letters of every script stay.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_printable(char) for char in text)


def _printable(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char not in _HIDDEN and unicodedata.category(char) not in ("Cc", "Cs"):
        return char
    return escaped(char) if code > 127 else _control(code)


def _control(code: int) -> str:
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code, f"\\x{code:02x}")


def same_name(name: str) -> str:
    """Key of a file name: macOS writes `è` as two characters, other systems as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Names:
    """File names, found although their accents are written in another way."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._others = {same_name(name): name for name in self._names if not name.isascii()}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def find(self, name: str) -> str:
        """The one of the names that `name` means; `name` itself if there is none."""
        return name if name in self._names else self._others.get(same_name(name), name)


def escaped(text: str) -> str:
    """`text` with `\\xe9`, `\\u4e2d` and the like for all that is not ASCII."""
    return text.encode("ascii", "backslashreplace").decode()


def holds_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


# --- standard streams -----------------------------------------------------------------------------


class OutputError(Exception):
    """Standard output cannot be written; `reason` says why."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason.strerror or str(reason))
        self.reason = reason

    @property
    def unread(self) -> bool:
        """Whether the reader has gone, as in `lineage list | head -1`."""
        return isinstance(self.reason, BrokenPipeError)


class _Diagnostics:
    """Standard error: what nobody can read is dropped, so that no work ends for a progress bar."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 - lives as the process does

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        """Send what is still in the stream's buffer, and all that follows, nowhere."""
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_Diagnostics):
    """Standard output: what cannot be written raises `OutputError`."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._closed = stream is None

    def write(self, text: str) -> int:
        if self._closed:
            raise OutputError(OSError(errno.EBADF, "it is closed"))
        return super().write(text)

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        raise OutputError(error) from None


@contextlib.contextmanager
def protect() -> Iterator[None]:
    """Within this context, the standard streams take any text, and nobody need read them.

    What their encoding lacks is escaped. What standard error cannot write is dropped; what standard
    output cannot write raises `OutputError`.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, _Output(sys.stdout))
    sys.stderr = cast(TextIO, _Diagnostics(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Give closed standard streams a descriptor: a file that is opened later must not be theirs."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)  # also makes it one that child processes inherit
            if null != number:
                os.close(null)
