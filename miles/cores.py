"""The cores and memory that this process may use, and how a run's processes share the cores."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable that PyTorch, oneDNN and OpenBLAS read when they are loaded."""
WAIT_VARIABLE = "OMP_WAIT_POLICY"
CGROUP_ROOT = pathlib.Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the cores that this process may use: those of its CPU affinity, or fewer under a cgroup's CPU quota.

    `os.cpu_count` returns the machine's cores: a container with 2 cores on a host with 64 would start 64 threads,
    which then wait for one another.
    """
    affinity = len(os.sched_getaffinity(0))
    quota = cgroup_quota(CGROUP_ROOT, own_cgroups())
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cgroup_quota(root: pathlib.Path, cgroups: Mapping[str, str]) -> float | None:
    """Return the smallest CPU quota, in cores, of this process's cgroup and its parents; None without a quota.

    Args:
        root: Where cgroups are mounted.
        cgroups: Path of the process's cgroup by controller, as in /proc/self/cgroup; "" stands for version 2.
    """
    quotas = []
    if "" in cgroups:
        quotas += [_quota_v2(folder) for folder in _upwards(root, cgroups[""])]
    for controllers, path in cgroups.items():
        if "cpu" in controllers.split(","):
            quotas += [_quota_v1(folder) for folder in _upwards(root / controllers, path)]
    known = [quota for quota in quotas if quota is not None]
    return min(known, default=None)


def cgroup_memory_limit(root: pathlib.Path, cgroups: Mapping[str, str]) -> int | None:
    """Return the smallest memory limit, in bytes, of this process's cgroup and its parents; None without a limit."""
    limits = []
    if "" in cgroups:
        limits += [_number_in(folder / "memory.max") for folder in _upwards(root, cgroups[""])]
    for controllers, path in cgroups.items():
        if "memory" in controllers.split(","):
            limits += [_number_in(folder / "memory.limit_in_bytes") for folder in _upwards(root / controllers, path)]
    return min((limit for limit in limits if limit is not None), default=None)


def share_of(cores: int, processes: int) -> int:
    """Return the threads for each of several processes that compute at the same time."""
    return max(1, cores // max(1, processes))


def limit_threads() -> None:
    """Limit this process to as many compute threads as it may use cores, unless its environment sets the number.

    Call before torch or numpy is imported. Waiting threads do not spin: another process may need the core.
    """
    os.environ.setdefault(THREADS_VARIABLE, str(usable_cores()))
    os.environ.setdefault(WAIT_VARIABLE, "PASSIVE")


def own_cgroups() -> dict[str, str]:
    """Return the path of this process's cgroup by controller, as in /proc/self/cgroup; "" stands for version 2."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        return {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    return {}


def _upwards(mount: pathlib.Path, path: str) -> list[pathlib.Path]:
    """Return the folders of a cgroup and its parents. In a container the mount may be the cgroup itself."""
    folder = mount / path.lstrip("/")
    return [each for each in (folder, *folder.parents) if each == mount or mount in each.parents]


def _number_in(file: pathlib.Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())  # no number: "max", without a limit
    return None


def _quota_v2(folder: pathlib.Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)  # no number: "max", without a quota
    return None


def _quota_v1(folder: pathlib.Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
