"""Versions whose bytes go from the trainer's ranks straight into the servers; this process knows only their layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import grpc
import torch

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import flat as flats
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ManifestError
from miles.weights.transports.collective.transport import CollectiveTransport, check_backend

CONNECT_S = 5.0
"""How long connecting to a source may take."""


@dataclasses.dataclass(frozen=True, slots=True)
class BucketContents:
    """What one broadcast holds, in SGLang's terms: tensors one after the other, without gaps."""

    names: Sequence[str]
    """As published."""
    dtypes: Sequence[str]
    """Torch's names."""
    shapes: Sequence[Sequence[int]]


class RemoteWeights(Mapping[str, torch.Tensor]):
    """The tensors of such a version, by HF name: on the meta device, with shapes and dtypes but without memory.

    Implements ReceivedWeights.
    """

    def __init__(
        self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest, endpoint: Endpoint
    ) -> None:
        """Raises ManifestError when the handle and the manifest do not fit each other."""
        self.handle = handle
        self.manifest = manifest
        self._endpoint = endpoint
        self._tensors = {d.name: _without_memory(d) for d in manifest.tensors}
        self.contents = contents(handle, manifest)
        """Buckets by source (host:port), in the source's order."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The mapping itself."""
        return self

    def release(self) -> bool:
        """Nothing is held."""
        return True

    def fetch(self) -> flats.FlatWeights:
        """Receive and verify the bytes, by a broadcast to this process. Blocks; raises like `receive`."""
        with contextlib.closing(CollectiveTransport(self._endpoint)) as transport:
            return transport.receive(self.handle, self.manifest)


class RemoteTransport:
    """Leaves the bytes with the trainer's ranks until a load; implements WeightReceiver."""

    def __init__(self, endpoint: Endpoint) -> None:
        """`endpoint.device`: where the servers compute."""
        self._endpoint = endpoint

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> RemoteWeights:
        """Check all that can be checked before a load: the contents, the backend, and that the sources answer.

        Raises ManifestError for a version that cannot be broadcast to servers, ConnectionError for a source that
        cannot be reached.
        """
        manifests.validate(manifest)
        check_backend(handle, self._endpoint.device)
        weights = RemoteWeights(handle, manifest, self._endpoint)
        for source in weights.contents:
            with connect_blocking(source) as channel:
                try:
                    grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
                except grpc.FutureTimeoutError:
                    raise ConnectionError(f"the trainer that has the weights, at {source}, cannot be reached") from None
        return weights

    def close(self) -> None:
        """Nothing is held."""


def contents(
    handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest
) -> Mapping[str, Sequence[BucketContents]]:
    """The contents of each source's broadcasts, in order. Raises ManifestError when buckets and tensors do not fit."""
    buckets = handle.collective.buckets
    flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in buckets))
    source_at = {bucket.offset: bucket.source for bucket in buckets}
    held = dict(flats.by_range(source_at, manifest.tensors))
    by_source: dict[str, list[BucketContents]] = {}
    for bucket in buckets:
        by_source.setdefault(bucket.source, []).append(_bucket_contents(held[bucket.offset]))
    return by_source


def _bucket_contents(descriptors: Sequence[policy_pb2.TensorDescriptor]) -> BucketContents:
    start = 0
    for descriptor in descriptors:
        size = TORCH_DTYPE[descriptor.dtype].itemsize
        if start % size:
            raise ManifestError(f"{descriptor.name!r} begins at byte {start} without gaps, no multiple of its {size}")
        start += descriptor.nbytes
    return BucketContents(
        [descriptor.name for descriptor in descriptors],
        [str(TORCH_DTYPE[descriptor.dtype]).removeprefix("torch.") for descriptor in descriptors],
        [list(descriptor.shape) for descriptor in descriptors],
    )


def _without_memory(descriptor: policy_pb2.TensorDescriptor) -> torch.Tensor:
    return torch.empty(tuple(descriptor.shape), dtype=TORCH_DTYPE[descriptor.dtype], device="meta")
