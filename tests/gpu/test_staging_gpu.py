"""Weights between GPU and host memory through pinned staging buffers.

    python -m pytest -m gpu tests/gpu/test_staging_gpu.py

Needs one GPU; about 30 s.
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Iterator, Mapping

import pytest
import torch
from weightsync_processes import Lines

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.rollout.engines.sglang.weights.gpu_buckets import GpuBuckets
from miles.services.rollout.engines.sglang.weights.staging import StagedWeights
from miles.weights import manifest as manifests
from miles.weights.dtypes import wire_dtype
from miles.weights.manifest import ManifestError, checksum
from miles.weights.staging.ahead import AheadOnDevice
from miles.weights.staging.ring import StagingRing
from miles.weights.transports.disk_delta.transport import DiskDeltaTransport
from miles.weights.transports.grpc_chunks.part import Part
from miles.weights.transports.shared_memory.transport import SharedMemoryTransport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TESTS = pathlib.Path(__file__).parent.parent
GPU = torch.device("cuda", 0)
VERSION = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=3)
SHAPES = {"large": (3000, 1111), "none": (0, 7), "norm": (33,), "strides": (257, 129), "scalar": (), "last": (64, 64)}
SLOT_BYTES = 1 << 18
"""Less than the largest of them."""

Tensors = dict[str, torch.Tensor]


def masters(seed: int, dtype: torch.dtype) -> Tensors:
    """What a trainer holds on its GPU; one tensor is not contiguous."""
    random = torch.Generator(GPU).manual_seed(seed)
    made = {name: torch.randn(shape, generator=random, device=GPU).to(dtype) for name, shape in SHAPES.items()}
    made["strides"] = torch.randn(SHAPES["strides"][::-1], generator=random, device=GPU).to(dtype).t()
    return made


def exported(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor in memory that is freed, and written to by somebody else, as soon as the next one is asked for.

    It is made by work that the GPU has not done yet.
    """
    for name, tensor in tensors.items():
        torch.cuda._sleep(10_000_000)
        yield name, tensor.clone()
        for _ in range(3):
            torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU).fill_(-7)


def wanted(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16().cpu().contiguous() for name, tensor in tensors.items()}


def planned() -> tuple[list[policy_pb2.TensorDescriptor], int]:
    return manifests.plan((name, wire_dtype(torch.bfloat16), shape) for name, shape in SHAPES.items())


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def same(received: Mapping[str, torch.Tensor], expected: Tensors) -> bool:
    return list(received) == list(expected) and all(
        received[name].dtype == tensor.dtype
        and received[name].shape == tensor.shape
        and raw(received[name].cpu()) == raw(tensor)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_own_stream", [False, True])
def test_shared_memory_has_every_byte_of_tensors_that_are_gone_by_then(
    held: torch.dtype, on_own_stream: bool, tmp_path: pathlib.Path
) -> None:
    transport = SharedMemoryTransport(StagingRing(pin_memory=True, slot_bytes=SLOT_BYTES, slots=3))
    stream = torch.cuda.Stream(GPU) if on_own_stream else torch.cuda.current_stream(GPU)
    path = tmp_path / "file"
    path.write_bytes(bytes(planned()[1]))
    handle = weightsync_pb2.TransportHandle(
        kind=weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
        shared_memory=weightsync_pb2.SharedMemoryHandle(path=str(path), nbytes=planned()[1]),
    )
    for version in range(3):
        descriptors, total = planned()
        tensors = masters(version, held)
        torch.cuda.synchronize(GPU)
        with torch.cuda.stream(stream):
            broken = dict(list(tensors.items())[:4])
            with pytest.raises(ManifestError, match="ended before tensor 'scalar'"):
                transport.send(handle, planned()[0], exported(broken))
            transport.send(handle, descriptors, exported(tensors))
        manifest = manifests.build(VERSION, descriptors, total, 0)
        received = SharedMemoryTransport().receive(handle, manifest)
        assert same(received.tensors, wanted(tensors))
        received.release()
    transport.close()


def test_chunks_and_files_have_every_byte(tmp_path: pathlib.Path) -> None:
    delta = DiskDeltaTransport()
    for version in range(2):
        tensors = masters(version, torch.float32)
        expected = wanted(tensors)
        descriptors, total = planned()
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            part = Part(descriptors, exported(tensors), 1 << 20, threads)
        data = b"".join(bytes(part.bytes(number)) for number in range(len(part.chunks)))
        for descriptor in descriptors:
            assert data[descriptor.offset : descriptor.offset + descriptor.nbytes] == raw(expected[descriptor.name])
            assert descriptor.checksum == checksum(raw(expected[descriptor.name]))
        handle = weightsync_pb2.TransportHandle(
            kind=weightsync_pb2.TRANSPORT_KIND_DISK_DELTA,
            publication_id=version + 1,
            disk_delta=weightsync_pb2.DiskDeltaHandle(
                path=str(tmp_path / str(version)), partial_path=str(tmp_path / f"partial-{version}")
            ),
        )
        descriptors, total = planned()
        delta.send(handle, descriptors, exported(tensors))
        manifest = manifests.build(VERSION, descriptors, total, version)
        delta.seal(handle, manifest)
        assert same(DiskDeltaTransport().receive(handle, manifest).tensors, expected)
    delta.close()


def test_a_version_is_copied_to_the_gpu_ahead() -> None:
    ahead = AheadOnDevice(GPU, StagingRing(pin_memory=True, slot_bytes=SLOT_BYTES, slots=3))
    for version in range(3):
        expected = wanted(masters(version, torch.float32))
        copied = ahead.copied(expected)
        assert all(tensor.device == GPU for tensor in copied.values())
        assert same(copied, expected)
    ahead.close()


@pytest.mark.parametrize("in_one", [True, False])
async def test_another_process_copies_buckets_whose_memory_is_used_again(in_one: bool) -> None:
    server = Lines([str(TESTS / "support/bucket_reader.py")])
    nbytes = 8 << 20
    free = 1 << 40 if in_one else 5 * nbytes
    buckets = GpuBuckets(StagingRing(pin_memory=True, slot_bytes=1 << 20, slots=4), lambda gpu: free)
    before = torch.cuda.memory_reserved(GPU)
    for version in range(2):
        random = torch.Generator().manual_seed(version)
        tensors = {f"t{i}": torch.randn(nbytes // 4, generator=random) for i in range(12)}
        staged = StagedWeights(list(tensors.items()), nbytes, buckets)
        await staged.stage([GPU])
        assert staged.copied_on_gpu
        (reader,) = await staged.join([GPU])
        count = 0
        with reader:
            async for bucket, _ in reader.buckets():
                count += 1
                server.send(bucket.serialized())
                server.wait_for(lambda line: line == "read", "the end of a bucket")
        assert count == (1 if in_one else 12)
        server.send("done")
        found = json.loads(server.wait_for(lambda line: line.startswith("{"), "checksums"))
        assert found == {name: checksum(raw(tensor)).hex() for name, tensor in tensors.items()}
        del bucket
        await staged.close()
        assert torch.cuda.memory_reserved(GPU) <= before, "the memory is the driver's again"
    buckets.close()
    server.kill()
