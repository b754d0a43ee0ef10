"""Leases: numbers, expiry and fencing."""

from __future__ import annotations

from miles.services.controller.workers.worker_leases import WorkerLeases


def test_heartbeats_keep_a_lease_alive_and_silence_ends_it() -> None:
    table = WorkerLeases(ttl_s=3)
    lease = table.register("w", "first", now_s=0)
    assert table.renew("w", lease.number, now_s=2)
    assert table.expire(now_s=4) == []
    assert [gone.worker_id for gone in table.expire(now_s=5)] == ["w"]
    assert not table.renew("w", lease.number, now_s=5.1)


def test_a_new_incarnation_fences_the_old_one() -> None:
    table = WorkerLeases(ttl_s=3)
    old = table.register("w", "first", now_s=0).number
    new = table.register("w", "second", now_s=1).number
    assert new > old
    assert not table.renew("w", old, now_s=1)
    assert not table.release("w", old)
    assert table.renew("w", new, now_s=1)


def test_the_same_incarnation_keeps_its_number_over_a_reconnect() -> None:
    table = WorkerLeases(ttl_s=3)
    number = table.register("w", "first", now_s=0).number
    assert table.register("w", "first", now_s=1).number == number


def test_numbers_go_on_after_an_expiry() -> None:
    table = WorkerLeases(ttl_s=3)
    number = table.register("w", "first", now_s=0).number
    table.expire(now_s=10)
    assert table.register("w", "first", now_s=10).number > number
