"""How a trainer judges engines' GPU memory before it opens it; opening it is in tests/gpu."""

from __future__ import annotations

import pytest

from miles.rpc.gen import weightsource_pb2
from miles.weights.transports.cuda_ipc.probe import merge_opened, suits


def probe(
    boot_id: str = "here", handle: bytes = b"\x03c1234", gpu: str = "GPU-0", sees: tuple[str, ...] = ("GPU-0",)
) -> weightsource_pb2.GpuMemoryProbe:
    memory = weightsource_pb2.CudaIpcBucket(device_uuid=gpu, memory_handle=handle)
    return weightsource_pb2.GpuMemoryProbe(boot_id=boot_id, memory=memory, visible_gpus=sees)


@pytest.mark.parametrize(
    ("engine", "trainer", "may"),
    [
        (probe(), probe(handle=b"\x03c5678"), True),
        (probe(gpu="GPU-1", sees=("GPU-1", "GPU-0")), probe(), True),
        (probe(boot_id="there"), probe(), False),
        (probe(gpu="GPU-1", sees=("GPU-1",)), probe(), False),
        (probe(handle=b"\x02c1234"), probe(), False),
        (probe(), probe(handle=b"\x03e1234"), False),
        (probe(handle=b"\x03e1234"), probe(handle=b"\x03e5678"), False),
    ],
    ids=["same", "two GPUs", "two nodes", "hidden GPU", "another torch", "expandable trainer", "expandable segments"],
)
def test_only_engines_of_the_node_that_allocate_alike_and_see_the_trainers_gpu_are_tried(
    engine: weightsource_pb2.GpuMemoryProbe, trainer: weightsource_pb2.GpuMemoryProbe, may: bool
) -> None:
    assert suits(engine, trainer) is may


def test_an_engine_counts_when_every_rank_can_share_memory_with_it() -> None:
    reports = [
        weightsource_pb2.OpenedGpuMemory(tokens=[b"a", b"b"], gpu_nbytes=3),
        weightsource_pb2.OpenedGpuMemory(tokens=[b"b", b"c"], gpu_nbytes=2),
    ]
    assert merge_opened(reports) == weightsource_pb2.OpenedGpuMemory(tokens=[b"b"], gpu_nbytes=2)
    assert not merge_opened([*reports, weightsource_pb2.OpenedGpuMemory()]).tokens
