"""`lineage evaluate`, `lineage prompts` and `lineage compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lineage.characters import plain
from lineage.cli.arguments import (
    Count,
    Flag,
    Flops,
    Keys,
    Minutes,
    PathName,
    Pictures,
    Preset,
    RunName,
    Seed,
    Settings,
    Steps,
    Threads,
    print_json,
    settings_of,
)
from lineage.cli.imports import large_imports
from lineage.errors import UserError


def evaluate(
    folders: Annotated[tuple[RunName, ...], Parameter(name="RUN", show_default=False)] = (),
    /,
    *,
    json: Flag = False,
    out: PathName | None = None,
    pictures: Pictures = (),
    data: str | None = None,
    prompts: PathName | None = None,
    features: str = "auto",
    scorer: str = "auto",
    batch: Count | None = None,
    seed: Seed = 0,
    device: str = "auto",
    threads: Threads | None = None,
) -> None:
    """Score runs, or pictures of another program: composition, quality, text fit and cost.

    Args:
        folders: Run folders of the same data, or pretrained:KEY.
        json: If true, print one JSON document.
        out: Folder for scores.json and sheets of failed pictures.
        pictures: Largest number of pictures to draw, 1000 if left out; or a folder of pictures of
            another program (./100 for a folder named 100), drawn from --prompts. May be repeated.
        data: Another data set than the runs' own.
        prompts: File of `lineage prompts`, or of prompts in GenEval's line schema.
        features: judge, scorer, inception:FILE or auto.
        scorer: hub:MODEL (a path or an id), damsm:RUN, none or auto.
        batch: Number of pictures drawn at once; changes no score.
        seed: Seed of the noise.
        device: cpu, cuda, mps or auto.
        threads: Number of threads on a CPU; measured if left out.
    """
    with large_imports():
        from lineage.evaluation.run import evaluate
        from lineage.evaluation.table import tables

    document = evaluate(
        folders,
        out=out,
        pictures=pictures,
        data=data,
        prompts=prompts,
        features=features,
        scorer=scorer,
        batch_size=batch,
        seed=seed,
        device=device,
        threads=threads,
    )
    if json:
        print_json(document)
    else:
        print(tables(document))


def prompts(
    *,
    out: PathName,
    data: str | None = None,
    run: RunName | None = None,
    count: Count = 1000,
    size: Count | None = None,
    seed: Seed = 0,
) -> None:
    """Write the prompts that `evaluate` draws, for another program to draw.

    Args:
        out: File of JSON lines to write.
        data: Data set of the real pictures; that of --run if left out, or shapes.
        run: Run whose data, size and seed the prompts are for: a folder, or pretrained:KEY.
        count: Largest number of captions of real pictures, as in `evaluate --pictures`.
        size: Side of the pictures in pixels, 32 if left out. Not with --run.
        seed: Seed of the noise, as in `evaluate --seed`.
    """
    with large_imports():
        from lineage.evaluation.prompt_files import write_prompts

    counts = write_prompts(out, data=data, run=run, count=count, size=size, seed=seed)
    listed = ", ".join(f"{number:,} {kind}s" for kind, number in counts.items() if number)
    print(plain(f"{out}: {listed}"))
    file = shlex.quote(str(out))
    print(
        "Draw the `prompt` of each line into a picture named `file_name` in a folder, then: "
        + plain(f"lineage evaluate --pictures FOLDER --prompts {file}")
    )


def compare(
    keys: Keys | None = None,
    /,
    *,
    data: str | None = None,
    preset: Preset | None = None,
    text: str = "historical",
    minutes: Minutes | None = None,
    steps: Steps | None = None,
    max_pictures: Steps | None = None,
    max_flops: Flops | None = None,
    out: PathName = Path("runs/compare"),
    pictures: Count = 1000,
    features: str = "auto",
    scorer: str = "auto",
    seed: Seed | None = None,
    seeds: Count | None = None,
    runs: Annotated[list[RunName] | None, Parameter(name="--from")] = None,
    device: str | None = None,
    threads: Threads | None = None,
    settings: Settings | None = None,
) -> None:
    """Train several systems on one budget each, or take finished runs, and write a report.

    Args:
        keys: Systems, as in `lineage list`; all that work if left out.
        data: Data set; shapes if left out.
        preset: Size of the systems; tiny if left out.
        text: Text encoder of all systems, as in --text transformer; historical gives each its
            recipe's.
        minutes: Budget of each system in minutes of training: of the processor, on a CPU.
        steps: Budget of each system in steps.
        max_pictures: Budget of each system in pictures of training.
        max_flops: Budget of each system in floating-point operations of training, as 1e13.
        out: Folder to write.
        pictures: Largest number of pictures to draw for the scores.
        features: judge, scorer, inception:FILE or auto.
        scorer: hub:MODEL (a path or an id), damsm:RUN, none or auto.
        seed: Seed of the weights, the order of the data and the noise.
        seeds: Number of runs of each system: with --seed, and with the seeds that follow it.
        runs: Finished run, or pretrained:KEY, to compare in place of training; may be repeated.
        device: cpu, cuda, mps or auto.
        threads: Number of threads of each system on a CPU, 1 if left out; as many systems as the
            cores allow are trained at a time.
        settings: Field of the configurations, as in --set optim.lr=3e-4; may be repeated.
    """
    with large_imports():
        from lineage.comparison.run import compare, compare_runs

    if runs:
        given: dict[str, object] = {
            "--data": data,
            "--minutes": minutes,
            "--steps": steps,
            "--seed": seed,
        }
        given |= {"--seeds": seeds, "--set": settings, "systems": keys, "--preset": preset}
        given |= {"--text": None if text == "historical" else text}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--from takes finished runs as they are: leave {name} out.")
        report = compare_runs(
            runs,
            out=out,
            pictures=pictures,
            features=features,
            scorer=scorer,
            device=device,
            threads=threads,
        )
        print(plain(report))
        return
    report = compare(
        keys,
        data=data,
        preset=preset or "tiny",
        text=text,
        minutes=minutes,
        steps=steps,
        max_pictures=max_pictures,
        max_flops=max_flops,
        out=out,
        pictures=pictures,
        features=features,
        scorer=scorer,
        seed=seed,
        seeds=seeds or 1,
        device=device,
        threads=threads,
        settings=settings_of(settings),
    )
    print(plain(report))
