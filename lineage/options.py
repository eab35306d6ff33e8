"""The configuration of a run: a preset, changed by what a command line or a call gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lineage.config import RunConfig, with_field
from lineage.recipes import preset
from lineage.text_runs import with_clip_runs


def configure(
    key: str,
    *,
    preset_name: str = "tiny",
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> RunConfig:
    """The configuration of a run: a preset, changed by `options`, keywords of `Options`, and by
    `settings`.
    """
    return changed_by(preset(key, preset_name), Options(**options), settings)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `train` that stand for fields of the configuration.

    Attributes:
        minutes, cpu_minutes, steps, max_pictures, max_flops: The budget; those that are given
            replace the whole of another.
    """

    data: str | None = None
    minutes: float | None = None
    cpu_minutes: float | None = None
    steps: int | None = None
    max_pictures: int | None = None
    max_flops: float | None = None
    seed: int | None = None
    device: str | None = None


def changed_by(
    config: RunConfig, options: Options, settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """`config` with the fields that `options` and `settings` name."""
    budget = {
        "train.minutes": options.minutes,
        "train.cpu_minutes": options.cpu_minutes,
        "train.max_steps": options.steps,
        "train.max_pictures": options.max_pictures,
        "train.max_flops": options.max_flops,
    }
    if any(value is not None for value in budget.values()):
        for name, value in budget.items():
            config = with_field(config, name, value)
    fields = {
        "data": options.data,
        "seed": options.seed,
        "train.device": options.device,
        **(settings or {}),
    }
    for name, value in sorted(fields.items(), key=lambda item: item[0] != "recipe"):
        if value is not None:
            config = with_field(config, name, value)
    return with_clip_runs(config, settings or {})
