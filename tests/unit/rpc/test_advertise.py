"""The address that a service tells others."""

from __future__ import annotations

import pytest

from miles.rpc.advertise import reachable_address


@pytest.mark.parametrize(
    ("bound", "advertise", "expected"),
    [
        ("127.0.0.1:50", None, "127.0.0.1:50"),
        ("0.0.0.0:50", None, "127.0.0.1:50"),
        ("[::]:50", None, "127.0.0.1:50"),
        ("0.0.0.0:50", "node-3", "node-3:50"),
        ("0.0.0.0:50", "node-3:80", "node-3:80"),
        ("127.0.0.1:50", "10.0.0.7", "10.0.0.7:50"),
        ("0.0.0.0:50", "[fd00::7]", "[fd00::7]:50"),
        ("0.0.0.0:50", "[fd00::7]:80", "[fd00::7]:80"),
    ],
)
def test_others_are_told_an_address_that_they_can_reach(bound: str, advertise: str | None, expected: str) -> None:
    assert reachable_address(bound, advertise, "127.0.0.1:9") == expected


@pytest.mark.parametrize("advertise", ["::1", "[::1]"])
def test_an_ipv6_host_gets_its_brackets(advertise: str) -> None:
    assert reachable_address("[::]:50", advertise, "127.0.0.1:9") == "[::1]:50"
