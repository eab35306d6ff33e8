"""Who draws and who waits: the page of `lineage app` makes one drawing at a time."""

from __future__ import annotations

import threading


class Desk:
    """The visitors in the order in which they asked; the first is the one that is served.

    A visitor is the name of a browser's session.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._visitors: list[str] = []
        self._doing = ""

    @property
    def is_busy(self) -> bool:
        """Whether something is being drawn."""
        return bool(self._doing)

    def enter(self, visitor: str) -> str:
        """Queue a visitor; returns a sentence about what he waits for, empty if for nothing."""
        with self._lock:
            if visitor not in self._visitors:
                self._visitors.append(visitor)
            ahead = self._visitors.index(visitor)
            if ahead == 0:
                return ""
            drawings = "one drawing is" if ahead == 1 else f"{ahead} drawings are"
            doing = f" ({self._doing})" if self._doing else ""
            return f"Waiting: {drawings} ahead of yours{doing}."

    def begin(self, visitor: str, doing: str) -> None:
        """Note what is done for a visitor now; others see it while they wait."""
        with self._lock:
            if visitor in self._visitors:
                self._visitors.remove(visitor)
            self._visitors.insert(0, visitor)
            self._doing = doing

    def leave(self, visitor: str) -> None:
        """Forget a visitor who is served, or has closed the page."""
        with self._lock:
            if visitor in self._visitors:
                if self._visitors[0] == visitor:
                    self._doing = ""
                self._visitors.remove(visitor)
