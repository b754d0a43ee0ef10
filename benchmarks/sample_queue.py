"""Throughput of the sample queue, and the size of a sample on the wire.

    python -m benchmarks.sample_queue

Prints one table: groups per second and megabytes per second from put to decoded through `GroupQueue`, beside the same
bytes through XADD and XREADGROUP alone (redis-py, same server, same run), and the bytes of one sample with routed
experts beside JSON with base64 int32 experts. Medians over --repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import redis.asyncio

from miles.queue import GroupQueue, RedisServer, connect_async
from miles.queue.payload import encode_group
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan


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
    Shape("short, dense", 8, 256, None, 256),
    Shape("long, dense", 8, 8192, None, 64),
    Shape("MoE, 24 layers, top-8", 8, 1024, (24, 8), 32),
    Shape("MoE, 60 layers, top-8", 8, 4096, (60, 8), 4),
)


def make_group(shape: Shape, job_id: str, group_id: int) -> SampleGroup:
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
    return SampleGroup(job_id, group_id, samples)


async def through_the_queue(client: redis.asyncio.Redis, groups: list[SampleGroup], producers: int) -> float:
    """Seconds from the first put to the last group decoded, a producer side and a trainer side at once."""
    queue = GroupQueue(client, groups[0].job_id)
    trainer = GroupQueue(client, groups[0].job_id)
    waiting = list(groups)

    async def produce() -> None:
        while waiting:
            await queue.put(waiting.pop(), attempt=1)

    started = time.perf_counter()
    collecting = asyncio.ensure_future(trainer.collect([group.group_id for group in groups], 600))
    await asyncio.gather(*(produce() for _ in range(producers)))
    collected = await collecting
    elapsed = time.perf_counter() - started
    assert collected[groups[0].group_id][1] == groups[0]
    await queue.drop_job()
    return elapsed


async def through_redis_alone(client: redis.asyncio.Redis, payloads: list[bytes], producers: int) -> float:
    """Seconds for the same bytes through XADD and XREADGROUP, encoded before and not decoded."""
    key = f"bench:{uuid.uuid4().hex}"
    await client.xgroup_create(key, "g", id="0", mkstream=True)
    waiting = list(payloads)

    async def produce() -> None:
        while waiting:
            await client.xadd(key, {"group": waiting.pop()})

    async def consume() -> None:
        read = 0
        while read < len(payloads):
            answer: Any = await client.xreadgroup("g", "c", {key: ">"}, count=16, block=1000)
            read += len(answer[0][1]) if answer else 0

    started = time.perf_counter()
    await asyncio.gather(consume(), *(produce() for _ in range(producers)))
    elapsed = time.perf_counter() - started
    await client.delete(key)
    return elapsed


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


async def measure(shape: Shape, client: redis.asyncio.Redis, repeats: int, producers: int) -> list[str]:
    """One row of the table."""
    queue_s: list[float] = []
    raw_s: list[float] = []
    payload_bytes = 0
    for _ in range(repeats):
        job_id = f"bench-{uuid.uuid4().hex[:8]}"
        groups = [make_group(shape, job_id, group_id) for group_id in range(shape.groups)]
        payloads = [encode_group(group) for group in groups]
        payload_bytes = sum(map(len, payloads))
        runs: list[tuple[list[float], Callable[[], Awaitable[float]]]] = [
            (queue_s, lambda groups=groups: through_the_queue(client, groups, producers)),  # type: ignore[misc]
            (raw_s, lambda payloads=payloads: through_redis_alone(client, payloads, producers)),  # type: ignore[misc]
        ]
        for times, run in runs:
            times.append(await run())
    queue, raw = statistics.median(queue_s), statistics.median(raw_s)
    sample = make_group(shape, "bench", 0).samples[0]
    wire = payload_bytes / shape.groups / shape.samples
    return [
        shape.name,
        f"{payload_bytes / shape.groups / 2**20:.2f}",
        f"{shape.groups / queue:.0f}",
        f"{payload_bytes / queue / 1e6:.0f}",
        f"{shape.groups / raw:.0f}",
        f"{payload_bytes / raw / 1e6:.0f}",
        f"{raw / queue:.0%}",
        f"{wire:,.0f}",
        f"{json_bytes(sample):,}",
        f"{json_bytes(sample) / wire:.1f}x",
    ]


HEADER = [
    *("group", "MiB", "groups/s", "MB/s", "raw groups/s", "raw MB/s", "of raw"),
    *("bytes/sample", "JSON bytes/sample", "JSON/ours"),
]


async def run(repeats: int, producers: int) -> None:
    """Measure every shape and print the table."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(folder) as server:
        client = await connect_async(server.url)
        rows = [await measure(shape, client, repeats, producers) for shape in SHAPES]
        await client.aclose()
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    for row in [HEADER, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measurements per row; the median is shown")
    parser.add_argument("--producers", type=int, default=4, help="groups put at the same time")
    flags = parser.parse_args()
    asyncio.run(run(flags.repeats, flags.producers))
