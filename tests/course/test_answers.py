"""The checks of the exercises: right answers are right, wrong ones refused with what is wrong."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest

from lineage.course.checking import exercises, outcome
from lineage.course.worker import _prelude

from . import wrong_answers

SOLUTIONS = Path(__file__).parents[2] / "notebooks" / "solutions"
SOURCES = {path.stem[3:]: path for path in sorted(SOLUTIONS.glob("[0-9][0-9]_*.py"))}
WRONG = [
    answer
    for module in pkgutil.iter_modules(wrong_answers.__path__)
    for answer in importlib.import_module(f"{wrong_answers.__name__}.{module.name}").WRONG
]


def answer_of(name: str, source: str) -> Any:
    """The function `name` that code defines."""
    names = _prelude()
    exec(compile(source, "answer", "exec"), names)
    return names[name]


def solution_of(name: str) -> str:
    """The cell of a source that defines an exercise."""
    source = SOURCES[exercises()[name].module].read_text(encoding="utf-8")
    cells = jupytext.reads(source, fmt="py:percent").cells
    (cell,) = [c.source for c in cells if re.search(rf"^def {name}\(", c.source, re.MULTILINE)]
    return str(cell)


@pytest.mark.parametrize("name", exercises())
def test_the_solution_is_right(name: str) -> None:
    result = outcome(exercises()[name], answer_of(name, solution_of(name)))
    assert (result.points, result.sentence) == (exercises()[name].points, f"{name} is right.")


@pytest.mark.parametrize(
    ("name", "source", "words"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)]
)
def test_a_wrong_answer_is_refused_with_what_is_wrong(name: str, source: str, words: str) -> None:
    result = outcome(exercises()[name], answer_of(name, source))
    assert result.points == 0
    assert words in result.sentence, result.sentence
    assert result.sentence.startswith(name) and result.sentence.endswith((".", "`"))


def test_enough_mistakes_are_known() -> None:
    assert len(WRONG) >= 40
    assert {name for name, _, _ in WRONG} == set(exercises()), "every exercise has a wrong answer"


def test_an_unwritten_answer_is_no_error() -> None:
    def q_sample(*_: Any) -> None:
        raise NotImplementedError

    assert outcome(exercises()["q_sample"], q_sample).sentence == "q_sample is not written yet."
