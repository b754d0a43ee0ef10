"""Weights in GPU memory shared by trainer and engines of one node: only handles are sent, as plain fields.

The trainer keeps a flat copy of each version's buckets on its GPU until no engine can ask for it any more. An engine
copies them on the device, or from one GPU to another, while it prefetches, so it goes on serving if the trainer dies.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Collection, Iterable, Sequence

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.telemetry.tracing import span
from miles.weights import flat as flats
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint, SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.manifest import ManifestError, checksum_threads
from miles.weights.transports.cuda_ipc.sharing import (
    SharedBucket,
    boot_id,
    decode_bucket,
    device_index,
    device_uuid,
    encode_bucket,
    open_shared,
    share,
)

_AT_ONCE_BYTES = 64 << 20
"""Tensors are copied in batches of about this size, each by few kernels; what they are converted from stays alive."""


class CudaIpcTransport:
    """Implements WeightTransport between processes whose GPUs are in one node."""

    def __init__(self, endpoint: Endpoint) -> None:
        """`endpoint.device` is the trainer rank's own GPU, or the engine's."""
        self._device = endpoint.device
        self._staged: dict[int, list[SharedBucket]] = {}
        self._spare: dict[int, list[SharedBucket]] = {}
        """By size; memory that is reused keeps its handle."""
        self._threads = concurrent.futures.ThreadPoolExecutor(checksum_threads(), thread_name_prefix="weight-checksum")

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Copy a bucket into device memory kept for it and add its handle."""
        began = time.monotonic()
        base, nbytes = flats.extent(descriptors)
        if nbytes == 0:
            self._set_checksums(torch.empty(0, dtype=torch.uint8), descriptors, base)
            return SendTimes()
        with span("start copying weights"):
            bucket = self._bucket(nbytes)
            flat = bucket.flat
            flats.clear_gaps(flat, descriptors)
            _fill(flat, base, descriptors, tensors)
        with span("wait for the GPU"):
            torch.cuda.current_stream(self._device).synchronize()
        copied = time.monotonic()
        with span("checksum weights"):
            self._set_checksums(flat, descriptors, base)
        self._staged.setdefault(handle.publication_id, []).append(bucket)
        handle.cuda_ipc.boot_id = boot_id()
        handle.cuda_ipc.buckets.append(encode_bucket(bucket.share, device_uuid(self._device), base, nbytes))
        return SendTimes(copied - began, time.monotonic() - copied, sum(d.nbytes for d in descriptors))

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Check that the ranks' buckets make up the version."""
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in handle.cuda_ipc.buckets))

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Free the version's buckets."""
        for bucket in self._staged.pop(handle.publication_id, []):
            bucket.free()

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> flats.FlatWeights:
        """Copy every bucket and verify every tensor."""
        buckets = handle.cuda_ipc.buckets
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in buckets))
        if handle.cuda_ipc.boot_id != boot_id():
            raise ManifestError("the weights are in GPU memory of another machine; use a transport between machines")
        flat = torch.empty(manifest.total_bytes, dtype=torch.uint8, device=self._device)
        received = {bucket.offset: flat[bucket.offset : bucket.offset + bucket.nbytes] for bucket in buckets}
        opened = [open_shared(decode_bucket(bucket, device_index(bucket.device_uuid))) for bucket in buckets]
        for bucket, theirs in zip(buckets, opened, strict=True):
            received[bucket.offset].copy_(theirs[: bucket.nbytes], non_blocking=True)
        manifests.validate(manifest)  # while the GPU copies
        weights = flats.FlatWeights({0: flat}, manifest.tensors)
        for theirs in opened:
            torch.cuda.synchronize(theirs.device)
        flats.verify(received, manifest, "GPU memory of the trainer", self._threads)
        return weights

    def trim(self, live: Collection[int] | None = None) -> None:
        """Keep the memory of versions that are not live for the next version, and free what it did not need."""
        if live is None:
            return
        self._free_spare()
        for publication_id in set(self._staged) - set(live):
            for bucket in self._staged.pop(publication_id):
                self._spare.setdefault(bucket.flat.numel(), []).append(bucket)

    def close(self) -> None:
        """Free every bucket."""
        self._free_spare()
        for buckets in self._staged.values():
            for bucket in buckets:
                bucket.free()
        self._staged.clear()
        self._threads.shutdown()

    def _set_checksums(self, flat: torch.Tensor, descriptors: Sequence[policy_pb2.TensorDescriptor], base: int) -> None:
        flats.set_checksums(flat, descriptors, base, self._threads, policy_pb2.CHECKSUM_KIND_BLOCK_SUMS)

    def _bucket(self, nbytes: int) -> SharedBucket:
        if spare := self._spare.get(nbytes):
            return spare.pop()
        flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return SharedBucket(flat, share(flat))

    def _free_spare(self) -> None:
        for buckets in self._spare.values():
            for bucket in buckets:
                bucket.free()
        self._spare.clear()


def _fill(
    flat: torch.Tensor,
    base: int,
    descriptors: Sequence[policy_pb2.TensorDescriptor],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Copy tensors to their places in `flat`, whose first byte is the version's byte `base`; starts the copies only."""
    places: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    waiting = 0
    matched = match_layout(descriptors, tensors)
    for place, (descriptor, tensor) in zip(flats.views(flat, descriptors, base), matched, strict=True):
        places.append(place)
        sources.append(tensor)
        waiting += descriptor.nbytes
        if waiting >= _AT_ONCE_BYTES:
            torch._foreach_copy_(places, sources, non_blocking=True)
            places, sources, waiting = [], [], 0
    if places:
        torch._foreach_copy_(places, sources, non_blocking=True)
