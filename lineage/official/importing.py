"""`lineage import-weights`: a published checkpoint becomes a run folder.

A checkpoint is read with `weights_only=True`, or as safetensors; nothing in it is executed. An
importer, a function in a module of key maps, finds our configuration from the tensors and gives
them our names; what the checkpoint lacks (a discriminator, say) is left as it starts.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lineage
from lineage.config import RunConfig, to_dict
from lineage.data import load_dataset
from lineage.errors import UserError, nearest
from lineage.recipes import find_recipe
from lineage.runs import build
from lineage.text.tokenizer import Tokenizer, make_tokenizer
from lineage.training.store import save_tensors, write_json


@dataclass(frozen=True)
class Imported:
    """What an importer finds.

    Attributes:
        config: the run's configuration.
        weights: by our names; none may be left over.
        absent: beginnings of names that such checkpoints never hold.
        note: what the user must know.
        tokenizer: that the text encoder was trained with; None if it comes without one.
    """

    config: RunConfig
    weights: dict[str, Tensor]
    absent: tuple[str, ...] = ()
    note: str = ""
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Given:
    """What the user gave: a checkpoint's `tensors`, the `lines` of a `.txt`, or a folder."""

    path: Path
    tensors: Mapping[str, Tensor]
    lines: list[str] | None = None


class Shell:
    """Stands for an object of a class that is not ours; holds what was saved of it."""

    def __init__(self, *given: Any) -> None:
        """Takes anything and does nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keeps attributes; any other state is of no use here."""
        if isinstance(state, dict):
            vars(self).update(state)

    def _group(self, name: str) -> dict[Any, Any]:
        group = vars(self).get(name)
        return group if isinstance(group, dict) else {}

    def tensors(self, before: str = "", around: tuple[Shell, ...] = ()) -> dict[str, Tensor]:
        """Parameters and buffers by name, if it was a module."""
        own = self._group("_parameters") | self._group("_buffers")
        passing = vars(self).get("_non_persistent_buffers_set") or ()
        found: dict[str, Tensor] = {
            f"{before}{name}": value
            for name, value in own.items()
            if value is not None and name not in passing
        }
        for name, inner in self._group("_modules").items():
            if isinstance(inner, Shell) and inner is not self and inner not in around:
                found |= inner.tensors(f"{before}{name}.", (*around, self))
        return found


Importer = Callable[[Sequence[Given]], Imported]

IMPORTERS: dict[str, str] = {
    "stackgan": "lineage.official.cgan:import_stackgan",
    "attngan": "lineage.official.attngan:import_attngan",
    "vqgan": "lineage.official.codecs:import_vqgan",
    "dalle": "lineage.official.codecs:import_dalle",
    "ldm": "lineage.official.stable_diffusion:import_ldm",
}
"""The systems whose published checkpoints can be read, by "module:function"."""


IN_FOLDERS = ("ldm",)
"""Those whose checkpoints come as folders too."""


def import_weights(key: str, files: str | Path | Sequence[str | Path], out: str | Path) -> str:
    """Write the run folder `out` from published files; returns a note for the user.

    Raises:
        UserError: no importer, files that are no checkpoint of that system, or a folder in use.
    """
    if key not in IMPORTERS:
        raise UserError(f"No published weights of {key!r} can be read: {nearest(key, IMPORTERS)}")
    folder = Path(out)
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    given = ", ".join(map(str, paths))
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; choose another --out.")
    where, name = IMPORTERS[key].split(":")
    importer: Importer = getattr(importlib.import_module(where), name)
    try:
        found = importer([read_given(path, key in IN_FOLDERS) for path in paths])
    except KeyError as error:
        raise UserError(f"{given} does not fit {key}: it lacks {error}.") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{given} does not fit {key}: its tensors have other shapes.") from error
    config = found.config
    tokenizer = found.tokenizer
    if tokenizer is None:
        words = load_dataset("shapes", "train", 32).all_captions(1000)
        tokenizer = make_tokenizer(config.encoder.tokenizer, words, config.encoder.vocabulary)
    torch.manual_seed(config.seed)
    system = build(find_recipe(key).stages(config, tokenizer))
    try:
        missing, unknown = system.load_state_dict(found.weights, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise UserError(f"{given} does not fit {key}: {line[:200]}") from error
    missing = [name for name in missing if not name.startswith(found.absent)]
    if missing:
        raise UserError(f"{given} does not fit {key}: it has no tensor for {missing[0]}.")
    if unknown:
        raise UserError(f"{given} does not fit {key}: it has tensors more, such as {unknown[0]}.")
    names = ", ".join(path.name for path in paths)
    save_tensors(folder / "model.safetensors", system.state_dict())
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    write_json(folder / "cost.json", {})
    write_json(
        folder / "config.json",
        {**to_dict(config), "made_with": {"lineage": lineage.__version__, "imported": names}},
    )
    return found.note


def read_given(path: Path, folders: bool) -> Given:
    """A checkpoint, a list of words (`.txt`), or, for some, a folder in which they look themselves.

    Raises `UserError` if it cannot be read.
    """
    if folders and path.is_dir():
        return Given(path, {})
    if path.suffix != ".txt":
        return Given(path, read_checkpoint(path))
    try:
        return Given(path, {}, path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}).") from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.pt`, `.ckpt`, `.pkl` or `.safetensors` file, by name.

    Nothing is executed: what is no tensor, such as the classes of a module that was saved whole,
    is read as an empty `Shell`.

    Raises:
        UserError: there is no such file, or it is not a dictionary of tensors.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            archive = zipfile.is_zipfile(path)  # before torch 1.6 it was none, and held no classes
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
            with torch.serialization.safe_globals([(Shell, name) for name in strange]):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds, for files that are foreign or cut short
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"{path} is no checkpoint of tensors alone ({line[:120]}).") from error
    if isinstance(loaded, Shell):
        loaded = loaded.tensors()
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} holds no dictionary of tensors by name.")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}
