"""What `lineage sample` does with PyTorch: options, picture files, and the best of several.

Axes: B pictures, S side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lineage.data.contract import to_bytes, to_unit
from lineage.data.pictures import decode
from lineage.errors import UserError
from lineage.sheets import rows_sheet
from lineage.system import System, Visualises


def unread_text(system: System, captions: list[str]) -> list[str]:
    """What the system does not read in the captions, or has no token for, in a few words each."""
    ends = [system.text.overflow(caption, system.text_len) for caption in dict.fromkeys(captions)]
    notes = [f"not read, beyond {end.limit}: {end.text}" for end in ends if end is not None]
    unknown = system.text.unknown(captions, system.text_len)
    return [*notes, *([f"unknown words: {', '.join(unknown)}"] if unknown else [])]


def draw(
    system: System,
    captions: list[str],
    options: Mapping[str, Any],
    *,
    seed: int,
    run: Path,
    candidates: int = 1,
    scorer: str = "auto",
) -> Tensor:
    """Pictures (B, 3, S, S) uint8 on the CPU, each the one of its candidates that fits best."""
    if candidates == 1:
        return to_bytes(system.generate(captions, seed=seed, **options)).cpu()
    from lineage.evaluation.best import best_of, scorer_of_run  # half a second that most skip

    judge = scorer_of_run(scorer, run, system.device)
    return best_of(system, captions, judge, candidates, seed=seed, **options)[0]


def options_of(
    system: System, settings: Mapping[str, str], files: Mapping[str, Path | None]
) -> dict[str, Any]:
    """Options of `generate`: text from --set, and pictures (1, C, S, S) from files.

    Raises:
        UserError: the system has no such option, or a value does not fit it.
    """
    options: dict[str, Any] = dict(settings)
    for name, path in files.items():
        if name in settings:
            raise UserError(f"{name} is a picture file: use --{name} in place of --set {name}=.")
        if path is not None:
            options[name] = _read_picture(path, system.size)
    if "mask" in options:
        options["mask"] = options["mask"].mean(1, keepdim=True) > 0  # white is painted over
    system.typed_options(options)  # a fault is found before a scorer is trained
    return options


def _read_picture(path: Path, size: int) -> Tensor:
    """A picture file as (1, 3, S, S) in [-1, 1]."""
    try:
        pixels = decode(path, size)
    except FileNotFoundError:
        raise UserError(f"There is no picture {path}.") from None
    except Exception as error:  # Pillow raises a dozen kinds for files that are broken or foreign
        raise UserError(f"{path} is no picture that can be read ({error}).") from error
    return to_unit(torch.from_numpy(pixels.copy()))[None]


def visualisation(system: System, caption: str, *, seed: int) -> Image.Image:
    """A sheet that shows how the picture of `caption` came about."""
    if not isinstance(system, Visualises):
        raise UserError(f"{type(system).__name__} has nothing to visualise: leave out --visualise.")
    rows = system.visualise(caption, seed=seed)
    return rows_sheet([[(label, to_bytes(one).cpu()) for label, one in row] for row in rows])
