"""Checks of the whole stack now and then: keys of Redis, shared memory, stray processes, ends of services."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
import redis

from soak.invariants import isolation, leftovers, services
from soak.jobs import SoakJob
from soak.records import Records
from soak.stack import SERVED_REWARD, SoakStack, wait_until

GRACE_S = 90.0
"""How long after a job's end what it used may still be there."""
STOPPED_S = 30.0
"""How long processes may take to end after `miles serve` has."""
KEPT = "torchinductor_"
"""PyTorch's own cache of a user, which later processes use again."""
SHARED_MEMORY = pathlib.Path("/dev/shm")


class Sweep:
    """Reads what there is, and notes the faults."""

    def __init__(self, stack: SoakStack, records: Records) -> None:
        self._stack = stack
        self._records = records
        self._strays = leftovers.Strays(GRACE_S)

    def run(self, jobs: Sequence[SoakJob], kills: Counter[str], *, calm: bool) -> None:
        """Check everything; strays only while all services are there."""
        faults: list[str] = []
        now_s = self._records.now_s
        gone = [job for job in jobs if job.ended_s is not None and now_s > job.ended_s + GRACE_S]
        with contextlib.closing(redis.Redis.from_url(self._stack.redis.url, socket_timeout=10.0)) as client:
            faults += self._redis(client, jobs, gone)
        if SHARED_MEMORY.is_dir():
            names = os.listdir(SHARED_MEMORY)
            faults += leftovers.shared_memory_faults(names, [job.id for job in gone])
        if calm:
            faults += self._strays.observe(now_s, self._stray_processes())
        if self._stack.serve_log.exists():
            faults += services.end_faults(self._stack.serve_log.read_text(errors="replace"), kills)
        for fault in faults:
            self._records.violation("sweep", fault)

    def after_stop(self) -> None:
        """Check that `miles serve`, which has ended, left no process, temporary file or shared memory."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self._stray_processes(), STOPPED_S, "processes to end")
        faults = [f"process {pid} outlived miles serve: {line}" for pid, line in self._stray_processes().items()]
        faults += [
            f"{path} was left in the temporary folder"
            for path in self._stack.temporary.glob("*")
            if not path.name.startswith(KEPT)
        ]
        for path in SHARED_MEMORY.glob("miles-weights-*.lock"):
            with contextlib.suppress(FileNotFoundError):
                if f'"{self._stack.folder}/' in path.read_text(errors="replace"):
                    faults.append(f"{path} was left in shared memory")
        for fault in faults:
            self._records.violation("stopped", fault)

    def _redis(self, client: Any, jobs: Sequence[SoakJob], gone: Sequence[SoakJob]) -> list[str]:
        keys = [key.decode(errors="replace") for key in client.scan_iter(count=1000)]
        faults = isolation.key_faults(keys, [job.id for job in jobs])
        for job in gone:
            own = [key for key in keys if key.startswith(f"miles:{job.id}:")]
            left = {key: client.ttl(key) for key in own}
            faults += leftovers.key_faults(job.id, {key: ttl for key, ttl in left.items() if ttl != -2})
        return faults

    def _stray_processes(self) -> dict[int, str]:
        """Marked processes that descend from no service."""
        family: set[int] = set()
        roots = self._stack.pids()
        for name in ("launcher", SERVED_REWARD):
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                root = psutil.Process(roots[name])
                family |= {root.pid, *(child.pid for child in root.children(recursive=True))}
        return {pid: line for pid, line in self._stack.marked().items() if pid not in family}
