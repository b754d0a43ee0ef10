"""Addresses of services: what is refused, what is accepted, and how they are put together."""

from __future__ import annotations

import argparse

import pytest

from miles.addresses import (
    address_argument,
    is_loopback,
    join_address,
    listen_argument,
    reachable_here,
    split_address,
    why_not_address,
    why_not_bindable,
    why_not_host,
)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:9000", "begins with http://"),
        ("grpc://reward:9000", "begins with grpc://"),
        ("127.0.0.1:9000/score", "a path"),
        ("127.0.0.1", "no port"),
        ("[::1]", "no port: write [::1]:9000"),
        ("", "it is empty"),
        (":9000", "no host: write 127.0.0.1:9000"),
        ("127.0.0.1:0", "0 is not a port from 1 to 65535"),
        ("127.0.0.1:99999", "99999 is not a port"),
        ("127.0.0.1:http", "http is not a port"),
        ("127.0.0.1:٣", "is not a port"),
        ("127.0.0.1:", "nothing is not a port"),
        ("a b:9000", "a space"),
        ("a:9000\n", "a space"),
        ("user@host:9000", "a user name"),
        ("a:1,b:2", "a comma"),
        ("::1:9000", "write [::1]:9000"),
        ("[::1:9000", "is no IPv6 address"),
        ("[fe80::zz]:9000", "is no IPv6 address"),
        ("300.1.1.1:9000", "is no IPv4 address"),
        ("127.1:9000", "is no IPv4 address"),
        ("-host:9000", "is no host name"),
        ("a..b:9000", "is no host name"),
        ("bücher.example:9000", "write xn--bcher-kva.example"),
        (f"{'a' * 64}:9000", "is no host name"),
        ("0.0.0.0:9000", "can be listened on, but"),
        ("[::]:9000", "can be listened on, but"),
    ],
)
def test_an_address_that_can_never_work_is_refused_with_the_reason(address: str, problem: str) -> None:
    assert problem in (why_not_address(address) or "accepted")
    with pytest.raises(argparse.ArgumentTypeError):
        address_argument(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:9000",
        "reward_1:9000",
        "node-3.cluster.local.:9000",
        "[::1]:9000",
        "[fe80::1%eth0]:9000",
        "localhost:1",
    ],
)
def test_addresses_that_work_are_accepted(address: str) -> None:
    assert why_not_address(address) is None
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "127.0.0.1:0"])
def test_every_interface_and_any_port_can_be_listened_on(address: str) -> None:
    assert listen_argument(address) == address


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost", "10.0.0.7", "fe80::1%eth0", "a_b", "0.0.0.0"])
def test_a_host_may_have_brackets_or_not(host: str) -> None:
    assert why_not_host(host) is None


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("http://127.0.0.1", "begins with http://"),
        ("127.0.0.1:5000", "it has a port: leave :5000 out"),
        ("[::1]:5000", "it has a port: leave :5000 out"),
        ("", "is no host name"),
        ("1.2.3", "is no IPv4 address"),
    ],
)
def test_what_is_no_host_is_refused(host: str, problem: str) -> None:
    assert problem in (why_not_host(host) or "accepted")


@pytest.mark.parametrize(
    ("listened_on", "reached_at"),
    [
        ("0.0.0.0:5", "127.0.0.1:5"),
        ("[::]:5", "[::1]:5"),
        ("[::1]:5", "[::1]:5"),
        ("::1:5", "[::1]:5"),
        ("10.0.0.7:5", "10.0.0.7:5"),
    ],
)
def test_a_machine_reaches_its_own_service(listened_on: str, reached_at: str) -> None:
    assert reachable_here(listened_on) == reached_at


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("Localhost.", True),
        ("10.0.0.7", False),
        ("::", False),
        ("0.0.0.0", False),
        ("localhost.evil.example", False),
    ],
)
def test_only_loopback_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    error = why_not_bindable("192.0.2.1", 0)  # of a network that is for documentation
    assert error is not None
    assert error.strerror == "Cannot assign requested address"
    assert why_not_bindable("[127.0.0.1]", 0) is None
