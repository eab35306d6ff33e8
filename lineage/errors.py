"""Errors that the user can correct, each with a message of one sentence, and notes to the user.

A wrong input, a full disk or a typing error raises `UserError`. The command line prints its message
on standard error and exits with its code, without a traceback. Any other exception is a defect of
this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from lineage.characters import plain


class UserError(Exception):
    """One sentence that names the wrong file or value and says how to correct it. Exit code 2.

    Control characters in it are escaped: a name or a value may come from anywhere.
    """

    exit_code = 2

    def __init__(self, sentence: object) -> None:
        super().__init__(plain(sentence))


class CheckFailed(UserError):
    """A check that failed, at the end of a command or in the middle of a run. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """A stop by the user or the operating system, after everything is saved. Exit code 130."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error sentence that suggests a name: `did you mean 'ddpm'?`, or all known names.

    If no name is close, it compares the parts after the last dot: `lr` suggests `optim.lr`.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if not close:
        leaves = [other.rpartition(".")[2] for other in names]
        similar = difflib.get_close_matches(name.rpartition(".")[2], set(leaves), n=3, cutoff=0.6)
        close = [names[i] for leaf in similar for i, own in enumerate(leaves) if own == leaf][:3]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "there is: " + ", ".join(names)


_said: set[str] = set()


def say(sentence: object) -> None:
    """Print a sentence to the user on standard error."""
    print(f"lineage: {plain(sentence)}", file=sys.stderr)


def say_once(sentence: str) -> None:
    """`say`, the first time only."""
    if sentence not in _said:
        _said.add(sentence)
        say(sentence)
