"""What each engine can use, as the service knows it."""

from __future__ import annotations

import pytest

from miles.rpc.gen import weightsource_pb2, weightsync_pb2
from miles.rpc.gen.weightsync_pb2 import (
    TRANSPORT_KIND_CUDA_IPC,
    TRANSPORT_KIND_GRPC_CHUNKS,
    TRANSPORT_KIND_SHARED_MEMORY,
)
from miles.services.weightsync.engine import Engine, InFlight, Order, OrderKind
from miles.services.weightsync.links import Links
from miles.services.weightsync.transport_choice import Placement

IPC, CHUNKS, MAP = TRANSPORT_KIND_CUDA_IPC, TRANSPORT_KIND_GRPC_CHUNKS, TRANSPORT_KIND_SHARED_MEMORY
GIGABYTE, PARTS = 1 << 30, 32
CHOSEN, CONFIGURED = Placement((IPC,), fixed=False), Placement((IPC,), fixed=True)


def hello(name: str, boot_id: str = "here", gpus: tuple[str, ...] = ("GPU-0",)) -> weightsync_pb2.EngineHello:
    probe = weightsource_pb2.GpuMemoryProbe(
        boot_id=boot_id, token=name.encode(), visible_gpus=gpus, gpu_nbytes=GIGABYTE * PARTS
    )
    return weightsync_pb2.EngineHello(engine_id=name, usable=[CHUNKS], gpu_memory=probe)


def opened(*names: str, gpu_nbytes: int = GIGABYTE * PARTS) -> weightsource_pb2.OpenedGpuMemory:
    return weightsource_pb2.OpenedGpuMemory(tokens=[name.encode() for name in names], gpu_nbytes=gpu_nbytes)


def in_gpu_memory(*gpus: str, boot_id: str = "here") -> weightsync_pb2.TransportHandle:
    handle = weightsync_pb2.TransportHandle(kind=IPC)
    handle.cuda_ipc.boot_id = boot_id
    for gpu in gpus:
        handle.cuda_ipc.buckets.add(device_uuid=gpu)
    return handle


def test_gpu_memory_is_usable_for_engines_whose_own_memory_the_trainer_has_opened() -> None:
    links = Links()
    links.attach(hello("a"))
    links.attach(weightsync_pb2.EngineHello(engine_id="on a cpu", usable=[CHUNKS]))
    assert links.usable_for(["a"], opened("a", "b"), GIGABYTE) == [{CHUNKS, IPC}]
    assert links.usable_for(["a"], opened("b"), GIGABYTE) == [{CHUNKS}]
    assert links.usable_for(["on a cpu"], opened("a"), GIGABYTE) == [{CHUNKS}]
    assert [probe.token for probe in links.gpu_memory(["a", "on a cpu"])] == [b"a"]


@pytest.mark.parametrize(("nbytes", "parts"), [(GIGABYTE + 1, PARTS), (GIGABYTE, PARTS - 1)])
def test_a_version_that_is_large_beside_either_gpu_does_not_go_there(nbytes: int, parts: int) -> None:
    links = Links()
    links.attach(hello("a"))
    assert links.usable_for(["a"], opened("a", gpu_nbytes=GIGABYTE * parts), nbytes) == [{CHUNKS}]


@pytest.mark.parametrize(
    ("gpus", "nbytes", "may"),
    [
        (["GPU-0", "GPU-0"], GIGABYTE, [False, False]),
        (["GPU-0", "GPU-0"], GIGABYTE * 32 // 48, [True, True]),
        (["GPU-0", "GPU-0"], GIGABYTE * 32 // 48 + 1, [False, False]),
        (["GPU-0"] * 4, GIGABYTE * 32 // 80, [True] * 4),
        (["GPU-0"] * 4, GIGABYTE * 32 // 80 + 1, [False] * 4),
        (["GPU-0", "GPU-1"], GIGABYTE, [True, True]),
        (["GPU-0", "GPU-0", "GPU-1"], GIGABYTE, [False, False, True]),
    ],
)
def test_the_more_engines_share_a_gpu_the_smaller_a_version_has_to_be(
    gpus: list[str], nbytes: int, may: list[bool]
) -> None:
    links, names = Links(), [str(number) for number in range(len(gpus))]
    for name, gpu in zip(names, gpus, strict=True):
        greeting = hello(name)
        greeting.gpu_memory.memory.device_uuid = gpu
        links.attach(greeting)
    assert [IPC in usable for usable in links.usable_for(names, opened(*names), nbytes)] == may


def test_an_engine_that_failed_with_gpu_memory_does_without_until_it_subscribes_again() -> None:
    links = Links()
    links.attach(hello("a"))
    links.prefetches("a", MAP)
    links.failed("a")
    assert IPC in links.usable_for(["a"], opened("a"), 1)[0], "that failure has nothing to do with it"
    links.prefetches("a", IPC)
    links.failed("a")
    assert IPC not in links.usable_for(["a"], opened("a"), 1)[0]
    assert links.gpu_memory(["a"]) == [], "nobody needs to try it either"
    links.attach(hello("a"))
    assert IPC in links.usable_for(["a"], opened("a"), 1)[0]


def test_only_engines_of_the_node_that_see_all_gpus_of_a_version_reach_it() -> None:
    links = Links()
    links.attach(hello("one", gpus=("GPU-0",)))
    links.attach(hello("both", gpus=("GPU-1", "GPU-0")))
    links.attach(hello("elsewhere", boot_id="there", gpus=("GPU-0", "GPU-1")))
    links.attach(weightsync_pb2.EngineHello(engine_id="on a cpu"))
    names = ("one", "both", "elsewhere", "on a cpu", "unknown")
    version = in_gpu_memory("GPU-0", "GPU-1")
    assert [name for name in names if links.reaches(name, CHOSEN, version)] == ["both"]
    assert [name for name in names if links.reaches(name, CHOSEN, in_gpu_memory("GPU-0"))] == ["one", "both"]
    mapped = weightsync_pb2.TransportHandle(kind=MAP)
    assert all(links.reaches(name, Placement((MAP,), fixed=False), mapped) for name in names)
    assert all(links.reaches(name, CONFIGURED, version) for name in names), "whoever configures it is told by the error"


def test_only_an_order_to_prefetch_that_is_late_counts_as_a_failure_with_gpu_memory() -> None:
    links = Links()
    for name, kind, late in (
        ("hangs", OrderKind.PREFETCH, True),
        ("busy", OrderKind.PREFETCH, False),
        ("slow swap", OrderKind.SWAP, True),
    ):
        links.attach(hello(name))
        links.prefetches(name, IPC)
        links.note_late([Engine(name, session=1, in_flight=InFlight(Order(1, kind, 1), 1.0, 1.0, expired=late))])
    assert [name for name in ("hangs", "busy", "slow swap") if links.has_failed(name)] == ["hangs"]


def test_only_the_answer_to_an_open_order_to_prefetch_is_one() -> None:
    def engine(kind: OrderKind) -> Engine:
        return Engine("a", session=3, in_flight=InFlight(Order(5, kind, 1), 1.0, 1.0))

    assert engine(OrderKind.PREFETCH).is_prefetching(3, 5)
    assert not engine(OrderKind.PREFETCH).is_prefetching(3, 4), "an earlier order"
    assert not engine(OrderKind.PREFETCH).is_prefetching(2, 5), "an earlier subscription"
    assert not engine(OrderKind.SWAP).is_prefetching(3, 5)
    assert not Engine("a", session=3).is_prefetching(3, 5)
