"""Cost of a GAN's step beyond its networks: the whole step against its forward and backward passes.

    python benchmarks/step.py

Pictures are generated once for all turns, so a step has one pass through the generator (forward and
backward) and, for each discriminator, real, mismatched and generated pairs in its own turn and
generated ones in the generator's; for AttnGAN also one pass through the frozen DAMSM. Eight steps,
two of which collect metrics as in training, and eight times the passes are timed in turn; the
results are medians over rounds, and the median of their ratios. The gradient penalty, an extra of
every few steps, is left out, and so is the text encoder, whose features are cached.
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
from lineage.cgan.stackgan import StackGANStage
from lineage.config import with_field
from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.nn.conditional_discriminator import ConditionalDiscriminator
from lineage.nn.gan import downsample
from lineage.nn.noise import NoiseStreams
from lineage.recipes import find_recipe, preset
from lineage.system import System
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.machine import keep_freed_memory
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
ROUNDS, STEPS = 60, 8
Parts = tuple[Callable[[], list[Tensor]], list[tuple[ConditionalDiscriminator, Tensor]], Tensor]


class FixedNoise(NoiseStreams):
    """Normal noise that is drawn once, so that random numbers are not timed."""

    def __init__(self, rows: int) -> None:
        super().__init__(())
        self.rows, self.tensors = rows, dict[int, Tensor]()

    def randn(self, *shape: int) -> Tensor:
        (width,) = shape
        return self.tensors.setdefault(width, torch.randn(self.rows, width))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def parts(system: System, trainer: Trainer) -> Parts:
    """Function that generates the pictures of a step, each discriminator with its real pictures,
    and their condition.
    """
    batch = trainer.loader.at(0)
    noise = FixedNoise(len(batch))
    with torch.no_grad(), trainer.autocast:
        text = system.text.encode(batch.caption)
    if isinstance(system, AttnGAN):
        z, eps = noise.randn(system.config.z_dim), noise.randn(system.config.cond_dim)
        real = [downsample(batch.image, side) for side in system.sides]
        discs = list(zip(system.discs(), real, strict=True))
        return (lambda: system.generator(text, z, eps).images), discs, text.sentence
    assert isinstance(system, StackGANStage)
    discs = [(system.discriminator, downsample(batch.image, system.size))]
    cond = noise.randn(system.config.cond_dim)
    return (lambda: [system.generator_output(text.sentence, noise).image]), discs, cond


def passes(system: System, trainer: Trainer) -> Callable[[], None]:
    """The passes of one step through its networks, and no more."""
    generate, discs, cond = parts(system, trainer)
    generator = [p for m in system.groups()["generator"] for p in m.parameters()]
    trained = [*generator, *(p for disc, _ in discs for p in disc.parameters())]

    def work() -> None:
        with trainer.autocast:
            fakes = generate()
        for (disc, real), fake in zip(discs, fakes, strict=True):
            with trainer.autocast:
                real_features, fake_features = disc.features(real), disc.features(fake.detach())
                logits = [
                    disc.cond_logits(real_features, cond),
                    disc.cond_logits(real_features[:-1], cond[1:]),
                    disc.cond_logits(fake_features, cond),
                ]
                if disc.uncond_head is not None:
                    logits += map(disc.uncond_logits, (real_features, fake_features))
                total = torch.cat(logits).sum()
            total.backward(inputs=list(disc.parameters()))
        with trainer.autocast:
            outputs = []
            for (disc, _), fake in zip(discs, fakes, strict=True):
                features = disc.features(fake)
                outputs.append(disc.cond_logits(features, cond))
                outputs += [disc.uncond_logits(features)] if disc.uncond_head is not None else []
            if isinstance(system, AttnGAN):
                image = system.image_encoder(fakes[-1])
                outputs += [image.regions.flatten(), image.global_vector.flatten()]
            total = torch.cat([output.float() for output in outputs]).sum()
        total.backward(inputs=generator)
        for parameter in trained:
            parameter.grad = None

    return work


def measure(system: System, trainer: Trainer) -> dict[str, float]:
    """Median milliseconds of both, in turn."""
    only_passes = passes(system, trainer)
    batches = cycle([trainer.loader.at(number) for number in range(16)])

    def steps() -> None:
        for number in range(STEPS):
            trainer.advance(next(batches), collect_metrics=number % (STEPS // 2) == 0)

    def as_many_passes() -> None:
        for _ in range(STEPS):
            only_passes()

    rounds = [(timed(steps), timed(as_many_passes)) for _ in range(ROUNDS + 1)][1:]
    step, passes_alone = (
        statistics.median(column) / STEPS * 1e3 for column in zip(*rounds, strict=True)
    )
    return {
        "step_ms": round(step, 2),
        "passes_alone_ms": round(passes_alone, 2),
        "ratio": round(statistics.median(a / b for a, b in rounds), 3),
    }


def main() -> None:
    keep_freed_memory()  # this and the next as in training
    gc.freeze()
    results = {}
    for key in ("stackgan", "attngan"):
        config = with_field(preset(key, "tiny"), "model.r1_weight", 0.0)
        data = load_dataset(config.data, "train", config.size, 0)
        tokenizer = make_tokenizer("word", data.all_captions(500), 4096)
        for stage in find_recipe(key).stages(config, tokenizer):
            system = stage.construct()
            if isinstance(system, System):
                train = replace(config.train, minutes=None, max_steps=10**6)
                trainer = Trainer(system, data, config.optim, train, stage=stage.name)
                name = f"{key} {stage.name}"
                results[name] = measure(system, trainer)
                print(name, results[name])
    write_json(RESULTS / "step.json", {**results, "machine": machine()})


if __name__ == "__main__":
    main()
