"""The weightsync service in the test's process, and engines that hold tensors; for tests of transports."""

from __future__ import annotations

import asyncio
import pathlib
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import grpc.aio
import torch

from miles.rpc import connect, connect_blocking, start_server
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.weightsync.service import SERVICE_NAME, WeightSyncServicer
from miles.services.weightsync.timing import PublicationLimits
from miles.weights import PublishResult, WeightPublisher
from miles.weights.base import Endpoint, WeightsRefused

POLICY = policy_pb2.WEIGHT_STREAM_POLICY
DRAFT = policy_pb2.WEIGHT_STREAM_DRAFT
DEADLINE_S = 120.0
JOB = "job"

Tensors = Mapping[str, torch.Tensor]


class GatedEngine:
    """Loads when its gate is open."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.device = torch.device("cpu")
        self.gate = asyncio.Event()
        self.gate.set()
        self.loading = asyncio.Event()
        self.loads: list[int] = []
        self.tensors: Tensors = {}
        self.fails = 0
        """Loads that fail from now on, a count."""

    async def load_weights(self, version: int, tensors: Tensors) -> float:
        self.loading.set()
        await self.gate.wait()
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the engine's server has died")
        self.loads.append(version)
        self.version, self.tensors = version, tensors
        return 0.0

    async def weight_bytes(self) -> Tensors:
        return self.tensors


class Host:
    """The service, on an address that survives its restarts; and the calls of a trainer and a controller."""

    def __init__(
        self, folder: pathlib.Path, lease_s: float = 300.0, disk_dir: pathlib.Path | None = None, job: str = JOB
    ) -> None:
        self._job = job
        self.stream = POLICY
        """Which weights are published and activated."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.folder = folder
        self.disk_dir = disk_dir
        self._lease_s = lease_s
        self._server: grpc.aio.Server | None = None
        self._publishers: dict[str, WeightPublisher] = {}
        self._channel = connect_blocking(self.address)

    async def start(self) -> None:
        limits = PublicationLimits(first_retry_s=0.1, last_retry_s=0.1, serving_lease_s=self._lease_s)
        self.servicer = WeightSyncServicer(
            *(self.folder / "state", self.folder), keep_bytes=True, limits=limits, disk_dir=self.disk_dir
        )
        self.servicer.start()

        def register(server: grpc.aio.Server) -> None:
            weightsync_pb2_grpc.add_WeightSyncServiceServicer_to_server(self.servicer, server)

        self._server, _ = await start_server(register, self.address, [SERVICE_NAME])

    async def stop(self) -> None:
        if self._server is not None:
            self.servicer.close()
            await self._server.stop(0)
            self._server = None

    async def close(self) -> None:
        await self.stop()
        for publisher in self._publishers.values():
            publisher.close()
        self._channel.close()

    async def publish(
        self,
        version: int,
        tensors: Tensors | None = None,
        transport: str = "UNSPECIFIED",
        lora: policy_pb2.LoraAdapter | None = None,
        **settings: Any,
    ) -> PublishResult:
        """What the trainer does; a publisher lives on for each transport. Without tensors, a small one."""
        sent = {"w": torch.full((1000,), float(version))} if tensors is None else tensors

        def work() -> PublishResult:
            if self._server is not None:  # on a busy machine the first attempt to connect may time out
                grpc.channel_ready_future(self._channel).result(DEADLINE_S)
            if transport not in self._publishers:
                kind = weightsync_pb2.TransportKind.Value(f"TRANSPORT_KIND_{transport}")
                stub = weightsync_pb2_grpc.WeightSyncServiceStub(self._channel)
                endpoint = Endpoint(address=self.address)
                self._publishers[transport] = WeightPublisher(
                    *(stub, self._job, self.stream, kind), endpoint=endpoint, deadline_s=DEADLINE_S, **settings
                )
            layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()]
            return self._publishers[transport].publish(version, version, layout, sent.items(), lora)

        return await asyncio.to_thread(work)

    async def activate(
        self,
        version: int,
        deadline_s: float = DEADLINE_S,
        *,
        min_engines: int = 1,
        check_equal: bool = False,
        wait_for: Iterable[str] = (),
    ) -> weightsync_pb2.ActivateDone:
        request = weightsync_pb2.ActivateRequest(
            version=policy_pb2.WeightVersion(job_id=self._job, stream=self.stream, version=version),
            operation_id=f"{version} within {deadline_s}",
            deadline_ms=int(deadline_s * 1000),
            min_engines=min_engines,
            check_equal=check_equal,
            wait_for=wait_for,
        )
        async with connect(self.address) as channel:
            stub = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
            async for response in stub.Activate(request, timeout=DEADLINE_S + 10):
                last = response
        if last.HasField("refused"):
            raise WeightsRefused(last.refused.reason)
        return last.done

    async def check(self) -> weightsync_pb2.CheckEnginesResponse:
        """Have every engine compare what it serves with the active version."""
        request = weightsync_pb2.CheckEnginesRequest(
            job_id=self._job, stream=POLICY, deadline_ms=int(DEADLINE_S * 1000)
        )
        async with connect(self.address) as channel:
            return await weightsync_pb2_grpc.WeightSyncServiceStub(channel).CheckEngines(request, timeout=DEADLINE_S)

    async def list(self) -> weightsync_pb2.ListVersionsResponse:
        async with connect(self.address) as channel:
            stub = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
            return await stub.ListVersions(weightsync_pb2.ListVersionsRequest(), timeout=DEADLINE_S)


def raw(tensors: Tensors) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensors as what they are made of, to compare bit for bit."""
    return {
        name: (t.dtype, tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }
