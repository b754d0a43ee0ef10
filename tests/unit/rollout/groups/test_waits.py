"""What a rollout reports that its groups wait for."""

from __future__ import annotations

from miles.queue.backpressure import WriteWait
from miles.reward_sdk.client import ServiceWait
from miles.services.rollout.groups.waits import queue_waits, reward_waits

LABEL = "reward service 'mine' at host:1"


def test_a_service_that_fails_is_reported_at_once_and_a_slow_one_later() -> None:
    failing = ServiceWait(LABEL, 4, 1000.0, "it cannot be reached: Connection refused", 3)
    slow = ServiceWait("reward service 'slow' at host:2", 1, 1000.0, "", 0)
    [wait] = reward_waits([failing, slow], 180.0, "retry", now_s=1001.0)
    assert (wait.what, wait.samples) == (LABEL, 4)
    assert wait.detail == "it cannot be reached: Connection refused (3 times)"
    assert wait.gives_up_unix_ns == int(1180e9)
    assert [wait.what for wait in reward_waits([failing, slow], 180.0, "drop", now_s=1011.0)] == [LABEL, slow.service]


def test_groups_that_redis_does_not_take_are_one_wait() -> None:
    waiting = {"group 3": WriteWait(1005.0, 600.0, "OOM"), "group 2": WriteWait(1001.0, 600.0, "OOM command")}
    [wait] = queue_waits(waiting)
    assert (wait.what, wait.detail) == ("Redis to take finished groups", "2 wait: OOM command")
    assert (wait.since_unix_ns, wait.gives_up_unix_ns) == (int(1001e9), int(1601e9))
    assert list(queue_waits({})) == []
