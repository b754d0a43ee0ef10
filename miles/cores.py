"""How many cores this process may really use, and how a run's processes share them."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Read by PyTorch, oneDNN and OpenBLAS when they are loaded."""
WAIT_VARIABLE = "OMP_WAIT_POLICY"
_CGROUP_ROOT = pathlib.Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may keep busy: those of its CPU affinity, or fewer under a cgroup's CPU quota.

    `os.cpu_count` names those of the machine instead, so that a container of 2 cores on a host of 64 would start 64
    threads, which then wait for one another.
    """
    affinity = len(os.sched_getaffinity(0))
    quota = cgroup_quota(_CGROUP_ROOT, _own_cgroups())
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cgroup_quota(root: pathlib.Path, cgroups: Mapping[str, str]) -> float | None:
    """The smallest CPU quota, in cores, of this process's cgroup and of those around it; None without one.

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


def share_of(cores: int, processes: int) -> int:
    """Threads of each of some processes that compute at the same time."""
    return max(1, cores // max(1, processes))


def limit_threads() -> None:
    """Have this process compute with as many threads as it may use cores, unless its environment says how many.

    Call before torch or numpy is imported. Threads that wait must not spin: another process may need the core.
    """
    os.environ.setdefault(THREADS_VARIABLE, str(usable_cores()))
    os.environ.setdefault(WAIT_VARIABLE, "PASSIVE")


def _own_cgroups() -> dict[str, str]:
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 2) for line in lines)
    return {controllers: path for _, controllers, path in fields}


def _upwards(mount: pathlib.Path, path: str) -> list[pathlib.Path]:
    """Folders of a cgroup and of those around it. In a container the mount may be the cgroup itself."""
    folder = mount / path.lstrip("/")
    return [each for each in (folder, *folder.parents) if each == mount or mount in each.parents]


def _quota_v2(folder: pathlib.Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: pathlib.Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
