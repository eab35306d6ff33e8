"""Fault injection: a run that is killed or whose disk fails at any write must lose nothing.

    OMP_NUM_THREADS=1 python benchmarks/faults.py      writes results/faults.json

A small run is trained once undisturbed. Each of its writes below the run folder and the cache (a
file opened for writing, a write, `fsync`, `replace`, a new folder) is an event with a number. Then
it is trained again for each event and each kind of fault, with the fault at that event: the process
is killed before it (a write half done) or after it, or the call raises ENOSPC, EIO or EACCES. The
same is done to a run that is resumed after a kill.

A fault passes if all of these hold:

    the process was killed, ended with exit code 2 and one sentence, or went on and trained on
    an error leaves no partial file behind, and a kill none after the run is resumed
    a model.safetensors that is there is one that the undisturbed run wrote too, and loads
    the command given again (with --resume) ends with the undisturbed run's weights to the byte, and
    with the same steps in its log and in cost.json

A refused command must have no events at all.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lineage
from lineage.cli import main as command
from lineage.evaluation.cost import machine
from lineage.training.log import read_log
from lineage.training.store import read_json, write_json

OUT = Path(__file__).parent.parent / "results" / "faults.json"
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
KINDS = ("killed", "killed after", *ERRORS)
RESULTS = ("resumed to the same bytes", "loads", "one sentence", "went on", "failed")
TRAIN = "--preset smoke --data data --out run --steps 4 --set train.batch_size=2"
EVERY = "--set train.checkpoint_every=2 --set train.sample_every=2 --set train.log_every=2"
UNET = "--set model.unet.attention_levels=0 --set model.unet.channel_mult=1"
SYSTEMS = {
    "ddpm": f"train ddpm {TRAIN} {EVERY} {UNET} --set model.sampling_steps=1",  # one stage
    "vqvae": f"train vqvae {TRAIN} {EVERY}",  # a codec, which is cached, and a prior
}
LIMIT = 60  # seconds of one command


# --- faults ---------------------------------------------------------------------------------------


class Faults:
    """Counts the writes of this process below some folders, and lets one of them fail.

    Args:
        folders: Folders whose writes are counted.
        number: Number of the event that fails, from 0; None for none.
        kind: One of `KINDS`.
    """

    def __init__(self, folders: list[Path], number: int | None, kind: str) -> None:
        self.folders = tuple(f"{folder}{os.sep}" for folder in folders)
        self.number, self.kind = number, kind
        self.events: list[str] = []
        self.models: list[str] = []  # hashes of the weights that the run wrote, in order
        self.open_files: dict[int, Path] = {}  # paths by descriptor
        self.open, self.mkdir = io.open, os.mkdir
        self.fsync, self.replace = os.fsync, os.replace

    def install(self) -> None:
        """Put the counting functions in place of Python's."""
        builtins.open = io.open = self._open
        os.mkdir, os.fsync, os.replace = self._mkdir, self._fsync, self._replace

    def event(
        self,
        name: str,
        path: Any,
        action: Callable[[], Any],
        half: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Do `action`, which is an event if `path` is below the folders; `half` of it comes before
        its fault.
        """
        place = os.path.abspath(os.fspath(path))
        if not f"{place}{os.sep}".startswith(self.folders):
            return action()
        written = re.sub(r"\.(.+)\.\d+-\w+\.partial$", r"\1", os.path.relpath(place))
        self.events.append(f"{name} {written}")
        if len(self.events) - 1 != self.number:
            return action()
        if self.kind == "killed after":
            action()
        else:
            half()
        if self.kind in ERRORS:
            code = ERRORS[self.kind]
            raise OSError(code, os.strerror(code), str(path))
        return os.kill(os.getpid(), signal.SIGKILL)

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+"):
            return self.open(file, mode, *arguments, **options)
        opened = self.event("open", file, lambda: self.open(file, mode, *arguments, **options))
        self.open_files[opened.fileno()] = Path(file)
        return CountedFile(self, opened, Path(file))

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        if os.path.exists(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            # fails in any case
            return self.mkdir(path, *arguments, **options)
        return self.event("mkdir", path, lambda: self.mkdir(path, *arguments, **options))

    def _fsync(self, descriptor: int) -> None:
        path = self.open_files.get(descriptor, Path(os.devnull))
        self.event("fsync", path, lambda: self.fsync(descriptor))

    def _replace(self, source: Any, target: Any) -> None:
        self.event("replace", target, lambda: self.replace(source, target))
        if Path(target).parts == ("run", "model.safetensors"):
            self.models.append(digest(Path(target)))


class CountedFile:
    """A file open for writing whose writes are events."""

    def __init__(self, faults: Faults, file: Any, path: Path) -> None:
        self.faults, self.file, self.path = faults, file, path

    def write(self, data: Any) -> Any:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        return self.faults.event("write", self.path, lambda: self.file.write(data), half)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# --- commands -------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; the negative number of the signal that ended it.
        errors: Lines of standard error.
        events: Names of its events.
        models: Hashes of the weights that it wrote.
    """

    code: int
    errors: list[str]
    events: list[str]
    models: list[str]


def run(arguments: str, place: Path, number: int | None = None, kind: str = "") -> Ended:
    """One command in `place`, in a process of its own, with a fault at event `number`.

    The process is a fork, so that PyTorch is not imported again.
    """
    errors, report = place / "errors.txt", place / "events.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(place)
            os.environ["LINEAGE_CACHE"] = "cache"
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            signal.alarm(LIMIT)
            faults = Faults([place / "run", place / "cache"], number, kind)
            faults.install()
            code = command(shlex.split(arguments))
            report.write_text(json.dumps([faults.events, faults.models]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    events, models = json.loads(report.read_text()) if report.exists() else ([], [])
    lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return Ended(os.waitstatus_to_exitcode(status), lines, events, models)


def digest(path: Path) -> str:
    """Hash of a file, or the empty text where there is none."""
    return hashlib.blake2b(path.read_bytes()).hexdigest() if path.exists() else ""


def steps(folder: Path) -> Any:
    """Stages and steps of a run's log and costs."""
    log = [(line["stage"], line["step"]) for line in read_log(folder / "metrics.jsonl")]
    cost = {name: stage["steps"] for name, stage in read_json(folder / "cost.json").items()}
    return log, cost


def partials(place: Path) -> set[Path]:
    """Files that were not written to their end."""
    return {path.relative_to(place) for path in place.rglob("*.partial")}


def copy(source: Path, place: Path) -> None:
    """`place` as a copy of `source`, and nothing else."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)


# --- judgement ------------------------------------------------------------------------------------


class Scenario:
    """A command that is disturbed, from the same start each time.

    Args:
        arguments: The command.
        start: Folder in which it starts, of which each trial has a copy.
        place: Folder of the trials.
        fresh: Command that trains the run from its beginning.
        finished: Folder of the undisturbed run, which was trained from the same beginning.
        models: Hashes of all weights that the undisturbed run wrote.
    """

    def __init__(
        self,
        arguments: str,
        start: Path,
        place: Path,
        fresh: str,
        finished: Path,
        models: list[str],
    ) -> None:
        self.arguments, self.start, self.place, self.fresh = arguments, start, place, fresh
        self.finished, self.models = finished, models
        self.loaded: dict[tuple[str, ...], str] = {}  # what `lineage.load` answered, by content
        copy(start, place)
        self.events = run(arguments, place).events

    def trial(self, number: int, kind: str) -> tuple[list[str], list[str]]:
        """Inject one fault; returns the results that it counts for, and what went wrong."""
        copy(self.start, self.place)
        ended = run(self.arguments, self.place, number, kind)
        folder = self.place / "run"
        results, wrong = [], []
        if kind not in ERRORS:
            wrong += [f"ended with {ended.code}"] * (ended.code != -signal.SIGKILL)
        elif ended.code == 2 and len(ended.errors) == 1 and ended.errors[0].startswith("lineage: "):
            results.append("one sentence")
        elif ended.code == 0 and all(line.startswith("lineage: ") for line in ended.errors):
            results.append("went on")
        else:
            wrong.append(f"exit code {ended.code}: {' / '.join(ended.errors[-3:])}")
        if kind in ERRORS and partials(self.place) - partials(self.start):
            wrong.append("a partial file was left behind")
        if (folder / "model.safetensors").exists():
            problem = self._load(folder)
            results += ["loads"] * (not problem)
            wrong += [problem] * bool(problem)
        problem = self._resume(folder)
        results += ["resumed to the same bytes"] * (not problem)
        wrong += [problem] * bool(problem)
        return (["failed"] if wrong else results), wrong

    def _load(self, folder: Path) -> str:
        """What is wrong with the weights in a run folder."""
        names = ("config.json", "tokenizer.json", "model.safetensors")
        content = tuple(digest(folder / name) for name in names)
        if content[-1] not in self.models:
            return "model.safetensors is none that the undisturbed run wrote"
        if content not in self.loaded:
            try:
                lineage.load(folder)
                self.loaded[content] = ""
            except Exception as error:
                self.loaded[content] = f"load: {error}"
        return self.loaded[content]

    def _resume(self, folder: Path) -> str:
        """Give the command again; returns what is wrong with its result."""
        again = f"{self.fresh} --resume" if (folder / "config.json").exists() else self.fresh
        ended = run(again, self.place)
        if ended.code:
            return f"resumed: exit code {ended.code}: {' / '.join(ended.errors[-3:])}"
        if digest(folder / "model.safetensors") != digest(self.finished / "model.safetensors"):
            return "resumed: other weights"
        if partials(folder):
            return "resumed: a partial file was left behind"
        if steps(folder) != steps(self.finished):
            return f"resumed: other steps in the log or in cost.json: {steps(folder)}"
        return ""


def scenarios(key: str, root: Path) -> dict[str, Scenario]:
    """The scenarios of a system, by name, below `root`, which holds the data."""
    fresh = SYSTEMS[key]
    empty, place = root / "empty", root / "trial"
    finished, killed = root / f"{key} finished", root / f"{key} killed"
    copy(empty, finished)
    whole = run(fresh, finished)
    assert whole.code == 0, whole.errors
    copy(empty, killed)
    run(fresh, killed, len(whole.events) // 2, "killed")
    common = (place, fresh, finished / "run", whole.models)
    return {
        key: Scenario(fresh, empty, *common),
        f"{key} resumed": Scenario(f"{fresh} --resume", killed, *common),
        f"{key} refused": Scenario(fresh, finished, *common),
    }


def count(
    name: str, scenario: Scenario, stride: int, failures: list[dict[str, Any]]
) -> dict[str, Any]:
    """Inject every `stride`-th fault; returns how many had each result, and adds to `failures`."""
    counts = {kind: dict.fromkeys(RESULTS, 0) for kind in KINDS}
    faults = [(n, kind) for n in range(len(scenario.events)) for kind in KINDS]
    for number, kind in faults[::stride]:
        results, wrong = scenario.trial(number, kind)
        for result in results:
            counts[kind][result] += 1
        if wrong:
            where = {"event": number, "call": scenario.events[number], "kind": kind}
            failures.append({"system": name, **where, "wrong": wrong})
            print(failures[-1], file=sys.stderr)
    return {"events": len(scenario.events), "kinds": counts}


def measure(keys: list[str], stride: int) -> dict[str, Any]:
    """Inject the faults of some systems."""
    systems: dict[str, Any] = {}
    failures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "empty").mkdir()
        os.chdir(root / "empty")
        command(shlex.split("data export shapes --count 8 --size 16 --out data"))
        for key in keys:
            os.chdir(root)
            shutil.copytree(root / "empty", root / f"warm {key}")
            os.chdir(root / f"warm {key}")
            os.environ["LINEAGE_CACHE"] = "cache"
            command(shlex.split(SYSTEMS[key]))  # imports once what training imports
            for name, scenario in scenarios(key, root).items():
                systems[name] = count(name, scenario, stride, failures)
                print(name, systems[name])
    return {"systems": systems, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS))
    parser.add_argument("--stride", type=int, default=1, help="inject only every n-th fault")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.stride % len(KINDS) == 0:
        parser.error(f"--stride {options.stride} would leave out kinds of faults")
    out = options.out.resolve()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread does not survive a fork
    command_line = shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]])
    made_by = {"command": f"OMP_NUM_THREADS=1 {command_line}", "machine": machine()}
    write_json(out, {**measure(options.systems, options.stride), "made_by": made_by})


if __name__ == "__main__":
    main()
