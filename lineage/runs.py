"""Runs: from a system's key to a run folder, and from a run folder to a system that draws.

config.json         every setting, what the run was made with, and stages of other runs
tokenizer.json      the tokeniser, trained from the captions
model.safetensors   weights to sample from (moving averages)
state.pt            everything that resuming needs
metrics.jsonl       the log
cost.json           steps, pictures, seconds and memory of each stage
samples/            sheets of the same captions and seeds as training goes on
stages/             checkpoints and finished weights of the stages before the last
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from PIL import Image

import lineage
from lineage.config import RunConfig, from_dict, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, to_bytes
from lineage.errors import Interrupted, UserError, nearest
from lineage.nn.noise import stream_seed
from lineage.recipes import find_recipe, preset
from lineage.sheets import sheet
from lineage.system import System
from lineage.text.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_json
from lineage.training.machine import Distributed, keep_freed_memory, pick_device
from lineage.training.stage import (
    NOT_IN_KEY,
    RunStages,
    Stage,
    Stopped,
    finished_weights,
    load_weights,
    replace_stage,
)
from lineage.training.store import load_tensors, read_json, unwritable, write_json

NOT_SETTINGS = ("made_with", "data_fingerprint", "stages_from")
"""Entries of config.json that are no settings of a run."""


# --- configuration --------------------------------------------------------------------------------


def configure(
    key: str,
    *,
    preset_name: str = "tiny",
    data: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run: a preset, changed by the arguments.

    `minutes` and `steps` replace the preset's budget.
    """
    return _changed(preset(key, preset_name), data, minutes, steps, seed, device, settings)


def _changed(
    config: RunConfig,
    data: str | None,
    minutes: float | None,
    steps: int | None,
    seed: int | None,
    device: str | None,
    settings: Mapping[str, Any] | None,
) -> RunConfig:
    if minutes is not None or steps is not None:
        config = with_field(config, "train.minutes", minutes)
        config = with_field(config, "train.max_steps", steps)
    fields = {"data": data, "seed": seed, "train.device": device, **(settings or {})}
    for name, value in sorted(fields.items(), key=lambda item: item[0] != "recipe"):
        if value is not None:
            config = with_field(config, name, value)
    return config


# --- stages, some of them of other runs -----------------------------------------------------------


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
        other = _stage_of(source, name)
        _check_kind(stages, name, other, source["run"])
        stages = replace_stage(stages, name, other)
    return stages


def source_of(run: str | Path, name: str) -> dict[str, Any]:
    """Everything that is needed to build stage `name` of another run again, as JSON values.

    Raises:
        UserError: the folder holds no run with that stage finished; the sentence says why.
    """
    folder = Path(run)
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    saved = read_json(folder / "config.json")
    source = {
        "run": str(folder),
        "config": to_dict(config.without_files()),
        "tokenizer": tokenizer.to_json(),
        "stages_from": saved.get("stages_from", {}),
    }
    _stage_of(source, name)
    last = _stages_of(source)[-1].name == name
    path = folder / "model.safetensors" if last else finished_weights(folder, name)
    interrupted = last and (folder / "state.pt").exists() and name not in _cost(folder)
    if interrupted or not path.exists():
        raise UserError(
            f"Stage {name} of {folder} is not finished, so there is no {path} to take: go on with "
            "that run first (--resume)."
        )
    return {**source, "weights": str(path)}


def _cost(folder: Path) -> dict[str, Any]:
    path = folder / "cost.json"
    return dict(read_json(path)) if path.exists() else {}


def _stages_of(source: Mapping[str, Any]) -> list[Stage]:
    config = _config_from(source["config"], Path(source["run"]) / "config.json")
    return plan(config, tokenizer_from_json(source["tokenizer"]), source["stages_from"])


def _stage_of(source: Mapping[str, Any], name: str) -> Stage:
    """Stage `name` of another run, with the file of its weights."""
    stages = {stage.name: stage for stage in _stages_of(source)}
    if name not in stages:
        raise UserError(f"{source['run']} has no stage {name!r}: {nearest(name, stages)}")
    stage = stages[name]
    stage.weights = Path(source["weights"]) if "weights" in source else None
    return stage


def _check_kind(stages: list[Stage], name: str, other: Stage, run: str) -> None:
    """Raise `UserError` if a later stage cannot be built from `other`'s system."""
    with torch.device("meta"):
        system = other.construct()
    other.system = None
    for later in stages:
        for argument, value in later.arguments.items():
            if not isinstance(value, Stage) or value.name != name:
                continue
            wanted = get_type_hints(later.build)[argument]
            if not isinstance(system, wanted):
                raise UserError(
                    f"Stage {later.name} needs a {wanted.__name__} as its stage {name}, and {run} "
                    f"has a {type(system).__name__}."
                )


def _check_weights(stages: list[Stage]) -> None:
    """Raise `UserError` if a file of finished weights does not fit the stage's system."""
    for stage in stages:
        if stage.weights is None or stage.system is None:
            continue
        saved = {name: tensor.shape for name, tensor in load_tensors(stage.weights).items()}
        sizes = {name: tensor.shape for name, tensor in stage.system.state_dict().items()}
        if saved != sizes:
            raise UserError(f"{stage.weights} does not hold the weights of a stage {stage.name}.")


def _check_effects(
    config: RunConfig,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    stages_from: Mapping[str, Any],
) -> None:
    """Raise `UserError` for a setting that only concerns a stage which another run has trained."""

    def keys(one: RunConfig) -> list[str]:
        data = {"data": one.data, "size": one.size, "seed": one.seed}
        return [stage.key(data) for stage in plan(one, tokenizer, stages_from)]

    default = preset(config.key, config.preset)
    for name in settings:
        if name.rpartition(".")[2] in NOT_IN_KEY or hasattr(config, f"with_{name}"):
            continue
        value: Any = to_dict(default)
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        other = with_field(config, name, value) if value is not None else config
        if other != config and keys(other) == keys(config):
            taken = ", ".join(f"{stage} of {s['run']}" for stage, s in stages_from.items())
            raise UserError(f"{name} has no effect: the run takes stage {taken} as it is.")


def build(stages: list[Stage]) -> System:
    """The untrained system of the last stage, built through the ones before it."""
    for stage in stages:
        stage.construct()
    system = stages[-1].system
    assert isinstance(system, System)
    return system


# --- training -------------------------------------------------------------------------------------


def train(
    key: str,
    *,
    data: str | None = None,
    preset: str = "tiny",
    minutes: float | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    stages_from: Mapping[str, str | Path] | None = None,
) -> Path:
    """Train all stages of a system; returns the run folder.

    Args:
        key: Key of the system, as in `lineage list`.
        data: Spec of the data set; the preset's default is `shapes`.
        preset: `smoke`, `tiny`, `small` or `paper`.
        minutes, steps: The budget, in place of the preset's.
        out: The run folder; `runs/<key>` if None.
        seed: Seed of the weights, the data order and the noise.
        device: `cpu`, `cuda`, `mps` or `auto`.
        resume: If true, go on with the run in `out`, with its own settings; a new budget may be
            given.
        settings: Any other field of the configuration by its dotted name, as `{"optim.lr": 3e-4}`.
        stages_from: Stages that are taken from other runs as they are, as
            `{"codec": "runs/vqvae"}`.

    Raises:
        UserError: an argument does not fit, or the folder holds a run already; one sentence says
            what to do.
        Interrupted: a request to stop; everything is saved, and the sentence says how to go on.
    """
    folder = Path(out) if out is not None else Path("runs") / key
    find_recipe(key)
    started = (folder / "config.json").exists()
    if started and not resume:
        raise UserError(
            f"{folder} holds a run already: add --resume to go on with it, or choose another --out."
        )
    if started:
        config = read_config(folder)
        if config.key != key:
            raise UserError(
                f"{folder} holds a run of {config.key}, not of {key}: choose another --out."
            )
        sources = read_json(folder / "config.json").get("stages_from", {})
        for name, run in (stages_from or {}).items():
            if sources.get(name, {}).get("run") != str(run):
                raise UserError(f"--from {name}={run} cannot be changed: choose another --out.")
        config = _changed(config, data, minutes, steps, seed, device, settings)
    else:
        config = configure(
            key,
            preset_name=preset,
            data=data,
            minutes=minutes,
            steps=steps,
            seed=seed,
            device=device,
            settings=settings,
        )
        sources = {name: source_of(run, name) for name, run in (stages_from or {}).items()}
    keep_freed_memory()
    processes = Distributed.join(pick_device(config.train.device))
    processes.barrier()  # all have looked for a run in the folder before the first one writes
    run = _prepare(folder, config, sources, settings or {}, started, processes.is_main)
    try:
        run.run()
    except Stopped:
        parts = ["lineage", "train", key, "--out", str(folder), "--resume"]
        raise Interrupted(
            f"Stopped; everything is saved. Go on with: {shlex.join(parts)}"
        ) from None
    return folder


def _prepare(
    folder: Path,
    config: RunConfig,
    sources: dict[str, Any],
    settings: Mapping[str, Any],
    started: bool,
    writes: bool,
) -> RunStages:
    """Data, tokeniser and stages of a run, and its first files, which one process writes."""
    dataset = load_dataset(config.data, "train", config.size, config.seed)
    fingerprint = fingerprint_of(dataset)
    if started:
        before = read_json(folder / "config.json").get("data_fingerprint")
        if before != fingerprint:
            raise UserError(
                f"The data {config.data} is no longer what the run in {folder} began with "
                f"({before} then, {fingerprint} now): restore it, or choose another --out."
            )
        tokenizer = read_tokenizer(folder)
    else:
        encoder = config.encoder
        captions = dataset.all_captions()
        tokenizer = make_tokenizer(encoder.tokenizer, captions, encoder.vocab_size)
    stages = plan(config, tokenizer, sources)
    if sources and not started:
        _check_effects(config, tokenizer, settings, sources)
    for stage in stages:  # a run that is resumed no longer needs the other run's folder
        if stage.weights is not None and (own := finished_weights(folder, stage.name)).exists():
            stage.weights = own
    with torch.device("meta"):
        system = build(stages)  # a fault is found before anything is written
    _check_weights(stages)
    for stage in stages:
        stage.system = None
    system.text.check()
    if writes:
        made_with = {
            "lineage": lineage.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        saved = {**to_dict(config), "data_fingerprint": fingerprint, "made_with": made_with}
        write_json(folder / "tokenizer.json", tokenizer.to_json())
        write_json(folder / "config.json", {**saved, "stages_from": sources})
    examples = dataset.showcase(16)

    def draw_sheet(system: System, stage: str, step: int) -> None:
        sample_sheet(system, examples, folder / "samples" / f"{stage}_{step:06d}.png")

    return RunStages(
        folder=folder,
        stages=stages,
        dataset=dataset,
        data={
            "data": config.data,
            "fingerprint": fingerprint,
            "size": config.size,
            "seed": config.seed,
            "lineage": lineage.__version__,
        },
        seed=config.seed,
        seed_weights=lambda: _seed_weights(config.seed),
        sheet=draw_sheet,
    )


def _seed_weights(seed: int) -> None:
    torch.manual_seed(stream_seed("weights", seed))


def fingerprint_of(dataset: CaptionedDataset) -> str:
    """Identity of a run's data: the hash of user files, or the name of an endless world."""
    return dataset.fingerprint() if hasattr(dataset, "fingerprint") else dataset.name


# --- pictures -------------------------------------------------------------------------------------


def sample_sheet(system: System, examples: list[Example], path: Path, seed: int = 0) -> None:
    """Draw the captions of `examples`, each in all of the system's variants, and save the sheet."""
    captions = [example.captions[0] for example in examples]
    variants = system.variants()
    pictures = [
        to_bytes(system.generate(captions, seed=seed, **v)).cpu() for v in variants.values()
    ]
    images = [one[i] for i in range(len(captions)) for one in pictures]
    labels = [f"{caption} {name}".strip() for caption in captions for name in variants]
    columns = -(-8 // len(variants)) * len(variants)  # variants of a caption stand side by side
    save_picture(sheet(images, labels, columns), path)


def save_picture(image: Image.Image, path: Path) -> None:
    """Save a PIL picture.

    Raises `UserError` if it cannot be written or its ending is not one of a picture.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except ValueError as error:
        raise UserError(
            f"{path} does not end like a picture file; try {path.with_suffix('.png')}."
        ) from error
    except OSError as error:
        raise unwritable(path, error) from error


# --- run folders ----------------------------------------------------------------------------------


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises `UserError` if it is missing, broken or of an unknown system.
    """
    return _config_from(read_json(folder / "config.json"), folder / "config.json")


def _config_from(saved: Any, path: Path) -> RunConfig:
    if not isinstance(saved, dict) or not isinstance(saved.get("key"), str):
        key = saved.get("key") if isinstance(saved, dict) else saved
        raise UserError(f"{path} is not the configuration of a run: {key!r} is no system.")
    fields = {name: value for name, value in saved.items() if name not in NOT_SETTINGS}
    return from_dict(find_recipe(saved["key"]).Config, fields)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser of a run folder."""
    return tokenizer_from_json(read_json(folder / "tokenizer.json"))


def load(run: str | Path, device: str = "auto") -> System:
    """The trained system of a run folder, ready to `generate`.

    On Linux the process keeps the memory that drawing frees (`keep_freed_memory`).

    Raises:
        UserError: the folder holds no run, or a file of it is damaged; the sentence names the file.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}.")
    config = read_config(folder).without_files()
    sources = read_json(folder / "config.json").get("stages_from", {})
    keep_freed_memory()
    system = build(plan(config, read_tokenizer(folder), sources))
    load_weights(system, folder / "model.safetensors")
    return system.to(pick_device(device)).eval()
