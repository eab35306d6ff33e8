"""Adapters of runs and in public files: what `lineage sample --adapter` adds to a system, and what
`lineage export-adapter` writes.

An adapter is the run folder of a recipe such as `lora`, or a public file (safetensors) of one of
the forms in `official/lora.py`; of peft, a folder with adapter_model.safetensors and
adapter_config.json. Nothing in a file is executed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lineage.catalog import CATALOG
from lineage.diffusion.adapters.adapted import ADAPTER, AdaptedModel
from lineage.diffusion.adapters.lora import LoRA, LoRANetwork, LowRank, adaptable, merge
from lineage.diffusion.model import DiffusionModel
from lineage.errors import UserError, say
from lineage.files import check_output, expanded, write_bytes
from lineage.official.lora import Form, read_adapter, stated_alpha, written_adapter
from lineage.plan import BASE, base_weights, read_config, read_saved
from lineage.pretrained import run_folder, run_name
from lineage.system import System
from lineage.training.stage import load_weights
from lineage.training.store import fingerprint, load_tensors, read_json, write_json
from lineage.weights import kind_of, read_tensors

PEFT = ("adapter_model.safetensors", "adapter_config.json")


class AdapterSpec(NamedTuple):
    """An adapter as the user names it: `PATH`, or `PATH:SCALE`."""

    path: str
    scale: float


def parsed(spec: str) -> AdapterSpec:
    """`runs/style:0.8` -> path and scale; without a number behind the last colon, scale 1.

    Raises:
        UserError: the scale is not finite.
    """
    path, colon, end = spec.rpartition(":")
    try:
        scale = float(end) if colon else 1.0
    except ValueError:
        return AdapterSpec(spec, 1.0)
    if not colon or not path:
        return AdapterSpec(spec, 1.0)
    if not math.isfinite(scale):
        raise UserError(f"--adapter {spec}: the scale {end} must be a finite number, as in 0.8.")
    return AdapterSpec(path, scale)


def add_adapters(system: System, run: str | Path, specs: Sequence[str]) -> None:
    """Merge adapters into a loaded system, each times its scale; says what of them is left out.

    Args:
        system: System of `run`.
        run: Run folder, or pretrained:KEY.
        specs: Adapters, as `PATH` or `PATH:SCALE`.

    Raises:
        UserError: one is no adapter, or is one of another model; the sentence says which layers do
            not fit.
    """
    if not isinstance(system, DiffusionModel):
        key = read_config(run_folder(run, "run")).key
        name = run_name(run_folder(run, "run"))
        raise UserError(f"{name} is a run of {key}, and adapters change diffusion models alone.")
    target: DiffusionModel = system
    if isinstance(system, AdaptedModel) and isinstance(system.network, LoRANetwork):
        target = system.base
    adapters = []
    for path, scale in map(parsed, specs):
        adapter, note = _read(path, target, run_folder(run, "run"))
        adapters.append((adapter, scale))
        if note:
            say(f"--adapter {path}: {note}")
    merge(target, adapters)


def _read(path: str, target: DiffusionModel, run: Path) -> tuple[LoRA, str]:
    """An adapter that fits `target`, the system of `run` or its base, and a note."""
    folder = run_folder(path, "--adapter")
    try:
        if (folder / "config.json").is_file():
            return _of_run(folder, run), ""
        return _of_file(folder, target)
    except UserError as error:
        if str(folder) in str(error) or path in str(error):
            raise
        raise UserError(f"--adapter {path}: {error}") from error


def _of_run(folder: Path, run: Path) -> LoRA:
    """The adapter of a run folder, if it was trained on `run`."""
    lora = read_lora(folder)
    if _base_hash(folder) != _base_hash(run):
        source = read_saved(folder).get("stages_from", {}).get(BASE, {}).get("run")
        own = run_name(Path(source)) if source else run_name(folder)
        base = own if source else "a base of its own"
        raise UserError(
            f"{run_name(folder)} was trained on {base}, whose weights are others than those of "
            f"{run_name(run)}: draw with {own}, or train an adapter with --from "
            f"base={run_name(run)}."
        )
    return lora


def _base_hash(run: Path) -> str:
    """Hash of a run's weights; of those of its base, if the run is an adapter's."""
    if not CATALOG[read_config(run).key].adapts:
        return fingerprint((run / "model.safetensors").read_bytes())
    source = read_saved(run).get("stages_from", {}).get(BASE, {})
    return source.get("hash") or fingerprint(base_weights(run).read_bytes())


def read_lora(folder: Path) -> LoRA:
    """The low-rank adapter of a run, without its base.

    Raises:
        UserError: the run has none, or its file is damaged.
    """
    key, path = read_config(folder).key, folder / "model.safetensors"
    if not CATALOG[key].adapts:
        raise UserError(f"{run_name(folder)} is a run of {key}, which is no adapter.")
    tensors = load_tensors(path)
    if not all(name.endswith((".down", ".up", ".alpha")) for name in tensors):
        raise UserError(
            f"{run_name(folder)} is a whole network and no low-rank adapter: draw with that run "
            "itself."
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix(f"{ADAPTER}.").rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    try:
        changes = {
            layer: LowRank((len(own["up"]), *own["down"].shape[1:]), len(own["down"]), 1.0)
            for layer, own in layers.items()
        }
    except KeyError as error:
        raise UserError(f"{path} is no adapter: a change lacks its {error}.") from error
    lora = LoRA(changes)
    load_weights(torch.nn.ModuleDict({ADAPTER: lora}), path)  # type: ignore[arg-type]
    return lora


def _of_file(path: Path, target: DiffusionModel) -> tuple[LoRA, str]:
    """The adapter of a public file, or of a folder of peft."""
    alpha: dict[str, float] = {}
    if path.is_dir() and (path / PEFT[0]).is_file():
        config = read_json(path / PEFT[1])
        stated = config.get("lora_alpha") if isinstance(config, dict) else None
        if not isinstance(stated, int | float):
            raise UserError(f"{path / PEFT[1]} states no lora_alpha: restore that file.")
        alpha, path = {"unet": float(stated)}, path / PEFT[0]
    if not path.exists():
        raise UserError(f"There is no run folder and no file {path}.")
    if path.is_dir() or kind_of(path) != "safetensors":
        raise UserError(
            f"{path} is neither the run folder of an adapter nor a safetensors file; pickled "
            "files are not read, since they can execute anything."
        )
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        alpha |= stated_alpha(file.metadata() or {})
    note = ""
    if not any(name.startswith("text.tower.") for name, _ in adaptable(target)):
        of_text = [key for key in tensors if key.startswith(("lora_te", "text_encoder."))]
        if of_text and len(of_text) < len(tensors):
            tensors = {key: t for key, t in tensors.items() if key not in of_text}
            note = (
                f"its changes of the text encoder ({len(of_text)} tensors) are left out, because "
                "this run's text encoder is not CLIP's of this package."
            )
    return read_adapter(tensors, target, alpha), note


def export_adapter(run: str | Path, out: str | Path, form: Form = "kohya") -> Path:
    """Write the adapter of a run in a public form; returns the file or, for peft, the folder.

    Args:
        run: Run folder of an adapter.
        out: File to write, or for `peft` a folder.
        form: `kohya`, `diffusers` or `peft`.

    Raises:
        UserError: the run is no adapter, or the form cannot hold it.
    """
    target = expanded(out, "out")
    tensors, metadata = written_adapter(read_lora(run_folder(run, "run")), form)
    if form == "peft":
        check_output(target, folder=True)
        write_bytes(target / PEFT[0], save(tensors, {"format": "pt"}))
        write_json(target / PEFT[1], metadata)
    else:
        check_output(target)
        write_bytes(target, save(tensors, {"format": "pt", **metadata}))
    return target
