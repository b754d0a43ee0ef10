"""A rollout service without a controller, and a client that leases groups to it as the controller does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import numpy as np

from benchmarks.gpu.peers import START_DEADLINE_S
from benchmarks.gpu.workload import SAMPLER
from miles.addresses import free_port
from miles.config import JobConfig
from miles.queue import RedisServer
from miles.rpc import connect
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc
from miles.rpc.server import WATCHED_PID_ENVIRONMENT
from miles.services.controller.run.lease_messages import training_lease
from miles.types import Sample, SampleGroup

GROUP_DEADLINE_S = 180.0
JOB = "bench"


@contextlib.asynccontextmanager
async def rollout_service(device: str, profile: pathlib.Path | None = None) -> AsyncIterator[str]:
    """A rollout service that stands alone; yields its address. `profile`: file of its sampler."""
    sampler = [str(SAMPLER), str(profile)] if profile else []
    command = [*sampler, "-m", "miles.services.rollout", "--device", device]
    async with _process(command, asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        while line := await asyncio.wait_for(process.stdout.readline(), START_DEADLINE_S):
            if line.startswith(b"listening on "):
                break
        else:
            raise RuntimeError("the rollout service ended before it listened")
        yield line.decode().split()[-1]


@contextlib.asynccontextmanager
async def reward_service() -> AsyncIterator[str]:
    """A service of built-in rewards; yields its address, which answers soon."""
    address = f"127.0.0.1:{free_port()}"
    async with _process(["-m", "miles.services.reward", "--listen", address], asyncio.subprocess.DEVNULL):
        yield address


@contextlib.asynccontextmanager
async def _process(arguments: Sequence[str], output: int) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {**os.environ, WATCHED_PID_ENVIRONMENT: str(os.getpid())}
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def group_client(
    flat_config: dict[str, Any], folder: pathlib.Path, profile: pathlib.Path | None = None
) -> AsyncIterator[GroupClient]:
    """A client of a rollout service that has started a job of this configuration, with a reward service and Redis."""
    config = JobConfig.from_flat(flat_config)
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        rewards = await stack.enter_async_context(reward_service())
        address = await stack.enter_async_context(rollout_service(config.services.device, profile))
        channel = await stack.enter_async_context(connect(address))
        stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
        start = rollout_pb2.RolloutStartJobRequest(
            job_id=JOB, config_json=json.dumps(flat_config), redis_url=redis.url, reward_addresses={"default": rewards}
        )
        async for _ in stub.StartJob(start):
            pass
        client = GroupClient(stub, config)
        await client.open()
        yield client
        await stub.StopJob(rollout_pb2.RolloutStopJobRequest(job_id=JOB))


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """How one round of groups went. Times are in seconds since the first lease was sent."""

    leased_s: float
    """When the last lease was handed to gRPC."""
    finished_s: Sequence[float]
    """When the outcome of each group came, in the order in which they came."""
    generate_s: Sequence[float]
    """For each group, from its lease's arrival to the end of its last response."""
    reward_s: Sequence[float]
    """For each group, from there to its last reward."""
    tokens: int
    """Of all responses."""


class GroupClient:
    """The controller's end of a Run stream: leases groups, all at once, and waits until they are in the queue."""

    def __init__(self, stub: Any, config: JobConfig) -> None:
        self._config = config
        self._call: Any = stub.Run()
        self._next = 0

    async def open(self) -> None:
        """Open the stream and wait until the worker takes groups."""
        await self._call.write(rollout_pb2.RunRequest(open=rollout_pb2.RunOpen(job_id=JOB, lease_number=1)))
        while True:
            response = await self._read()
            if response.HasField("ready") and response.ready.capacity_groups:
                return

    async def round(self, prompts: Sequence[Sequence[int]], tokens: int | None = None) -> Round:
        """Lease one group for each prompt. `tokens`: the longest response, instead of the configured one."""
        first, self._next = self._next, self._next + len(prompts)
        leases = []
        for group_id, prompt in enumerate(prompts, first):
            sample = Sample(group_id=group_id, index=0, prompt="p", tokens=np.asarray(prompt, np.int32), label="1")
            lease = training_lease(self._config, SampleGroup(JOB, group_id, [sample]), 1, 0, 0)
            for sampling in lease.sampling if tokens else ():
                sampling.max_new_tokens = tokens or 0
            leases.append(rollout_pb2.RunRequest(lease=lease))
        began = time.perf_counter()
        for lease_request in leases:
            await self._call.write(lease_request)
        leased_s = time.perf_counter() - began
        finished_s: list[float] = []
        stats: list[rollout_pb2.GroupStats] = []
        while len(stats) < len(leases):
            response = await self._read()
            kind = response.WhichOneof("kind")
            if kind in ("failed", "preempted"):
                raise RuntimeError(f"a group did not finish: {response}")
            if kind == "finished":
                finished_s.append(time.perf_counter() - began)
                stats.append(response.finished.stats)
        return Round(
            leased_s,
            finished_s,
            [each.generate_s for each in stats],
            [each.reward_s for each in stats],
            sum(each.response_tokens for each in stats),
        )

    async def _read(self) -> rollout_pb2.RunResponse:
        response = await asyncio.wait_for(self._call.read(), GROUP_DEADLINE_S)
        if response is grpc.aio.EOF:
            raise RuntimeError("the rollout service ended the stream")
        message: rollout_pb2.RunResponse = response
        return message
