"""Notices that no engine can get the active version, which only another publication ends."""

from __future__ import annotations

import asyncio
import contextlib

import grpc.aio

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.workers.registry import AttachedWorker

_INTERVAL_S = 5.0


async def watch_reach(weightsync: AttachedWorker, job_id: str, interval_s: float = _INTERVAL_S) -> None:
    """Ask the weight-sync service again and again, until it says so; then raise WorkerLostError.

    A version in GPU memory was put there for engines that may be gone: those that replace them may be elsewhere. The
    run is then loaded again, which publishes the trainer's weights for the engines that are there now.
    """
    # A client of its own: a call that fails closes the client's connection, which may carry an activation.
    with contextlib.closing(WeightSyncClient(weightsync)) as client:
        while True:
            await asyncio.sleep(interval_s)
            try:
                versions = (await client.list_versions(job_id)).versions
            except grpc.aio.AioRpcError:  # whether the service is lost, its lease says
                continue
            for version in versions:
                if version.out_of_reach and version.version.stream == policy_pb2.WEIGHT_STREAM_POLICY:
                    raise WorkerLostError(_reason(version))


def _reason(version: weightsync_pb2.VersionStatus) -> str:
    number = version.version.version
    return f"no engine that is attached can open the GPU memory that version {number} is in; it is published again"
