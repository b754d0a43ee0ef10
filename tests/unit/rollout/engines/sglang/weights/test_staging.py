"""Versions made ready for servers, with the memory of a CPU in place of a GPU's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from miles.services.rollout.engines.sglang.weights.bucket_line import BucketReader
from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor
from miles.services.rollout.engines.sglang.weights.gpu_buckets import GpuBuckets
from miles.services.rollout.engines.sglang.weights.staging import StagedWeights
from miles.weights.staging.ring import StagingRing

GPU = torch.device("cpu")
TENSORS: list[NamedTensor] = [
    ("a", torch.randn(30, 10)),
    ("b", torch.randn(7).bfloat16()),
    ("c", torch.randn(10, 20).t()),
    ("d", torch.empty(0, 3)),
    ("e", torch.tensor(2.5)),
]
BUCKET_BYTES = 1000
NBYTES = sum(tensor.nbytes for _, tensor in TENSORS)


def gpus_with(free: int) -> GpuBuckets:
    return GpuBuckets(StagingRing(pin_memory=False, slot_bytes=256, slots=2), lambda gpu: free)


def held(bucket: Bucket) -> dict[str, torch.Tensor]:
    """The tensors of a bucket, as SGLang reads them."""
    return {
        entry.name: bucket.flat[entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
        for entry in bucket.entries
    }


async def everything(reader: BucketReader) -> list[dict[str, torch.Tensor]]:
    with reader:
        return [held(bucket) async for bucket, _ in reader.buckets()]


def check(buckets: Sequence[dict[str, torch.Tensor]]) -> None:
    found = {name: tensor for bucket in buckets for name, tensor in bucket.items()}
    assert list(found) == [name for name, _ in TENSORS]
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS)


@pytest.mark.parametrize(
    ("free", "count", "on_gpu"),
    [(1 << 20, 1, True), (2 * NBYTES, 1, True), (2 * NBYTES - 2, 2, False), (100, 2, False)],
)
async def test_a_server_reads_every_byte_wherever_there_is_room(free: int, count: int, on_gpu: bool) -> None:
    made = gpus_with(free)
    for _ in range(2):
        staged = StagedWeights(TENSORS, BUCKET_BYTES, made)
        await staged.stage([GPU])
        (reader,) = await staged.join([GPU])
        buckets = await everything(reader)
        check(buckets)
        assert len(buckets) == count
        assert any(tensor.is_shared() for bucket in buckets for tensor in bucket.values()) is not on_gpu
        await staged.close()
    made.close()


async def test_what_does_not_fit_at_once_goes_bucket_by_bucket() -> None:
    tensors = [(str(number), torch.full((100,), float(number))) for number in range(10)]
    made = gpus_with(4 * 400 + 100)
    staged = StagedWeights(tensors, 400, made)
    await staged.stage([GPU])
    (reader,) = await staged.join([GPU])
    buckets = await everything(reader)
    assert [list(bucket) for bucket in buckets] == [[name] for name, _ in tensors]
    assert all(buckets[number][name].equal(tensor) for number, (name, tensor) in enumerate(tensors))
    await staged.close()
    made.close()


async def test_servers_with_a_gpu_and_without_read_the_same() -> None:
    made = gpus_with(1 << 20)
    staged = StagedWeights(TENSORS, BUCKET_BYTES, made)
    await staged.stage([GPU, None])
    for buckets in await asyncio.gather(*map(everything, await staged.join([None, GPU, None]))):
        check(buckets)
    await staged.close()
    made.close()


async def test_a_gpu_that_cannot_be_asked_or_filled_is_left_out() -> None:
    def unknown(gpu: torch.device) -> int:
        raise RuntimeError("CUDA error: out of memory")

    for made in (GpuBuckets(StagingRing(pin_memory=False), unknown), gpus_with(1 << 60)):
        gpu = torch.device("vulkan")
        staged = StagedWeights(TENSORS, BUCKET_BYTES, made)
        await staged.stage([gpu])
        (reader,) = await staged.join([gpu])
        buckets = await everything(reader)
        check(buckets)
        assert any(tensor.is_shared() for bucket in buckets for tensor in bucket.values())
        await staged.close()
        made.close()
