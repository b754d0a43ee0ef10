"""What an ended job, or an ended process, must not leave: keys of Redis for ever, shared memory, files, processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

KEPT_KEYS = ("events",)
"""Keys of a job that stay as long as its record: its history."""


def key_faults(job_id: str, seconds_left: Mapping[str, int]) -> list[str]:
    """Faults of the keys of an ended job, given the time that each has to live (-1: no end)."""
    kept = {f"miles:{job_id}:{name}" for name in KEPT_KEYS}
    endless = sorted(key for key, left in seconds_left.items() if left == -1 and key not in kept)
    return [f"keys of the ended job {job_id} have no time to live: {endless}"] if endless else []


def shared_memory_faults(names: Iterable[str], ended_ids: Iterable[str]) -> list[str]:
    """Faults of the names of files in shared memory: none is of an ended job."""
    found = [(name, job_id) for job_id in ended_ids for name in names if job_id in name]
    return [f"{name} is left in shared memory of job {job_id}" for name, job_id in found]


class Strays:
    """Processes that belong to no service any more: seen twice, some time apart."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since_s: dict[int, float] = {}

    def observe(self, now_s: float, strays: Mapping[int, str]) -> list[str]:
        """Faults, given the strays that run now by pid."""
        self._since_s = {pid: self._since_s.get(pid, now_s) for pid in strays}
        old = [pid for pid, since in self._since_s.items() if now_s - since > self._grace_s]
        return [f"process {pid} outlived its service by {self._grace_s:g} s: {strays[pid]}" for pid in old]
