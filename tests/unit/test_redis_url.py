"""Addresses of Redis servers."""

from __future__ import annotations

import pytest

from miles.redis_url import redis_url_argument, why_not_redis_url, without_password

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "redis://:p%40ss@127.0.0.1:6379/0",
        "redis://user:p@h:6379/",
        "rediss://h:6380/3?ssl_cert_reqs=none",
        "redis://[::1]:6379/0",
        "redis://[::1]",
        "redis://redis_1:6379?db=2",
        "unix:///tmp/r.sock?db=0",
        "unix://:pw@/run/redis%20dir/r.sock",
    ],
)
def test_addresses_that_work_are_accepted(url: str) -> None:
    assert why_not_redis_url(url) is None
    assert redis_url_argument(url) == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("127.0.0.1:6379", "it must begin with redis://"),
        ("http://127.0.0.1:6379", "it must begin with redis://"),
        ("REDIS://h", "it must begin with redis://"),
        ("redis://", "no host"),
        ("redis:///0", "no host"),
        (f"redis://:{SECRET}@/0", "no host"),
        ("redis://:6379", "no host"),
        ("redis://127.0.0.1:99999", "99999 is not a port"),
        ("redis://127.0.0.1:0", "0 is not a port"),
        ("redis://127.0.0.1:x", "x is not a port"),
        ("redis://127.0.0.1:6379/zero", "zero is not the number of a database"),
        ("redis://127.0.0.1:6379?db=-1", "-1 is not the number of a database"),
        ("redis://::1:6379", "must be in brackets"),
        ("redis://0.0.0.0:6379", "can be listened on, but"),
        ("redis://a b:6379", "a space"),
        (f"redis://:{SECRET}/x@h:6379", "%2F"),
        (f"redis://:{SECRET}#x@h:6379", "%23"),
        ("redis://h?protocol=3", "the parameter protocol"),
        ("redis://h?ssl_cert_reqs=none", "which is of rediss://"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        (f"unix:///{'a' * 120}", "its path has 121 bytes"),
    ],
)
def test_addresses_that_can_never_work_are_refused_without_their_password(url: str, problem: str) -> None:
    said = why_not_redis_url(url) or "accepted"
    assert problem in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{SECRET}@h:1/0", "redis://h:1/0"),
        (f"redis://me:{SECRET}@x@h:1", "redis://h:1"),
        (f"redis://:{SECRET}/x@h:1", "redis://h:1"),
        (f"rediss://h?password={SECRET}", "rediss://h"),
        (f"unix://:{SECRET}@/r.sock?db=1", "unix:///r.sock"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
