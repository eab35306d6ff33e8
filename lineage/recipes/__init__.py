"""Recipes: data set, text encoder and stages of one system, at each preset. The only place where
families meet.

`lineage/recipes/<key>.py` holds `Config` (a `RunConfig` with the system's `model`), `PRESETS` and
`stages(config, tokenizer)`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Protocol

from lineage.catalog import lookup
from lineage.config import RunConfig
from lineage.errors import UserError, nearest
from lineage.text.tokenizer import Tokenizer
from lineage.training.stage import Stage


class Recipe(Protocol):
    """Contents of a recipe's module."""

    Config: type[RunConfig]
    PRESETS: dict[str, RunConfig]

    def stages(self, config: RunConfig, tokenizer: Tokenizer) -> list[Stage]:
        """Stages of a run, in order; the last one's system is the run's result."""


def find_recipe(key: str) -> Recipe:
    """The recipe of a working system.

    Raises `UserError` for a key that is unknown or only planned.
    """
    lookup(key)
    module: Recipe = importlib.import_module(f"lineage.recipes.{key}")
    return module


def preset(key: str, name: str) -> RunConfig:
    """The configuration of `key` at preset `name`, both filled in.

    Raises `UserError` for a preset that the recipe lacks.
    """
    presets = find_recipe(key).PRESETS
    if name not in presets:
        raise UserError(f"{key} has no preset {name!r}: {nearest(name, presets)}")
    return replace(presets[name], key=key, preset=name)
