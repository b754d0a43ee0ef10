from __future__ import annotations

import logging

import pytest

from miles.queue import RedisUnsuitable
from miles.queue.client import check_server

GOOD = {"redis_version": "6.2.14", "maxmemory": 100, "maxmemory_policy": "noeviction", "aof_enabled": 1}


def test_a_good_server_passes_silently(caplog: pytest.LogCaptureFixture) -> None:
    check_server(GOOD, "redis://x")
    assert not caplog.records


@pytest.mark.parametrize("version", ["6.0.16", "5.0.7", "0"])
def test_an_old_server_is_refused(version: str) -> None:
    with pytest.raises(RedisUnsuitable, match=r"6\.2"):
        check_server(GOOD | {"redis_version": version}, "redis://x")


@pytest.mark.parametrize("version", ["6.2.0", "7.4.1", "10.0.0"])
def test_newer_servers_pass(version: str) -> None:
    check_server(GOOD | {"redis_version": version}, "redis://x")


def test_a_server_that_evicts_is_refused() -> None:
    with pytest.raises(RedisUnsuitable, match="allkeys-lru"):
        check_server(GOOD | {"maxmemory_policy": "allkeys-lru"}, "redis://x")


def test_a_policy_without_a_limit_and_a_missing_aof_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_server(GOOD | {"maxmemory_policy": "volatile-lru", "maxmemory": 0, "aof_enabled": 0}, "redis://x")
    assert [("volatile-lru" in r.message, "appendonly" in r.message) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]
