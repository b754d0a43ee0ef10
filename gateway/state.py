"""The state shared by all routes: the controller client, cached answers, and event feeds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from miles.gateway.cache import AnswerCache
from miles.gateway.controller_client import ControllerClient
from miles.gateway.feeds import Feeds
from miles.gateway.options import GatewayOptions
from miles.gateway.schemas import Job, Worker, worker_model
from miles.rpc.gen import controller_pb2, job_pb2, records_pb2

RENEW_S = 0.3
JOB_FOR_S = 1.0
"""A job's record is renewed when one older than `RENEW_S` is read. Until it is `JOB_FOR_S` old, callers do not wait for
that: the controller may be busy with a step. A change of state that this gateway caused or saw is never hidden."""
SLOW_RENEW_S = 0.7
WORKERS_FOR_S = 1.0
METRICS_FOR_S = 1.0
RUN_FOR_S = 1.0


class GatewayState:
    """The state of one gateway. Use as an async context manager."""

    def __init__(self, options: GatewayOptions) -> None:
        self.options = options
        self.controller = ControllerClient(options.controller)
        self.feeds = Feeds(self.controller, self.forget)
        self._jobs: AnswerCache[tuple[job_pb2.Job, bytes]] = AnswerCache(JOB_FOR_S, renew_s=RENEW_S)
        self._workers: AnswerCache[list[controller_pb2.Worker]] = AnswerCache(WORKERS_FOR_S, renew_s=SLOW_RENEW_S)
        self._metrics: AnswerCache[bytes] = AnswerCache(METRICS_FOR_S, renew_s=SLOW_RENEW_S)
        self._runs: AnswerCache[controller_pb2.DescribeRunResponse] = AnswerCache(RUN_FOR_S, renew_s=RENEW_S)
        self._tidying: asyncio.Task[None] | None = None

    async def __aenter__(self) -> GatewayState:
        self._tidying = asyncio.create_task(self.feeds.tidy(), name="closing idle feeds")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tidying
        await self.feeds.close()
        await self.controller.close()

    async def job(self, job_id: str) -> job_pb2.Job:
        """Return a job's record, at most `JOB_FOR_S` old. Raises Problem when there is none."""
        return (await self._job(job_id))[0]

    async def encoded_job(self, job_id: str) -> bytes:
        """Return the same as JSON of a `Job`, encoded once for all watchers."""
        return (await self._job(job_id))[1]

    async def _job(self, job_id: str) -> tuple[job_pb2.Job, bytes]:
        async def make() -> tuple[job_pb2.Job, bytes]:
            job = await self.controller.job(job_id)
            return job, Job.of(job).model_dump_json().encode()

        return await self._jobs.get(job_id, make)

    def forget(self, job_id: str) -> None:
        """Remove cached answers about a job that has changed, so that the next answer shows the change."""
        self._jobs.forget(job_id)
        self._runs.forget(job_id)

    async def run(self, job_id: str) -> controller_pb2.DescribeRunResponse:
        """Return the state of a job's run, at most `RUN_FOR_S` old."""
        return await self._runs.get(job_id, lambda: self.controller.run(job_id))

    async def workers(self) -> list[Worker]:
        """Return every worker, at most `WORKERS_FOR_S` old."""

        async def make() -> list[controller_pb2.Worker]:
            return list(await self.controller.workers())

        described = []
        for worker in await self._workers.get("all", make):
            job_id = next(iter(worker.job_ids), None)
            version = (await self.job(job_id)).policy_version if job_id else None
            described.append(worker_model(worker, version))
        return described

    async def encoded_metrics(
        self, request: records_pb2.ListMetricsRequest, encode: Callable[[records_pb2.ListMetricsResponse], bytes]
    ) -> bytes:
        """Return per-step metrics, at most `METRICS_FOR_S` old, encoded once for equal requests."""

        async def make() -> bytes:
            # In a thread: a long run has hundreds of thousands of values, and other requests must not wait.
            return await asyncio.to_thread(encode, await self.controller.metrics(request))

        return await self._metrics.get(request.SerializeToString(deterministic=True), make)
