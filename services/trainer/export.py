"""The export of one version by all ranks: which rank sends which bucket, and how rank 0 merges their reports."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.trainer.ranks.collective_calls import Command
from miles.weights import manifest as manifests
from miles.weights.base import SendTimes
from miles.weights.bucketing import buckets
from miles.weights.dtypes import wire_dtype
from miles.weights.export_format import AS_TRAINED, ExportFormat, formatted, formatted_layout
from miles.weights.manifest import ManifestError

if TYPE_CHECKING:
    import torch

    from miles.services.trainer.backends.protocol import TrainerBackend
    from miles.weights.publisher import Layout, PendingVersion, WeightSender

EXPORT = "export"

_KEPT_BY_RANKS = (weightsync_pb2.TRANSPORT_KIND_COLLECTIVE, weightsync_pb2.TRANSPORT_KIND_CUDA_IPC)
"""Transports whose bytes stay with the trainer: each rank keeps its share. With others rank 0 sends every bucket."""
_OF_CHANGES = (weightsync_pb2.TRANSPORT_KIND_DISK_DELTA, weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS)
"""Transports that send what changed: where there are no others, rank 0 also gathers no more than that."""


def export_command(pending: PendingVersion, address: str, bucket_bytes: int) -> Command:
    """The command to send each rank's share of a version; `address` is the weightsync service's."""
    arguments = {"address": address, "bucket_bytes": bucket_bytes, "live": pending.live}
    return Command(EXPORT, arguments, tuple(handle.SerializeToString() for handle in pending.handles))


def send_share(
    backend: TrainerBackend,
    sender: WeightSender,
    command: Command,
    rank: int,
    ranks: int,
    export_format: ExportFormat = AS_TRAINED,
) -> bytes:
    """Send this rank's buckets of an export and return its report for `merge`; collective."""
    handles = [weightsync_pb2.TransportHandle.FromString(payload) for payload in command.payloads]
    if rank:
        sender.trim(command.arguments["live"])
    to_first = ranks > 1 and all(handle.kind in _OF_CHANGES for handle in handles)
    tensors = backend.export_to_first() if to_first else backend.export()
    try:
        layout = formatted_layout(export_format, backend.export_layout())
        converted = formatted(export_format, tensors)
        if to_first and rank:
            collections.deque(converted, maxlen=0)
            return _report([], SendTimes(), handles, rank)
        bucket_bytes = command.arguments["bucket_bytes"]
        return _send(layout, converted, sender, handles, bucket_bytes, rank, ranks, lasting=to_first)
    except BaseException:
        if rank:
            sender.discard(handles)
        raise
    finally:
        for _ in tensors:  # gathering is collective: even after an error every rank takes part to the end
            pass


def merge(pending: PendingVersion, reports: Sequence[bytes]) -> SendTimes:
    """Merge every rank's checksums and handles into the version; a tensor that was not sent raises ManifestError."""
    by_name = {descriptor.name: descriptor for descriptor in pending.descriptors}
    copy_s = checksum_s = 0.0
    written = 0
    for report in reports:
        part = weightsync_pb2.PrepareRequest.FromString(report)
        for tensor in part.manifest.tensors:
            by_name[tensor.name].checksum = tensor.checksum
        for handle, theirs in zip(pending.handles, (part.handle, *part.more), strict=True):
            handle.MergeFrom(theirs)
        copy_s, checksum_s = max(copy_s, part.stage_s["copy"]), max(checksum_s, part.stage_s["checksum"])
        written += part.written_bytes
    missing = [descriptor.name for descriptor in pending.descriptors if not descriptor.checksum]
    if missing:
        raise ManifestError(f"{len(missing)} tensors were sent by no rank: {', '.join(missing[:3])}")
    return SendTimes(copy_s, checksum_s, written)


def _send(
    layout: Layout,
    tensors: Iterator[tuple[str, torch.Tensor]],
    sender: WeightSender,
    handles: Sequence[weightsync_pb2.TransportHandle],
    bucket_bytes: int,
    rank: int,
    ranks: int,
    *,
    lasting: bool,
) -> bytes:
    descriptors, _ = manifests.plan((name, wire_dtype(dtype), shape) for name, dtype, shape in layout)
    times = SendTimes()
    sent: list[policy_pb2.TensorDescriptor] = []
    for index, bucket in enumerate(buckets(descriptors, bucket_bytes)):
        part = itertools.islice(tensors, len(bucket))
        mine = [handle for handle in handles if rank == (index % ranks if handle.kind in _KEPT_BY_RANKS else 0)]
        if mine:
            times += sender.send(mine, bucket, part, lasting=lasting)
            sent += bucket
        else:
            collections.deque(part, maxlen=0)  # keeps not even the last tensor, which would keep its bucket alive
    extra, _ = next(tensors, ("", None))
    if extra:
        raise ManifestError(f"the export yields {extra!r} after the last tensor of its layout")
    return _report(sent, times, handles, rank)


def _report(
    sent: Sequence[policy_pb2.TensorDescriptor],
    times: SendTimes,
    handles: Sequence[weightsync_pb2.TransportHandle],
    rank: int,
) -> bytes:
    """What `merge` needs to know of the tensors that this rank has sent."""
    report = weightsync_pb2.PrepareRequest(
        manifest=policy_pb2.Manifest(tensors=sent),
        written_bytes=times.written_bytes,
        stage_s={"copy": times.copy_s, "checksum": times.checksum_s},
    )
    nothing = weightsync_pb2.TransportHandle()
    parts = [handle if rank == 0 or handle.kind in _KEPT_BY_RANKS else nothing for handle in handles]
    report.handle.CopyFrom(parts[0])
    report.more.extend(parts[1:])
    return report.SerializeToString()
