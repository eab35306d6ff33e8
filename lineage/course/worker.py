"""The process in which one submission runs: `python -m lineage.course.worker`, for `grading`.

Standard input holds a JSON object: `cells`, a list of [number, source]; `names` of exercises; and
`secret`, with which every line of the answer begins. The answer is one JSON object a line: before
a cell or a check begins, and after it has ended.

    {"begin": "cell 7"}                       {"end": "cell 7", "error": "..."}
    {"begin": "q_sample"}                     {"end": "q_sample", "points": 2, "sentence": "..."}

A submission may open no connection, start no process, and write no file but in the empty folder
that it runs in. That guards against accidents and simple tricks, not against an attacker: run
strangers' notebooks in a container.
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lineage
from lineage.course import checking, comparing
from lineage.course.checking import check, exercises

MEMORY = 6 * 2**30  # bytes of address space
FILE_SIZE = 10**7
FORBIDDEN = (
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("os.kill", "os.forkpty", "ctypes.dlopen", "sys.addaudithook"),
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


def main() -> None:
    """Run the cells of a submission, and check its answers."""
    task = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    say = _speaker(channel, task["secret"])
    known = dict(exercises())  # imports all checks before anything foreign runs
    outcome = checking.outcome
    restore = _snapshot()
    torch.set_num_threads(1)
    _limit()
    names = _prelude()
    for number, source in task["cells"]:
        say(begin=f"cell {number}")
        say(end=f"cell {number}", error=_executed(source, f"cell {number}", names))
    changed = restore()
    for name in task["names"]:
        say(begin=name)
        if name not in names:
            say(end=name, points=0, sentence=f"{name} is missing: no cell defines it.")
            continue
        result = outcome(known[name], names[name])
        say(end=name, points=result.points, sentence=result.sentence)
        restore()
    say(done=True, changed=changed)


def _speaker(channel: TextIO, secret: str) -> Callable[..., None]:
    def say(**message: Any) -> None:
        channel.write(f"{secret}{json.dumps(message)}\n")
        channel.flush()

    return say


def _prelude() -> dict[str, Any]:
    """Names that every notebook's first cell imports."""
    return {
        "__name__": "__main__",
        "math": math,
        "np": np,
        "torch": torch,
        "F": F,
        "nn": nn,
        "Tensor": Tensor,
        "lineage": lineage,
        "check": check,
    }


def _executed(source: str, name: str, names: dict[str, Any]) -> str:
    """Run a cell; returns its error, or an empty text. Lines for IPython alone are left out."""
    lines = ["" if line.lstrip()[:1] in ("%", "!") else line for line in source.splitlines()]
    try:
        exec(compile("\n".join(lines), name, "exec"), names)
    except BaseException as error:  # SystemExit, too
        first = (str(error).splitlines() or [""])[0][:160]
        return f"{type(error).__name__}: {first}"
    return ""


def _snapshot() -> Callable[[], bool]:
    """A function that puts back what a submission changed in the checks; returns whether it had."""
    modules = [checking, comparing, sys.modules[checking.__package__ + ".checks"]]
    modules += [m for n, m in sys.modules.items() if n.startswith(modules[-1].__name__ + ".")]
    contents = [(vars(module), dict(vars(module))) for module in modules]
    codes = [
        (value, value.__code__, value.__defaults__)
        for _, content in contents
        for value in content.values()
        if isinstance(value, types.FunctionType)
    ]
    functions = {name: getattr(torch, name) for name in ("allclose", "as_tensor", "equal")}

    def restore() -> bool:
        changed = False
        for live, content in contents:
            if any(live.get(name) is not value for name, value in content.items()):
                live.update(content)
                changed = True
        for function, code, defaults in codes:
            if function.__code__ is not code:
                function.__code__, function.__defaults__ = code, defaults
                changed = True
        for name, value in functions.items():
            if getattr(torch, name) is not value:
                setattr(torch, name, value)
                changed = True
        return changed

    return restore


def _limit() -> None:
    """Bound memory and file sizes, and forbid the network, other processes and foreign files."""
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        for kind, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_SIZE)):
            hard = resource.getrlimit(kind)[1]
            if hard == resource.RLIM_INFINITY or hard > value:
                resource.setrlimit(kind, (value, value))
    home = os.path.realpath(os.getcwd())

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        where = os.path.realpath(os.fsdecode(path))
        return where != os.devnull and not where.startswith(home + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed in a graded notebook")
        if event == "open" and arguments[2] & WRITES and outside(arguments[0]):
            raise PermissionError(f"{arguments[0]!s} may not be written in a graded notebook")
        in_folder = arguments[-1:] not in ((-1,), ()) and isinstance(arguments[-1], int)
        paths = [one for one in arguments if isinstance(one, (str, bytes))]
        if event in CHANGES and (in_folder or any(map(outside, paths))):
            raise PermissionError(f"{event} is not allowed in a graded notebook")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
