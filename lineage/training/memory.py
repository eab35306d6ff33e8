"""Check, before anything is written, that a stage fits into memory."""

from __future__ import annotations

import os
from typing import Any

import torch

from lineage.config import OptimConfig, TrainConfig, flat
from lineage.errors import UserError
from lineage.system import Trainable
from lineage.training.machine import pick_device

BYTES = 4  # of a number in float32
NOT_SIZES = ("seed", "_steps", "max_pictures", "_every", "warmup", "disc_start", "cache_size")
"""Ends of the names of whole numbers on which no memory depends."""


def check_memory(
    system: Trainable, optim: OptimConfig, train: TrainConfig, size: int, config: Any, default: Any
) -> None:
    """Check that the weights, gradients and optimiser of a system, and a batch of pictures, fit
    into the memory of the device. What the layers compute in between is not counted.

    Args:
        system: System of a stage, which may be on the `meta` device.
        optim, train: Optimiser and budget of the stage.
        size: Side of the pictures in pixels.
        config, default: Configuration of the run, and of its preset, whose difference says which
            setting to lower.

    Raises:
        UserError: they do not fit; the sentence names the setting.
    """
    model, batch = model_bytes(system, optim), batch_bytes(train, size)
    memory = total_memory(train.device)
    if model + batch <= memory:
        return
    if batch > model:
        what = f"A batch of {train.batch_size:,} pictures of {size} pixels needs"
    else:
        what = "The model and its optimiser need"
    raise UserError(
        f"{what} {max(model, batch) / 1e9:,.1f} GB, and there are {memory / 1e9:,.1f} GB: lower "
        f"{largest_change(config, default, of_batch=batch > model)}."
    )


def model_bytes(system: Trainable, optim: OptimConfig) -> int:
    """Bytes of all tensors, and of gradients, two moments and an average of those trained."""
    parts = [module for modules in system.groups().values() for module in modules]
    trained = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    copies = 4 if optim.ema_decay else 3
    count = sum(t.numel() for t in (*system.parameters(), *system.buffers()))
    return BYTES * (count + copies * sum(p.numel() for p in trained.values()))


def batch_bytes(train: TrainConfig, size: int) -> int:
    """Bytes of a batch of pictures, and of its output."""
    return 2 * BYTES * train.batch_size * 3 * size**2


def total_memory(device: str) -> int:
    """Bytes of the memory of a device: a GPU's own, or the machine's."""
    on = pick_device(device)
    if on.type == "cuda":
        return torch.cuda.get_device_properties(on).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows: nothing is refused
        return 2**62


def largest_change(config: Any, default: Any, of_batch: bool = False) -> str:
    """The whole number of `config` that is the largest multiple of its value in `default`.

    Args:
        of_batch: If true, among sizes of batches and pictures alone.
    """
    before, now = flat(default), flat(config)
    multiples: dict[str, float] = {}
    for name, new in now.items():
        old = before.get(name)
        if name.endswith(NOT_SIZES) or (of_batch and not name.endswith("size")):
            continue
        if type(old) is int and type(new) is int and new > old:
            multiples[f"{name}={new}"] = new / max(1, old)
    return max(multiples, key=lambda name: multiples[name], default="--preset")
