"""The engine's side of weight updates: stay subscribed to the weightsync service and carry out its orders in turn."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import sys
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, cast

import grpc.aio

from miles.rpc.channel import connect
from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights.adapters.merging import AdapterBase
from miles.weights.base import Endpoint, WeightReceiver, WeightsRefused
from miles.weights.engine_weights import EngineWeights, WeightTarget
from miles.weights.manifest import ManifestError
from miles.weights.registry import create_transport
from miles.weights.serving_lease import ServingLease
from miles.weights.transports.cuda_ipc.probe import SharedProbe, share_probe
from miles.weights.usable_transports import usable_transports

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen.weightsync_pb2 import TransportKind

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_DESCRIBE_DEADLINE_S = 10.0


class SubscriberState(enum.Enum):
    """Whether the engine may serve, and whether it has prefetched a newer version."""

    EMPTY = "empty"
    """Has no version yet; must not serve."""
    SERVING = "serving"
    PREFETCHED = "prefetched"
    """Serves one version and has prefetched the next."""
    QUARANTINED = "quarantined"
    """Must not serve until a verified full load."""


class WeightSubscriber:
    """Keeps one engine at the version that the service wants. Runs on the event loop that called `start`."""

    def __init__(
        self,
        address: str,
        job_id: str,
        engine_id: str,
        stream: policy_pb2.WeightStream.ValueType,
        target: WeightTarget,
        on_change: Callable[[SubscriberState], None] | None = None,
        create_receiver: Callable[[TransportKind.ValueType, Endpoint], WeightReceiver] = create_transport,
        base: AdapterBase | None = None,
        share_gpu_memory: Callable[[torch.device, int], SharedProbe | None] = share_probe,
    ) -> None:
        """`address` is host:port of the service; `on_change` is called on the event loop after each change of state.

        `create_receiver` makes the engine's end of a transport. Versions that consist of an adapter are merged into
        `base`; without one, they fail. `share_gpu_memory` shares a little memory of a GPU, for the trainer to open,
        unless a version of so many bytes is too large for it; 0 bytes: the size is unknown.
        """
        self._address = address
        self._target = target
        self._on_change = on_change
        self._weights = EngineWeights(address, target, create_receiver, base)
        self._share_gpu_memory = share_gpu_memory
        self._lease = ServingLease()
        self._hello = weightsync_pb2.EngineHello(job_id=job_id, engine_id=engine_id, stream=stream)
        self._quarantined_by = 0
        """The last order that quarantined the engine; swaps ordered before it do not readmit the engine."""
        self._runner: asyncio.Task[None] | None = None
        self._connection: asyncio.Task[None] | None = None
        self._retry_s = _FIRST_RETRY_S
        self._changed = asyncio.Event()
        self.state = SubscriberState.EMPTY
        self.connected = False
        self.last_error = ""
        self.refused = False
        """Whether the target refused the last version that it was to load: no retry helps."""
        self.pause_s = 0.0

    @property
    def version(self) -> int | None:
        """Version that the engine may serve; None while it must not serve."""
        served = self._weights.served
        if served is None or self.state is SubscriberState.QUARANTINED:
            return None
        return served.version

    async def start(self) -> None:
        """Subscribe to the service in the background."""
        self._runner = asyncio.create_task(self._run(), name=f"weights of {self._hello.engine_id}")

    async def close(self, deadline_s: float = 10.0) -> None:
        """Unsubscribe; an order under way has `deadline_s` seconds to finish. The engine keeps what it serves."""
        if self._runner is None:
            return
        self._runner.cancel()
        done, _ = await asyncio.wait([self._runner], timeout=deadline_s)
        if not done:
            raise TimeoutError(f"waited {deadline_s:g} s for engine {self._hello.engine_id} to finish a weight order")
        self._runner = None
        await self._weights.close()

    async def wait_for_version(self, version: int | None, deadline_s: float) -> None:
        """Return once the engine may serve `version` (None: any); TimeoutError says what it serves instead."""
        try:
            async with asyncio.timeout(deadline_s):
                while self.version is None or (version is not None and self.version != version):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            wanted = "a version" if version is None else f"version {version}"
            raise TimeoutError(
                f"waited {deadline_s:g} s for engine {self._hello.engine_id} to serve {wanted}; it is "
                f"{self.state.value} at version {self.version}, connected: {self.connected}, {self.last_error!r}"
            ) from None

    async def _run(self) -> None:
        """Subscribe again and again, with growing pauses while the service cannot be reached."""
        with contextlib.ExitStack() as at_end:
            watch = asyncio.create_task(self._watch_lease(), name=f"serving lease of {self._hello.engine_id}")
            at_end.callback(watch.cancel)
            while True:
                self._connection = asyncio.create_task(self._connect())
                try:
                    await asyncio.wait([self._connection])
                finally:
                    self._connection.cancel()
                    await _wait_through_cancellation(self._connection)
                if not self._connection.cancelled():
                    self._connection.result()
                await asyncio.sleep(self._retry_s * random.uniform(0.5, 1.0))
                self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    async def _connect(self) -> None:
        """Connect to the service and serve one subscription, until it breaks."""
        # A new channel each time: one that has failed for long waits for its own, longer, back-off.
        async with connect(self._address) as channel:
            stub = cast(
                "weightsync_pb2_grpc.WeightSyncServiceAsyncStub", weightsync_pb2_grpc.WeightSyncServiceStub(channel)
            )
            try:
                described = await stub.DescribeTransports(
                    weightsync_pb2.DescribeTransportsRequest(job_id=self._hello.job_id, stream=self._hello.stream),
                    timeout=_DESCRIBE_DEADLINE_S,
                )
                usable = await asyncio.to_thread(usable_transports, described)
                async with self._shared_gpu_memory(described.version_nbytes) as gpu_memory:
                    await self._subscribe(stub, usable, gpu_memory)
            except grpc.aio.AioRpcError as error:
                self.last_error = f"{error.code().name}: {error.details()}"
                logger.info("weightsync at %s: %s; retrying in %.1f s", self._address, self.last_error, self._retry_s)

    @contextlib.asynccontextmanager
    async def _shared_gpu_memory(self, nbytes: int) -> AsyncGenerator[weightsource_pb2.GpuMemoryProbe | None, None]:
        """Share a little memory of the engine's GPU meanwhile; None when it has no GPU, or cannot share."""
        device = self._target.device
        if device.type != "cuda":
            yield None
            return
        sharing = asyncio.create_task(asyncio.to_thread(self._share_gpu_memory, device, nbytes))
        try:
            await _wait_through_cancellation(sharing)
            shared = sharing.result()
            yield None if shared is None else shared.message
        finally:
            if (shared := sharing.result()) is not None:
                shared.free()

    async def _subscribe(
        self,
        stub: weightsync_pb2_grpc.WeightSyncServiceAsyncStub,
        usable: list[weightsync_pb2.TransportKind.ValueType],
        gpu_memory: weightsource_pb2.GpuMemoryProbe | None,
    ) -> None:
        """Subscribe and follow the orders, until the subscription breaks.

        Orders wait in a queue, but a quarantine and a lease take effect when they arrive. When the subscription breaks,
        the order under way is finished first, so that the next hello reports what the engine really serves.
        """
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None] = asyncio.Queue()
        self._quarantined_by = 0
        call = stub.Subscribe()
        hello = self._hello_now()
        hello.usable.extend(usable)
        if gpu_memory is not None:
            hello.gpu_memory.CopyFrom(gpu_memory)
        await call.write(weightsync_pb2.SubscribeRequest(hello=hello))
        worker = asyncio.create_task(self._work(orders, call))
        self.connected = True
        try:
            async for order in call:
                self._retry_s = _FIRST_RETRY_S
                kind = order.WhichOneof("kind")
                if kind == "serving_lease":
                    self._lease.renew(order.serving_lease.lease_ms / 1000)
                elif kind == "quarantine":
                    self._quarantined_by = order.order_id
                    self._quarantine(order.quarantine.reason)
                else:
                    orders.put_nowait(order)
        finally:
            self.connected = False
            orders.put_nowait(None)
            await _wait_through_cancellation(worker)
            call.cancel()

    async def _watch_lease(self) -> None:
        """Quarantine the engine when its lease expires, and reconnect: it then reports that it serves nothing."""
        while True:
            await self._lease.wait_until_expired()
            self._quarantined_by = sys.maxsize  # also of an order that is being carried out
            if self.state is not SubscriberState.EMPTY:
                self._quarantine(
                    f"nothing was heard from the weightsync service at {self._address} for {self._lease.duration_s:g} s"
                )
            if self._connection is not None:
                self._connection.cancel()

    async def _work(
        self,
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None],
        call: grpc.aio.StreamStreamCall[weightsync_pb2.SubscribeRequest, weightsync_pb2.SubscribeResponse],
    ) -> None:
        """Carry out orders in turn and report each; stops at None or when the subscription has broken."""
        while (order := await orders.get()) is not None and self.connected:
            report = await self._carry_out(order)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The reader notices a broken subscription, and the next hello contains what this report would have.
                await call.write(weightsync_pb2.SubscribeRequest(report=report))

    async def _carry_out(self, order: weightsync_pb2.SubscribeResponse) -> weightsync_pb2.EngineReport:
        """Carry out an order and report the outcome; a failure quarantines the engine, except that of a discard."""
        report = weightsync_pb2.EngineReport(order_id=order.order_id, outcome=weightsync_pb2.ORDER_OUTCOME_DONE)
        began = time.monotonic()
        kind = order.WhichOneof("kind")
        try:
            if kind == "prefetch":
                self.refused = False
                await self._weights.prefetch(order.prefetch)
                if self.state is SubscriberState.SERVING:
                    self._enter(SubscriberState.PREFETCHED)
            elif kind == "swap":
                self.pause_s = report.pause_s = await self._weights.swap(order.swap)
                if order.order_id > self._quarantined_by:
                    self.last_error = ""
                    self._enter(SubscriberState.SERVING)
            elif kind == "discard":
                discarded = self._weights.discard_prefetched(order.discard.publication_id)
                if discarded and self.state is SubscriberState.PREFETCHED:
                    self._enter(SubscriberState.SERVING)
                await self._weights.wait_until_released(order.discard)
            elif kind == "check":
                await self._weights.check(order.check.manifest)
            else:
                raise ManifestError(f"order {order.order_id} is of a kind this engine does not know; update it")
        except Exception as error:  # whatever an engine raises decides one thing: this order failed
            report.outcome = weightsync_pb2.ORDER_OUTCOME_FAILED
            report.error = f"{type(error).__name__}: {error}"
            if isinstance(error, WeightsRefused):
                self.refused = True
                report.outcome, report.error = weightsync_pb2.ORDER_OUTCOME_REFUSED, str(error)
            logger.warning("engine %s failed to %s: %s", self._hello.engine_id, kind, report.error)
            if kind != "discard":
                self._quarantine(report.error)
        report.elapsed_s = time.monotonic() - began
        return report

    def _quarantine(self, reason: str) -> None:
        self.last_error = reason
        self._enter(SubscriberState.QUARANTINED)

    def _enter(self, state: SubscriberState) -> None:
        self.state = state
        self._changed.set()
        if self._on_change is not None:
            self._on_change(state)

    def _hello_now(self) -> weightsync_pb2.EngineHello:
        hello = weightsync_pb2.EngineHello()
        hello.CopyFrom(self._hello)
        served = self._weights.served
        if served is not None and self.version is not None and self._target.version == self.version:
            hello.version = served.version
            hello.manifest_checksum = served.checksum
        return hello


async def _wait_through_cancellation(worker: asyncio.Task[Any]) -> None:
    """Wait for a task even if the waiter is cancelled: an order is never left half done, nor memory left shared."""
    cancelled = False
    while not worker.done():
        try:
            await asyncio.shield(worker)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
