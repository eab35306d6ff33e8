"""Training of several runs, each in a process of its own, some of them at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from lineage.catalog import CATALOG
from lineage.errors import Interrupted, say
from lineage.training.progress import LABEL
from lineage.training.stopping import STOP_SIGNALS

POLL = 0.1  # seconds between two looks for a process that has ended


def train_all(commands: Mapping[str, Sequence[str]], at_once: int) -> dict[str, str]:
    """Train runs, or continue them. One that fails does not stop the others.

    Args:
        commands: Arguments of `lineage train` for each run, the key first, by the run's name.
        at_once: Number of runs that are trained at a time.

    Returns:
        The reason of each run that could not be trained.

    Raises:
        Interrupted: a request to stop, after all have saved their state.
    """
    waiting, running = list(commands), dict[str, subprocess.Popen[str]]()
    places = list(range(min(at_once, len(waiting))))  # free lines for bars, from the top
    place_of: dict[str, int] = {}
    failed: dict[str, str] = {}
    with _stopped_together(running):
        while waiting or running:
            while waiting and places:
                name, place = waiting.pop(0), places.pop(0)
                number = f"[{len(commands) - len(waiting)}/{len(commands)}]"
                title = CATALOG[commands[name][0]].title
                print(f"{number} {name}: {title}", file=sys.stderr)
                running[name], place_of[name] = _start(name, commands[name], place), place
            for name in [name for name, child in running.items() if child.poll() is not None]:
                child = running.pop(name)
                places = sorted([*places, place_of.pop(name)])
                if reason := reason_of(child):
                    failed[name] = reason
                    say(f"{name} could not be trained: {reason.rstrip('.')}.")
            time.sleep(POLL)
    return failed


def _start(name: str, command: Sequence[str], place: int) -> subprocess.Popen[str]:
    """Start `lineage train`, which shows its bar in line `place` below the others."""
    arguments = [sys.executable, "-m", "lineage.cli.child", "train", *command]
    environment = {**os.environ, "TQDM_POSITION": str(place), LABEL: f"{name} "}
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,  # a line
        env=environment,
        text=True,
        errors="replace",
    )


@contextmanager
def _stopped_together(running: Mapping[str, subprocess.Popen[str]]) -> Iterator[None]:
    """Stop all running processes on a request to stop; they save their state and end."""
    try:
        yield
    except KeyboardInterrupt:  # SIGTERM and SIGHUP on the command line, too
        raise _interrupted() from None
    finally:
        for child in running.values():
            child.terminate()  # the terminal has asked it too after Ctrl-C, a program may not have
        for child in running.values():
            child.wait()


def reason_of(child: subprocess.Popen[str]) -> str:
    """Why the run of an ended process was not finished; empty if it was.

    Raises:
        Interrupted: it was asked to stop.
    """
    code = child.returncode
    if code in (130, *(-number for number in STOP_SIGNALS)):
        raise _interrupted()
    if not code:
        return ""
    if code < 0:
        return (
            f"its process was ended by signal {-code} (9 is the system's, where memory is short); "
            "give the same command again to go on"
        )
    said = child.stdout.read().splitlines() if child.stdout else []
    return said[-1] if said else f"its process ended with exit code {code}"


def _interrupted() -> Interrupted:
    return Interrupted("The comparison stopped; give the same command again to go on.")
