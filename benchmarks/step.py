"""What a GAN's step costs beyond its networks: the whole step against its passes timed alone.

    python benchmarks/step.py

The fake picture is drawn once for both turns, so a step is one pass through the generator (forward
and backward) and three through the discriminator: real and fake in its own turn, and fake in the
generator's. Timed alternately in one run, the median of each; the gradient penalty, an extra of
every few steps, is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lineage.cgan.stackgan import StageOne, StageTwo
from lineage.data import load_dataset
from lineage.evaluate.cost import machine
from lineage.recipes.joint_text import text_stage, trained_text
from lineage.recipes.stackgan import PRESETS
from lineage.text.tokenizer import make_tokenizer
from lineage.train.loop import Trainer
from lineage.train.machine import autocast
from lineage.train.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS = 30


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def passes(system: StageOne | StageTwo, trainer: Trainer) -> Callable[[], None]:
    """The passes of one step through text encoder, generator and discriminator, and no more."""
    batch = trainer.loader.at(0)
    config, look = system.config, system.discriminator
    rows = len(batch)
    noise, eps = torch.randn(rows, config.noise), torch.randn(rows, config.condition)
    real = system.real(batch)
    ones = torch.randn(rows, config.condition)

    def draw(sentence: Tensor) -> Tensor:
        if isinstance(system, StageTwo):
            with torch.no_grad():
                small = system.first(sentence, noise, eps).image
            return system.generator(small, sentence, eps).image
        return system.generator(sentence, noise, eps).image

    def score(image: Tensor) -> Tensor:
        seen = look.features(image)
        logits = look.score(seen, ones).sum()
        return logits if look.alone is None else logits + look.score_alone(seen).sum()

    def work() -> None:
        judging, drawing = list(look.parameters()), list(system.generator.parameters())
        with autocast(trainer.device, trainer.train.precision):
            sentence = system.text.encode(batch.caption).sentence.detach()
            fake = draw(sentence)
            own = score(real) + score(fake.detach())
        own.backward(inputs=judging)
        with autocast(trainer.device, trainer.train.precision):
            other = score(fake)
        other.backward(inputs=drawing)
        system.zero_grad(set_to_none=True)

    return work


def measure(system: StageOne | StageTwo, trainer: Trainer) -> dict[str, float]:
    """Median milliseconds of both, in turn."""
    alone = passes(system, trainer)
    numbers = iter(range(10_000))
    whole = lambda: trainer.advance(trainer.loader.at(next(numbers)))  # noqa: E731
    times = [(timed(whole), timed(alone)) for _ in range(ROUNDS + 5)][5:]
    step, parts = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    ratios = sorted(a / b for a, b in times)
    return {
        "step_ms": round(step, 2),
        "passes_alone_ms": round(parts, 2),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    config = PRESETS["tiny"]
    config = replace(config, model=replace(config.model, r1=0.0))
    data = load_dataset(config.data, "train", config.size, 0)
    tokenizer = make_tokenizer("word", data.all_captions(500), 4096)

    def first() -> StageOne:
        text = text_stage(config, tokenizer, 0.1).build({})
        return StageOne(config.model, trained_text({"text": text.eval()}))

    result = {}
    for name, system in (("stage1", first()), ("stage2", StageTwo(config.model, first(), 32))):
        train = replace(config.train, minutes=None, steps=10**6)
        result[name] = measure(system, Trainer(system, data, config.optim, train, stage=name))
        print(name, result[name])
    write_json(RESULTS / "step.json", {**result, "machine": machine()})


if __name__ == "__main__":
    main()
