"""Processor cores: how many this process may use, and how many others use right now."""

from __future__ import annotations

import os
import time
from pathlib import Path

# --- what the process may use ---------------------------------------------------------------------


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of cores that this process may use, at least 1.

    A quota of 1.5 cores counts as 1: two threads would both be stopped for a quarter of the time.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in cgroup_quotas(root))]))


def cgroup_quotas(root: Path = Path("/")) -> list[float]:
    """Quotas, in cores, of this process's control groups and of those that hold them."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    quotas: list[float] = []
    for line in mounts:
        place, _, kind = line.partition(" - ")
        own, system, options = place.split(), kind.split()[0], kind.split()[-1].split(",")
        if system == "cgroup2":
            controller, read = "", _quota_v2
        elif system == "cgroup" and "cpu" in options:
            controller, read = "cpu", _quota_v1
        else:
            continue
        top = root / own[4].lstrip("/")
        folder = _own_group(memberships, controller, top, own[3])
        for group in (folder, *folder.parents):
            if (quota := read(group)) is not None:
                quotas.append(quota)
            if group == top:
                break
    return quotas


def _own_group(memberships: list[str], controller: str, top: Path, part: str) -> Path:
    """Folder of this process's group below the mount point `top`, which is the root `part` of the
    hierarchy. A container may see its own group as `top`.
    """
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and (controller or not controllers):
            relative = Path(path)
            if part != "/" and relative.is_relative_to(part):
                relative = relative.relative_to(part)
            folder = top / str(relative).lstrip("/")
            return folder if folder.is_dir() else top
    return top


def _quota_v1(group: Path) -> float | None:
    return _ratio(f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}")


def _quota_v2(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.max"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _ratio(text: str) -> float | None:
    """`"150000 100000"` -> 1.5; None for no quota (`max`, -1) and for what cannot be read."""
    try:
        quota, period = (int(word) for word in text.split())
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


# --- what others use ------------------------------------------------------------------------------

GLANCES, PAUSE = 8, 0.0005  # one glance may fall on a service that runs for a moment


def free_cpus(root: Path = Path("/")) -> int | None:
    """Number of cores that no other process computes on, seen in about 5 ms; None where the system
    does not tell, or where this process may not use all cores: others may be on those.
    """
    cores = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < cores:
        return None
    glances = []
    for _ in range(GLANCES):
        if (others := _others(root)) is None:
            return None
        glances.append(others)
        time.sleep(PAUSE)
    return max(0, cores - round(sum(glances) / GLANCES))


def _others(root: Path) -> int | None:
    """Threads of other processes that run or wait for a core now."""
    try:
        total = next(
            int(line.split()[1])
            for line in (root / "proc/stat").read_text().splitlines()
            if line.startswith("procs_running ")
        )
        states = [_state(thread) for thread in (root / "proc/self/task").iterdir()]
    except (OSError, StopIteration, ValueError, IndexError):  # not Linux, or a sandbox
        return None
    return max(0, total - states.count("R"))


def _state(thread: Path) -> str:
    """The letter of a thread's state: R for one that runs or waits for a core."""
    return _read(thread / "stat").rpartition(")")[2].strip()[:1]
