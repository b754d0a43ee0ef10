"""When an ended process is started again."""

from __future__ import annotations

import pytest

from miles.launcher.restart_policy import RestartPolicy
from miles.rpc import ExitCode


def test_delays_grow_and_end_in_giving_up() -> None:
    policy = RestartPolicy(limit=4, first_delay_s=1.0, max_delay_s=5.0)
    assert [policy.delay_after(-9, now_s=float(i)) for i in range(5)] == [1.0, 2.0, 4.0, 5.0, None]


def test_old_ends_are_forgotten() -> None:
    policy = RestartPolicy(limit=1, window_s=10.0, first_delay_s=1.0)
    assert policy.delay_after(1, now_s=0.0) == 1.0
    assert policy.delay_after(1, now_s=11.0) == 1.0
    assert policy.delay_after(1, now_s=12.0) is None


@pytest.mark.parametrize("code", [ExitCode.BAD_CONFIG, ExitCode.PORT_IN_USE, ExitCode.MODEL_UNUSABLE])
def test_causes_that_a_restart_cannot_remove_are_final(code: ExitCode) -> None:
    assert RestartPolicy().delay_after(int(code), now_s=0.0) is None
