from __future__ import annotations

import time

import pytest

from miles.rpc.gen import controller_pb2
from miles.services.controller.workers.registry import WorkerRegistry

ROLLOUT, REWARD = controller_pb2.WORKER_KIND_ROLLOUT, controller_pb2.WORKER_KIND_REWARD


def registration(
    name: str, kind: controller_pb2.WorkerKind.ValueType = ROLLOUT, incarnation: str = "1"
) -> controller_pb2.WorkerRegistration:
    return controller_pb2.WorkerRegistration(
        worker_id=name, kind=kind, address=f"host-{name}:1", incarnation=incarnation
    )


class Clock:
    """The monotonic clock, in a test's hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


async def test_silence_while_the_controller_listens_ends_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    registry = WorkerRegistry(ttl_s=6.0)
    silent, loud = registry.attach(registration("a")), registry.attach(registration("b"))
    lost: list[str] = []
    for _ in range(8):
        clock.now_s += 1.0
        assert registry.beat(loud, controller_pb2.WorkerHeartbeat())
        lost += [worker.worker_id for worker in registry.expire()]
    assert lost == ["a"]
    assert silent.lost.is_set()
    assert not registry.beat(silent, controller_pb2.WorkerHeartbeat())


async def test_a_controller_that_was_stopped_hears_its_workers_before_it_gives_them_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    registry = WorkerRegistry(ttl_s=6.0)
    worker = registry.attach(registration("a"))
    clock.now_s += 3600.0
    assert registry.expire() == []
    assert registry.beat(worker, controller_pb2.WorkerHeartbeat())
    assert registry.alive(ROLLOUT) == [worker]


async def test_workers_are_found_by_kind_and_address_until_they_go() -> None:
    registry = WorkerRegistry()
    b, a = registry.attach(registration("b")), registry.attach(registration("a"))
    reward = registry.attach(registration("r", REWARD))
    assert registry.alive(ROLLOUT) == [a, b]
    assert registry.at("host-r:1") == [reward]
    again = registry.attach(registration("b", incarnation="2"))
    assert b.lost.is_set()
    assert registry.alive(ROLLOUT) == [a, again]
    assert registry.at("host-b:1") == [again]
    registry.detach(b)
    assert registry.alive(ROLLOUT) == [a, again]
    registry.detach(again)
    assert registry.alive(ROLLOUT) == [a]
    assert registry.at("host-b:1") == []
