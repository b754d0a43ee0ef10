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
from miles.queue.refusals import RETRIED, Patience
from miles.redis_url import without_password

log = logging.getLogger(__name__)

MINIMUM_VERSION = (6, 2)
"""The first version with GETEX and with exclusive ranges in XPENDING."""

CONNECT_DEADLINE_S = 30.0
RETRIES = 8
"""Retries, up to 2 s apart: callers do not notice a server that restarts within about 10 s."""

_PROBE = "return redis.call('del', KEYS[1])"
"""Needs the right to run scripts and to write our keys, no memory, and changes nothing."""
_PROBE_KEY = "miles:connection_check"
_PROBE_TIMEOUT_S = 5.0
_PAUSE_S = 0.1
_CONNECTIONS = 32
_POOL_WAIT_S = 120.0

_TRANSIENT = (ConnectionError, TimeoutError, BusyLoadingError)


def connect(url: str, *, deadline_s: float = CONNECT_DEADLINE_S) -> redis.Redis:
    """Connect to redis://, rediss:// or unix:// and check the server.

    Waits up to `deadline_s` for it to answer, and longer while it loads its data. Raises
    redis.exceptions.ConnectionError when it does not answer, and at once RedisRefused for a cause that waiting cannot
    remove and RedisUnsuitable for a server that cannot hold the queue.
    """
    patience = Patience(url, deadline_s)
    while True:
        try:
            with redis.Redis.from_url(url, **_probe_options(), retry=Retry(NoBackoff(), 0)) as probe:
                check_server(probe.info(), url)
                probe.eval(_PROBE, 1, _PROBE_KEY)
            retry = Retry(ExponentialWithJitterBackoff(cap=2.0, base=0.05), RETRIES)
            return redis.Redis.from_url(url, **_options(), retry=retry)
        except RETRIED as error:
            patience.after(error)
        time.sleep(_PAUSE_S)


async def connect_async(url: str, *, deadline_s: float = CONNECT_DEADLINE_S) -> redis.asyncio.Redis:
    """`connect` for asyncio."""
    patience = Patience(url, deadline_s)
    while True:
        try:
            async with redis.asyncio.Redis.from_url(url, **_probe_options(), retry=AsyncRetry(NoBackoff(), 0)) as probe:
                check_server(await probe.info(), url)
                await probe.eval(_PROBE, 1, _PROBE_KEY)
            retry = AsyncRetry(ExponentialWithJitterBackoff(cap=2.0, base=0.05), RETRIES)
            # Blocking: hundreds of groups may need a connection at once, and the default pool refuses the 101st.
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url, **_options(), retry=retry, max_connections=_CONNECTIONS, timeout=_POOL_WAIT_S
            )
            return redis.asyncio.Redis.from_pool(pool)
        except RETRIED as error:
            await asyncio.to_thread(patience.after, error)
        await asyncio.sleep(_PAUSE_S)


def check_server(info: Mapping[str, Any], url: str) -> None:
    """Refuse a server that is too old, cannot be written to, or may evict keys; warn of one that forgets.

    `info` is the answer to INFO. Raises RedisUnsuitable.
    """
    url = without_password(url)
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        raise RedisUnsuitable(f"Redis at {url} has version {version}; the sample queue needs 6.2 or later")
    if int(info.get("cluster_enabled", 0)):
        problem = "is a cluster, whose keys lie on several servers; the sample queue needs a single server"
        raise RedisUnsuitable(f"Redis at {url} {problem}")
    if info.get("role") in ("slave", "replica"):
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        raise RedisUnsuitable(f"Redis at {url} is a read-only replica; give the address of its primary, {primary}")
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


def _probe_options() -> dict[str, Any]:
    return {**_options(), "socket_timeout": _PROBE_TIMEOUT_S}
