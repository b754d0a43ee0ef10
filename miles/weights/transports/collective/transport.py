"""Weights by broadcast from the trainer's ranks to the engines: NCCL between GPUs, gloo between CPUs.

Each trainer rank keeps its buckets in host memory and is rank 0 of its own process group with the engines. So no rank
holds the full model, engines that join later get the same bytes, and training goes on meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import socket
import time
from collections.abc import Collection, Iterable, Sequence

import torch

from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2
from miles.weights import flat as flats
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint, SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.manifest import ManifestError, checksum_threads
from miles.weights.transports.collective.group import Timing
from miles.weights.transports.collective.member import TensorReceiver, receive_from
from miles.weights.transports.collective.source import WeightSource

logger = logging.getLogger(__name__)


class CollectiveTransport:
    """Implements WeightTransport; the backend follows from the endpoint's device."""

    def __init__(self, endpoint: Endpoint, timing: Timing | None = None) -> None:
        """`endpoint.device` is the trainer rank's own GPU, or the engine's."""
        self._endpoint = endpoint
        self._timing = timing or Timing()
        self._source: WeightSource | None = None
        self._receiver: TensorReceiver | None = None
        self._threads = concurrent.futures.ThreadPoolExecutor(checksum_threads(), thread_name_prefix="weight-checksum")

    @property
    def source(self) -> WeightSource:
        """The server of this rank's buckets; created at first use."""
        if self._source is None:
            self._source = WeightSource(local_host(self._endpoint.address), self._endpoint.device, self._timing)
        return self._source

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Keep a bucket in host memory for engines to ask for."""
        began = time.monotonic()
        base, nbytes = flats.extent(descriptors)
        flat = self.source.staged.buffer(nbytes)
        flats.clear_gaps(flat, descriptors)
        on_gpu = self._endpoint.device.type == "cuda"
        places = flats.views(flat, descriptors, base)
        for place, (_, tensor) in zip(places, match_layout(descriptors, tensors), strict=True):
            place.copy_(tensor, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream(self._endpoint.device).synchronize()
        copied = time.monotonic()
        flats.set_checksums(flat, descriptors, base, self._threads)
        handle.collective.backend = self.source.backend
        if nbytes:
            self.source.staged.add(handle.publication_id, descriptors, flat)
            handle.collective.buckets.add(offset=base, nbytes=nbytes, source=self.source.address)
        return SendTimes(copied - began, time.monotonic() - copied, sum(d.nbytes for d in descriptors))

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Check that the ranks' buckets make up the version; they are being served already."""
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in handle.collective.buckets))

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Forget the version's buckets."""
        if self._source is not None:
            self._source.staged.forget(handle.publication_id)

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> flats.FlatWeights:
        """Receive every bucket from its source, one source after the other, and verify every tensor."""
        manifests.validate(manifest)
        buckets = handle.collective.buckets
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in buckets))
        device = self._endpoint.device
        check_backend(handle, device)
        flat = torch.empty(manifest.total_bytes, dtype=torch.uint8, device=device)
        wanted: dict[str, list[torch.Tensor]] = {}
        for bucket in buckets:
            wanted.setdefault(bucket.source, []).append(flat[bucket.offset : bucket.offset + bucket.nbytes])
        self._take(handle.publication_id, wanted)
        flats.verify({0: flat}, manifest, ", ".join(wanted), self._threads)
        return flats.FlatWeights({0: flat}, manifest.tensors)

    def _take(self, publication_id: int, wanted: dict[str, list[torch.Tensor]]) -> None:
        timing = self._timing
        if self._receiver is None:
            self._receiver = TensorReceiver(self._endpoint.device, timing.patience_s)
        receiver = self._receiver
        receiver.leave_all_but(wanted)
        receiver.set_targets(wanted)
        deadline_s = time.monotonic() + timing.deadline_s
        companions: list[str] = []
        with contextlib.ExitStack() as at_end:
            at_end.callback(receiver.set_targets, {})
            for source in wanted:
                hello = weightsource_pb2.JoinHello(
                    publication_id=publication_id, member=receiver.member, ranks=1, companions=companions
                )
                companions = receive_from(source, hello, receiver, deadline_s, timing)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Forget the versions that are not live."""
        if live is not None and self._source is not None:
            self._source.trim(live)

    def close(self) -> None:
        """Stop serving and leave every group."""
        if self._source is not None:
            self._source.close()
        if self._receiver is not None:
            self._receiver.leave_all_but(())
        self._threads.shutdown()


def check_backend(handle: weightsync_pb2.TransportHandle, device: torch.device) -> None:
    """Raise ManifestError unless the weights are broadcast by the backend that an engine on that device needs."""
    expected = "nccl" if device.type == "cuda" else "gloo"
    if handle.collective.backend != expected:
        raise ManifestError(f"the weights come by {handle.collective.backend}; an engine on {device} needs {expected}")


def local_host(peer: str) -> str:
    """The address of this machine in the network of `peer`, host:port."""
    host = peer.rpartition(":")[0].strip("[]")
    if not host:
        return "127.0.0.1"
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with contextlib.closing(socket.socket(family, kind)) as probe:
        probe.connect(target)  # sends nothing; asks the routing table
        return str(probe.getsockname()[0])
