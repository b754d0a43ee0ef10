"""What a run's processes inherit from the user's environment."""

from __future__ import annotations

import logging

import pytest

from miles.launcher.inherited import inherited
from miles.launcher.program import warn_of_secrets
from miles.proxies import without_proxy_for_loopback


def test_variables_of_another_launcher_do_not_reach_our_ranks() -> None:
    leftovers = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node-0", "TORCHELASTIC_RUN_ID": "x"}
    leftovers |= {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error"}
    kept = {"PATH": "/bin", "MY_RANK": "1", "OMP_NUM_THREADS": "2"}
    assert inherited(leftovers | kept).items() >= kept.items()
    assert not inherited(leftovers | kept).keys() & leftovers.keys()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "example.org, localhost"}, "example.org,localhost,127.0.0.1,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,::1"),
    ],
)
def test_programs_on_this_machine_are_reached_without_a_proxy(given: dict[str, str], expected: str) -> None:
    found = without_proxy_for_loopback({"http_proxy": "http://p:1", **given})
    assert (found["no_proxy"], found["NO_PROXY"], found["http_proxy"]) == (expected, expected, "http://p:1")


def test_a_secret_on_the_command_line_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_secrets(["--redis-url", "redis://h:1/0", "--name", "a"])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_secrets(["--redis-url=redis://:hunter2@h:1/0"])
    (record,) = caplog.records
    assert "everybody on this machine" in record.message
    assert "hunter2" not in record.message
