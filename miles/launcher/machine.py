"""What memory this machine has, for estimates to be compared with."""

from __future__ import annotations

import pathlib
import re
import subprocess

from miles.config.checks.device import visible_gpus
from miles.cores import CGROUP_ROOT, cgroup_memory_limit, own_cgroups
from miles.doctor.probe import torch_facts
from miles.placement.nodes import Cluster, local_cluster


def cluster_here(nodes: int) -> Cluster:
    """Return this machine with the GPUs that this process sees and their memory, and other nodes like it."""
    gpus = visible_gpus()
    return local_cluster(gpus, nodes, _gpu_bytes() if gpus else ())


def host_bytes() -> int:
    """Return the host memory that processes here may use together: a cgroup may have less than the machine."""
    found = re.search(r"MemTotal:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    assert found is not None, "Linux says how much memory there is"
    limit = cgroup_memory_limit(CGROUP_ROOT, own_cgroups())
    total = int(found[1]) << 10
    return total if limit is None else min(total, limit)


def _gpu_bytes() -> list[int]:
    """Return the memory of each GPU as PyTorch sees it, asked in a process of its own; nothing when it does not say."""
    try:
        facts = torch_facts()
    except subprocess.SubprocessError:
        return []
    return [] if facts is None else [gpu["bytes"] for gpu in facts["gpus"]]
