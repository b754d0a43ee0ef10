"""Throughput of the sample queue, and the size of a sample on the wire.

    python -m benchmarks.sample_queue

Rollout processes put groups, a few at a time each (--producers), while this process collects them as the trainer does,
until the last is there and its checksum compared. Beside it, the same bytes through XADD and XREADGROUP alone
(redis-py with its own parser, same server, same processes, as many at a time, taking turns), encoded before. The two
also differ in this: groups below 64 KiB that a process puts at the same time share a call to Redis, as `GroupQueue` has
them do, and those that lie ready are read joined, while each raw XADD has a round trip and a connection of its own, and
raw entries are read 16 at a time. `of raw` therefore counts what that gains as ours; with --producers 1 there is
nothing to share.

`a step` is what a training step waits for when its groups lie ready: to collect them, beside reading the same bytes.
Samples are decoded when they are first asked for, by the thread that trains; `decoded, of raw` counts that too. The
second table has what one group costs each process in processor time, which depends less on what else the machine does,
in `decoding` what its samples cost the trainer beyond that, and the bytes of one sample beside JSON with base64 int32
experts. Medians over --repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import psutil
import redis.asyncio

from miles.queue import GroupQueue, RedisServer, connect_async
from miles.queue.payload import encode_group
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

JOB = "bench"
RAW_KEY = "bench:raw"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a group is made of."""

    name: str
    samples: int
    tokens: int
    """Prompt and response of one sample, in tokens."""
    experts: tuple[int, int] | None
    """MoE layers and experts a token, if routing is recorded."""
    groups: int
    """Groups sent per measurement."""


SHAPES = (
    Shape("short, dense", 8, 256, None, 1024),
    Shape("long, dense", 8, 8192, None, 128),
    Shape("MoE, 24 layers, top-8", 8, 1024, (24, 8), 64),
    Shape("MoE, 60 layers, top-8", 8, 4096, (60, 8), 8),
)


def make_group(shape: Shape, group_id: int) -> SampleGroup:
    """A scored group of this shape with random contents."""
    random = np.random.default_rng(group_id)
    response = shape.tokens * 3 // 4
    samples = [
        Sample(
            group_id=group_id,
            index=index,
            prompt="What is the sum of 3 and 4?",
            tokens=random.integers(0, 150_000, shape.tokens).astype(np.int32),
            response_length=response,
            response="x" * (4 * response),
            label="7",
            reward=1.0,
            status=SampleStatus.COMPLETED,
            rollout_log_probs=-random.random(response, np.float32),
            rollout_routed_experts=None
            if shape.experts is None
            else random.integers(0, 128, (shape.tokens - 1, *shape.experts)).astype(np.uint8),
            weight_versions=(VersionSpan(3, 0, response),),
        )
        for index in range(shape.samples)
    ]
    return SampleGroup(JOB, group_id, samples)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def rollout(url: str, number: int, rollouts: int, producers: int, orders: Connection) -> None:
    """The process of one rollout, which makes or puts its share of the groups when it is told to."""
    asyncio.run(_rollout(url, number, rollouts, producers, orders))


async def _rollout(url: str, number: int, rollouts: int, producers: int, orders: Connection) -> None:
    client = await connect_async(url)
    groups: list[SampleGroup] = []
    payloads: list[bytes] = []

    queue = GroupQueue(client, JOB)
    while (order := orders.recv()) is not None:
        began = time.process_time()
        if isinstance(order, Shape):
            groups = [make_group(order, group_id) for group_id in range(number, order.groups, rollouts)]
            payloads = [encode_group(group) for group in groups]
        elif order == "queue":
            await _each(groups, producers, lambda group: queue.put(group, attempt=1))
        else:
            await _each(payloads, producers, lambda payload: client.xadd(RAW_KEY, {"group": payload}))
        orders.send((sum(map(len, payloads)), time.process_time() - began))
    await client.aclose()


async def _each(items: Sequence[T], at_once: int, act: Callable[[T], Awaitable[object]]) -> None:
    waiting = list(items)

    async def work() -> None:
        while waiting:
            await act(waiting.pop())

    await asyncio.gather(*(work() for _ in range(at_once)))


@contextlib.contextmanager
def rollout_processes(url: str, rollouts: int, producers: int) -> Iterator[list[Connection]]:
    """Connections to so many of them."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(rollouts)]
    processes = [
        spawn.Process(target=rollout, args=(url, number, rollouts, producers, theirs), daemon=True)
        for number, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pipes]
    finally:
        for ours, _ in pipes:
            ours.send(None)
        for process in processes:
            process.join()


# -- the trainer -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What moving all groups of a shape took, in seconds."""

    wall: float
    rollout: float
    """Processor time of all rollouts; so of the others."""
    trainer: float
    redis: float


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What getting groups that lie ready took, in seconds."""

    collected: float
    decoded: float
    """With the decoding of all samples."""
    decoding: float
    """Processor time of that alone."""


M = TypeVar("M", Cost, Step)


async def collect(client: redis.asyncio.Redis, groups: int) -> list[SampleGroup]:
    """Get all groups as the trainer does."""
    queue = GroupQueue(client, JOB)
    collected = await queue.collect(range(groups), 600)
    assert len(collected) == groups
    return [group for _, group in collected.values()]


async def read(client: redis.asyncio.Redis, groups: int) -> list[SampleGroup]:
    """Get as many entries, and decode none."""
    count = 0
    while count < groups:
        answer: Any = await client.xreadgroup("g", "c", {RAW_KEY: ">"}, count=16, block=1000)
        count += len(answer[0][1]) if answer else 0
    return []


class Bench:
    """A server, rollouts, and this process, which is the trainer."""

    def __init__(self, server: RedisServer, client: redis.asyncio.Redis, rollouts: Sequence[Connection]) -> None:
        self._redis = psutil.Process(server.pid)
        self._client = client
        self._rollouts = rollouts

    async def order(self, what: object) -> list[tuple[int, float]]:
        """Have every rollout do something; returns the bytes it holds and the processor time it took."""
        for pipe in self._rollouts:
            pipe.send(what)
        return [await asyncio.to_thread(pipe.recv) for pipe in self._rollouts]

    async def stream(self, mode: str, groups: int) -> Cost:
        """From the first put to the last group here."""
        await self._clear()
        redis_s, trainer_s, began = self._redis_s(), time.process_time(), time.perf_counter()
        putting = asyncio.ensure_future(self.order(mode))
        await (collect if mode == "queue" else read)(self._client, groups)
        wall_s, trainer_s = time.perf_counter() - began, time.process_time() - trainer_s
        rollout_s = sum(seconds for _, seconds in await putting)
        return Cost(wall_s, rollout_s, trainer_s, self._redis_s() - redis_s)

    async def step(self, mode: str, groups: int) -> Step:
        """Get groups that were put before."""
        await self._clear()
        await self.order(mode)
        began = time.perf_counter()
        collected = await (collect if mode == "queue" else read)(self._client, groups)
        collected_s, decoding = time.perf_counter() - began, time.process_time()
        for group in collected:
            _ = group.samples
        return Step(collected_s, time.perf_counter() - began, time.process_time() - decoding)

    async def _clear(self) -> None:
        await GroupQueue(self._client, JOB).drop_job()
        await self._client.delete(RAW_KEY)
        await self._client.xgroup_create(RAW_KEY, "g", id="0", mkstream=True)

    def _redis_s(self) -> float:
        times = self._redis.cpu_times()
        return float(times.user + times.system)


# -- tables ------------------------------------------------------------------------------------------------------------


def json_bytes(sample: Sample) -> int:
    """Size of the sample as JSON with lists of numbers and base64 int32 experts, in bytes."""
    experts = sample.rollout_routed_experts
    return len(
        json.dumps(
            {
                "tokens": sample.tokens.tolist(),
                "rollout_log_probs": [float(value) for value in sample.rollout_log_probs]
                if sample.rollout_log_probs is not None
                else None,
                "rollout_routed_experts": None
                if experts is None
                else base64.b64encode(experts.astype(np.int32).tobytes()).decode(),
                "response": sample.response,
                "reward": sample.reward,
            }
        )
    )


async def measure(bench: Bench, shape: Shape, repeats: int) -> tuple[list[str], list[str]]:
    """The row of each table."""
    payload_bytes = sum(nbytes for nbytes, _ in await bench.order(shape))
    streams: dict[str, list[Cost]] = {"queue": [], "raw": []}
    steps: dict[str, list[Step]] = {"queue": [], "raw": []}
    for _ in range(repeats):
        for mode in streams:
            streams[mode].append(await bench.stream(mode, shape.groups))
            steps[mode].append(await bench.step(mode, shape.groups))
    queue, raw = (_median(streams[mode]) for mode in streams)
    queue_step, raw_step = (_median(steps[mode]) for mode in steps)
    sample = make_group(shape, 0).samples[0]
    wire = payload_bytes / shape.groups / shape.samples
    throughput = [
        *(shape.name, f"{payload_bytes / shape.groups / 2**20:.2f}"),
        *(f"{shape.groups / queue.wall:.0f}", f"{payload_bytes / queue.wall / 1e6:.0f}"),
        *(f"{shape.groups / raw.wall:.0f}", f"{raw.wall / queue.wall:.0%}"),
        *(f"{shape.groups / queue_step.collected:.0f}", f"{shape.groups / raw_step.collected:.0f}"),
        *(f"{raw_step.collected / queue_step.collected:.0%}", f"{raw_step.collected / queue_step.decoded:.0%}"),
    ]
    pairs = ((queue.rollout, raw.rollout), (queue.trainer, raw.trainer), (queue.redis, raw.redis))
    costs = [
        shape.name,
        *(f"{ours / shape.groups * 1e6:.0f} / {theirs / shape.groups * 1e6:.0f}" for ours, theirs in pairs),
        f"{queue_step.decoding / shape.groups * 1e6:.0f}",
        *(f"{wire:,.0f}", f"{json_bytes(sample):,}", f"{wire / json_bytes(sample):.0%}"),
    ]
    return throughput, costs


def _median(costs: Sequence[M]) -> M:
    fields = dataclasses.fields(costs[0])
    return type(costs[0])(*(statistics.median(getattr(cost, field.name) for cost in costs) for field in fields))


THROUGHPUT = [
    *("group", "MiB", "groups/s", "MB/s", "raw groups/s", "of raw"),
    *("a step: groups/s", "raw groups/s", "of raw", "decoded, of raw"),
]
COSTS = [
    *("µs per group, ours / raw:", "rollout", "trainer", "Redis", "decoding"),
    *("bytes/sample", "JSON bytes/sample", "of JSON"),
]


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()


async def run(shapes: Sequence[Shape], repeats: int, rollouts: int, producers: int) -> None:
    """Measure shapes and print the tables."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(pathlib.Path(folder)) as server,
        rollout_processes(server.url, rollouts, producers) as pipes,
    ):
        client = await connect_async(server.url)
        bench = Bench(server, client, pipes)
        rows = [await measure(bench, shape, repeats) for shape in shapes]
        await client.aclose()
    show([THROUGHPUT, *(throughput for throughput, _ in rows)])
    show([COSTS, *(costs for _, costs in rows)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, help="which to measure")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per row; the median is shown")
    parser.add_argument("--rollouts", type=int, default=1, help="processes that put")
    parser.add_argument("--producers", type=int, default=4, help="groups that each puts at the same time")
    flags = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name in flags.shapes]
    asyncio.run(run(shapes, flags.repeats, flags.rollouts, flags.producers))
