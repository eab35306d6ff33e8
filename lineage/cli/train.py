"""`lineage train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lineage.characters import plain
from lineage.cli.arguments import (
    Count,
    Flag,
    Key,
    Minutes,
    Preset,
    Settings,
    Whole,
    pairs,
    settings_of,
)


def train(
    key: Key,
    /,
    *,
    data: str | None = None,
    preset: Preset | None = None,
    minutes: Minutes | None = None,
    steps: Count | None = None,
    out: Path | None = None,
    seed: Whole | None = None,
    device: str | None = None,
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
        steps: Budget in steps.
        out: Run folder to write; runs/KEY if left out.
        seed: Seed of the weights, the order of the data and the noise.
        device: cpu, cuda, mps or auto.
        resume: If true, go on with the run in --out.
        stages_from: Stage of another run, as in --from codec=runs/vqvae; may be repeated.
        settings: Field of the configuration, as in --set optim.lr=3e-4; may be repeated.
    """
    from lineage import runs

    folder = runs.train(
        key,
        data=data,
        preset=preset,
        minutes=minutes,
        steps=steps,
        out=out,
        seed=seed,
        device=device,
        resume=resume,
        settings=settings_of(settings),
        stages_from=pairs(stages_from, "STAGE=RUN, as in --from codec=runs/vqvae"),
    )
    place = shlex.quote(str(folder))
    print(plain(f'{folder}: trained; draw with: lineage sample {place} "a caption"'))
