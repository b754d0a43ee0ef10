"""A drill: kill services of a running cluster as a crash would, and measure how long each takes to come back."""

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

from miles.launcher.drill.schedule import Blow, ChaosSchedule, Strike
from miles.rpc import ExitCode, ServiceExit, connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.launcher.cluster import LocalCluster

logger = logging.getLogger(__name__)

RECOVERY_LIMIT_S = 300.0
"""How long a service that was killed may take to come back, and the job then to take a step."""
SEVERAL, EVERYTHING = "several at once", "everything at once"
_LOOK_EVERY_S = 0.1
_ANSWER_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """What came of one kill, or of one strike."""

    what: str
    """The service; SEVERAL or EVERYTHING for strikes that hit more than one."""
    back_s: float | None = None
    """From the kill until the service answered again."""
    step_s: float | None = None
    """From the strike until the job had taken a step that began or ended after it; None when it had no step left."""


class Drill:
    """Carries out a schedule on a cluster. `on_event` is to be told of the job's events, if there is a job."""

    def __init__(self, cluster: LocalCluster, seed: int, mean_pause_s: float, *, with_job: bool = True) -> None:
        self.recoveries: list[Recovery] = []
        self.kills = 0
        self._cluster = cluster
        self._schedule = ChaosSchedule(seed, cluster.services, mean_pause_s)
        self._with_job = with_job
        self._last_step_ns = 0
        self._stepped = asyncio.Event()
        self._known: dict[str, set[str]] = {}
        """Incarnations of each worker that are not to be taken for one that came back."""
        self._controller_answered = False

    def on_event(self, event: job_pb2.JobEvent) -> None:
        """The job's next event."""
        if event.WhichOneof("kind") == "metrics" and "perf/step_time" in event.metrics.values:
            self._last_step_ns = event.unix_ns
            self._stepped.set()

    async def run(self, strikes: int | None = None) -> None:
        """Strike after strike, or so many, until cancelled. Raises ServiceExit when something does not come back."""
        for _ in itertools.count() if strikes is None else range(strikes):
            strike = self._schedule.next()
            await asyncio.sleep(strike.pause_s)
            await self.carry_out(strike)

    async def carry_out(self, strike: Strike) -> None:
        """Kill, and wait until all that was killed is back and the job goes on."""
        last_blow_s: dict[str, float] = {}
        hit: set[str] = set()
        for blow in strike.blows:
            await asyncio.sleep(blow.after_s)
            killed = await self._strike(blow)
            hit |= killed
            last_blow_s |= dict.fromkeys(killed, time.monotonic())
        began_s, began_ns = time.monotonic(), time.time_ns()
        if not hit:
            return
        await self._until_back(last_blow_s)
        if self._with_job:
            await self._until_step(began_ns)
            what = hit.copy().pop() if len(hit) == 1 else EVERYTHING if hit == set(self._cluster.services) else SEVERAL
            self.recoveries.append(Recovery(what, step_s=time.monotonic() - began_s))

    async def _strike(self, blow: Blow) -> set[str]:
        for worker in await self._workers():
            self._known.setdefault(worker.registration.worker_id, set()).add(worker.registration.incarnation)
        killed = {name for name in blow.victims if self._cluster.kill(name)}
        self.kills += len(killed)
        logger.warning("drill: killed %s", ", ".join(sorted(killed)) or "nothing, as nothing of it was running")
        return killed

    async def _until_back(self, killed_s: dict[str, float]) -> None:
        """Note for each service when it answers again; `killed_s` is when it was killed."""
        missing = set(killed_s)
        end = time.monotonic() + RECOVERY_LIMIT_S
        while missing:
            if time.monotonic() > end:
                problem = f"{', '.join(sorted(missing))} did not come back within {RECOVERY_LIMIT_S:g} s of the drill"
                raise ServiceExit(ExitCode.WORKER_FAILED, problem)
            for name in await self._answering(missing):
                self.recoveries.append(Recovery(name, back_s=time.monotonic() - killed_s[name]))
                missing.remove(name)
            await asyncio.sleep(_LOOK_EVERY_S)

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
        """Those of the services that serve again."""
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
        """Workers that are attached; none while the controller is away."""
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
    """The drill that the configuration asks for, if it does."""
    seed = config.services.chaos
    return None if seed is None else Drill(cluster, seed, config.services.chaos_interval_s, with_job=with_job)


async def _redis_answers(url: str) -> bool:
    client = redis.asyncio.Redis.from_url(url, socket_timeout=1.0, retry=None)
    try:
        return bool(await client.ping())
    except redis.exceptions.RedisError:
        return False
    finally:
        with contextlib.suppress(redis.exceptions.RedisError):
            await client.aclose()


async def _listens(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return False
    writer.close()
    return True


def recovery_table(recoveries: Iterable[Recovery]) -> Table:
    """Seconds per service until it answered again, and until the job had taken its next step when only it was hit."""
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
