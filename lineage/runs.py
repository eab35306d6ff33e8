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
from typing import Any

import torch
from PIL import Image

import lineage
from lineage.config import RunConfig, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, to_bytes
from lineage.errors import Interrupted, UserError
from lineage.files import unwritable
from lineage.nn.noise import stream_seed
from lineage.plan import (
    build,
    check_checkpoints,
    check_effects,
    check_weights,
    plan,
    read_config,
    read_tokenizer,
    source_of,
)
from lineage.recipes import find_recipe, preset
from lineage.sheets import sheet
from lineage.system import System
from lineage.text.tokenizer import make_tokenizer
from lineage.training.machine import Distributed, keep_freed_memory, pick_device
from lineage.training.stage import RunStages, Stopped, finished_weights, load_weights
from lineage.training.store import read_json, write_json

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
        for name, other in (stages_from or {}).items():
            if sources.get(name, {}).get("run") != str(other):
                raise UserError(f"--from {name}={other} cannot be changed: choose another --out.")
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
        sources = {name: source_of(other, name) for name, other in (stages_from or {}).items()}
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
        check_effects(config, tokenizer, settings, sources)
    for stage in stages:  # a run that is resumed no longer needs the other run's folder
        if stage.weights is not None and (own := finished_weights(folder, stage.name)).exists():
            stage.weights = own
    with torch.device("meta"):
        system = build(stages)  # a fault is found before anything is written
    check_weights(stages)
    if started:
        check_checkpoints(folder, stages)
    stages[-1].clear()
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
