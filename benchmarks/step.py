"""What a GAN's step costs beyond its networks: the whole step against its passes timed alone.

    python benchmarks/step.py

The fake pictures are drawn once for all turns, so a step is one pass through the generator (forward
and backward) and, for each discriminator, real, wrong and fake pairs in its own turn and fake ones
in the generator's; for AttnGAN also one through the frozen DAMSM. Timed in turn, eight steps, two
of which are watched for the log as in training, and eight times the passes: the medians of the
turns' means, and the median of their ratios. The gradient penalty, an extra of every few steps, is
left out, and so is the text encoder, whose answers are kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from lineage.attngan.attngan import AttnGAN
from lineage.cgan.stackgan import StageOne, StageTwo
from lineage.config import with_field
from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.nn.conditional_discriminator import Discriminator, pair_logits
from lineage.nn.gan import smaller
from lineage.recipes import find_recipe, preset
from lineage.system import System
from lineage.text.tokenizer import make_tokenizer
from lineage.training import texts
from lineage.training.loop import Trainer
from lineage.training.machine import keep_freed_memory
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS, IN_A_ROW = 60, 8
Parts = tuple[Callable[[], list[Tensor]], list[tuple[Discriminator, Tensor]], Tensor]


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parts(system: System, trainer: Trainer) -> Parts:
    """How the pictures of a step are drawn, each discriminator with its real pictures, and what it
    is told.
    """
    batch = trainer.loader.at(0)
    assert isinstance(system, StageOne | StageTwo | AttnGAN)
    config = system.config
    noise = torch.randn(len(batch), config.noise)
    eps = torch.randn(len(batch), config.condition)
    with torch.no_grad(), trainer.context:
        text = system.text.encode(batch.caption)
    if isinstance(system, AttnGAN):
        looks = [(look, smaller(batch.image, side)) for side, look in system.looks()]
        return (lambda: system.generator(text, noise, eps).images), looks, text.sentence
    look = [(system.discriminator, system.real(batch))]
    if isinstance(system, StageOne):
        return (lambda: [system.generator(text.sentence, noise, eps).image]), look, eps

    def draw() -> list[Tensor]:
        with torch.no_grad():
            small = system.first(text.sentence, noise, eps).image
        return [system.generator(small, text.sentence, eps).image]

    return draw, look, eps


def passes(system: System, trainer: Trainer) -> Callable[[], None]:
    """The passes of one step through its networks, and no more."""
    draw, looks, told = parts(system, trainer)
    drawing = [p for m in system.groups()["generator"] for p in m.parameters()]
    drawn_and_judged = [*drawing, *(p for look, _ in looks for p in look.parameters())]

    def work() -> None:
        with trainer.context:
            fakes = draw()
        for (look, real), fake in zip(looks, fakes, strict=True):
            with trainer.context:
                logits = pair_logits(look, real, fake.detach(), told)
                own = torch.cat(list(logits.values())).sum()
            own.backward(inputs=list(look.parameters()))
        with trainer.context:
            scores = []
            for (look, _), fake in zip(looks, fakes, strict=True):
                seen = look.features(fake)
                scores.append(look.score(seen, told))
                scores += [look.score_alone(seen)] if look.alone is not None else []
            if isinstance(system, AttnGAN):
                regions = system.matcher(fakes[-1])
                scores += [regions.local.flatten(), regions.whole.flatten()]
            other = torch.cat([score.float() for score in scores]).sum()
        other.backward(inputs=drawing)
        for parameter in drawn_and_judged:
            parameter.grad = None

    return work


def measure(system: System, trainer: Trainer) -> dict[str, float]:
    """Median milliseconds of both, in turn."""
    alone = passes(system, trainer)
    batches = cycle([trainer.loader.at(number) for number in range(16)])
    trainer.step = texts.KEPT  # from here on the captions' features are kept

    def steps() -> None:
        for number in range(IN_A_ROW):
            system.watched = number % (IN_A_ROW // 2) == 0
            trainer.advance(next(batches))

    def as_many_passes() -> None:
        for _ in range(IN_A_ROW):
            alone()

    turns = [(timed(steps), timed(as_many_passes)) for _ in range(ROUNDS + 1)][1:]
    step, sum_of_parts = (
        statistics.median(column) / IN_A_ROW * 1e3 for column in zip(*turns, strict=True)
    )
    return {
        "step_ms": round(step, 2),
        "passes_alone_ms": round(sum_of_parts, 2),
        "ratio": round(statistics.median(a / b for a, b in turns), 3),
    }


def main() -> None:
    keep_freed_memory()  # this and the next as in training
    gc.freeze()
    result = {}
    for key in ("stackgan", "attngan"):
        config = with_field(preset(key, "tiny"), "model.r1", 0.0)
        data = load_dataset(config.data, "train", config.size, 0)
        tokenizer = make_tokenizer("word", data.all_captions(500), 4096)
        made: dict[str, System] = {}
        for stage in find_recipe(key).stages(config, tokenizer):
            system = made[stage.name] = stage.build(made)
            if isinstance(system, System):
                train = replace(config.train, minutes=None, steps=10**6)
                trainer = Trainer(system, data, config.optim, train, stage=stage.name)
                name = f"{key} {stage.name}"
                result[name] = measure(system, trainer)
                print(name, result[name])
    write_json(RESULTS / "step.json", {**result, "machine": machine()})


if __name__ == "__main__":
    main()
