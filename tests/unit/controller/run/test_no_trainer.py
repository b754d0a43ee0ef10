"""How far a run has got that has no trainer to say it."""

from __future__ import annotations

from miles.services.controller.run.no_trainer import _after


def test_consumed_groups_are_kept_as_few_numbers() -> None:
    at = _after({}, 1, [0, 2, 3])
    assert at == {"step": 1, "consumed_below": 1, "consumed_group_ids": [2, 3]}
    assert _after(at, 2, [1, 5]) == {"step": 2, "consumed_below": 4, "consumed_group_ids": [5]}
