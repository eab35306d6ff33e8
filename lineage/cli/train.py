"""`lineage train`."""

from __future__ import annotations

import shlex
from typing import Annotated

from cyclopts import Parameter

from lineage import catalog
from lineage.characters import plain
from lineage.cli.arguments import (
    Flag,
    Flops,
    Key,
    Minutes,
    PathName,
    Preset,
    Seed,
    Settings,
    Steps,
    Threads,
    pairs,
    settings_of,
)
from lineage.cli.imports import large_imports


def train(
    key: Key,
    /,
    *,
    data: str | None = None,
    preset: Preset | None = None,
    minutes: Minutes | None = None,
    cpu_minutes: Minutes | None = None,
    steps: Steps | None = None,
    max_pictures: Steps | None = None,
    max_flops: Flops | None = None,
    out: PathName | None = None,
    seed: Seed | None = None,
    device: str | None = None,
    threads: Threads | None = None,
    resume: Flag = False,
    stages_from: Annotated[list[str] | None, Parameter(name="--from")] = None,
    settings: Settings | None = None,
) -> None:
    """Train all stages of a system.

    Args:
        key: System, as in `lineage list`.
        data: Data set; shapes if left out.
        preset: Size of the system; tiny if left out.
        minutes: Budget in minutes of training.
        cpu_minutes: Budget in minutes of the processor, with one thread unless --threads says
            otherwise: nearly the same work on a busy machine.
        steps: Budget in steps.
        max_pictures: Budget in pictures.
        max_flops: Budget in floating-point operations, as 1e13.
        out: Run folder to write; runs/KEY if left out.
        seed: Seed of the weights, the order of the data and the noise.
        device: cpu, cuda, mps or auto.
        threads: Number of threads on a CPU; measured if left out.
        resume: If true, go on with the run in --out.
        stages_from: Stage of another run, as in --from codec=runs/vqvae; may be repeated.
        settings: Field of the configuration, as in --set optim.lr=3e-4; may be repeated.
    """
    with large_imports():
        from lineage import runs

    folder = runs.train(
        key,
        data=data,
        preset=preset,
        minutes=minutes,
        cpu_minutes=cpu_minutes,
        steps=steps,
        max_pictures=max_pictures,
        max_flops=max_flops,
        out=out,
        seed=seed,
        device=device,
        threads=threads,
        resume=resume,
        settings=settings_of(settings),
        stages_from=pairs(stages_from, "STAGE=RUN, as in --from codec=runs/vqvae"),
    )
    place = shlex.quote(str(folder))
    use = f'draw with: lineage sample {place} "a caption"'
    if not catalog.CATALOG[key].draws:
        use = f'search with: lineage search {place} shapes "a caption"'
    print(plain(f"{folder}: trained; {use}"))
