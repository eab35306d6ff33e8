"""What a system does not use of captions and options, in a few words, for whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lineage.system import System
from lineage.text.contract import TextEncoder

MAX_NOTE = 400  # letters of a note


def unread_text(text: TextEncoder, captions: list[str], length: int | None = None) -> list[str]:
    """What an encoder does not read in the captions, or has no token for, in a few words each.

    Args:
        length: Number of the words' vectors that are used; None for all.
    """
    ends = [text.overflow(caption, length) for caption in dict.fromkeys(captions)]
    notes = [f"not read, beyond {end.limit}: {end.text}" for end in ends if end is not None]
    if unknown := text.unknown(captions, length):
        notes.append(f"unknown words: {', '.join(unknown)}")
    return [n if len(n) <= MAX_NOTE else f"{n[:MAX_NOTE]} ... ({len(n):,} letters)" for n in notes]


def idle_options(system: System, captions: list[str], options: Mapping[str, Any]) -> list[str]:
    """A sentence about each option that changes no picture."""
    idle = system.idle_options(captions, system.typed_options(options))
    return [f"{name} has no effect: {reason}." for name, reason in idle.items()]
