"""The prior's speed: cached against uncached sampling, and both against transformers' GPT-2.

    pip install transformers
    python benchmarks/prior.py

All in one run, in turn, the median of each. GPT-2 has the prior's width, layers and heads, its own
vocabulary of K codes and no dropout. Both sample with temperature 1 from as many tokens.

    sampling   N codes after a caption, cached and not, at batch 1 and 16; GPT-2's `generate` goes
               on from a prompt as long as ours (start and text) by as many tokens, with its cache
    training   a step at the recipe's batch: forward, backward, AdamW. GPT-2 in float32, as it
               comes, and under the same autocast as ours
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lineage.data import load_dataset
from lineage.evaluation.cost import machine
from lineage.nn.noise import NoiseStreams
from lineage.recipes import find_recipe, preset
from lineage.runs import build
from lineage.text.tokenizer import make_tokenizer
from lineage.training.loop import Trainer
from lineage.training.machine import autocast
from lineage.training.store import write_json
from lineage.vqvae.ar_prior import Choice, Prior

RESULTS = Path(__file__).parent.parent / "results"


def medians(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one round after the other, the first left out."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, one in work.items():
            started = time.perf_counter()
            one()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def gpt2(prior: Prior, places: int) -> Any:
    """transformers' GPT-2 of the prior's sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = prior.config.transformer
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = GPT2Config(
        vocab_size=prior.codec.codes,
        n_positions=places,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        **off,
        **ends,
    )
    return GPT2LMHeadModel(config)


def made(size: int) -> tuple[Prior, Any, Any]:
    """An untrained prior for pictures of `size`, its data and its configuration."""
    config = replace(preset("vqvae", "tiny"), size=size)
    data = load_dataset(config.data, "train", size, 0)
    tokenizer = make_tokenizer("word", data.all_captions(500), 4096)
    system = build(find_recipe("vqvae").stages(config, tokenizer))
    assert isinstance(system, Prior)
    return system, data, config


@torch.no_grad()
def sampling(size: int, batch: int, rounds: int) -> dict[str, float]:
    """Seconds for all codes of `batch` pictures."""
    prior, data, _ = made(size)
    prior.eval()
    codes, prompt = prior.side**2, 1 + prior.config.places
    other = gpt2(prior, prompt + codes).eval()
    captions = list(data.all_captions(64))[:batch]
    draw = lambda cached: prior.sample(  # noqa: E731
        prior.text.encode(captions),
        NoiseStreams.for_pictures(0, batch, "cpu"),
        Choice(),
        cached=cached,
    )
    ids = torch.randint(prior.codec.codes, (batch, prompt))
    go_on = lambda: other.generate(  # noqa: E731
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=codes,
        min_new_tokens=codes,
        pad_token_id=0,
    )
    work = {"cached": lambda: draw(True), "uncached": lambda: draw(False), "gpt2": go_on}
    seconds = medians(work, rounds)
    return {
        "codes": codes,
        "batch": batch,
        **{f"{name}_ms_per_code": 1e3 * value / codes for name, value in seconds.items()},
        "uncached_over_cached": seconds["uncached"] / seconds["cached"],
        "cached_over_gpt2": seconds["cached"] / seconds["gpt2"],
    }


def training(rounds: int) -> dict[str, float]:
    """Milliseconds of a step, and the shares of GPT-2's."""
    prior, data, config = made(32)
    train = replace(config.train, minutes=None, steps=10**6)
    trainer = Trainer(prior, data, config.optim, train, stage="prior")
    batch = trainer.loader.at(0)
    places = prior.config.places + prior.side**2
    ids = torch.randint(prior.codec.codes, (len(batch), places))
    other = gpt2(prior, places)
    optimiser = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)

    def step(precision: str) -> None:
        optimiser.zero_grad()
        with autocast(trainer.device, precision):
            loss = other(ids, labels=ids).loss
        loss.backward()
        optimiser.step()

    work = {
        "ours": lambda: trainer.advance(batch),
        "gpt2": lambda: step("fp32"),
        "gpt2_autocast": lambda: step("auto"),
    }
    seconds = medians(work, rounds)
    return {
        "places": places,
        "batch": len(batch),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "ours_over_gpt2": seconds["ours"] / seconds["gpt2"],
        "ours_over_gpt2_autocast": seconds["ours"] / seconds["gpt2_autocast"],
    }


def main() -> None:
    settings = [(size, batch) for size in (32, 64) for batch in (1, 16)]
    result: dict[str, Any] = {"sampling": []}
    for size, batch in settings:
        result["sampling"].append(sampling(size, batch, 5 if size == 32 else 3))
        print(result["sampling"][-1])
    result["training"] = training(20)
    print(result["training"])
    write_json(RESULTS / "vqvae" / "speed.json", {**result, "machine": machine()})


if __name__ == "__main__":
    main()
