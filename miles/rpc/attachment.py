"""A worker's attachment to the controller: registration, heartbeats, and the worker lease that they renew."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pathlib
import platform
import uuid
from collections.abc import AsyncIterator, Callable

import grpc.aio

from miles.rpc.advertise import reachable_address
from miles.rpc.channel import connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc
from miles.rpc.refusals import Refusals
from miles.telemetry.repeated_warnings import RepeatedWarnings
from miles.telemetry.tracing import write_spans

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_BEAT_S = 2.0
"""Time between heartbeats, which also report the worker's progress, unless the controller says another."""


class WorkerAttachment:
    """Keeps a worker attached to the controller while `run` runs, also when the controller restarts.

    `heartbeat` is called before each heartbeat and returns the worker's activity; `sequence` is filled in here.
    """

    def __init__(
        self,
        controller_address: str,
        *,
        worker_id: str,
        kind: controller_pb2.WorkerKind.ValueType,
        address: str,
        heartbeat: Callable[[], controller_pb2.WorkerHeartbeat],
        num_gpus: int = 0,
        info: dict[str, str | int | float] | None = None,
        advertise: str | None = None,
    ) -> None:
        """The worker listens on `address` and is reached at `advertise`; see `reachable_address`."""
        self._controller_address = controller_address
        self._heartbeat = heartbeat
        self._lease_ttl_s, self._beat_s = 3.0, _BEAT_S
        self.lease_number: int | None = None
        self.registration = controller_pb2.WorkerRegistration(
            worker_id=worker_id,
            kind=kind,
            address=reachable_address(address, advertise, controller_address),
            incarnation=uuid.uuid4().hex,
            num_gpus=num_gpus,
            info_json=json.dumps({"pid": os.getpid(), "host": platform.node(), **(info or {})}),
        )

    async def run(self) -> None:
        """Attach, and attach again whenever the stream breaks, until cancelled.

        Raises ServiceExit when the first attachment fails for a cause that waiting cannot mend.
        """
        refusals = Refusals(self._controller_address)
        attached = False
        async with connect(self._controller_address) as channel:
            stub = controller_pb2_grpc.ControllerServiceStub(channel)
            failures = RepeatedWarnings()
            while True:
                try:
                    async for response in stub.Attach(self._requests()):
                        self.lease_number = response.lease_number
                        self._lease_ttl_s = response.lease_ttl_ms / 1000
                        self._beat_s = response.heartbeat_interval_ms / 1000 or _BEAT_S
                        attached, failures = True, RepeatedWarnings()
                        if response.HasField("trace"):
                            await self._write_trace(response.trace)
                except grpc.aio.AioRpcError as error:
                    if not attached:
                        await refusals.judge(error)
                    why = error.details() or error.code().name
                    if line := failures.note(f"not attached to {self._controller_address} ({why}); trying again"):
                        logger.warning("%s", line)
                self.lease_number = None
                await asyncio.sleep(_RETRY_S)

    async def _write_trace(self, order: controller_pb2.TraceOrder) -> None:
        times = (order.begin_unix_ns, order.end_unix_ns)
        try:
            await asyncio.to_thread(write_spans, pathlib.Path(order.folder), self.registration.worker_id, *times)
        except OSError as error:  # a trace is no reason to stop working
            logger.warning("no trace is written to %s: %s", order.folder, error)

    async def _requests(self) -> AsyncIterator[controller_pb2.AttachRequest]:
        yield controller_pb2.AttachRequest(registration=self.registration)
        sequence = 0
        while True:
            heartbeat = self._heartbeat()
            sequence += 1
            heartbeat.sequence = sequence
            yield controller_pb2.AttachRequest(heartbeat=heartbeat)
            await asyncio.sleep(min(self._lease_ttl_s / 3, self._beat_s))
