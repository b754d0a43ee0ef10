"""The engine's side: stay attached to the weightsync service and carry out its orders, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import logging
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import grpc.aio
import torch

from miles.rpc.channel import connect
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import manifest as manifests
from miles.weights.adapters.merging import AdaptedWeights, AdapterBase
from miles.weights.base import Endpoint, ReceivedWeights, WeightReceiver
from miles.weights.check import check_weight_update_equal
from miles.weights.manifest import ManifestError
from miles.weights.reach import usable_transports
from miles.weights.registry import create_transport

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_DESCRIBE_DEADLINE_S = 10.0
_RELEASE_GRACE_S = 0.5
_RELEASE_POLL_S = 0.05


class WeightTarget(Protocol):
    """The part of RolloutEngine that updates need."""

    @property
    def version(self) -> int | None:
        """Version served now; None before the first `load_weights`."""

    @property
    def device(self) -> torch.device:
        """Where transports that need not go through host memory are to put the weights."""

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in a full set of weights; return how long generation stood still, in seconds."""

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The parameters as served, by HF name."""


class SubscriberState(enum.Enum):
    """Whether the engine may serve, and what it is about to serve."""

    EMPTY = "empty"
    """Holds no version yet; must not serve."""
    SERVING = "serving"
    PREFETCHED = "prefetched"
    """Serves one version and has the next at hand."""
    QUARANTINED = "quarantined"
    """Must not serve until a verified full load."""


class WeightSubscriber:
    """Keeps one engine at the version that the service wants.

    Everything runs on the event loop that called `start`, except mapping and verifying, which block a worker thread.
    """

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
    ) -> None:
        """`address` is host:port of the service; `on_change` is called on the event loop after each change of state.

        `create_receiver`: makes what gets the bytes of one kind of transport for this engine. Versions that consist of
        an adapter are merged into `base`; without one, they fail.
        """
        self._address = address
        self._target = target
        self._on_change = on_change
        self._base = base
        self._hello = weightsync_pb2.EngineHello(job_id=job_id, engine_id=engine_id, stream=stream)
        self._create_receiver = create_receiver
        self._transports: dict[int, WeightReceiver] = {}
        self._prefetched: _Bytes | None = None
        self._served: _Bytes | None = None
        self._outgoing: list[_Bytes] = []
        self._quarantined_by = 0
        self._runner: asyncio.Task[None] | None = None
        self._attending: asyncio.Task[None] | None = None
        self._retry_s = _FIRST_RETRY_S
        self._lease_s = 0.0
        self._lease_end: float | None = None
        """Until when the engine may serve unheard; None before the first lease and after one has run out."""
        self._leased = asyncio.Event()
        self._changed = asyncio.Event()
        self.state = SubscriberState.EMPTY
        self.connected = False
        self.last_error = ""
        self.pause_s = 0.0

    @property
    def version(self) -> int | None:
        """Version that the engine may serve; None while it must not serve."""
        if self._served is None or self.state is SubscriberState.QUARANTINED:
            return None
        return self._served.version

    async def start(self) -> None:
        """Begin to follow the service; returns at once."""
        self._runner = asyncio.create_task(self._run(), name=f"weights of {self._hello.engine_id}")

    async def close(self, deadline_s: float = 10.0) -> None:
        """Detach; an order being carried out has `deadline_s` seconds to finish. The engine keeps what it serves."""
        if self._runner is None:
            return
        self._runner.cancel()
        done, _ = await asyncio.wait([self._runner], timeout=deadline_s)
        if not done:
            raise TimeoutError(f"waited {deadline_s:g} s for engine {self._hello.engine_id} to finish a weight order")
        self._runner = None
        for transport in self._transports.values():
            await asyncio.to_thread(transport.close)
        self._transports.clear()

    async def wait_for_version(self, version: int | None, deadline_s: float) -> None:
        """Return once the engine may serve `version` (None: any); TimeoutError naming what it has instead."""
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
        """Attach again and again, with growing pauses while the service cannot be reached."""
        watch = asyncio.create_task(self._watch_lease(), name=f"lease of {self._hello.engine_id}")
        try:
            while True:
                self._attending = asyncio.create_task(self._attach())
                try:
                    await asyncio.wait([self._attending])
                finally:
                    self._attending.cancel()
                    await _finish(self._attending)
                if not self._attending.cancelled():
                    self._attending.result()
                await asyncio.sleep(self._retry_s * random.uniform(0.5, 1.0))
                self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        finally:
            watch.cancel()

    async def _attach(self) -> None:
        """One connection, until it breaks."""
        # A new channel each time: one that has failed for long waits by its own, longer, back-off.
        async with connect(self._address) as channel:
            stub = cast(
                "weightsync_pb2_grpc.WeightSyncServiceAsyncStub", weightsync_pb2_grpc.WeightSyncServiceStub(channel)
            )
            try:
                described = await stub.DescribeTransports(
                    weightsync_pb2.DescribeTransportsRequest(), timeout=_DESCRIBE_DEADLINE_S
                )
                await self._attend(stub, await asyncio.to_thread(usable_transports, described))
            except grpc.aio.AioRpcError as error:
                self.last_error = f"{error.code().name}: {error.details()}"
                logger.info("weightsync at %s: %s; retrying in %.1f s", self._address, self.last_error, self._retry_s)

    async def _attend(
        self,
        stub: weightsync_pb2_grpc.WeightSyncServiceAsyncStub,
        usable: list[weightsync_pb2.TransportKind.ValueType],
    ) -> None:
        """One subscription, until it breaks.

        Orders wait in a queue, but a quarantine and a lease take effect when they arrive. When the subscription breaks,
        the order being carried out is finished first, so that the next hello tells the truth.
        """
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None] = asyncio.Queue()
        self._quarantined_by = 0
        call = stub.Subscribe()
        hello = self._hello_now()
        hello.usable.extend(usable)
        await call.write(weightsync_pb2.SubscribeRequest(hello=hello))
        worker = asyncio.create_task(self._work(orders, call))
        self.connected = True
        try:
            async for order in call:
                self._retry_s = _FIRST_RETRY_S
                kind = order.WhichOneof("kind")
                if kind == "lease":
                    self._lease_s = order.lease.lease_ms / 1000
                    self._lease_end = time.monotonic() + self._lease_s
                    self._leased.set()
                elif kind == "quarantine":
                    self._quarantined_by = order.order_id
                    self._quarantine(order.quarantine.reason)
                else:
                    orders.put_nowait(order)
        finally:
            self.connected = False
            orders.put_nowait(None)
            await _finish(worker)
            call.cancel()

    async def _watch_lease(self) -> None:
        """Quarantine the engine when its lease runs out, and attach anew: it then says that it serves nothing."""
        while True:
            if self._lease_end is None:
                self._leased.clear()
                await self._leased.wait()
            elif (left_s := self._lease_end - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            else:
                self._lease_end = None
                self._quarantined_by = sys.maxsize  # also of an order that is being carried out
                if self.state is not SubscriberState.EMPTY:
                    self._quarantine(
                        f"nothing was heard from the weightsync service at {self._address} for {self._lease_s:g} s"
                    )
                if self._attending is not None:
                    self._attending.cancel()

    async def _work(
        self,
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None],
        call: grpc.aio.StreamStreamCall[weightsync_pb2.SubscribeRequest, weightsync_pb2.SubscribeResponse],
    ) -> None:
        """Carry out orders in turn and report each; stops at None or when the subscription has broken."""
        while (order := await orders.get()) is not None and self.connected:
            report = await self._carry_out(order)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # A broken subscription shows in the reader, and the next hello tells what this report would have.
                await call.write(weightsync_pb2.SubscribeRequest(report=report))

    async def _carry_out(self, order: weightsync_pb2.SubscribeResponse) -> weightsync_pb2.EngineReport:
        """Do what an order says; a failure becomes a report, and all but a failed drop quarantines the engine."""
        report = weightsync_pb2.EngineReport(order_id=order.order_id, outcome=weightsync_pb2.ORDER_OUTCOME_DONE)
        began = time.monotonic()
        kind = order.WhichOneof("kind")
        try:
            if kind == "prefetch":
                await self._prefetch(order.prefetch)
            elif kind == "swap":
                report.pause_s = await self._swap(order.swap, order.order_id)
            elif kind == "drop":
                await self._drop(order.drop)
            elif kind == "check":
                await self._check(order.check.manifest)
            else:
                raise ManifestError(f"order {order.order_id} is of a kind this engine does not know; update it")
        except Exception as error:  # whatever an engine raises decides one thing: this order failed
            report.outcome = weightsync_pb2.ORDER_OUTCOME_FAILED
            report.error = f"{type(error).__name__}: {error}"
            logger.warning("engine %s failed to %s: %s", self._hello.engine_id, kind, report.error)
            if kind != "drop":
                self._quarantine(report.error)
        report.elapsed_s = time.monotonic() - began
        return report

    async def _prefetch(self, order: weightsync_pb2.PrefetchOrder) -> None:
        if self._prefetched is not None:
            self._outgoing.append(self._prefetched)
            self._prefetched = None
        kind = order.handle.kind
        if kind not in self._transports:
            self._transports[kind] = self._create_receiver(kind, Endpoint(self._address, self._target.device))
        received = await asyncio.to_thread(self._transports[kind].receive, order.handle, order.manifest)
        if order.manifest.HasField("lora"):
            try:
                # Here and not in the swap: generation goes on meanwhile.
                received = await asyncio.to_thread(self._adapter_base().merge, received, order.manifest)
            except BaseException:
                received.release()
                raise
        self._prefetched = _Bytes(order.publication_id, order.manifest, received)
        if self.state is SubscriberState.SERVING:
            self._enter(SubscriberState.PREFETCHED)

    async def _swap(self, order: weightsync_pb2.SwapOrder, order_id: int) -> float:
        """Load what was prefetched; generation stands still for the seconds returned."""
        ready = self._prefetched
        if ready is None or ready.publication_id != order.publication_id:
            raise ManifestError(f"told to serve {manifests.describe(order.version)}, which was not prefetched")
        if self._served is not None:
            self._outgoing.append(self._served)
        self._served = None  # what the engine holds is unknown until load_weights returns
        self._prefetched = None
        try:
            self.pause_s = await self._target.load_weights(ready.version, ready.received.tensors)
        except BaseException:
            self._outgoing.append(ready)
            raise
        self._served = ready
        self._release()  # the engine has no use for older tensors once load_weights has returned
        if order_id > self._quarantined_by:
            self.last_error = ""
            self._enter(SubscriberState.SERVING)
        return self.pause_s

    async def _check(self, manifest: policy_pb2.Manifest) -> None:
        served = await self._target.weight_bytes()
        received = None if self._served is None else self._served.received
        if not manifest.HasField("lora"):
            await asyncio.to_thread(check_weight_update_equal, manifest, served)
        elif isinstance(received, AdaptedWeights):
            await asyncio.to_thread(self._adapter_base().check, manifest, received, served)
        else:
            raise ManifestError(f"the engine serves no adapter, but {manifests.describe(manifest.version)} is one")

    def _adapter_base(self) -> AdapterBase:
        if self._base is None:
            raise ManifestError("the version consists of an adapter, and this engine has no base to merge it into")
        return self._base

    async def _drop(self, order: weightsync_pb2.DropOrder) -> None:
        """Let go of bytes not served; raises when the engine still holds on to them after a grace."""
        if self._prefetched is not None and self._prefetched.publication_id == order.publication_id:
            self._outgoing.append(self._prefetched)
            self._prefetched = None
            if self.state is SubscriberState.PREFETCHED:
                self._enter(SubscriberState.SERVING)
        end = time.monotonic() + _RELEASE_GRACE_S
        while order.publication_id in self._release():
            if time.monotonic() > end:
                raise ManifestError(f"the engine still holds tensors of {manifests.describe(order.version)}")
            await asyncio.to_thread(gc.collect)
            await asyncio.sleep(_RELEASE_POLL_S)

    def _release(self) -> set[int]:
        """Let go of what is on its way out; returns the publications that the engine still holds tensors of."""
        self._outgoing = [old for old in self._outgoing if not old.received.release()]
        return {old.publication_id for old in self._outgoing}

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
        if self._served is not None and self.version is not None and self._target.version == self.version:
            hello.version = self._served.version
            hello.manifest_checksum = self._served.checksum
        return hello


class _Bytes:
    """A version at hand: prefetched, served, or on its way out."""

    def __init__(self, publication_id: int, manifest: policy_pb2.Manifest, received: ReceivedWeights) -> None:
        self.publication_id = publication_id
        self.version = manifest.version.version
        self.checksum = manifest.checksum
        self.received = received


async def _finish(worker: asyncio.Task[None]) -> None:
    """Wait for a worker through cancellations of the waiter: an order is never left half done."""
    cancelled = False
    while not worker.done():
        try:
            await asyncio.shield(worker)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
