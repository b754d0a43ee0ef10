"""Connections to Redis, after checks that the server cannot lose queued groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry

from miles.queue.errors import RedisUnsuitable

log = logging.getLogger(__name__)

MINIMUM_VERSION = (6, 2)
"""The first version with GETEX and with exclusive ranges in XPENDING."""

CONNECT_DEADLINE_S = 30.0
RETRIES = 8
"""Retries, up to 2 s apart: callers do not notice a server that restarts within about 10 s."""

_CONNECTIONS = 32
_POOL_WAIT_S = 120.0

_TRANSIENT = (ConnectionError, TimeoutError, BusyLoadingError)


def connect(url: str, *, deadline_s: float = CONNECT_DEADLINE_S) -> redis.Redis:
    """Connect to redis://, rediss:// or unix:// and check the server.

    Waits up to `deadline_s` for it to answer. Raises redis.exceptions.ConnectionError when it does not, and
    RedisUnsuitable for a server that is too old or may evict keys.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            with redis.Redis.from_url(url, **_options(), retry=Retry(NoBackoff(), 0)) as probe:
                check_server(probe.info(), url)
            retry = Retry(ExponentialWithJitterBackoff(cap=2.0, base=0.05), RETRIES)
            return redis.Redis.from_url(url, **_options(), retry=retry)
        except _TRANSIENT as error:
            if time.monotonic() >= deadline:
                raise _unreachable(url, deadline_s, error) from error
            time.sleep(0.1)


async def connect_async(url: str, *, deadline_s: float = CONNECT_DEADLINE_S) -> redis.asyncio.Redis:
    """`connect` for asyncio."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            async with redis.asyncio.Redis.from_url(url, **_options(), retry=AsyncRetry(NoBackoff(), 0)) as probe:
                check_server(await probe.info(), url)
            retry = AsyncRetry(ExponentialWithJitterBackoff(cap=2.0, base=0.05), RETRIES)
            # Blocking: hundreds of groups may need a connection at once, and the default pool refuses the 101st.
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url, **_options(), retry=retry, max_connections=_CONNECTIONS, timeout=_POOL_WAIT_S
            )
            return redis.asyncio.Redis.from_pool(pool)
        except _TRANSIENT as error:
            if time.monotonic() >= deadline:
                raise _unreachable(url, deadline_s, error) from error
            await asyncio.sleep(0.1)


def check_server(info: Mapping[str, Any], url: str) -> None:
    """Refuse a server that is too old or may evict keys; warn of one that loses its data when it restarts.

    `info` is the answer to INFO. Raises RedisUnsuitable.
    """
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        raise RedisUnsuitable(f"Redis at {url} has version {version}; the sample queue needs 6.2 or later")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction" and int(info.get("maxmemory", 0)) > 0:
        raise RedisUnsuitable(
            f"Redis at {url} has maxmemory-policy {policy} and would evict finished groups; "
            "set it to noeviction (CONFIG SET maxmemory-policy noeviction)"
        )
    if policy != "noeviction":
        log.warning("Redis at %s has maxmemory-policy %s: set it to noeviction before it gets a maxmemory", url, policy)
    if not int(info.get("aof_enabled", 0)):
        log.warning("Redis at %s has appendonly off: finished groups are lost when it restarts", url)


def _options() -> dict[str, Any]:
    # protocol 2: the shape of XREADGROUP's answer differs between the protocols. The read timeout must exceed every
    # BLOCK and the transfer of a blob of hundreds of megabytes.
    return {
        "protocol": 2,
        "socket_timeout": 60.0,
        "socket_connect_timeout": 5.0,
        "retry_on_error": list(_TRANSIENT),
        "health_check_interval": 15,
        "socket_read_size": 1 << 20,
    }


def _unreachable(url: str, deadline_s: float, error: Exception) -> ConnectionError:
    return ConnectionError(f"Redis at {url} did not answer for {deadline_s:.0f} s: {error}")
