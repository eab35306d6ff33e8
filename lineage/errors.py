"""Faults that are the user's to mend, told in one sentence.

Everything that a wrong input, a full disk or a typing error can cause is raised as `UserError`; the
command line prints its text on standard error and exits with its code, without a traceback.
Anything else that is raised is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear sentence that names the file or value at fault and the mend. Exit code 2."""

    exit_code = 2


class CheckFailed(UserError):
    """Something ran to its end or stopped itself because a check did not hold. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """The user, or the system, asked the run to stop; everything is saved. Exit code 130."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence part that suggests what was meant: `did you mean 'ddpm'?` or the whole list.

    `train.step` finds `train.steps` as well as `train.stop`; nothing similar lists what there is.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        close = [known_name for known_name in names if known_name.rsplit(".", 1)[-1] == leaf][:3]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "there is: " + ", ".join(names)
