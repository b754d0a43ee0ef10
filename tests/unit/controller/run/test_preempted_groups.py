"""Groups that are preempted without end are said."""

from __future__ import annotations

from miles.services.controller.run.preempted_groups import PreemptedGroups


def test_a_group_that_never_gets_on_is_said() -> None:
    groups = PreemptedGroups()
    lines = [line for _ in range(16) if (line := groups.preempt(3, 0))]
    assert [line.split(" without")[0] for line in lines] == [
        "group 3 was preempted 8 times in a row",
        "group 3 was preempted 16 times in a row",
    ]


def test_a_group_that_gets_on_is_not() -> None:
    groups = PreemptedGroups()
    assert not any(groups.preempt(3, tokens) for tokens in range(50))
    for _ in range(5):
        assert not any(groups.preempt(4, 0) for _ in range(7))
        groups.finish(4)
