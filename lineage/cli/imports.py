"""Imports of a command that needs PyTorch."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import PyTorch in the block without Python's search for garbage.

    The import leaves some 250,000 objects, none of which is garbage. To search them while they are
    made, later, and when Python ends takes a quarter of the time of `lineage sample`. They are
    therefore frozen: the collector never visits them again.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
