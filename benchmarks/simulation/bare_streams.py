"""What grpc.aio alone takes for a message there and one back on each of many streams: the limit of any controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from benchmarks.simulation.stand_ins import loopback_address
from miles.addresses import split_address
from miles.rpc import connect, start_server
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc

_WARM_UP_S = 2.0


class _Echo(rollout_pb2_grpc.RolloutServiceServicer):
    """Answers every lease with a finished group."""

    async def Run(self, requests: AsyncIterator[rollout_pb2.RunRequest], context: Any) -> None:  # type: ignore[override]
        answer = rollout_pb2.RunResponse(lease_number=1, finished=rollout_pb2.GroupFinished(group_id=1, entry_id="0-1"))
        while await context.read() is not grpc.aio.EOF:
            await context.write(answer)


async def cpu_us_of_a_pair(streams: int, seconds: float, lease_bytes: int) -> float:
    """Return the CPU time that a process takes for a lease of so many bytes and its answer, in µs.

    It has one connection and one lease under way for each stream, and does nothing else.
    """
    server, address = await start_server(
        lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(_Echo(), server),
        "0.0.0.0:0",
        [],
        bandwidth_probes=False,
    )
    try:
        command = [sys.executable, "-m", __name__, str(split_address(address)[1])]
        command += [str(streams), str(seconds), str(lease_bytes)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
    finally:
        await server.stop(0)
    return float(said)


async def _measure(port: int, streams: int, seconds: float, lease_bytes: int) -> None:
    pairs = 0
    all_streams = asyncio.Event()

    async def exchange(place: int) -> None:
        nonlocal pairs
        stub = rollout_pb2_grpc.RolloutServiceStub(connect(loopback_address(place, port), bandwidth_probes=False))
        call = stub.Run()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                lease = rollout_pb2.GroupLease(group_id=1, attempt=1)
                lease.group.job_id = "-" * max(1, lease_bytes - 16)
                await call.write(rollout_pb2.RunRequest(lease=lease))
                await call.read()
                pairs += 1
                if pairs == 2 * streams:
                    all_streams.set()

    exchanges = [asyncio.create_task(exchange(place)) for place in range(streams)]
    await all_streams.wait()
    await asyncio.sleep(_WARM_UP_S)
    before, began_s = pairs, time.process_time()
    await asyncio.sleep(seconds)
    print((time.process_time() - began_s) / (pairs - before) * 1e6, flush=True)
    os._exit(0 if exchanges else 1)  # closing thousands of channels one by one takes longer than all of this


if __name__ == "__main__":
    port, streams, seconds, lease_bytes = sys.argv[1:]
    asyncio.run(_measure(int(port), int(streams), float(seconds), int(lease_bytes)))
