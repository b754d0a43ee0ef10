from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from miles.cores import cgroup_memory_limit, cgroup_quota, share_of, usable_cores


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_quota_there_is_none(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "jobs/mine/cpu.max", "max 100000\n")
    assert cgroup_quota(tmp_path, {"": "/jobs/mine"}) is None
    assert cgroup_quota(tmp_path, {}) is None


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "jobs/cpu.max", "150000 100000\n")
    write(tmp_path / "jobs/mine/cpu.max", "400000 100000\n")
    assert cgroup_quota(tmp_path, {"": "/jobs/mine"}) == 1.5


def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "cpu.max", "200000 100000\n")
    assert cgroup_quota(tmp_path, {"": "/"}) == 2
    assert cgroup_quota(tmp_path, {"": "/pods/of/the/host"}) == 2


def test_quotas_of_version_1_count_too(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "cpu,cpuacct/jobs/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "cpu,cpuacct/jobs/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroup_quota(tmp_path, {"cpu,cpuacct": "/jobs", "memory": "/jobs"}) == 0.5


def test_cores_are_those_of_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, [{one}]); from miles.cores import usable_cores; print(usable_cores())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert printed.stdout.strip() == "1"
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("cores", "processes", "expected"), [(2, 1, 2), (2, 2, 1), (2, 5, 1), (16, 3, 5), (4, 0, 4)])
def test_processes_share_cores(cores: int, processes: int, expected: int) -> None:
    assert share_of(cores, processes) == expected


def test_the_smallest_memory_limit_counts(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "jobs/memory.max", "4096\n")
    write(tmp_path / "jobs/mine/memory.max", "max\n")
    write(tmp_path / "memory/jobs/memory.limit_in_bytes", "8192\n")
    assert cgroup_memory_limit(tmp_path, {"": "/jobs/mine"}) == 4096
    assert cgroup_memory_limit(tmp_path, {"memory": "/jobs", "": "/elsewhere"}) == 8192
    assert cgroup_memory_limit(tmp_path, {}) is None
