"""What the command line answers when it refuses."""

from __future__ import annotations

from conftest import Answer


def assert_refused(answer: Answer, *words: str, code: int = 2) -> None:
    """One sentence on standard error that holds `words`; nothing on standard output."""
    assert answer.code == code, answer
    assert answer.out == ""
    lines = [line for line in answer.errors.splitlines() if line.strip()]
    assert len(lines) == 1, answer.errors
    assert lines[0].startswith("lineage: ")
    assert "Traceback" not in answer.errors
    for word in words:
        assert word in lines[0], lines[0]
