"""Who draws and who waits: the page of `lineage app` makes one drawing at a time."""

from __future__ import annotations

import threading


class DrawingQueue:
    """Sessions of browsers in the order in which they asked; the first one is served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: list[str] = []
        self._doing = ""

    @property
    def is_busy(self) -> bool:
        """Whether something is being drawn."""
        return bool(self._doing)

    def enter(self, session: str) -> str:
        """Queue a session; returns a sentence about what it waits for, empty if for nothing."""
        with self._lock:
            if session not in self._sessions:
                self._sessions.append(session)
            ahead = self._sessions.index(session)
            if ahead == 0:
                return ""
            drawings = "one drawing is" if ahead == 1 else f"{ahead} drawings are"
            doing = f" ({self._doing})" if self._doing else ""
            return f"Waiting: {drawings} ahead of yours{doing}."

    def begin(self, session: str, doing: str) -> None:
        """Note what is done for a session now; others see it while they wait."""
        with self._lock:
            if session in self._sessions:
                self._sessions.remove(session)
            self._sessions.insert(0, session)
            self._doing = doing

    def leave(self, session: str) -> None:
        """Forget a session that is served, or whose page is closed."""
        with self._lock:
            if session in self._sessions:
                if self._sessions[0] == session:
                    self._doing = ""
                self._sessions.remove(session)
