"""Runs: from a system's key to a run folder, and from a run folder to a system that draws.

config.json         every setting, hash of the data, what the run was made with, stages of other
                    runs, changes of settings on the way
tokenizer.json      the tokeniser, trained from the captions
model.safetensors   weights to sample from (moving averages)
state.pt            everything that resuming needs
metrics.jsonl       the log
cost.json           steps, pictures, seconds and memory of each stage so far
samples/            sheets of the same captions and seeds as training goes on
stages/             checkpoints and finished weights of the stages before the last
snapshots/SHARE/    a run folder at a share of the budget, where `train.snapshots` asks for it
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lineage
from lineage.bounds import Threads
from lineage.cache import cache_folder
from lineage.config import RunConfig, to_dict, typed
from lineage.data import load_dataset
from lineage.data.contract import CaptionedDataset, Example, fingerprint_of, to_bytes
from lineage.errors import Interrupted, UserError, say_once
from lineage.files import check_output, claimed, expanded
from lineage.nn.noise import seed_weights
from lineage.options import Options, changed_by
from lineage.options import configure as configure
from lineage.plan import (
    NOT_SETTINGS,
    build,
    check_checkpoints,
    check_effects,
    check_weights,
    load_base,
    plan,
    read_config,
    read_saved,
    read_tokenizer,
    saved_stages,
    source_of,
    use_own_weights,
)
from lineage.pretrained import PREFIX, run_folder, run_name
from lineage.recipes import find_recipe
from lineage.recipes import preset as recipe_preset
from lineage.resume import (
    check_changes,
    differences,
    last_threads,
    recorded_changes,
    usable_threads,
)
from lineage.search import Comparer, matches_sheet
from lineage.sheets import save_picture, sheet
from lineage.system import System, Trainable
from lineage.text.tokenizer import make_tokenizer
from lineage.threads import requested, use_threads
from lineage.training.machine import Distributed, keep_freed_memory, pick_device
from lineage.training.memory import check_memory
from lineage.training.run_stages import RunStages
from lineage.training.stage import Stage, load_weights
from lineage.training.stopping import Stopped
from lineage.training.store import remove_partials, write_json

# --- training -------------------------------------------------------------------------------------


def train(
    key: str,
    *,
    data: str | None = None,
    preset: str | None = None,
    minutes: float | None = None,
    cpu_minutes: float | None = None,
    steps: int | None = None,
    max_pictures: int | None = None,
    max_flops: float | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    stages_from: Mapping[str, str | Path] | None = None,
) -> Path:
    """Train all stages of a system; returns the run folder.

    Nothing is written before all arguments are known to fit, and one process at a time trains in a
    folder.

    Args:
        key: Key of the system, as in `lineage list`.
        data: Data set; the preset's default is `shapes`.
        preset: `smoke`, `tiny`, `small` or `paper`; `tiny` if None.
        minutes, cpu_minutes, steps, max_pictures, max_flops: The budget, in place of the preset's:
            minutes of the clock, minutes of the processor (with one thread; nearly the same work
            whatever else the machine does), steps, pictures, or floating-point operations.
        out: The run folder; `runs/<key>` if None.
        seed: Seed of the weights, the data order and the noise.
        device: `cpu`, `cuda`, `mps` or `auto`.
        threads: Number of threads on a CPU; None to measure (see lineage/threads.py).
        resume: If true, go on with the run in `out`, with its own settings; a new budget and new
            rates may be given, and are recorded. Without a run there, a new one begins.
        settings: Any other field of the configuration by its dotted name, as `{"optim.lr": 3e-4}`.
        stages_from: Stages that are taken from other runs as they are, as
            `{"codec": "runs/vqvae"}`.

    Raises:
        UserError: an argument does not fit, or the folder holds a run already; one sentence says
            what to do.
        Interrupted: a request to stop; everything is saved, and the sentence says how to go on.
    """
    folder = expanded(out, "out") if out is not None else Path("runs") / key
    if str(folder).startswith(PREFIX):
        raise UserError(f"--out {folder} names a run of the package: choose a folder of your own.")
    find_recipe(key)
    cache_folder("stages")  # a wrong name of the cache is found before anything is written
    options = Options(
        data=data,
        minutes=minutes,
        cpu_minutes=cpu_minutes,
        steps=steps,
        max_pictures=max_pictures,
        max_flops=max_flops,
        seed=seed,
        device=device,
    )
    count = requested() if threads is None else typed(Threads, threads, "threads")
    taken = {name: run_folder(run, f"--from {name}") for name, run in (stages_from or {}).items()}
    keep_freed_memory()
    started = _holds_run(folder)
    if started and not resume:
        raise _taken(folder)
    _check_places(folder, started)
    if not started:
        check_output(folder, folder=True)
        config = changed_by(recipe_preset(key, preset or "tiny"), options, settings)
        sources = {name: source_of(other, name) for name, other in taken.items()}
        run = _new(folder, config, sources, settings or {})
    with use_threads(count), claimed(folder) if _is_main() else contextlib.nullcontext():
        if started:
            run = _resumed(folder, key, preset, options, settings, taken)
        elif _is_main():
            if _holds_run(folder):  # of a process that was quicker
                raise _taken(folder)
            if resume:
                say_once(f"There is no run in {folder} yet: a new one begins.")
        if _is_main():
            remove_partials(folder)
        try:
            run.run()
        except Stopped:
            parts = ["lineage", "train", key, "--out", str(folder), "--resume"]
            raise Interrupted(
                f"Stopped; everything is saved. Go on with: {shlex.join(parts)}"
            ) from None
    return folder


def _holds_run(folder: Path) -> bool:
    return os.path.lexists(folder / "config.json")


_FILES = ("model.safetensors", "state.pt", "cost.json", "metrics.jsonl", "tokenizer.json")
_FOLDERS = ("samples", "stages")


def _check_places(folder: Path, started: bool) -> None:
    """Raise `UserError` if something else stands where a run has its files."""
    if not started:
        for name in ("model.safetensors", "state.pt", "stages"):
            if os.path.lexists(folder / name):
                raise UserError(
                    f"{folder} holds {name} of a run, but no config.json: restore that file, or "
                    "choose another --out."
                )
    for name in (*_FILES, *_FOLDERS):
        path, is_right = folder / name, os.path.isdir if name in _FOLDERS else os.path.isfile
        if os.path.exists(path) and not is_right(path):
            raise UserError(f"{path} is not what a run has there: remove it, or restore the run.")


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds a run already: add --resume to go on with it, or choose another --out."
    )


def _is_main() -> bool:
    """Whether this is the first process of a `torchrun`, or alone."""
    return os.environ.get("RANK", "0") == "0"


def _resumed(
    folder: Path,
    key: str,
    preset: str | None,
    options: Options,
    settings: Mapping[str, Any] | None,
    stages_from: Mapping[str, Path],
) -> RunStages:
    """The run in `folder`, ready to go on; nothing is written yet."""
    before, saved = read_config(folder), read_saved(folder)
    if before.key != key:
        raise UserError(
            f"{folder} holds a run of {before.key}, not of {key}: choose another --out."
        )
    if preset is not None and preset != before.preset:
        raise UserError(
            f"--preset {preset} does not fit the run in {folder}, which has preset "
            f"{before.preset}: leave it out, or choose another --out."
        )
    sources = saved.get("stages_from", {})
    for name, other in stages_from.items():
        if sources.get(name, {}).get("run") != str(other):
            raise UserError(f"--from {name}={other} cannot be changed: choose another --out.")
    config = changed_by(before, options, settings)
    fields = differences(before, config)
    check_changes(folder, fields)
    dataset = load_dataset(config.data, "train", config.size, config.seed)
    fingerprint = fingerprint_of(dataset)
    if saved.get("data_fingerprint") != fingerprint:
        raise UserError(
            f"The data {config.data} is no longer what the run in {folder} began with "
            f"({saved.get('data_fingerprint')} then, {fingerprint} now): restore it, or choose "
            "another --out."
        )
    stages = plan(config, read_tokenizer(folder), sources)
    use_own_weights(stages, folder)
    _check_stages(stages, config, dataset, folder)
    threads, new_threads = None, None
    if not config.train.is_timed:
        threads_before = last_threads(saved)
        threads = usable_threads(folder, threads_before)
        if threads_before is not None and requested() not in (None, threads_before):
            new_threads = threads_before, requested()
    changes = recorded_changes(folder, stages, fields, saved.get("changes", []), new_threads)
    constant = {name: saved[name] for name in NOT_SETTINGS if name in saved}
    now = {**to_dict(config), **constant, **({"changes": changes} if changes else {})}
    write_settings = _settings_writer(folder, now, saved)
    return _stages(folder, config, stages, dataset, fingerprint, write_settings, threads)


def _settings_writer(
    folder: Path, settings: dict[str, Any], saved: dict[str, Any]
) -> Callable[[int | None], None]:
    """A function that writes `settings`, with the number of threads that the run keeps, to
    `config.json`, unless that is what is `saved` there.
    """

    def write_settings(threads: int | None) -> None:
        nonlocal saved
        made_with = settings.get("made_with", {})
        if made_with.get("threads") is None:
            made_with = {**made_with, "threads": threads}
        now = {**settings, "made_with": made_with}
        if now != saved:
            write_json(folder / "config.json", now)
            saved = now

    return write_settings


def _new(
    folder: Path, config: RunConfig, sources: dict[str, Any], changed: Mapping[str, Any]
) -> RunStages:
    """A new run in `folder`; nothing is written yet."""
    Distributed.join(pick_device(config.train.device)).barrier()  # none has written yet
    dataset = load_dataset(config.data, "train", config.size, config.seed)
    fingerprint, encoder = fingerprint_of(dataset), config.encoder
    tokenizer = make_tokenizer(encoder.tokenizer, dataset.all_captions(), encoder.vocab_size)
    stages = plan(config, tokenizer, sources)
    if sources:
        check_effects(config, tokenizer, changed, sources)
    _check_stages(stages, config, dataset)
    made_with = {
        "lineage": lineage.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    settings = {**to_dict(config), "data_fingerprint": fingerprint, "made_with": made_with}
    write_config = _settings_writer(folder, {**settings, "stages_from": sources}, {})

    def write_settings(threads: int | None) -> None:
        if not _holds_run(folder):
            write_json(folder / "tokenizer.json", tokenizer.to_json())
        write_config(threads)

    return _stages(folder, config, stages, dataset, fingerprint, write_settings)


def check_runs(configs: Sequence[RunConfig]) -> None:
    """Raise `UserError` if one of several runs on the same data could not be trained."""
    first = configs[0]
    dataset = load_dataset(first.data, "train", first.size, first.seed)
    for config in configs:
        encoder = config.encoder
        tokenizer = make_tokenizer(encoder.tokenizer, dataset.all_captions(), encoder.vocab_size)
        _check_stages(plan(config, tokenizer), config, dataset)


def _check_stages(
    stages: list[Stage],
    config: RunConfig,
    dataset: CaptionedDataset,
    folder: Path | None = None,
) -> None:
    """Raise `UserError` if the stages cannot be built, need too much memory, lack files, or do not
    fit the shapes of the data or the checkpoints in `folder`.
    """
    train = config.train
    if not train.has_budget:
        raise UserError("The run has no budget and would never end: add --minutes or --steps.")
    if train.cpu_minutes is not None and pick_device(train.device).type != "cpu":
        raise UserError(
            f"train.cpu_minutes={train.cpu_minutes:g} counts the processor's time, and this run is "
            "for a GPU: give --minutes or --steps, or add --device cpu."
        )
    if train.text_cache:
        check_output(expanded(train.text_cache, "train.text_cache"), folder=True)
    with torch.device("meta"):
        system = build(stages)
    default = recipe_preset(config.key, config.preset)
    for stage in stages:
        if stage.weights is None and stage.system is not None:
            check_memory(stage.system, stage.optim, stage.train, config.size, config, default)
            for part in dataset.parts:
                stage.system.check_shape(*part.shape)
    check_weights(stages)
    if folder is not None:
        check_checkpoints(folder, stages)
    stages[-1].clear()
    if system.text is not None:
        system.text.check()


def _stages(
    folder: Path,
    config: RunConfig,
    stages: list[Stage],
    dataset: CaptionedDataset,
    fingerprint: str,
    write_settings: Callable[[int | None], None],
    threads: int | None = None,
) -> RunStages:
    examples = dataset.showcase(16)
    is_main = Distributed.join(pick_device(config.train.device)).is_main

    def draw_sheet(system: Trainable, stage: str, step: int) -> None:
        path = folder / "samples" / f"{stage}_{step:06d}.png"
        if isinstance(system, System):
            sample_sheet(system, examples, path)
        else:
            save_picture(matches_sheet(system, dataset, examples[:8]), path)

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
        seed_weights=lambda: seed_weights(config.seed),
        sheet=draw_sheet,
        write_settings=write_settings if is_main else lambda threads: None,
        threads=threads,
    )


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


# --- run folders ----------------------------------------------------------------------------------


def load_system(run: str | Path, device: str = "auto", adapters: Sequence[str] = ()) -> System:
    """As `load`, for a run that draws. Raises `UserError` for others too."""
    system = load(run, device, adapters)
    if not isinstance(system, System):
        key = read_config(run_folder(run, "run")).key
        raise UserError(
            f"{run} is a run of {key}, which draws no pictures: it compares pictures with captions."
        )
    return system


def load_comparer(run: str | Path, device: str = "auto") -> Comparer:
    """As `load`, for a run of CLIP. Raises `UserError` for others too."""
    model = load(run, device)
    if not isinstance(model, Comparer):
        raise UserError(
            f"{run_name(run_folder(run))} is no run of clip: name one, which `lineage train clip` "
            "makes, or pretrained:clip."
        )
    return model


def load(run: str | Path, device: str = "auto", adapters: Sequence[str] = ()) -> Any:
    """The trained model of a run folder: a `System`, ready to `generate`, or a `CLIP`. On Linux the
    process keeps the memory that drawing frees (`keep_freed_memory`).

    Args:
        run, device: Run folder or pretrained:KEY; `cpu`, `cuda`, `mps` or `auto`.
        adapters: Adapters that are merged into the weights, each with a scale if it is not 1, as
            `["runs/style:0.8"]`.

    Raises:
        UserError: there is no such run, a file is damaged, or an adapter does not fit.
    """
    folder = run_folder(run, "run")
    if not folder.is_dir():
        raise UserError(f"There is no run folder {folder}.")
    keep_freed_memory()
    stages = saved_stages(folder)
    system: Any = build(stages)
    load_base(stages, folder)
    load_weights(system, folder / "model.safetensors")
    if adapters:
        from lineage.official.adapters import add_adapters

        add_adapters(system, folder, adapters)
    return system.to(pick_device(device)).eval()
