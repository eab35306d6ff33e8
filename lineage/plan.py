"""The stages of a run, some of them taken from other runs (`--from STAGE=RUN`).

A taken stage is built again from the other run's own configuration and tokeniser, which this run's
config.json holds, so that a trained run never needs the other folder; its weights are loaded from
the other run's file. Recipes know nothing of this.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch

from lineage.cache import cache_folder
from lineage.config import RunConfig, flat, from_dict, to_dict, with_field
from lineage.errors import UserError, nearest
from lineage.pretrained import is_packaged, run_folder, run_name
from lineage.recipes import find_recipe, preset
from lineage.system import Trainable
from lineage.text.encoders import EncoderSpec
from lineage.text.tokenizer import Tokenizer, tokenizer_from_json
from lineage.training.cost import is_interrupted
from lineage.training.stage import (
    NOT_IN_KEY,
    Stage,
    finished_weights,
    load_weights,
    replace_stage,
    state_path,
)
from lineage.training.store import fingerprint, load_state, load_tensors, read_json, save_tensors

NOT_SETTINGS = ("made_with", "data_fingerprint", "stages_from", "changes")
"""Entries of config.json that are no settings of a run."""
BASE = "base"
"""Stage of an adapter's recipe: the whole system on which the adapter is trained."""


def plan(
    config: RunConfig, tokenizer: Tokenizer, stages_from: Mapping[str, Any] | None = None
) -> list[Stage]:
    """Stages of a run, those of other runs in place of its own.

    Args:
        stages_from: Name of a stage -> what `source_of` returned for the run it comes from.

    Raises:
        UserError: the recipe has no such stage, or the other run's does not fit it.
    """
    stages = find_recipe(config.key).stages(config, tokenizer)
    for name, source in (stages_from or {}).items():
        names = [stage.name for stage in stages]
        if name not in names:
            raise UserError(f"{config.key} has no stage {name!r}: {nearest(name, names)}")
        if name == names[-1]:
            raise UserError(
                f"{name} is the last stage of {config.key}: with --from {name}=RUN nothing would "
                "be left to train."
            )
        other = _stage_of(source, name)
        other.name = name
        _check_kind(stages, name, other, source["run"])
        stages = replace_stage(stages, name, other)
    return stages


def source_of(run: str | Path, name: str) -> dict[str, Any]:
    """Everything that is needed to build stage `name` of another run again, as JSON values.

    Raises:
        UserError: the folder holds no run with that stage finished; the sentence says why.
    """
    folder = run_folder(run, f"--from {name}")
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    saved = read_saved(folder)
    source = {
        "run": str(folder),
        "config": to_dict(config.without_files()),
        "tokenizer": tokenizer.to_json(),
        "stages_from": saved.get("stages_from", {}),
    }
    own_name = _stage_of(source, name).name
    stages = _stages_of(source)
    last = stages[-1].name == own_name
    path = folder / "model.safetensors" if last else finished_weights(folder, own_name)
    if is_packaged(folder) and not last:
        path = _part_of_last(folder, stages, own_name)
    if (last and is_interrupted(folder, own_name)) or not path.exists():
        raise UserError(
            f"Stage {name} of {folder} is not finished, so there is no {path} to take: go on with "
            "that run first (--resume)."
        )
    if name == BASE:  # its adapter fits no other weights
        source["hash"] = fingerprint(path.read_bytes())
    return {**source, "weights": str(path.resolve())}


def _part_of_last(folder: Path, stages: list[Stage], name: str) -> Path:
    """File with the weights of an earlier stage, as a packaged run's last system holds them.

    Raises:
        UserError: it does not hold all of them, as a GAN without its first discriminator does.
    """
    with torch.device("meta"):
        last = build(stages)
    earlier = next(stage.system for stage in stages if stage.name == name)
    assert earlier is not None
    prefixes = [f"{place}." for place, module in last.named_modules() if module is earlier]
    file = folder / "model.safetensors"
    saved = load_tensors(file)
    own = {n.removeprefix(p): t for p in prefixes for n, t in saved.items() if n.startswith(p)}
    for stage in stages:
        stage.clear()
    if own.keys() != earlier.state_dict().keys():
        raise UserError(
            f"{run_name(folder)} holds only a part of its stage {name}: train a run of your own, "
            "and take its stage."
        )
    path = cache_folder("parts") / f"{name}-{fingerprint(file.read_bytes())}.safetensors"
    if not path.exists():
        try:
            save_tensors(path, own)
        except UserError:  # a cache is no requirement
            path = Path(tempfile.mkdtemp(prefix="lineage-")) / path.name
            atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
            save_tensors(path, own)
    return path


def _stages_of(source: Mapping[str, Any]) -> list[Stage]:
    config = _config_from(source["config"], Path(source["run"]) / "config.json")
    return plan(config, tokenizer_from_json(source["tokenizer"]), source["stages_from"])


def _stage_of(source: Mapping[str, Any], name: str) -> Stage:
    """Stage `name` of another run, with the file of its weights; `base` is the last stage of any
    run that has none of that name.
    """
    stages = {stage.name: stage for stage in _stages_of(source)}
    if name == BASE and name not in stages:
        name = list(stages)[-1]
    if name not in stages:
        raise UserError(f"{source['run']} has no stage {name!r}: {nearest(name, stages)}")
    stage = stages[name]
    stage.weights = Path(source["weights"]) if "weights" in source else None
    return stage


def _check_kind(stages: list[Stage], name: str, other: Stage, run: str) -> None:
    """Raise `UserError` if a later stage cannot be built from `other`'s system."""
    with torch.device("meta"):
        system = other.construct()
    other.clear()
    for later in stages:
        for argument, value in later.arguments.items():
            if not isinstance(value, Stage) or value.name != name:
                continue
            is_class = isinstance(later.build, type)
            hints = get_type_hints(later.build.__init__ if is_class else later.build)
            wanted = hints[argument]
            if not isinstance(system, wanted):
                raise UserError(
                    f"Stage {later.name} needs a {wanted.__name__} as its stage {name}, and {run} "
                    f"has a {type(system).__name__}."
                )


def check_weights(stages: list[Stage]) -> None:
    """Raise `UserError` if a file of finished weights does not fit the stage's system."""
    for stage in stages:
        if stage.weights is None or stage.system is None:
            continue
        saved = {name: tensor.shape for name, tensor in load_tensors(stage.weights).items()}
        sizes = {name: tensor.shape for name, tensor in stage.system.state_dict().items()}
        if saved != sizes:
            raise UserError(f"{stage.weights} does not hold the weights of a stage {stage.name}.")


def load_base(stages: list[Stage], folder: Path) -> None:
    """Load the base of an adapter's run, which is saved without it; nothing for other runs."""
    for stage in stages[:-1]:
        if stage.name == BASE and stage.system is not None:
            load_weights(stage.system, base_weights(folder))


def base_weights(folder: Path) -> Path:
    """File with the weights of the base of an adapter's run: its own copy, or the run's it is from.

    Raises:
        UserError: there is neither, or that run has other weights now.
    """
    of_snapshot = folder.parent.parent
    for run in (folder, of_snapshot):
        if (own := finished_weights(run, BASE)).exists():
            return own
    source = read_saved(folder).get("stages_from", {}).get(BASE)
    if source is None:
        raise UserError(f"{folder} lacks {finished_weights(Path(), BASE)}: restore that file.")
    other = run_folder(source["run"], "base")
    path = other / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} holds an adapter of {run_name(other)}, and there is no such run: restore it."
        )
    if fingerprint(path.read_bytes()) != source.get("hash"):
        raise UserError(
            f"{folder} holds an adapter of {run_name(other)}, which has other weights now: restore "
            "that run, or train the adapter again."
        )
    return path


def use_own_weights(stages: list[Stage], folder: Path) -> None:
    """Let a resumed run read the files of other runs for such stages only that it does not hold.

    Raises `UserError` if a text tower that is still to be read is no longer that of the beginning.
    """
    for stage in stages:
        own = finished_weights(folder, stage.name)
        if stage.weights is not None and own.exists():
            stage.weights = own
        started = own.exists() or state_path(folder, stage, stages).exists()
        for argument, value in stage.arguments.items():
            if isinstance(value, EncoderSpec) and started:
                stage.arguments[argument] = value.without_files()
            elif isinstance(value, EncoderSpec):
                _check_runs(value.config.runs, folder)


def _check_runs(runs: Mapping[str, Any], folder: Path) -> None:
    for run, source in runs.items():
        if "weights" not in source:  # of a stage of another run, whose own weights are read
            continue
        weights = Path(source["weights"])
        if not weights.is_file() or fingerprint(weights.read_bytes()) != source["hash"]:
            raise UserError(
                f"The CLIP {run} is no longer what the run in {folder} began with: restore it, or "
                "choose another --out."
            )


def check_checkpoints(folder: Path, stages: list[Stage]) -> None:
    """Raise `UserError` if a checkpoint in a run folder does not fit its stage's system."""
    for stage in stages:
        path = state_path(folder, stage, stages)
        if stage.system is None or not path.exists():
            continue
        weights = load_state(path)["weights"]
        saved = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        own = stage.system.state_dict()
        sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        if saved != sizes:
            name = min(n for n, _ in saved.items() ^ sizes.items())
            raise UserError(
                f"The checkpoint of stage {stage.name} does not fit this configuration ({name}); "
                "resume with the settings it was made with, or choose another --out."
            )


def check_effects(
    config: RunConfig,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    stages_from: Mapping[str, Any],
) -> None:
    """Raise `UserError` for a setting that only concerns a stage which another run has trained."""

    def keys(one: RunConfig) -> list[str]:
        data = {"data": one.data, "size": one.size, "seed": one.seed}
        return [stage.key(data) for stage in plan(one, tokenizer, stages_from)]

    default = flat(preset(config.key, config.preset))
    for name in settings:
        if name.rpartition(".")[2] in NOT_IN_KEY or hasattr(config, f"with_{name}"):
            continue
        value = default.get(name)
        other = with_field(config, name, value) if value is not None else config
        if other != config and keys(other) == keys(config):
            taken = ", ".join(f"{stage} of {s['run']}" for stage, s in stages_from.items())
            raise UserError(f"{name} has no effect: the run takes stage {taken} as it is.")


def build(stages: list[Stage]) -> Trainable:
    """The untrained system of the last stage, built through the ones before it."""
    for stage in stages:
        stage.construct()
    system = stages[-1].system
    assert system is not None
    return system


# --- reading run folders ------------------------------------------------------------------------


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises `UserError` if it is missing, broken or of an unknown system.
    """
    return _config_from(read_saved(folder), folder / "config.json")


def read_saved(folder: Path) -> dict[str, Any]:
    """The contents of a run folder's config.json.

    Raises `UserError` if it is missing, or an entry is of another type than a run writes.
    """
    path = folder / "config.json"
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not the configuration of a run: {saved!r:.40} is no system.")
    sources = saved.get("stages_from", {})
    fits = (
        isinstance(saved.get("made_with", {}), dict)
        and isinstance(saved.get("changes", []), list)
        and isinstance(sources, dict)
        and all(isinstance(one, dict) and one.keys() >= _SOURCE for one in sources.values())
    )
    if not fits:
        raise UserError(f"{path} is damaged: restore it, or train again.")
    return saved


_SOURCE = {"run", "config", "tokenizer", "stages_from"}


def _config_from(saved: Any, path: Path) -> RunConfig:
    if not isinstance(saved, dict) or not isinstance(saved.get("key"), str):
        key = saved.get("key") if isinstance(saved, dict) else saved
        raise UserError(f"{path} is not the configuration of a run: {key!r} is no system.")
    fields = {name: value for name, value in saved.items() if name not in NOT_SETTINGS}
    return from_dict(find_recipe(saved["key"]).Config, fields)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a run folder."""
    return tokenizer_from_json(read_json(folder / "tokenizer.json"))


def saved_stages(folder: Path) -> list[Stage]:
    """Stages of the run in a folder, to load its weights into; they read no files of others."""
    sources = read_saved(folder).get("stages_from", {})
    return plan(read_config(folder).without_files(), read_tokenizer(folder), sources)
