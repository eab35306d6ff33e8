"""Speed of a LoRA training step, and of sampling with adapters, against peft and diffusers.

    pip install -c constraints.txt -e ".[peers]"
    OMP_NUM_THREADS=1 python benchmarks/lora_step.py

All in one run, in turn, the median of each. The UNet is that of `unet.py`, with the same weights in
our class and in diffusers'; the adapters have rank 4 and are in the attention of both.

    step       batch 32, float32: noise, forward, mean square, backward, AdamW on the adapter
               ours        `LoRANetwork`, which computes W'
               peft        our class with peft's layers, which compute W x + B A x
               diffusers   `UNet2DConditionModel.add_adapter`
               whole       our class without an adapter, all weights trained
    call       one call of the network at batch 16, without gradients: without an adapter, with one
               (`LoRANetwork`), with two merged (as `lineage sample --adapter` does), and peft's
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prior import medians
from torch import nn
from unet import CHANNELS, SIDE, WORD_DIM, WORDS, make_both, make_step

from lineage.diffusion.adapters.lora import (
    ATTENTION,
    LoRA,
    LoRANetwork,
    LowRank,
    adaptable,
    merge,
)
from lineage.evaluation.cost import machine
from lineage.official.adm_unet import text_features
from lineage.training.store import write_json

RESULTS = Path(__file__).parent.parent / "results"
RANK = 4


def new_lora(model: nn.Module, seed: int) -> LoRA:
    """An adapter of the attention, with numbers in place of zeros."""
    torch.manual_seed(seed)
    layers = [(n, w) for n, w in adaptable(model) if n.rpartition(".")[2] in ATTENTION]
    lora = LoRA({name: LowRank(weight.shape, RANK, RANK) for name, weight in layers})
    with torch.no_grad():
        for change in lora.changes().values():
            change.up.normal_(std=0.02)
    return lora


def main() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.set_num_threads(1)
    made_by = machine()
    ours, theirs = make_both()
    words = torch.randn(32, WORDS, WORD_DIM)
    text = text_features(words)

    frozen = copy.deepcopy(ours).requires_grad_(False)
    holder = nn.ModuleDict({"network": frozen})  # under the name that it has in a model
    lora = new_lora(holder, seed=1)
    adapted = LoRANetwork(frozen, lora)
    injected: Any = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)), copy.deepcopy(ours)
    )
    with_peft = copy.deepcopy(theirs).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    with_peft.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))

    def trainable(network: nn.Module) -> nn.Module:
        """The trained parameters alone, as a module."""
        return nn.ParameterList([p for p in network.parameters() if p.requires_grad])

    counts = {
        name: sum(p.numel() for p in trainable(network).parameters())
        for name, network in (("ours", lora), ("peft", injected), ("diffusers", with_peft))
    }
    assert len(set(counts.values())) == 1, counts
    whole = copy.deepcopy(ours)
    steps: dict[str, Callable[[], object]] = {
        "ours": make_step(lora, lambda x, t: adapted(x, t, text), "fp32"),
        "peft": make_step(trainable(injected), lambda x, t: injected(x, t, text), "fp32"),
        "diffusers": make_step(
            trainable(with_peft),
            lambda x, t: with_peft(x, t, encoder_hidden_states=words).sample,
            "fp32",
        ),
        "whole": make_step(whole, lambda x, t: whole(x, t, text), "fp32"),
    }
    step_seconds = medians(steps, rounds=9)

    merged = copy.deepcopy(frozen)
    merge(nn.ModuleDict({"network": merged}), [(lora, 1.0), (new_lora(holder, seed=2), 1.0)])
    x, t, some = torch.randn(16, 3, SIDE, SIDE), torch.full((16,), 500), text_features(words[:16])

    @torch.no_grad()
    def call(network: nn.Module) -> None:
        network(x, t, some)

    calls: dict[str, Callable[[], object]] = {
        "without an adapter": lambda: call(frozen),
        "an adapter": lambda: call(adapted),
        "two adapters, merged": lambda: call(merged),
        "peft": lambda: call(injected),
    }
    call_seconds = medians(calls, rounds=15)
    document = {
        "channels": CHANNELS,
        "rank": RANK,
        "parameters": counts["ours"],
        "step_seconds": step_seconds,
        "step_relative_to_peft": round(step_seconds["ours"] / step_seconds["peft"], 3),
        "step_relative_to_diffusers": round(step_seconds["ours"] / step_seconds["diffusers"], 3),
        "call_seconds": call_seconds,
        "call_relative": {
            name: round(seconds / call_seconds["without an adapter"], 3)
            for name, seconds in call_seconds.items()
        },
        "machine": made_by,
    }
    write_json(RESULTS / "lora" / "speed.json", document)
    for name, value in document.items():
        print(name, value)


if __name__ == "__main__":
    main()
