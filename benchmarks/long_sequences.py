"""Peak memory of what a 32k-token response passes on its way from a rollout to a training step, beside its own size.

    python -m benchmarks.long_sequences                   # 4 samples of 32,768 tokens with the routing of 60 layers
    python -m benchmarks.long_sequences --tokens 8192 --stage attention --stage ranks

Each stage runs in processes of its own. "peak" is resident memory above what the process had when the stage began, with
its inputs; "payload" is what the stage works on: bytes of a group in the queue, of a rank's share, of queries, keys and
values. "said" is the bound by `miles.memory.sequences`. Times are of one run on whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.long_samples import Measured, Sizes, make_group, measuring, tiny
from miles.memory import sequences
from miles.types import Sample, SampleGroup

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16


def encode(sizes: Sizes) -> list[Measured]:
    """A rollout makes a group's payload."""
    from miles.queue.payload import encode_group

    group = make_group(sizes)
    encode_group(make_group(tiny(sizes)))
    row = Measured("group to payload", sizes.samples * sizes.sample.payload_bytes)
    row.said = row.payload
    with measuring(row):
        payload = encode_group(group)
    row.payload = len(payload)
    return [row]


def decode(sizes: Sizes) -> list[Measured]:
    """The trainer decodes it."""
    from miles.queue.payload import decode_group, encode_group

    payload = encode_group(make_group(sizes))
    row = Measured("payload to samples", len(payload), sizes.samples * sizes.sample.light_bytes * 2)
    with measuring(row):
        samples = decode_group(payload).samples
    assert len(samples) == sizes.samples
    return [row]


def queue(sizes: Sizes) -> list[Measured]:
    """Through Redis: a rollout puts, a trainer collects."""
    from miles.queue import GroupQueue, RedisServer, connect_async
    from miles.queue.blobs import PIECE_BYTES

    async def run(url: str) -> list[Measured]:
        client = await connect_async(url)
        warm_up = make_group(tiny(sizes), group_id=1)
        await GroupQueue(client, "warm").put(warm_up, attempt=1)
        await GroupQueue(client, "warm").collect([1], 60)
        group = make_group(sizes)
        put = Measured("put into the queue", 0)
        with measuring(put):
            await GroupQueue(client, "long").put(group, attempt=1)
        del group
        collected = Measured("collect from the queue", 0)
        with measuring(collected):
            found = await GroupQueue(client, "long").collect([0], 60)
        assert len(found) == 1
        payload = sizes.samples * sizes.sample.payload_bytes
        put.payload = collected.payload = payload
        put.said = collected.said = payload + 4 * PIECE_BYTES
        await client.aclose()
        return [put, collected]

    with tempfile.TemporaryDirectory() as folder, RedisServer(pathlib.Path(folder)) as server:
        return asyncio.run(run(server.url))


def partial(sizes: Sizes) -> list[Measured]:
    """Responses of a group end one after the other, and each time the group is stored."""
    from miles.queue import PartialStore, RedisServer, connect_async

    async def run(url: str) -> list[Measured]:
        group = make_group(sizes)
        client = await connect_async(url)
        store = PartialStore(client, "long")
        row = Measured("store as responses end (bytes sent as peak)", sizes.samples * sizes.sample.payload_bytes)
        before = (await client.info("stats"))["total_net_input_bytes"]
        began = time.perf_counter()
        for ended in range(sizes.samples):
            done = [s if i <= ended else _pending(s) for i, s in enumerate(group.samples)]
            await store.save(0, SampleGroup("long", 0, done), changed=[ended] if ended else None)
        row.seconds = time.perf_counter() - began
        row.peak = (await client.info("stats"))["total_net_input_bytes"] - before
        row.said = row.payload + sizes.samples * 4096
        await client.aclose()
        return [row]

    with tempfile.TemporaryDirectory() as folder, RedisServer(pathlib.Path(folder)) as server:
        return asyncio.run(run(server.url))


def _pending(sample: Sample) -> Sample:
    return Sample(
        group_id=sample.group_id, index=sample.index, prompt=sample.prompt, tokens=sample.prompt_tokens.copy()
    )


def ranks(sizes: Sizes) -> list[Measured]:
    """Two ranks train on a group: rank 0 hands out what it has collected."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "benchmarks.long_sequences", "--inner", "rank", *_flags(sizes)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE) for rank in (0, 1)
    ]
    return [row for process in processes for row in _rows(process.communicate(timeout=600)[0])]


def one_rank(sizes: Sizes) -> list[Measured]:
    """One of the two."""
    import torch
    import torch.distributed as dist

    from miles.queue.payload import decode_group, encode_group
    from miles.services.trainer.batch.rollout_schedule import RolloutSchedule, StepSchedule
    from miles.services.trainer.ranks.collective_calls import Ranks

    half = sizes.samples // 2
    cuts = (tuple((i,) for i in range(half)), tuple((i,) for i in range(half, sizes.samples)))

    class Halves:
        """A backend of two replicas, as the exchange sees it."""

        replica = int(os.environ["RANK"])

        def schedule(self, groups: Any) -> RolloutSchedule:
            step = StepSchedule(sizes.samples, sizes.samples, 1, cuts, ((), ()))
            return RolloutSchedule((step,), None)

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    exchange = Ranks().exchange
    assert exchange is not None
    backend: Any = Halves()
    exchange.hand_out([make_group(tiny(sizes))] if backend.replica == 0 else None, backend)
    groups = [decode_group(encode_group(make_group(sizes)))] if backend.replica == 0 else None
    row = Measured(f"rank {backend.replica} gets its samples", half * sizes.sample.payload_bytes)
    if backend.replica:
        row.said = sequences.rank_bytes(sizes.sample, samples=sizes.samples, replicas=2)
    else:
        row.said = 3 * sizes.samples * sizes.sample.light_bytes  # decoded, and once more for the others
    with measuring(row):
        handed, _ = exchange.hand_out(groups, backend)
    assert len(handed[0].samples) == sizes.samples
    dist.barrier()
    dist.destroy_process_group()
    return [row]


def routing(sizes: Sizes) -> list[Measured]:
    """The engine's experts as the rows of a micro-batch."""
    from miles.services.trainer.batch.packing import pack
    from miles.services.trainer.batch.replayed_experts import rollout_routing

    samples = make_group(sizes).samples
    micro_batch = pack(samples, range(len(samples)), share_prompts=False)
    row = Measured("experts of a micro-batch", sizes.samples * sizes.sample.routing_bytes)
    row.said = row.payload
    with measuring(row):
        rollout_routing(samples, micro_batch)
    return [row]


def packing(sizes: Sizes) -> list[Measured]:
    """Samples of a group packed into rows that share their prompt."""
    from miles.services.trainer.batch.packing import pack

    samples = make_group(sizes).samples
    row = Measured("rows of a micro-batch", sizes.samples * sizes.tokens * 4)
    row.said = 2 * sizes.samples * sizes.sample.row_bytes
    with measuring(row):
        pack(samples, range(len(samples)), share_prompts=True)
    return [row]


def attention(sizes: Sizes) -> list[Measured]:
    """Forward and backward of one layer, on a sample alone and behind a prompt that samples share."""
    import torch

    from miles.services.trainer.backends.fsdp.attention.packed_attention import AttentionPlan, packed_attention
    from miles.services.trainer.batch.packing import pack

    torch.set_num_threads(1)
    rows: list[Measured] = []
    layer = dataclasses.replace(sizes, samples=2, layers=1, top_k=1)
    for what, count, tokens in (
        ("a first run", 2, 2600),
        ("attention, one sample", 1, sizes.tokens),
        ("attention, two samples with one prompt", 2, sizes.tokens),
    ):
        made = make_group(dataclasses.replace(layer, tokens=tokens)).samples
        samples = [dataclasses.replace(sample, rollout_routed_experts=None) for sample in made]
        micro_batch = pack(samples, range(count), share_prompts=True)
        shapes = ((HEADS, micro_batch.num_rows), (KV_HEADS, micro_batch.num_rows), (KV_HEADS, micro_batch.num_rows))
        q, k, v = (torch.randn(1, *shape, HEAD_SIZE, requires_grad=True) for shape in shapes)
        row = Measured(what, 4 * HEAD_SIZE * micro_batch.num_rows * (HEADS + 2 * KV_HEADS))
        row.said = sequences.attention_bytes(
            micro_batch.num_rows, heads=HEADS, kv_heads=KV_HEADS, head_size=HEAD_SIZE, bytes_per_number=4
        )
        plan = AttentionPlan(micro_batch.segments, torch.device("cpu"), torch.float32)
        with measuring(row):
            out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, attention_plan=plan)
            out.sum().backward()
        rows.append(row)
    return rows[1:]


STAGES: dict[str, Callable[[Sizes], list[Measured]]] = {
    "encode": encode,
    "decode": decode,
    "queue": queue,
    "partial": partial,
    "ranks": ranks,
    "routing": routing,
    "packing": packing,
    "attention": attention,
}


def _flags(sizes: Sizes) -> list[str]:
    return [text for name, value in dataclasses.asdict(sizes).items() for text in (f"--{name}", str(value))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rows(output: bytes) -> list[Measured]:
    return [Measured(**row) for row in json.loads(output.splitlines()[-1])]


def main() -> None:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--top_k", "--top-k", type=int, default=8)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = Sizes(arguments.samples, arguments.tokens, arguments.layers, arguments.top_k)
    if arguments.inner:
        found = (one_rank if arguments.inner == "rank" else STAGES[arguments.inner])(sizes)
        print(json.dumps([dataclasses.asdict(row) for row in found]))
        return
    print(f"{'':44}{'payload MB':>12}{'peak MB':>10}{'said MB':>10}{'peak/payload':>14}{'s':>8}")
    for stage in arguments.stage or STAGES:
        command = [sys.executable, "-m", "benchmarks.long_sequences", "--inner", stage, *_flags(sizes)]
        for row in _rows(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout):
            said = "" if row.said is None else f"{row.said / 1e6:.1f}"
            print(
                f"{row.what:44}{row.payload / 1e6:12.1f}{row.peak / 1e6:10.1f}{said:>10}"
                f"{row.peak / row.payload:14.2f}{row.seconds:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
