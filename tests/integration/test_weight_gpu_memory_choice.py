"""When versions go through GPU memory by themselves: a real service, and processes on a node whose GPU is a fake."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator

import grpc.aio
import pytest
import torch
from fake_gpu import IPC, FakeNode
from weight_host import DEADLINE_S, JOB, POLICY, GatedEngine, Host, raw

from miles.rpc.gen import controller_pb2, weightsync_pb2
from miles.services.controller.clients.calls import WorkerLostError
from miles.services.controller.run.reach import watch_reach
from miles.services.controller.workers.registry import AttachedWorker
from miles.weights import SubscriberState, WeightSubscriber

MAP = weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    made = Host(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def node(host: Host) -> Iterator[FakeNode]:
    """A node with a trainer."""
    made = FakeNode()
    made.trainer(host)
    yield made
    for channel in made.channels:
        channel.close()


@pytest.fixture
async def started() -> AsyncIterator[list[WeightSubscriber]]:
    """Subscribers to close in the end."""
    made: list[WeightSubscriber] = []
    yield made
    for subscriber in made:
        await subscriber.close()


def attached_at(address: str) -> AttachedWorker:
    """The service as the controller knows it."""
    registration = controller_pb2.WorkerRegistration(worker_id="weightsync", address=address)
    return AttachedWorker(registration, 1, controller_pb2.WorkerHeartbeat(), 0, asyncio.Event())


async def start(host: Host, node: FakeNode, name: str, started: list[WeightSubscriber]) -> GatedEngine:
    """Start an engine on the node and wait until it is attached."""
    subscriber, engine = node.engine(host, name)
    started.append(subscriber)
    await attach(host, subscriber, name)
    return engine


async def attach(host: Host, subscriber: WeightSubscriber, name: str) -> None:
    await subscriber.start()
    await status(host, name, lambda engine: engine.attached)


async def status(
    host: Host, name: str, accept: Callable[[weightsync_pb2.EngineStatus], bool]
) -> weightsync_pb2.EngineStatus:
    """Wait until the service says this of an engine."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for engine in (await host.list()).engines:
                if engine.engine_id == name and accept(engine):
                    return engine
            await asyncio.sleep(0.02)


async def publish(host: Host, version: int) -> list[int]:
    """Publish a version; returns the transports that it goes by."""
    return [handle.kind for handle in (await host.publish(version)).handles]


async def test_versions_go_through_gpu_memory_once_every_engine_has_proven_that_they_can(
    host: Host, node: FakeNode, started: list[WeightSubscriber], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert await publish(host, 0) == [MAP], "no engine is there"
    engine = await start(host, node, "a", started)
    assert await publish(host, 1) == [IPC]
    await host.activate(1)
    assert raw(engine.tensors) == raw({"w": torch.full((1000,), 1.0)})
    assert await publish(host, 2) == [IPC]
    assert len(node.tried) == 1, "an engine is tried once for as long as it is subscribed"
    lines = [record.getMessage() for record in caplog.records if "weights go by" in record.getMessage()]
    assert lines == ["job/policy: weights go by shared_memory", "job/policy: weights go by cuda_ipc"]
    (version,) = [v for v in (await host.list()).versions if v.version.version == 1]
    assert list(version.transports) == [IPC]
    assert (await status(host, "a", lambda engine: engine.version == 1)).transport == IPC


async def test_one_engine_that_cannot_share_gpu_memory_sends_all_of_them_another_way(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "near", started)
    other = WeightSubscriber(host.address, JOB, "on a cpu", POLICY, GatedEngine())
    started.append(other)
    await attach(host, other, "on a cpu")
    assert await publish(host, 0) == [MAP]
    await host.activate(0, min_engines=2)
    await other.close()
    started.remove(other)
    await status(host, "near", lambda engine: engine.HasField("version"))
    async with asyncio.timeout(DEADLINE_S):
        while len((await host.list()).engines) > 1:  # noqa: ASYNC110 — the service's state is what is waited for
            await asyncio.sleep(0.02)
    assert await publish(host, 1) == [IPC], "it has left"


async def test_memory_that_the_trainer_cannot_open_is_not_used(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    node.locked = True
    await start(host, node, "a", started)
    assert await publish(host, 0) == [MAP]
    await host.activate(0)


async def test_a_version_that_is_large_for_the_gpu_goes_through_the_host(
    host: Host, started: list[WeightSubscriber]
) -> None:
    small = FakeNode(gpu_nbytes=32 * 4000 - 1)
    small.trainer(host)
    await start(host, small, "a", started)
    assert await publish(host, 0) == [MAP]
    assert small.told == [0], "the engine had to share without knowing"
    assert small.tried == [], "the trainer knows the size, and would take a context on the engine's GPU to find out"
    small.channels[0].close()


async def test_an_engine_that_comes_late_from_elsewhere_waits_for_the_next_version_and_says_so(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "near", started)
    assert await publish(host, 3) == [IPC]
    await host.activate(3)
    late = await start(host, FakeNode("another node"), "late", started)
    said = await status(host, "late", lambda engine: engine.last_error != "")
    assert said.last_error == "waits for the version after 3, which is in GPU memory that it cannot open"
    assert said.state == weightsync_pb2.ENGINE_STATE_EMPTY, "it has done nothing wrong"
    assert await publish(host, 4) == [MAP]
    await host.activate(4, min_engines=2)
    assert raw(late.tensors) == raw({"w": torch.full((1000,), 4.0)})
    assert (await status(host, "late", lambda engine: engine.version == 4)).last_error == ""


async def test_an_engine_that_attaches_between_allocation_and_activation_holds_nobody_up(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "near", started)
    assert await publish(host, 0) == [IPC]
    await start(host, FakeNode("another node"), "late", started)
    done = await host.activate(0)
    assert (done.engines, done.quarantined) == (1, 0)


async def test_an_engine_that_restarts_on_the_node_loads_the_version_in_gpu_memory_at_once(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    await host.activate(0)
    await started.pop().close()
    assert node.shared == {}, "its memory is freed with its subscription"
    engine = await start(host, node, "a", started)
    await started[-1].wait_for_version(0, DEADLINE_S)
    assert raw(engine.tensors) == raw({"w": torch.full((1000,), 0.0)})
    assert await publish(host, 1) == [IPC], "it has been tried again"
    assert len(node.tried) == 2
    assert node.told == [0, 4000], "the size is unknown before the first version, and then keeps large models out"


async def test_an_engine_that_fails_to_load_from_gpu_memory_gets_the_next_version_another_way(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    node.locked = True
    failing = asyncio.create_task(host.activate(0))
    failed = await status(host, "a", lambda engine: engine.state == weightsync_pb2.ENGINE_STATE_QUARANTINED)
    assert "cannot be opened" in failed.last_error
    node.locked = False
    await failing
    assert await publish(host, 1) == [MAP], "although the trainer could open its memory"
    await host.activate(1)
    assert started[0].state is SubscriberState.SERVING
    await started.pop().close()
    await start(host, node, "a", started)
    assert await publish(host, 2) == [IPC], "it has subscribed anew"


async def test_an_engine_that_hangs_while_it_opens_gpu_memory_gets_the_next_version_another_way(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    node.opens.clear()
    with pytest.raises(grpc.aio.AioRpcError):
        await host.activate(0, deadline_s=0.5)
    assert await publish(host, 1) == [MAP]
    node.opens.set()
    await host.activate(1)


async def test_an_engine_that_fails_after_it_has_copied_a_version_from_gpu_memory_goes_on_to_use_it(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    engine = await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    engine.fails = 1
    await host.activate(0)
    assert engine.fails == 0, "it failed once, and loaded the version the second time"
    assert await publish(host, 1) == [IPC]


async def test_a_version_that_engines_in_place_of_the_lost_ones_cannot_get_is_published_again(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    await host.activate(0)
    watch = asyncio.create_task(watch_reach(attached_at(host.address), JOB, interval_s=0.05))
    await started.pop().close()
    assert [version.out_of_reach for version in (await host.list()).versions] == [False], "others may come"
    engine = await start(host, FakeNode("another node"), "b", started)
    with pytest.raises(
        WorkerLostError, match="no engine that is attached can open the GPU memory that version 0 is in"
    ):
        await asyncio.wait_for(watch, DEADLINE_S)
    assert await publish(host, 0) == [MAP]
    await host.activate(0, DEADLINE_S - 1)
    assert raw(engine.tensors) == raw({"w": torch.full((1000,), 0.0)})
    assert not any(version.out_of_reach for version in (await host.list()).versions)


async def test_a_version_that_the_only_engine_cannot_open_after_its_restart_is_out_of_reach(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    await host.activate(0)
    await started.pop().close()
    node.locked = True
    await start(host, node, "a", started)
    async with asyncio.timeout(DEADLINE_S):
        while not any(version.out_of_reach for version in (await host.list()).versions):  # noqa: ASYNC110 — as above
            await asyncio.sleep(0.02)
    assert await publish(host, 0) == [MAP]
    await host.activate(0, DEADLINE_S - 1)
    assert started[-1].state is SubscriberState.SERVING


async def test_a_restarted_service_knows_where_its_versions_are(
    host: Host, node: FakeNode, started: list[WeightSubscriber]
) -> None:
    engine = await start(host, node, "a", started)
    assert await publish(host, 0) == [IPC]
    await host.activate(0)
    await host.stop()
    await host.start()
    await status(host, "a", lambda engine: engine.attached and engine.HasField("version"))
    assert engine.loads == [0]
    node.trainer(host)  # a new connection: an old one may notice only with its next call that it has ended
    assert await publish(host, 1) == [IPC]
    await host.activate(1)
    assert engine.loads == [0, 1]


async def test_processes_without_a_gpu_neither_share_nor_open_gpu_memory(
    host: Host, started: list[WeightSubscriber]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("there is no GPU here")

    engine = GatedEngine()
    subscriber = WeightSubscriber(host.address, JOB, "a", POLICY, engine, share_gpu_memory=fail)
    started.append(subscriber)
    await attach(host, subscriber, "a")
    result = await host.publish(0, open_gpu_memory=fail)
    assert [handle.kind for handle in result.handles] == [MAP]
    await host.activate(0)
    assert not torch.cuda.is_initialized()


async def test_an_engine_that_ends_while_it_shares_gpu_memory_leaves_none_behind(host: Host, node: FakeNode) -> None:
    node.shares.clear()
    subscriber, _ = node.engine(host, "a")
    await subscriber.start()
    assert await asyncio.to_thread(node.sharing.wait, DEADLINE_S)
    closing = asyncio.create_task(subscriber.close())
    for _ in range(10):  # it is cancelled meanwhile
        await asyncio.sleep(0)
    node.shares.set()
    await closing
    assert (node.freed, node.shared) == (1, {})
