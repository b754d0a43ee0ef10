"""A drill: kills services of a running cluster as crashes would, and measures how long each takes to recover."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import statistics
import time
import urllib.parse
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc.aio
import redis.asyncio
import redis.exceptions
from rich.table import Table

from miles.launcher.drill.schedule import ChaosSchedule, Kill, KillRound
from miles.rpc import ExitCode, ServiceExit, connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.launcher.cluster import LocalCluster

logger = logging.getLogger(__name__)

RECOVERY_LIMIT_S = 300.0
"""How long a killed service may take to recover, and the job then to finish a step."""
SEVERAL, EVERYTHING = "several at once", "everything at once"
_POLL_S = 0.1
_ANSWER_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """How long the recovery from one kill, or from one round, took."""

    what: str
    """The service; SEVERAL or EVERYTHING for rounds that killed more than one."""
    back_s: float | None = None
    """Time from the kill until the service answered again."""
    step_s: float | None = None
    """Time from the round until the job had finished another step; None for a single service, and without a job."""


class Drill:
    """Carries out a schedule on a cluster. Pass the events of the job, if there is one, to `on_event`."""

    def __init__(self, cluster: LocalCluster, seed: int, mean_pause_s: float, *, with_job: bool = True) -> None:
        self.recoveries: list[Recovery] = []
        self.kills = 0
        self._cluster = cluster
        self._schedule = ChaosSchedule(seed, cluster.services, mean_pause_s)
        self._with_job = with_job
        self._last_step_ns = 0
        self._stepped = asyncio.Event()
        self._known: dict[str, set[str]] = {}
        """Incarnations of each worker from before its kill, which do not count as recovered."""
        self._controller_answered = False

    def on_event(self, event: job_pb2.JobEvent) -> None:
        """Note the job's next event."""
        if event.WhichOneof("kind") == "metrics" and "perf/step_time" in event.metrics.values:
            self._last_step_ns = event.unix_ns
            self._stepped.set()

    async def run(self, rounds: int | None = None) -> None:
        """Run `rounds` rounds, or rounds without end until cancelled. Raises ServiceExit when a service stays away."""
        for _ in itertools.count() if rounds is None else range(rounds):
            kill_round = self._schedule.next()
            await asyncio.sleep(kill_round.pause_s)
            await self.carry_out(kill_round)

    async def carry_out(self, kill_round: KillRound) -> None:
        """Kill, and wait until all killed services have recovered and the job has finished another step."""
        last_kill_s: dict[str, float] = {}
        hit: set[str] = set()
        for kill in kill_round.kills:
            await asyncio.sleep(kill.after_s)
            killed = await self._kill(kill)
            hit |= killed
            last_kill_s |= dict.fromkeys(killed, time.monotonic())
        began_s, began_ns = time.monotonic(), time.time_ns()
        if not hit:
            return
        await self._until_back(last_kill_s)
        if self._with_job:
            await self._until_step(began_ns)
            what = hit.copy().pop() if len(hit) == 1 else EVERYTHING if hit == set(self._cluster.services) else SEVERAL
            self.recoveries.append(Recovery(what, step_s=time.monotonic() - began_s))

    async def _kill(self, kill: Kill) -> set[str]:
        for worker in await self._workers():
            self._known.setdefault(worker.registration.worker_id, set()).add(worker.registration.incarnation)
        killed = {name for name in kill.victims if self._cluster.kill(name)}
        self.kills += len(killed)
        logger.warning("drill: killed %s", ", ".join(sorted(killed)) or "nothing: none of the services was running")
        return killed

    async def _until_back(self, killed_s: dict[str, float]) -> None:
        """Record when each service answers again; `killed_s` has the time of its last kill."""
        missing = set(killed_s)
        end = time.monotonic() + RECOVERY_LIMIT_S
        while missing:
            if time.monotonic() > end:
                problem = f"{', '.join(sorted(missing))} did not recover within {RECOVERY_LIMIT_S:g} s of the drill"
                raise ServiceExit(ExitCode.WORKER_FAILED, problem)
            for name in await self._answering(missing):
                self.recoveries.append(Recovery(name, back_s=time.monotonic() - killed_s[name]))
                missing.remove(name)
            await asyncio.sleep(_POLL_S)

    async def _until_step(self, since_ns: int) -> None:
        try:
            async with asyncio.timeout(RECOVERY_LIMIT_S):
                while self._last_step_ns <= since_ns:
                    self._stepped.clear()
                    await self._stepped.wait()
        except TimeoutError:
            problem = f"waited {RECOVERY_LIMIT_S:g} s after the drill's kills for the job's next step"
            raise ServiceExit(ExitCode.WORKER_FAILED, problem) from None

    async def _answering(self, names: Iterable[str]) -> set[str]:
        """Return those of the services that answer again."""
        found = set()
        alive = {worker.registration.worker_id for worker in await self._workers() if self._is_new(worker)}
        for name in names:
            if self._cluster.pid(name) is None:
                continue
            if name == "redis":
                answers = await _redis_answers(self._cluster.redis_url)
            elif name == "gateway":
                answers = await _listens(self._cluster.gateway_url)
            elif name == "controller":
                answers = self._controller_answered
            else:
                answers = name in alive
            if answers:
                found.add(name)
        return found

    async def _workers(self) -> list[controller_pb2.Worker]:
        """Return the attached workers; none while the controller does not answer."""
        self._controller_answered = False
        try:
            async with connect(self._cluster.controller_address) as channel:
                stub = controller_pb2_grpc.ControllerServiceStub(channel)
                answer = await stub.ListWorkers(controller_pb2.ListWorkersRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError:
            return []  # the caller asks again
        self._controller_answered = True
        return [worker for worker in answer.workers if worker.alive]

    def _is_new(self, worker: controller_pb2.Worker) -> bool:
        registration = worker.registration
        pid = json.loads(registration.info_json).get("pid")
        exists = isinstance(pid, int) and os.path.exists(f"/proc/{pid}")
        return exists and registration.incarnation not in self._known.get(registration.worker_id, ())


def drill_of(config: JobConfig, cluster: LocalCluster, *, with_job: bool = True) -> Drill | None:
    """Return the configured drill, or None."""
    seed = config.services.chaos
    return None if seed is None else Drill(cluster, seed, config.services.chaos_interval_s, with_job=with_job)


async def _redis_answers(url: str) -> bool:
    with contextlib.suppress(redis.exceptions.RedisError):
        async with redis.asyncio.Redis.from_url(url, socket_timeout=1.0, retry=None) as client:
            return bool(await client.ping())
    return False


async def _listens(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.close()
        return True
    return False


def recovery_table(recoveries: Iterable[Recovery]) -> Table:
    """Build a table of seconds until each service answered again, and until the job had finished its next step."""
    table = Table(title="Recovery after kill -9, in seconds")
    table.add_column("killed")
    for heading in ("kills", "back: median", "longest", "next step: median", "longest"):
        table.add_column(heading, justify="right")
    found = list(recoveries)
    names = sorted({each.what for each in found}, key=lambda name: ((SEVERAL, EVERYTHING).count(name), name))
    for name in names:
        back = [each.back_s for each in found if each.what == name and each.back_s is not None]
        step = [each.step_s for each in found if each.what == name and each.step_s is not None]
        table.add_row(name, str(len(back) or len(step)), *_median_and_most(back), *_median_and_most(step))
    return table


def _median_and_most(values: list[float]) -> tuple[str, str]:
    return (f"{statistics.median(values):.2f}", f"{max(values):.2f}") if values else ("–", "–")
