"""Collectives use the interface by which the ranks reach each other."""

from __future__ import annotations

import pytest

from miles.services.trainer.ranks.network import choose_interfaces, interface_towards

ADDRESSES = {"eth9": ["10.0.0.4", "fe80::1%eth9"], "lo": ["127.0.0.1", "::1"]}


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", "lo"), ("::1", "lo"), ("no-such-host.invalid", None)])
def test_the_interface_on_the_route_to_the_master_is_found(host: str, expected: str | None) -> None:
    assert interface_towards(host, 80, ADDRESSES) == expected


def test_ranks_of_one_host_leave_the_choice_to_nccl() -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "80", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    choose_interfaces(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in environment


def test_ranks_of_several_hosts_use_it_for_everything_unless_the_user_has_chosen() -> None:
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "80", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    environment = several | {"GLOO_SOCKET_IFNAME": "ib0"}
    choose_interfaces(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert environment["NCCL_SOCKET_IFNAME"] == "=lo"


def test_a_rank_alone_has_no_master() -> None:
    environment: dict[str, str] = {}
    choose_interfaces(environment)
    assert environment == {}
