"""Runs: from a system's key to a run folder, and from a run folder to a system that draws.

config.json         every setting, and what the run was made with
tokenizer.json      the words, trained from the captions
model.safetensors   the weights to sample from (moving averages)
state.pt            all that resuming needs
metrics.jsonl       the log
cost.json           steps, pictures, seconds and memory of each stage
samples/            sheets of the same captions and seeds as training goes on
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lineage
from lineage.config import RunConfig, from_dict, to_dict, with_field
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, to_bytes
from lineage.errors import Interrupted, UserError
from lineage.nn.noise import stream_seed
from lineage.recipes import find_recipe, preset
from lineage.sheets import sheet
from lineage.system import System, Trainable
from lineage.text.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_json
from lineage.training.machine import Processes, keep_freed_memory, pick_device
from lineage.training.stage import RunStages, Stage, Stopped, load_weights
from lineage.training.store import read_json, unwritable, write_json


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
    """The configuration of a run.

    A preset, then what was asked for. `minutes` and `steps` replace its budget.
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
        config = with_field(config, "train.steps", steps)
    given = {"data": data, "seed": seed, "train.device": device, **(settings or {})}
    for name, value in sorted(given.items(), key=lambda item: item[0] != "recipe"):
        if value is not None:
            config = with_field(config, name, value)
    return config


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
) -> Path:
    """Train all stages of a system; returns the run folder.

    Args:
        key: the system, as in `lineage list`.
        data: spec of the data set; the preset's default is `shapes`.
        preset: `smoke`, `tiny`, `small` or `paper`.
        minutes, steps: the budget, in place of the preset's.
        out: the run folder; `runs/<key>` if None.
        seed: of the weights, the data order and the noise.
        device: `cpu`, `cuda`, `mps` or `auto`.
        resume: go on with the run in `out`, with the settings it was made with; a new budget may be
            given.
        settings: any other field of the configuration by its dotted name, as `{"optim.lr": 3e-4}`.

    Raises:
        UserError: what was given does not fit, or the folder holds a run already; one sentence says
            what to do.
        Interrupted: asked to stop; everything is saved, and the sentence says how to go on.
    """
    folder = Path(out) if out is not None else Path("runs") / key
    find_recipe(key)
    started = (folder / "config.json").exists()
    if started and not resume:
        raise UserError(
            f"{folder} holds a run already: add --resume to go on with it, or choose another --out."
        )
    if started:
        saved = read_config(folder)
        if saved.key != key:
            raise UserError(
                f"{folder} holds a run of {saved.key}, not of {key}: choose another --out."
            )
        config = _changed(saved, data, minutes, steps, seed, device, settings)
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
    keep_freed_memory()
    processes = Processes.join(pick_device(config.train.device))
    processes.wait()  # all have seen whether the folder holds a run before the first one writes
    run = _prepare(folder, config, started, processes.first)
    try:
        run.run()
    except Stopped:
        parts = ["lineage", "train", key, "--out", str(folder), "--resume"]
        raise Interrupted(
            f"Stopped; everything is saved. Go on with: {shlex.join(parts)}"
        ) from None
    return folder


def _prepare(folder: Path, config: RunConfig, started: bool, writes: bool) -> RunStages:
    """Data, words and stages of a run, and its first files, which one process writes."""
    dataset = load_dataset(config.data, "train", config.size, config.seed)
    made_with = {
        "lineage": lineage.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    fingerprint = fingerprint_of(dataset)
    if (
        started
        and (known := read_json(folder / "config.json").get("data_fingerprint")) != fingerprint
    ):
        raise UserError(
            f"The data {config.data} is no longer what the run in {folder} began with "
            f"({known} then, {fingerprint} now): restore it, or choose another --out."
        )
    if started:
        tokenizer = read_tokenizer(folder)
    else:
        tokenizer = make_tokenizer(
            config.encoder.tokenizer, dataset.all_captions(), config.encoder.vocabulary
        )
    stages = find_recipe(config.key).stages(config, tokenizer)
    with torch.device("meta"):
        system = build(stages)  # what cannot be built is told before anything is written
    system.text.check()
    if writes:
        saved = {**to_dict(config), "data_fingerprint": fingerprint, "made_with": made_with}
        write_json(folder / "tokenizer.json", tokenizer.to_json())
        write_json(folder / "config.json", saved)
    shown = dataset.showcase(16)

    def draw_sheet(system: System, stage: str, step: int) -> None:
        sample_sheet(system, shown, folder / "samples" / f"{stage}_{step:06d}.png")

    return RunStages(
        folder=folder,
        stages=stages,
        dataset=dataset,
        origin={
            "data": config.data,
            "fingerprint": fingerprint,
            "size": config.size,
            "seed": config.seed,
            "tokenizer": tokenizer.to_json(),
            "lineage": lineage.__version__,
        },
        seed=config.seed,
        seeded=lambda: _seed_weights(config.seed),
        sheet=draw_sheet,
    )


def _seed_weights(seed: int) -> None:
    torch.manual_seed(stream_seed("weights", seed))


def fingerprint_of(dataset: CaptionedDataset) -> str:
    """What identifies the data of a run.

    The hash of user files, or the name of an endless world.
    """
    return dataset.fingerprint() if hasattr(dataset, "fingerprint") else dataset.name


def sample_sheet(system: System, examples: list[Example], path: Path, seed: int = 0) -> None:
    """Draw the captions of `examples`, each in all of the system's variants, and save the sheet."""
    captions = [example.captions[0] for example in examples]
    variants = system.variants()
    drawn = [to_bytes(system.generate(captions, seed=seed, **k)).cpu() for k in variants.values()]
    images = [one[i] for i in range(len(captions)) for one in drawn]
    texts = [f"{caption} {name}".strip() for caption in captions for name in variants]
    columns = -(-8 // len(variants)) * len(variants)  # what is drawn of a caption stands together
    save_picture(sheet(images, texts, columns), path)


def save_picture(image: Any, path: Path) -> None:
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


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises `UserError` if it is missing, broken or of an unknown system.
    """
    saved = read_json(folder / "config.json")
    if not isinstance(saved, dict) or not isinstance(saved.get("key"), str):
        key = saved.get("key") if isinstance(saved, dict) else saved
        raise UserError(
            f"{folder / 'config.json'} is not the configuration of a run: {key!r} is no system."
        )
    fields = {
        name: value
        for name, value in saved.items()
        if name not in ("made_with", "data_fingerprint")
    }
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
    keep_freed_memory()
    system = build(find_recipe(config.key).stages(config, read_tokenizer(folder)))
    load_weights(system, folder / "model.safetensors")
    return system.to(pick_device(device)).eval()


def build(stages: list[Stage]) -> System:
    """The untrained system of the last stage, built through the ones before it."""
    made: dict[str, Trainable] = {}
    for stage in stages:
        made[stage.name] = stage.build(made)
    last = made[stages[-1].name]
    assert isinstance(last, System)
    return last
