"""What the sessions of browsers have drawn last, so that it can be looked at and repainted."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

MAX_SESSIONS = 64  # that are remembered


@dataclass
class Session:
    """One session.

    Attributes:
        pictures: Pictures (3, S, S) uint8 of its last drawing.
        frames: Steps of its last visualisation, as HTML.
    """

    pictures: list[Tensor] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)


class Sessions:
    """The sessions that were used last, by the names that gradio gives them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __getitem__(self, name: str) -> Session:
        with self._lock:
            session = self._sessions.setdefault(name, Session())
            self._sessions.move_to_end(name)
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
            return session

    def forget(self, name: str) -> None:
        """Forget a session whose page is closed."""
        with self._lock:
            self._sessions.pop(name, None)
