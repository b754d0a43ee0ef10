"""Main memory and shared memory, against what the job needs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from miles.cores import CGROUP_ROOT, cgroup_memory_limit, own_cgroups
from miles.doctor import needs
from miles.doctor.finding import Finding, fail, ok, size, warn
from miles.doctor.subject import Subject

_NARROW = 0.8
"""Part of the memory that weights and optimizer may take before activations and caches become a worry."""
_SERVICES = 2 << 30
"""What the services' processes take without any model: a Python process with PyTorch has about 300 MiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Facts about memory, in bytes."""

    total: int
    available: int
    limit: int | None
    """Of the cgroup."""
    need: needs.Need | None


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """Facts about the folder of shared memory, in bytes."""

    folder: str
    total: int
    free: int
    writable: bool
    need: needs.Need | None
    required: bool
    """Whether the configuration names this transport, so that no other takes its place."""


def look(subject: Subject) -> Memory:
    """Read /proc/meminfo and the cgroup's limit."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text()))
    job = needs.job_of(subject)
    need = None
    if job is not None:
        parts = [needs.engine_memory(job), needs.trainer_memory(job)]
        if subject.get("device") == "cuda":
            parts = [needs.Need(2 * job.parameters * job.weight_bytes, "2 versions of the weights on their way")]
        if subject.get("update_weight_transfer_mode") in ("disk_delta", "grpc_chunks"):
            parts.append(needs.compared_versions(job))
        formula = " + ".join(part.formula for part in parts)
        need = needs.Need(sum(part.bytes for part in parts), formula)
    limit = cgroup_memory_limit(CGROUP_ROOT, own_cgroups())
    return Memory(int(fields["MemTotal"]) << 10, int(fields["MemAvailable"]) << 10, limit, need)


def judge(facts: Memory) -> list[Finding]:
    """Judge whether weights, gradients and optimizer fit."""
    usable = facts.total if facts.limit is None else min(facts.total, facts.limit)
    what = f"{size(usable)}" + (" by the cgroup's limit" if usable < facts.total else "")
    what += f", {size(facts.available)} available"
    if facts.need is None:
        if usable < 2 * _SERVICES:
            return [warn(what, "give the container at least 4 GiB: docker run --memory 4g")]
        return [ok(what)]
    asked = f"{what}; the job needs {facts.need}, activations and caches besides"
    change = "a smaller model, --lora-rank 16, fewer --rollout-num-workers, or a larger machine (docker run --memory)"
    if facts.need.bytes + _SERVICES > usable:
        return [fail(asked, change)]
    if facts.need.bytes + _SERVICES > _NARROW * usable or facts.need.bytes > facts.available:
        return [warn(asked, change)]
    return [ok(asked)]


def look_at_shared(subject: Subject, folder: str = "/dev/shm") -> Shared:
    """Measure the folder of shared memory."""
    job = needs.job_of(subject)
    mode = subject.get("update_weight_transfer_mode", "auto")
    if not os.path.isdir(folder):
        return Shared(folder, 0, 0, False, None, mode == "shared_memory")
    measured = os.statvfs(folder)
    return Shared(
        folder,
        measured.f_blocks * measured.f_frsize,
        measured.f_bavail * measured.f_frsize,
        os.access(folder, os.W_OK | os.X_OK),
        needs.shared_memory(job) if job is not None and mode in ("auto", "shared_memory") else None,
        mode == "shared_memory",
    )


def judge_shared(facts: Shared) -> list[Finding]:
    """Judge whether versions of the weights fit into shared memory."""
    bad = fail if facts.required else warn
    change = "docker run --shm-size 16g, or mount -o remount,size=16g /dev/shm"
    if not facts.writable:
        return [bad(f"{facts.folder} is not there, or not writable; weights go through slower ways", change)]
    what = f"{facts.folder} has {size(facts.free)} of {size(facts.total)} free"
    if facts.need is not None and facts.need.bytes > facts.free:
        return [bad(f"{what}; weights need {facts.need}", change)]
    if facts.need is None and facts.total < 1 << 30:
        return [warn(f"{what}; containers get 64 MiB by default, less than most models' weights", change)]
    return [ok(what + (f"; weights need {facts.need}" if facts.need else ""))]
