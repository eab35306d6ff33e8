"""Speed of the prior: sampling with and without cache, and both against transformers' GPT-2.

    pip install transformers
    python benchmarks/prior.py

Everything is measured in one run, in turn, and the median is reported. GPT-2 has the prior's width,
number of layers and heads, a vocabulary of K codes and no dropout. Both sample with temperature 1
from as many tokens.

    sampling   N codes after a caption, with and without cache, in batches of 1 and 16; GPT-2's
               `generate` continues a prompt as long as ours (start token and text) by as many
               tokens, with its cache
    training   a step at the recipe's batch size: forward, backward, AdamW; GPT-2 in float32, its
               default, and under our autocast
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
from lineage.vqvae.ar_prior import Prior, SamplingConfig

RESULTS = Path(__file__).parent.parent / "results"


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def gpt2_like(prior: Prior, num_positions: int) -> Any:
    """transformers' GPT-2 with the prior's sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = prior.config.transformer
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    no_ends = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = GPT2Config(
        vocab_size=prior.codec.num_codes,
        n_positions=num_positions,
        n_embd=sizes.width,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        **no_dropout,
        **no_ends,
    )
    return GPT2LMHeadModel(config)


def make_prior(size: int) -> tuple[Prior, Any, Any]:
    """An untrained prior for pictures of `size`, its data set and its configuration."""
    config = replace(preset("vqvae", "tiny"), size=size)
    dataset = load_dataset(config.data, "train", size, 0)
    tokenizer = make_tokenizer("word", dataset.all_captions(500), 4096)
    system = build(find_recipe("vqvae").stages(config, tokenizer))
    assert isinstance(system, Prior)
    return system, dataset, config


@torch.no_grad()
def sampling(size: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Milliseconds per code of `batch_size` pictures."""
    prior, dataset, _ = make_prior(size)
    prior.eval()
    num_codes, prompt_length = prior.grid_size**2, 1 + prior.config.text_len
    other = gpt2_like(prior, prompt_length + num_codes).eval()
    captions = list(dataset.all_captions(64))[:batch_size]
    prompt = torch.randint(prior.codec.num_codes, (batch_size, prompt_length))

    def sample(cached: bool) -> object:
        noise = NoiseStreams.for_pictures(0, batch_size, "cpu")
        return prior.sample_codes(
            prior.text.encode(captions), noise, SamplingConfig(), cached=cached
        )

    def generate() -> object:
        return other.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=num_codes,
            min_new_tokens=num_codes,
            pad_token_id=0,
        )

    functions = {
        "cached": lambda: sample(True),
        "uncached": lambda: sample(False),
        "gpt2": generate,
    }
    seconds = medians(functions, rounds)
    return {
        "codes": num_codes,
        "batch": batch_size,
        **{f"{name}_ms_per_code": 1e3 * value / num_codes for name, value in seconds.items()},
        "uncached_over_cached": seconds["uncached"] / seconds["cached"],
        "cached_over_gpt2": seconds["cached"] / seconds["gpt2"],
    }


def training(rounds: int) -> dict[str, float]:
    """Milliseconds of a step, and its ratio to GPT-2's."""
    prior, dataset, config = make_prior(32)
    train = replace(config.train, minutes=None, max_steps=10**6)
    trainer = Trainer(prior, dataset, config.optim, train, stage="prior")
    batch = trainer.loader.at(0)
    length = prior.config.text_len + prior.grid_size**2
    ids = torch.randint(prior.codec.num_codes, (len(batch), length))
    other = gpt2_like(prior, length)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)

    def step(precision: str) -> None:
        optimizer.zero_grad()
        with autocast(trainer.device, precision):
            loss = other(ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    functions = {
        "ours": lambda: trainer.advance(batch),
        "gpt2": lambda: step("fp32"),
        "gpt2_autocast": lambda: step("auto"),
    }
    seconds = medians(functions, rounds)
    return {
        "places": length,
        "batch": len(batch),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "ours_over_gpt2": seconds["ours"] / seconds["gpt2"],
        "ours_over_gpt2_autocast": seconds["ours"] / seconds["gpt2_autocast"],
    }


def main() -> None:
    settings = [(size, batch_size) for size in (32, 64) for batch_size in (1, 16)]
    result: dict[str, Any] = {"sampling": []}
    for size, batch_size in settings:
        result["sampling"].append(sampling(size, batch_size, 5 if size == 32 else 3))
        print(result["sampling"][-1])
    result["training"] = training(20)
    print(result["training"])
    write_json(RESULTS / "vqvae" / "speed.json", {**result, "machine": machine()})


if __name__ == "__main__":
    main()
