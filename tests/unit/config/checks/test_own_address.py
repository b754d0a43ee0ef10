from __future__ import annotations

from config_cases import MINIMAL

from miles.addresses import is_loopback, why_not_bindable
from miles.config.checks.own_address import own_address
from miles.config.job import resolution


def test_the_address_is_one_of_this_machine_and_no_loopback() -> None:
    address = own_address()
    assert address is None or (not is_loopback(address) and why_not_bindable(address, 0) is None)


def test_several_nodes_take_it_as_host_unless_one_is_given() -> None:
    address = own_address()
    several = {**MINIMAL, "actor_num_nodes": 2}
    found = resolution(several, "cpu")
    assert found.flat.get("host") == address
    assert (f"host = {address}" in str(found.chosen)) == (address is not None)
    assert resolution({**several, "host": "10.0.0.1"}, "cpu").flat["host"] == "10.0.0.1"
    assert (
        resolution({**MINIMAL, "rollout_num_workers": 2, "rollout_workers_elsewhere": 1}, "cpu").flat.get("host")
        == address
    )
    assert "host" not in resolution(MINIMAL, "cpu").flat
