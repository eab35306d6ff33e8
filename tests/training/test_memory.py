"""A stage that cannot fit into memory is refused, with the setting to lower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lineage.config import with_field
from lineage.errors import UserError
from lineage.plan import build, plan
from lineage.recipes import preset
from lineage.text.tokenizer import WordTokenizer
from lineage.training import memory
from lineage.training.memory import check_memory, largest_change, model_bytes, total_memory


def check(tokenizer: WordTokenizer, key: str = "ddpm", **settings: Any) -> None:
    default = preset(key, "smoke")
    config = default
    for name, value in settings.items():
        config = with_field(config, name.replace("__", "."), value)
    stages = plan(config, tokenizer)
    with torch.device("meta"):
        build(stages)
    for stage in stages:
        assert stage.system is not None
        check_memory(stage.system, stage.optim, stage.train, config.size, config, default)


@pytest.mark.parametrize("key", ["ddpm", "vqvae", "stackgan", "attngan", "retrieval"])
def test_a_smoke_run_fits(key: str, tokenizer: WordTokenizer) -> None:
    check(tokenizer, key)


@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("ddpm", {"train.batch_size": 10**8}, ["A batch of 100,000,000", "train.batch_size="]),
        ("vqvae", {"codec_batch_size": 10**8}, ["A batch", "codec_batch_size=100000000"]),
        ("ddpm", {"model.unet.channels": 65536}, ["The model", "model.unet.channels=65536"]),
        ("vqvae", {"model.transformer.width": 65536}, ["The model", "model.transformer.width="]),
        ("retrieval", {"model.memory_size": 10**9}, ["The model", "model.memory_size="]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(
    key: str, settings: dict[str, Any], words: list[str], tokenizer: WordTokenizer
) -> None:
    with pytest.raises(UserError) as caught:
        check(tokenizer, key, **settings)
    message = str(caught.value)
    assert all(word in message for word in words) and " GB" in message and "\n" not in message


def test_the_bytes_of_a_model_are_those_of_its_training(
    make_system: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, two moments and an average of each trained parameter."""
    system, config = make_system("ddpm")
    parameters = sum(p.numel() for p in system.parameters())
    buffers = sum(b.numel() for b in system.buffers())
    assert model_bytes(system, config.optim) == 4 * (5 * parameters + buffers)
    assert model_bytes(system, replace(config.optim, ema_decay=0.0)) == 4 * (
        4 * parameters + buffers
    )
    needed = model_bytes(system, config.optim) + memory.batch_bytes(config.train, config.size)
    arguments = (system, config.optim, config.train, config.size, config, config)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed)
    check_memory(*arguments)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed - 1)
    with pytest.raises(UserError, match=r"lower --preset\.$"):
        check_memory(*arguments)


def test_a_frozen_part_counts_once(make_system: Callable[..., Any]) -> None:
    system, config = make_system("vqvae")
    frozen = nn.Module.parameters(system.codec)
    count = sum(p.numel() for p in frozen)
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    assert count > 0
    assert model_bytes(system, config.optim) < 4 * 5 * (count + trained)


def test_the_memory_of_this_machine_is_known() -> None:
    assert 2**28 < total_memory("cpu") < 2**48


def test_seeds_and_budgets_are_no_sizes() -> None:
    default = preset("ddpm", "smoke")
    config = with_field(default, "seed", 10**9)
    config = with_field(config, "train.max_steps", 10**9)
    assert largest_change(config, default) == "--preset"
    config = with_field(config, "model.unet.channels", 64)
    assert largest_change(config, default) == "model.unet.channels=64"
