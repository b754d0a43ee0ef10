"""Versions to broadcast, in this process and between processes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint, WeightTransport
from miles.weights.bucketing import buckets
from miles.weights.dtypes import wire_dtype
from miles.weights.transports.collective.group import Timing
from miles.weights.transports.collective.transport import CollectiveTransport
from miles.weights.transports.names import checksum_kind

Published = tuple[weightsync_pb2.TransportHandle, policy_pb2.Manifest]
QUICK = Timing(gather_s=0.2, linger_s=0.5, connect_s=1.0, patience_s=5.0, deadline_s=40.0)


PATIENT = dataclasses.replace(QUICK, linger_s=30.0)
"""Waits for engines that are expected, however busy the machine is."""


def transport(device: str = "cpu", timing: Timing = QUICK) -> CollectiveTransport:
    """A rank's, or an engine's."""
    return CollectiveTransport(Endpoint(device=torch.device(device)), timing)


def publish(
    ranks: Sequence[WeightTransport],
    publication_id: int,
    tensors: Mapping[str, torch.Tensor],
    bucket_bytes: int,
    kind: weightsync_pb2.TransportKind.ValueType = weightsync_pb2.TRANSPORT_KIND_COLLECTIVE,
) -> Published:
    """What the ranks of a trainer do, bucket by bucket in turn."""
    descriptors, total = manifests.plan((name, wire_dtype(t.dtype), t.shape) for name, t in tensors.items())
    handles = [weightsync_pb2.TransportHandle(kind=kind, publication_id=publication_id) for _ in ranks]
    for index, bucket in enumerate(buckets(descriptors, bucket_bytes)):
        rank = index % len(ranks)
        ranks[rank].send(handles[rank], bucket, [(d.name, tensors[d.name]) for d in bucket])
    for other in handles[1:]:
        handles[0].MergeFrom(other)
    version = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=publication_id)
    manifest = manifests.build(version, descriptors, total, publication_id, checksum_kind=checksum_kind([kind]))
    ranks[0].seal(handles[0], manifest)
    return handles[0], manifest


def write(folder: pathlib.Path, published: Published) -> None:
    """Leave a version's description for another process."""
    for name, message in zip(("handle", "manifest"), published, strict=True):
        partial = folder / f"{name}.tmp"
        partial.write_bytes(message.SerializeToString())
        partial.rename(folder / name)


def read(folder: pathlib.Path) -> Published:
    """What `write` left."""
    handle = weightsync_pb2.TransportHandle.FromString((folder / "handle").read_bytes())
    return handle, policy_pb2.Manifest.FromString((folder / "manifest").read_bytes())


def random_tensors(seed: int, count: int = 24) -> dict[str, torch.Tensor]:
    """Of several sizes and dtypes, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {f"layer.{i}": torch.randn(5 + 7 * i, 9, generator=generator).to(dtypes[i % 3]) for i in range(count)}
    return {**tensors, "empty": torch.empty(0, 4), "scalar": torch.tensor(seed)}
