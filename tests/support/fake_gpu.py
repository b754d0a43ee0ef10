"""A node whose GPU memory is a dictionary: what processes share there, and how a trainer opens it."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Collection, Iterable, Sequence

import grpc
import torch
from weight_host import DEADLINE_S, JOB, POLICY, GatedEngine, Host

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher, WeightSubscriber
from miles.weights import flat as flats
from miles.weights.base import Endpoint, SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.manifest import ManifestError
from miles.weights.registry import create_transport

GPU = torch.device("cuda", 0)
IPC = weightsync_pb2.TRANSPORT_KIND_CUDA_IPC


@dataclasses.dataclass
class FakeProbe:
    """Implements SharedProbe."""

    node: FakeNode
    message: weightsource_pb2.GpuMemoryProbe

    def free(self) -> None:
        del self.node.shared[self.message.token]
        self.node.freed += 1


class FakeNode:
    """One GPU, seen by every process of the node."""

    def __init__(self, name: str = "node", gpu_nbytes: int = 1 << 20) -> None:
        self.name = name
        self.gpu_nbytes = gpu_nbytes
        self.shared: dict[bytes, FakeProbe] = {}
        """Probes by token."""
        self.freed = 0
        """Probes that are shared no more, a count."""
        self.versions: dict[int, list[torch.Tensor]] = {}
        """Buckets by publication."""
        self.locked = False
        """Whether processes cannot open each other's memory."""
        self.opens = threading.Event()
        """Cleared, an engine that opens a trainer's memory hangs."""
        self.opens.set()
        self.shares = threading.Event()
        """Cleared, an engine that is about to share memory takes its time."""
        self.shares.set()
        self.sharing = threading.Event()
        """Set when an engine is about to."""
        self.tried: list[bytes] = []
        """Tokens, in the order in which a trainer tried to open them."""
        self.told: list[int] = []
        """Size of the versions, as each engine heard it when it subscribed."""
        self.channels: list[grpc.Channel] = []
        """One for each trainer, to close in the end."""
        self._numbers = itertools.count(1)

    def share(self, device: torch.device, version_nbytes: int) -> FakeProbe:
        """What engines do when they subscribe."""
        self.told.append(version_nbytes)
        self.sharing.set()
        assert self.shares.wait(DEADLINE_S)
        token = f"{self.name} {next(self._numbers)}".encode()
        probe = weightsource_pb2.GpuMemoryProbe(
            boot_id=self.name, token=token, visible_gpus=["GPU-0"], gpu_nbytes=self.gpu_nbytes
        )
        self.shared[token] = FakeProbe(self, probe)
        return self.shared[token]

    def open(
        self, probes: Sequence[weightsource_pb2.GpuMemoryProbe], device: torch.device
    ) -> weightsource_pb2.OpenedGpuMemory:
        """What a trainer does before it publishes."""
        self.tried += [probe.token for probe in probes]
        tokens = [probe.token for probe in probes if probe.token in self.shared and not self.locked]
        return weightsource_pb2.OpenedGpuMemory(tokens=tokens, gpu_nbytes=self.gpu_nbytes)

    def engine(self, host: Host, name: str) -> tuple[WeightSubscriber, GatedEngine]:
        """An engine on the GPU of this node."""
        engine = GatedEngine()
        engine.device = GPU
        subscriber = WeightSubscriber(
            *(host.address, JOB, name, POLICY, engine),
            create_receiver=lambda kind, endpoint: FakeIpc(self) if kind == IPC else create_transport(kind, endpoint),
            share_gpu_memory=self.share,  # type: ignore[arg-type]
        )
        return subscriber, engine

    def trainer(self, host: Host) -> WeightPublisher:
        """A trainer on the GPU of this node; `host.publish` uses it from now on."""
        self.channels.append(connect_blocking(host.address))
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(self.channels[-1])
        publisher = WeightPublisher(stub, JOB, POLICY, endpoint=Endpoint(host.address, GPU), open_gpu_memory=self.open)
        publisher.sender._transports[IPC] = FakeIpc(self)
        host._publishers["UNSPECIFIED"] = publisher
        return publisher


class FakeIpc:
    """Implements WeightTransport by the node's dictionary."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        base, nbytes = flats.extent(descriptors)
        flat = torch.zeros(nbytes, dtype=torch.uint8)
        places = flats.views(flat, descriptors, base)
        for place, (descriptor, tensor) in zip(places, match_layout(descriptors, tensors), strict=True):
            place.copy_(tensor)
            descriptor.checksum = bytes(16)
        self._node.versions.setdefault(handle.publication_id, []).append(flat)
        handle.cuda_ipc.boot_id = self._node.name
        handle.cuda_ipc.buckets.add(device_uuid="GPU-0", offset=base, nbytes=nbytes)
        return SendTimes(written_bytes=nbytes)

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        pass

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        self._node.versions.pop(handle.publication_id, None)

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> flats.FlatWeights:
        assert self._node.opens.wait(DEADLINE_S)
        if self._node.locked:
            raise ManifestError("the other process's GPU memory cannot be opened")
        theirs = self._node.versions[handle.publication_id]
        ranges = {b.offset: flat.clone() for b, flat in zip(handle.cuda_ipc.buckets, theirs, strict=True)}
        return flats.FlatWeights(ranges, manifest.tensors)

    def trim(self, live: Collection[int] | None = None) -> None:
        if live is not None:
            self._node.versions = {number: kept for number, kept in self._node.versions.items() if number in live}

    def close(self) -> None:
        pass
