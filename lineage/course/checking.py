"""Checks of the notebooks' exercises: each takes an answer, and says in one sentence what is wrong.

    @exercise(points=2)
    def q_sample(answer):                    # in checks/ddpm.py, of the notebook 08_ddpm
        expect(answer(x0, t, eps), right, mistakes={"...": wrong})

A check calls the answer on small inputs and compares shapes, closed forms, gradients and
identities, never exact samples.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lineage.errors import nearest


class Wrong(Exception):
    """An answer is not right; the text says why, as the rest of a sentence about it."""


Judge = Callable[[Any], None]


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        name: Name of the function that the student writes.
        module: Name of the checks' module, which is that of the notebook without its number.
        points: Points for a right answer.
        judge: Function that raises `Wrong` for a wrong answer.
    """

    name: str
    module: str
    points: int
    judge: Judge


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        points: Points that the answer earned.
        sentence: What to tell its author.
    """

    points: int
    sentence: str


_registered: dict[str, Exercise] = {}


def exercise(points: int = 1) -> Callable[[Judge], Judge]:
    """Decorator of a check, which has the name of its exercise."""

    def register(judge: Judge) -> Judge:
        name, module = judge.__name__, judge.__module__.rpartition(".")[2]
        if name in _registered and _registered[name].module != module:
            raise ValueError(f"two exercises are called {name}")
        _registered[name] = Exercise(name, module, points, judge)
        return judge

    return register


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by name, those of a notebook in the order of its module."""
    from lineage.course import checks

    for module in sorted(one.name for one in pkgutil.iter_modules(checks.__path__)):
        importlib.import_module(f"{checks.__name__}.{module}")
    return _registered


def outcome(one: Exercise, answer: Any) -> Outcome:
    """Check an answer to an exercise."""
    name = one.name
    if not callable(answer):
        return Outcome(0, f"{name} is {type(answer).__name__}, not a function.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            one.judge(answer)
        except Wrong as error:
            return Outcome(0, f"{name} {error}")
        except NotImplementedError:
            return Outcome(0, f"{name} is not written yet.")
        except Exception as error:
            return Outcome(0, f"{name} {_raised(error)}")
    return Outcome(one.points, f"{name} is right.")


def _raised(error: Exception) -> str:
    """An error that the answer raised, with its line."""
    first = (str(error).splitlines() or [""])[0][:160]
    line = ""
    for frame in inspect.getinnerframes(error.__traceback__) if error.__traceback__ else ():
        if not frame.filename.endswith(("checking.py", "comparing.py")) and frame.code_context:
            line = f", at `{frame.code_context[0].strip()[:80]}`"
    return f"raises {type(error).__name__}: {first}{line}"


class Checks:
    """`check.NAME(answer)` prints whether the answer is right, and if not, what is wrong."""

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        known = exercises()
        if name not in known:
            raise AttributeError(f"There is no exercise {name!r}: {nearest(name, known)}")

        def run(answer: Any) -> None:
            print(outcome(known[name], answer).sentence)

        return run

    def __dir__(self) -> list[str]:
        return list(exercises())


check = Checks()
