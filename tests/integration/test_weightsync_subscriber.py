"""The engine's side on its own: a real service and a subscriber on one event loop."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
from weight_host import DEADLINE_S, POLICY, GatedEngine, Host

from miles.weights import SubscriberState, WeightSubscriber


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A service that runs."""
    made = Host(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def subscribe(host: Host) -> AsyncIterator[Callable[..., WeightSubscriber]]:
    """Makes subscribers that are closed at the end."""
    made: list[WeightSubscriber] = []

    def make(engine: GatedEngine, on_change: Callable[[SubscriberState], None] | None = None) -> WeightSubscriber:
        made.append(WeightSubscriber(host.address, "job", "engine", POLICY, engine, on_change))
        return made[-1]

    yield make
    for subscriber in made:
        await subscriber.close()


async def test_an_engine_finds_a_service_that_starts_later(
    host: Host, subscribe: Callable[..., WeightSubscriber]
) -> None:
    await host.publish(0)
    await host.stop()
    subscriber = subscribe(engine := GatedEngine())
    await subscriber.start()
    with pytest.raises(
        TimeoutError, match=r"waited 1 s for engine engine to serve a version; it is empty.*UNAVAILABLE"
    ):
        await subscriber.wait_for_version(None, 1)
    await host.start()
    await host.activate(0)
    await subscriber.wait_for_version(0, DEADLINE_S)
    assert engine.loads == [0]


async def test_a_restarted_service_does_not_make_engines_load_again(
    host: Host, subscribe: Callable[..., WeightSubscriber]
) -> None:
    subscriber = subscribe(engine := GatedEngine())
    await subscriber.start()
    await host.publish(0)
    await host.activate(0)
    await host.stop()
    await host.start()
    await host.publish(1)
    await host.activate(1)
    assert engine.loads == [0, 1]
    assert subscriber.state is SubscriberState.SERVING


async def test_changes_of_state_are_told_in_order(host: Host, subscribe: Callable[..., WeightSubscriber]) -> None:
    seen: list[tuple[SubscriberState, int | None]] = []
    subscriber = subscribe(GatedEngine(), lambda state: seen.append((state, subscriber.version)))
    await subscriber.start()
    for version in range(2):
        await host.publish(version)
        await host.activate(version)
    assert seen == [(SubscriberState.SERVING, 0), (SubscriberState.PREFETCHED, 0), (SubscriberState.SERVING, 1)]


async def test_a_swap_that_ends_too_late_does_not_bring_the_engine_back(
    host: Host, subscribe: Callable[..., WeightSubscriber]
) -> None:
    states: asyncio.Queue[SubscriberState] = asyncio.Queue()
    subscriber = subscribe(engine := GatedEngine(), states.put_nowait)
    await subscriber.start()
    await host.publish(0)
    await host.activate(0)
    await host.publish(1)
    engine.gate.clear()
    engine.loading.clear()
    with pytest.raises(grpc.aio.AioRpcError, match="0 of 1 engines"):
        await host.activate(1, deadline_s=2)
    assert engine.loading.is_set()
    async with asyncio.timeout(DEADLINE_S):
        while await states.get() is not SubscriberState.QUARANTINED:
            pass
    assert subscriber.version is None
    engine.gate.set()
    await subscriber.wait_for_version(0, DEADLINE_S)
    assert engine.loads == [0, 1, 0], "the late swap, then a full load of the version that is active"
    assert states.get_nowait() is SubscriberState.SERVING
    assert states.empty(), "it served nothing in between"


async def test_closing_lets_an_order_finish(host: Host, subscribe: Callable[..., WeightSubscriber]) -> None:
    subscriber = subscribe(engine := GatedEngine())
    await subscriber.start()
    await host.publish(0)
    engine.gate.clear()
    activation = asyncio.create_task(host.activate(0, deadline_s=5))
    await engine.loading.wait()
    with pytest.raises(TimeoutError, match=r"waited 0\.2 s for engine engine to finish a weight order"):
        await subscriber.close(deadline_s=0.2)
    engine.gate.set()
    await subscriber.close()
    assert engine.loads == [0]
    with pytest.raises(grpc.aio.AioRpcError):
        await activation
