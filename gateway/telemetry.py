"""Prometheus metrics of the gateway, and its request log."""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles.gateway.cache import AnswerCache
from miles.gateway.problems import Problem
from miles.gateway.schemas import ENDED, JobState

if TYPE_CHECKING:
    from miles.gateway.state import GatewayState

logger = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_EXPOSITION_FOR_S = 2.0
_LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0)


class Telemetry:
    """Counters of the gateway, and gauges of jobs and workers that are read on demand."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self._requests = Counter("miles_gateway_requests", "Requests answered", labels, registry=registry)
        self._latency = Histogram(
            "miles_gateway_request_seconds",
            "Time until the first byte of the answer",
            ["method", "route"],
            buckets=_LATENCIES_S,
            registry=registry,
        )
        self._watchers = Gauge("miles_gateway_watchers", "Event streams open", registry=registry)
        self._up = Gauge("miles_controller_up", "Whether the controller answers", registry=registry)
        self._jobs = Gauge("miles_jobs", "Jobs by state, of the newest 500", ["state"], registry=registry)
        self._step = Gauge(
            "miles_job_step", "Training steps done by a job that has not ended", ["job"], registry=registry
        )
        self._workers = Gauge("miles_workers", "Workers by kind and health", ["kind", "health"], registry=registry)
        self._load = Gauge("miles_worker_load", "Load of workers, by name", ["worker", "name"], registry=registry)
        self._version = Gauge("miles_worker_version", "Policy version a worker holds", ["worker"], registry=registry)
        self._expositions: AnswerCache[bytes] = AnswerCache(_EXPOSITION_FOR_S)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(method, route).observe(seconds)

    async def exposition(self, gateway: GatewayState) -> bytes:
        """Return all metrics in the Prometheus text format."""

        async def make() -> bytes:
            await self._collect(gateway)
            return generate_latest(self._registry)

        return await self._expositions.get("all", make)

    async def _collect(self, gateway: GatewayState) -> None:
        self._watchers.set(gateway.feeds.watchers)
        try:
            jobs = (await gateway.controller.jobs([], 500, "")).jobs
            workers = await gateway.workers()
        except Problem:
            self._up.set(0)
            return
        self._up.set(1)
        for gauge in (self._jobs, self._step, self._workers, self._load, self._version):
            gauge.clear()
        states = Tally(JobState.of(job.state) for job in jobs)
        for state in JobState:
            self._jobs.labels(state.value).set(states[state])
        for job in jobs:
            if JobState.of(job.state) not in ENDED:
                self._step.labels(job.job_id).set(job.policy_version)
        for (kind, health), count in Tally((worker.kind, worker.health) for worker in workers).items():
            self._workers.labels(kind, health).set(count)
        for worker in workers:
            for name, value in worker.load.items():
                self._load.labels(worker.id, name).set(value)
            if worker.version is not None:
                self._version.labels(worker.id).set(worker.version)


class RequestLog:
    """ASGI middleware: counts every request, and logs those that change something or fail.

    A log line has method, path, status, time and caller, but no headers, queries and bodies, which may have secrets.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0
        scope.setdefault("state", {})

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._note(scope, status, time.monotonic() - began)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if not status:  # the answer with status 500 is sent outside of this middleware
                self._note(scope, 500, time.monotonic() - began)
            raise

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "(none)")
        self._telemetry.answered(scope["method"], route, status, seconds)
        level = logging.WARNING if status >= 500 else logging.INFO
        if scope["method"] not in ("GET", "HEAD") or status >= 500:
            caller = scope["state"].get("caller", "-")
            path = scope["path"] if route != "(none)" else "(unknown path)"
            logger.log(level, "%s %s %d %.1f ms by %s", scope["method"], path, status, seconds * 1000, caller)
