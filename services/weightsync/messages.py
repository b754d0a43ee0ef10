"""Wire messages for what the publication state machine knows: engines, versions and orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync.engine import Engine, Order, OrderKind
from miles.services.weightsync.version import Version


def version_status(
    name: policy_pb2.WeightVersion,
    version: Version,
    transports: Sequence[weightsync_pb2.TransportKind.ValueType],
    out_of_reach: bool,
) -> weightsync_pb2.VersionStatus:
    """A version as `ListVersions` shows it; `transports` are those by which engines can get it.

    `out_of_reach`: it is active, and no engine that is attached serves it or can get it.
    """
    return weightsync_pb2.VersionStatus(
        version=name,
        state=weightsync_pb2.VersionState.Value(f"VERSION_STATE_{version.state.value}"),
        total_bytes=version.nbytes,
        active_unix_ns=version.active_unix_ns,
        transports=transports,
        written_bytes=version.written_bytes,
        stage_s=version.stage_s,
        out_of_reach=out_of_reach,
    )


def engine_status(
    job_id: str,
    stream: policy_pb2.WeightStream.ValueType,
    engine: Engine,
    versions: Mapping[int, Version],
    transport: weightsync_pb2.TransportKind.ValueType,
    target: int | None,
) -> weightsync_pb2.EngineStatus:
    """An engine as the service sees it; `transport` is that of its last prefetch, `target` what it is led to."""
    waits = ""
    if target in engine.out_of_reach and target in versions and engine.held != target:
        waits = f"waits for the version after {versions[target].number}, which is in GPU memory that it cannot open"
    status = weightsync_pb2.EngineStatus(
        engine_id=engine.engine_id,
        stream=stream,
        state=weightsync_pb2.EngineState.Value(f"ENGINE_STATE_{engine.state.value}"),
        since_unix_ns=engine.since_unix_ns,
        prefetch_s=engine.stage_s.get(OrderKind.PREFETCH.value, 0.0),
        pause_s=engine.pause_s,
        last_error=engine.last_error or waits,
        transport=transport,
        attached=engine.session is not None,
        job_id=job_id,
        stage_s=engine.stage_s,
        refused=engine.refused is not None,
    )
    if engine.held is not None and engine.held in versions:
        held = versions[engine.held]
        status.version, status.total_bytes = held.number, held.nbytes
    return status


def prefetch_order(
    order: Order, manifest: policy_pb2.Manifest, handle: weightsync_pb2.TransportHandle
) -> weightsync_pb2.SubscribeResponse:
    """An order to prefetch a version; `handle` is for the transport that the engine is to use."""
    prefetch = weightsync_pb2.PrefetchOrder(manifest=manifest, handle=handle, publication_id=order.publication_id)
    return weightsync_pb2.SubscribeResponse(order_id=order.order_id, prefetch=prefetch)


def check_order(order: Order, manifest: policy_pb2.Manifest) -> weightsync_pb2.SubscribeResponse:
    """An order to compare the served bytes with a manifest."""
    check = weightsync_pb2.CheckOrder(manifest=manifest)
    return weightsync_pb2.SubscribeResponse(order_id=order.order_id, check=check)


def quarantine_order(order: Order) -> weightsync_pb2.SubscribeResponse:
    """An order to stop serving."""
    quarantine = weightsync_pb2.QuarantineOrder(reason=order.reason)
    return weightsync_pb2.SubscribeResponse(order_id=order.order_id, quarantine=quarantine)


def swap_order(order: Order, name: policy_pb2.WeightVersion) -> weightsync_pb2.SubscribeResponse:
    """An order to serve a prefetched version."""
    swap = weightsync_pb2.SwapOrder(version=name, publication_id=order.publication_id)
    return weightsync_pb2.SubscribeResponse(order_id=order.order_id, swap=swap)


def discard_order(order: Order, name: policy_pb2.WeightVersion) -> weightsync_pb2.SubscribeResponse:
    """An order to discard the bytes of a version."""
    discard = weightsync_pb2.DiscardOrder(version=name, publication_id=order.publication_id)
    return weightsync_pb2.SubscribeResponse(order_id=order.order_id, discard=discard)
