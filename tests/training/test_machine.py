"""The memory that a process keeps, and its seeds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from lineage.training import machine

PROGRAM = """
import ctypes, resource, torch
from lineage.training.machine import keep_freed_memory
{call}
if "{call}" and not ctypes.CDLL(None).mallopt(-3, 2**30):
    raise SystemExit(3)
for _ in range(20):
    torch.ones(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_not_taken_anew_page_by_page() -> None:
    """Ten tensors of 64 MB are 160,000 pages; kept, they are few or none."""

    def faults(call: str) -> int:
        run = [sys.executable, "-c", PROGRAM.format(call=call)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode == 3:
            pytest.skip("this glibc gives blocks above 32 MB back in any case")
        return int(done.stdout)

    assert faults("keep_freed_memory()") * 10 < faults("")


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    program = (
        "import torch; from lineage.training.machine import peak_memory;"
        "before = peak_memory(torch.device('cpu')); torch.ones(2**26);"
        "print(before, peak_memory(torch.device('cpu')))"
    )
    large = torch.ones(2**28)  # 1 GB, in this process
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 50_000_000 < before < 4 * large.numel()
    assert after >= before + 200_000_000


def test_layers_are_seeded_as_by_torch() -> None:
    """What dropout leaves out is what it would with `torch.manual_seed`."""
    dropout, ones = nn.Dropout(0.5), torch.ones(1000)
    torch.manual_seed(11)
    expected = dropout(ones)
    assert not torch.equal(dropout(ones), expected)
    machine.seed_layers(torch.device("cpu"), 11)
    assert torch.equal(dropout(ones), expected)
