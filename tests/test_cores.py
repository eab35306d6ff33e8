"""The cores that the process may use, and those that others use, from files that are made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lineage.cores import GLANCES, cgroup_quotas, free_cpus, usable_cpus

# --- quotas ---------------------------------------------------------------------------------------


def make_system(root: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "quotas"),
    [
        ("0::/a/b\n", [V2], {"a/b/cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b\n", [V2], {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),
        ("0::/a\n", [V2], {"a/cpu.max": "max 100000", "cpu.max": "max 100000"}, []),
        ("0::/\n", [V2], {"cpu.max": "200000 100000"}, [2.0]),
        # a container that is shown its own group as the root, though it is deeper
        ("0::/docker/x\n", [V2], {"cpu.max": "300000 100000"}, [3.0]),
        # one that is shown a part of the hierarchy
        ("0::/pods/x\n", [V2.replace(" / ", " /pods ")], {"x/cpu.max": "400000 100000"}, [4.0]),
        ("0::/a\n", [V2], {"a/cpu.max": "damaged"}, []),
        ("0::/a\n", [V2], {}, []),
        ("", [], {}, []),
    ],
    ids=["own", "above", "none", "root", "container", "part", "damaged", "missing", "no cgroups"],
)
def test_quotas_of_version_2(
    cgroup: str, mounts: list[str], files: dict[str, str], quotas: list[float], tmp_path: Path
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    assert cgroup_quotas(make_system(tmp_path, cgroup, mounts, files)) == quotas


@pytest.mark.parametrize(("quota", "quotas"), [("250000", [2.5]), ("-1", []), ("0", []), ("", [])])
def test_quotas_of_version_1(quota: str, quotas: list[float], tmp_path: Path) -> None:
    at = "sys/fs/cgroup/cpu,cpuacct/job"
    files = {f"{at}/cpu.cfs_quota_us": quota, f"{at}/cpu.cfs_period_us": "100000"}
    cgroup = "5:memory:/elsewhere\n4:cpu,cpuacct:/job\n0::/other\n"
    mounts = [V1, "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"]
    assert cgroup_quotas(make_system(tmp_path, cgroup, mounts, files)) == quotas


@pytest.mark.parametrize(("quota", "count"), [("1000", 1), ("150000", 1), ("99900000", None)])
def test_a_quota_is_rounded_down_to_whole_cores(
    quota: str, count: int | None, tmp_path: Path
) -> None:
    make_system(tmp_path, "0::/\n", [V2], {"sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    assert usable_cpus(tmp_path) == (count or len(os.sched_getaffinity(0)))


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cgroup_quotas(tmp_path) == []


def test_affinity_counts() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


# --- what others use ------------------------------------------------------------------------------


def make_processes(root: Path, running: int, own: str) -> Path:
    """`running` threads on the machine, of which this process's are in the states of `own`."""
    (root / "proc").mkdir()
    (root / "proc/stat").write_text(f"cpu 1 2 3\nprocs_running {running}\nprocs_blocked 7\n")
    for number, state in enumerate(own):
        (root / f"proc/self/task/{number}").mkdir(parents=True)
        (root / f"proc/self/task/{number}/stat").write_text(f"{number} (a (R) b) {state} 1 2\n")
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("running", "own", "free"),
    [(1, "R", 8), (4, "R", 5), (4, "RSRS", 6), (20, "R", 0), (1, "RR", 8)],
    ids=["alone", "three others", "own threads", "more than cores", "just ended"],
)
def test_cores_on_which_others_run_are_not_free(
    running: int, own: str, free: int, tmp_path: Path
) -> None:
    assert free_cpus(make_processes(tmp_path, running, own)) == free


@pytest.mark.usefixtures("eight_cores")
def test_a_service_that_runs_for_a_moment_takes_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter([3, *[0] * (GLANCES - 1)])
    monkeypatch.setattr("lineage.cores._others", lambda _: next(others))
    assert free_cpus(tmp_path) == 8


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("damage", ["", "cpu 1 2 3\n", "procs_running many\n"])
def test_a_system_that_does_not_tell(damage: str, tmp_path: Path) -> None:
    assert free_cpus(tmp_path) is None
    make_processes(tmp_path, 1, "R")
    (tmp_path / "proc/stat").write_text(damage)
    assert free_cpus(tmp_path) is None


@pytest.mark.usefixtures("eight_cores")
def test_with_some_of_the_cores_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert free_cpus(make_processes(tmp_path, 1, "R")) is None
