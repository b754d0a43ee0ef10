"""What a worker's groups wait for outside the engine, as it is reported to the controller."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from miles.queue.backpressure import WriteWait
from miles.rpc.gen import job_pb2

if TYPE_CHECKING:
    from miles.reward_sdk.client import ServiceWait
    from miles.services.rollout.teachers.server import TeacherServer

_SLOW_S = 10.0
"""A reward that takes longer is worth a word; a failed call always is."""
_ENDINGS = {
    "retry": "their groups are generated again, 5 times at most (reward_failure_policy retry)",
    "drop": "they are left out of training (reward_failure_policy drop)",
}


def reward_waits(
    services: Iterable[ServiceWait], patience_s: float, failure_policy: str, now_s: float | None = None
) -> Iterator[job_pb2.Wait]:
    """Describe reward services that samples wait for, unless they answer as usual. Times are Unix seconds.

    `patience_s` is how long a sample waits; `failure_policy` is the setting that decides about it then.
    """
    now_s = time.time() if now_s is None else now_s
    for service in services:
        if not service.error and now_s - service.since_unix_s < _SLOW_S:
            continue
        times = f" ({service.failures} times)" if service.failures > 1 else ""
        yield job_pb2.Wait(
            what=service.service,
            detail=f"{service.error}{times}" if service.error else "it has not answered yet",
            since_unix_ns=int(service.since_unix_s * 1e9),
            gives_up_unix_ns=int((service.since_unix_s + patience_s) * 1e9),
            ending=_ENDINGS[failure_policy],
            samples=service.samples,
        )


def teacher_waits(servers: Iterable[TeacherServer], now_s: float | None = None) -> Iterator[job_pb2.Wait]:
    """Describe the servers of teachers that samples wait for, unless they answer as usual. Times are Unix seconds."""
    now_s = time.time() if now_s is None else now_s
    for server in servers:
        wait = server.wait
        if wait is None or (not wait.error and now_s - wait.since_unix_s < _SLOW_S):
            continue
        times = f" ({wait.failures} times)" if wait.failures > 1 else ""
        yield job_pb2.Wait(
            what=str(server),
            detail=f"{wait.error}{times}" if wait.error else "it has not answered yet",
            since_unix_ns=int(wait.since_unix_s * 1e9),
            gives_up_unix_ns=int((wait.since_unix_s + server.patience_s) * 1e9),
            ending=_ENDINGS["retry"].partition(" (")[0],
            samples=wait.requests,
        )


def queue_waits(waiting: Mapping[str, WriteWait]) -> Iterator[job_pb2.Wait]:
    """Describe finished groups that Redis does not take."""
    if not waiting:
        return
    oldest = min(waiting.values(), key=lambda wait: wait.since_unix_s)
    yield job_pb2.Wait(
        what="Redis to take finished groups",
        detail=f"{len(waiting)} wait: {oldest.error}",
        since_unix_ns=int(oldest.since_unix_s * 1e9),
        gives_up_unix_ns=int((oldest.since_unix_s + oldest.deadline_s) * 1e9),
        ending="their groups are generated again",
    )
