"""Limits of this process that a run reaches sooner than people expect."""

from __future__ import annotations

import dataclasses
import resource

from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject
from miles.memory.amount import size

_FEW_FILES, _ENOUGH_FILES = 256, 4096
"""Open files: a process needs one for each connection, mapped version and log."""
_FEW_PROCESSES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Soft and hard limits; -1 is none."""

    files: tuple[int, int]
    processes: tuple[int, int]
    address_space: tuple[int, int]
    file_size: tuple[int, int]


def look(subject: Subject) -> Limits:
    """Read this process's limits, which a run's processes inherit."""
    return Limits(
        resource.getrlimit(resource.RLIMIT_NOFILE),
        resource.getrlimit(resource.RLIMIT_NPROC),
        resource.getrlimit(resource.RLIMIT_AS),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )


def judge(facts: Limits) -> list[Finding]:
    """Judge open files, processes, address space and the size of files."""
    soft, hard = facts.files
    found = [ok(f"{'any number of' if soft < 0 else soft} open files a process")]
    if 0 <= soft < _ENOUGH_FILES:
        raised = f"ulimit -n {_ENOUGH_FILES if hard < 0 else min(hard, _ENOUGH_FILES)}"
        if 0 <= hard < _ENOUGH_FILES:
            raised += ", and raise the hard limit (docker run --ulimit nofile=65536)"
        bad = fail if soft < _FEW_FILES else warn
        found = [bad(f"{soft} open files a process, fewer than {_ENOUGH_FILES}", raised)]
    if 0 <= facts.processes[0] < _FEW_PROCESSES:
        found.append(warn(f"{facts.processes[0]} processes and threads for this user", "ulimit -u 4096"))
    if facts.address_space[0] >= 0:
        limited = f"address space is limited to {size(facts.address_space[0])}, and mapped weights count"
        found.append(warn(limited, "ulimit -v unlimited"))
    if facts.file_size[0] >= 0:
        limited = f"files are limited to {size(facts.file_size[0])}, checkpoints too"
        found.append(warn(limited, "ulimit -f unlimited"))
    return found
