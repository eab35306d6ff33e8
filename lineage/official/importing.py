"""`lineage import-weights`: a published checkpoint becomes a run folder.

A checkpoint is read with `weights_only=True`, or as safetensors; nothing in it is executed. The
function `import_weights` in `lineage/official/<key>.py` reads our configuration off the tensors and
gives them our names; what the checkpoint lacks (a discriminator, say) keeps its initial weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lineage
from lineage import weights
from lineage.catalog import working
from lineage.characters import decoded
from lineage.config import RunConfig, to_dict
from lineage.data import load_dataset
from lineage.errors import UserError, nearest
from lineage.files import check_output, expanded, read_regular
from lineage.runs import build, plan
from lineage.text.tokenizer import Tokenizer, make_tokenizer
from lineage.training.stage import finished_weights
from lineage.training.store import save_tensors, write_json

MAX_WORDS = 10**8
"""Largest number of bytes of a list of words."""


@dataclass(frozen=True)
class Imported:
    """A published checkpoint in our terms.

    Attributes:
        config: Configuration of the run.
        weights: Tensors by our names; none may be left over.
        absent: Beginnings of names that such checkpoints never hold.
        note: A sentence that the user must know.
        tokenizer: Tokeniser of the text encoder; None if the checkpoint has none.
    """

    config: RunConfig
    weights: dict[str, Tensor]
    absent: tuple[str, ...] = ()
    note: str = ""
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class CheckpointFile:
    """A file of the user: a checkpoint's `tensors`, the `lines` of a `.txt`, or a folder."""

    path: Path
    tensors: Mapping[str, Tensor]
    lines: list[str] | None = None


class Shell:
    """Placeholder for an object of a foreign class; holds the attributes that were saved."""

    def __init__(self, *arguments: Any) -> None:
        """Accept anything and do nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep attributes; any other state is ignored."""
        if isinstance(state, dict):
            vars(self).update(state)

    def _group(self, name: str) -> dict[Any, Any]:
        group = vars(self).get(name)
        return group if isinstance(group, dict) else {}

    def tensors(self, before: str = "", around: tuple[Shell, ...] = ()) -> dict[str, Tensor]:
        """Parameters and buffers by name, if it was a module, or one of a TorchScript program."""
        own = self._group("_parameters") | self._group("_buffers")
        modules = self._group("_modules")
        if "_parameters" not in vars(self):  # TorchScript keeps all as plain attributes
            own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
            modules = vars(self)
        not_saved = vars(self).get("_non_persistent_buffers_set") or ()
        tensors: dict[str, Tensor] = {
            f"{before}{name}": value
            for name, value in own.items()
            if value is not None and name not in not_saved
        }
        for name, inner in modules.items():
            if isinstance(inner, Shell) and inner is not self and inner not in around:
                tensors |= inner.tensors(f"{before}{name}.", (*around, self))
        return tensors


def importer_of(key: str) -> Any:
    """The module of a system whose published checkpoints can be read.

    Raises `UserError` if there is none.
    """
    modules = {}
    for one in working():
        if importlib.util.find_spec(f"lineage.official.{one}") is not None:
            module = importlib.import_module(f"lineage.official.{one}")
            if hasattr(module, "import_weights"):
                modules[one] = module
    if key not in modules:
        raise UserError(f"No published weights of {key!r} can be read: {nearest(key, modules)}")
    return modules[key]


def import_weights(key: str, files: str | Path | Sequence[str | Path], out: str | Path) -> str:
    """Write the run folder `out` from published files; returns a note for the user.

    Raises:
        UserError: no importer, files that are no checkpoint of that system, or a folder in use.
    """
    module = importer_of(key)
    folder = expanded(out, "out")
    paths = [expanded(file) for file in ([files] if isinstance(files, str | Path) else files)]
    names = ", ".join(map(str, paths))
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a run already; choose another --out.")
    check_output(folder, folder=True)
    folders = getattr(module, "ACCEPTS_FOLDERS", False)
    try:
        imported: Imported = module.import_weights([read_file(path, folders) for path in paths])
    except KeyError as error:
        raise UserError(f"{names} does not fit {key}: it lacks {error}.") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{names} does not fit {key}: its tensors have other shapes.") from error
    config = replace(imported.config, key=key, preset="paper")
    tokenizer = imported.tokenizer
    if tokenizer is None:
        captions = load_dataset("shapes", "train", 32).all_captions(1000)
        encoder = config.encoder
        tokenizer = make_tokenizer(encoder.tokenizer, captions, encoder.vocab_size)
    torch.manual_seed(config.seed)
    stages = plan(config, tokenizer)
    system = build(stages)
    try:
        missing, unknown = system.load_state_dict(imported.weights, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise UserError(f"{names} does not fit {key}: {line[:200]}") from error
    missing = [name for name in missing if not name.startswith(imported.absent)]
    if missing:
        raise UserError(f"{names} does not fit {key}: it has no tensor for {missing[0]}.")
    if unknown:
        raise UserError(f"{names} does not fit {key}: it has tensors more, such as {unknown[0]}.")
    for stage in stages[:-1]:  # which other runs can take with --from
        if stage.system is not None:
            save_tensors(finished_weights(folder, stage.name), stage.system.state_dict())
    save_tensors(folder / "model.safetensors", system.state_dict())
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    write_json(folder / "cost.json", {})
    made_with = {"lineage": lineage.__version__, "imported": ", ".join(p.name for p in paths)}
    write_json(folder / "config.json", {**to_dict(config), "made_with": made_with})
    return imported.note


def read_file(path: Path, folders: bool) -> CheckpointFile:
    """A checkpoint, a list of words (`.txt`), or, if `folders` is true, a folder.

    Raises `UserError` if it cannot be read.
    """
    if folders and path.is_dir():
        return CheckpointFile(path, {})
    if weights.kind_of(path) != "text" or path.suffix.lower() != ".txt":
        return CheckpointFile(path, read_checkpoint(path))
    try:
        text = decoded(read_regular(path, MAX_WORDS)).removesuffix("\n")
        return CheckpointFile(path, {}, text.split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}).") from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, whatever the ending of its file.

    Nothing is executed: objects that are no tensors, such as the classes of a module that was
    saved whole, are read as an empty `Shell`.

    Raises:
        UserError: there is no such file, or it is not a dictionary of tensors.
    """
    loaded = weights.read(path, placeholder=Shell)
    if isinstance(loaded, Shell):
        loaded = loaded.tensors()
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} holds no dictionary of tensors by name.")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}
