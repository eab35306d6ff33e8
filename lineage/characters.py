"""Text at the edges: from file names, files and arguments, and to terminals and files.

    decoded    bytes of a text file -> text
    valid      any text -> text that can be written as UTF-8
    plain      any text -> text that a terminal, a log or a page shows as it is
    same_name  the key by which two file names are one
    protect    make the standard streams write every text, in any encoding

Python holds the bytes of a name or an argument that is not UTF-8 as lone surrogates
(`surrogateescape`), and a terminal obeys control characters. Both end here.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from typing import TextIO

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_HIDDEN = frozenset(
    "\u2028\u2029\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Separators of lines and paragraphs, and marks that change the direction of what follows."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decoded(raw: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 with a byte order mark; every line ends in `\\n`.

    Raises:
        UnicodeDecodeError: the bytes are neither; its `start` is the first wrong byte.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if raw.startswith(m)), (b"", "utf-8"))
    text = raw[len(mark) :].decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def valid(text: str) -> str:
    """`text` with U+FFFD for each character that UTF-8 cannot hold, and without the character 0."""
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return joined.replace("\0", REPLACEMENT)


def plain(text: object) -> str:
    """`text` with `\\x1b` and the like for characters that a terminal obeys instead of showing.

    Bytes of a file name that are not UTF-8 become `\\xe9`. Letters of every script stay.
    """
    return "".join(_shown(char) for char in str(text))


def _shown(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char not in _HIDDEN and unicodedata.category(char) not in ("Cc", "Cs"):
        return char
    return char.encode("ascii", "backslashreplace").decode() if code > 127 else _escaped(code)


def _escaped(code: int) -> str:
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code, f"\\x{code:02x}")


def same_name(name: str) -> str:
    """Key of a file name: macOS writes `è` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def protect() -> None:
    """Let standard output and error write any text: what their encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def holds_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")
