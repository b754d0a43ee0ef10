"""Rollouts are spread over reward workers, each always to the same one."""

from __future__ import annotations

from miles.services.controller.workers.reward_addresses import RewardAddresses


def test_rollouts_are_spread_over_the_built_in_workers() -> None:
    addresses = RewardAddresses({"judge": "far:9"}, ("a:1", "b:2"))
    found = [addresses.of(f"rollout-{i}") for i in range(4)]
    assert [each["default"] for each in found] == ["a:1", "b:2", "a:1", "b:2"]
    assert all(each["judge"] == "far:9" for each in found)


def test_a_name_without_a_number_has_its_worker_too() -> None:
    addresses = RewardAddresses({}, ("a:1", "b:2"))
    assert addresses.of("left")["default"] in ("a:1", "b:2")
    assert addresses.of("left") == addresses.of("left")


def test_a_users_own_default_serves_all() -> None:
    assert RewardAddresses({"default": "own:1"}).of("rollout-3") == {"default": "own:1"}
