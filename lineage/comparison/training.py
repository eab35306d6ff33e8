"""Training of several systems, each in a process of its own, some of them at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lineage.catalog import CATALOG
from lineage.errors import CheckFailed, Interrupted, UserError
from lineage.training.progress import LABEL
from lineage.training.stopping import STOP_SIGNALS

POLL = 0.1  # seconds between two looks for a process that has ended


def train_all(flags: Mapping[str, Sequence[str]], at_once: int) -> None:
    """Train systems, or continue their runs.

    Args:
        flags: Arguments of `lineage train` for each key.
        at_once: Number of systems that are trained at a time.

    Raises:
        UserError, CheckFailed: a system could not be trained; the others have saved their state.
        Interrupted: a request to stop, after all have saved their state.
    """
    waiting, running = list(flags), dict[str, subprocess.Popen[bytes]]()
    places = list(range(min(at_once, len(waiting))))  # free lines for bars, from the top
    place_of: dict[str, int] = {}
    with _stopped_together(running):
        while waiting or running:
            while waiting and places:
                key, place = waiting.pop(0), places.pop(0)
                number = f"[{len(flags) - len(waiting)}/{len(flags)}]"
                print(f"{number} {key}: {CATALOG[key].title}", file=sys.stderr)
                running[key], place_of[key] = _start(key, flags[key], place), place
            for key in [key for key, child in running.items() if child.poll() is not None]:
                code = running.pop(key).returncode
                places = sorted([*places, place_of.pop(key)])
                _check(key, code)
            time.sleep(POLL)


def _start(key: str, flags: Sequence[str], place: int) -> subprocess.Popen[bytes]:
    """Start `lineage train`, which shows its bar in line `place` below the others."""
    command = [sys.executable, "-m", "lineage.cli.child", "train", key, *flags]
    environment = {**os.environ, "TQDM_POSITION": str(place), LABEL: f"{key} "}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )


@contextmanager
def _stopped_together(running: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Stop all running processes on a request to stop, and when one of them fails; they save their
    state and end.
    """
    try:
        yield
    except KeyboardInterrupt:  # SIGTERM and SIGHUP on the command line, too
        raise _interrupted() from None
    finally:
        for child in running.values():
            child.terminate()  # the terminal has asked it too after Ctrl-C, a program may not have
        for child in running.values():
            child.wait()


def _check(key: str, code: int) -> None:
    """Raise what the exit code of a system's process means."""
    if code in (130, *(-number for number in STOP_SIGNALS)):
        raise _interrupted()
    if code == 2:
        raise UserError(f"{key} could not be trained, for the reason above.")
    if code < 0:
        raise CheckFailed(
            f"{key} was ended by signal {-code} (9 is the system's, where memory is short); give "
            "the same command again to go on."
        )
    if code:
        raise CheckFailed(f"{key} stopped with exit code {code}, for the reason above.")


def _interrupted() -> Interrupted:
    return Interrupted("The comparison stopped; give the same command again to go on.")
