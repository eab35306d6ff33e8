"""Device, precision, memory layout, and the other processes of a `torchrun`."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lineage.config import TrainConfig
from lineage.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises `UserError` if this machine lacks it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device to train on")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or ["not available"])[0]
        raise UserError(
            f"Device {name!r} cannot be used here ({first[:100]}); try --device cpu."
        ) from None
    return device


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run: bfloat16 matrix products, or nothing."""
    on = precision == "bf16" or (precision == "auto" and bfloat16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def channels_last(device: torch.device, train: TrainConfig) -> bool:
    """Whether weights and pictures are stored with channels last, which is faster on tensor cores.

    On a CPU, networks that gain from it convert their own activations (lineage/nn/fast.py).
    """
    return train.channels_last == "on" or (train.channels_last == "auto" and device.type == "cuda")


def seed_layers(device: torch.device, seed: int) -> None:
    """Seed the generators of layers such as dropout, on the CPU and on `device`.

    `torch.manual_seed` seeds every kind of accelerator, which takes longer than a small layer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@dataclass(frozen=True)
class Distributed:
    """The processes that train together; a process alone is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Distributed:
        """Join the group that `torchrun` started, if it did."""
        if "WORLD_SIZE" not in os.environ or not dist.is_available():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def all_reduce_mean(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one message; in place."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes, so that all decide alike."""
        if self.world_size == 1:
            return values
        flat = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            flat = flat.cuda()
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        return flat.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    glibc returns large blocks to the system at once and requests them again, page by page, for
    every tensor of this size: a quarter of the time in which `ddpm` draws 64 pictures. On other
    systems nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        mallopt(trim_threshold, -1)  # never
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # the most that older ones take


def peak_memory(device: torch.device) -> int:
    """Largest memory use so far, in bytes: the allocator's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where `ru_maxrss` starts at the parent's peak
    if status.exists() and (peak_line := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak_line[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Exempt all existing objects from garbage collection, which would scan them repeatedly."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
