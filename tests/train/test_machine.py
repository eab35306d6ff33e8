"""The memory that a process keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from lineage.train.machine import keep_freed_memory
{call}
for _ in range(20):
    torch.ones(2**24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_taken_anew_page_by_page() -> None:
    """Ten tensors of 64 MB are 160,000 pages; kept, they are few or none."""

    def faults(call: str) -> int:
        run = [sys.executable, "-c", PROGRAM.format(call=call)]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    assert faults("keep_freed_memory()") * 10 < faults("")
