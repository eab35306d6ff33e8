"""Packages that are functions as well: `lineage.train(...)` beside `lineage.train.loop`.

`lineage.train` is both the function that users call and the package that holds the loop. Python
binds a package's name in its parent as soon as any of its modules is imported, so the package
itself is made callable.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, target: str) -> None:
    """Let a call of the package `package` be a call of `target`, written as `module:function`."""
    where, name = target.split(":")

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(where), name)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
