"""How many steps of a job are safe."""

from __future__ import annotations

from miles.services.controller.jobs.saved_steps import saved_step


def test_steps_are_safe_by_a_checkpoint_or_where_none_is_written_once_taken() -> None:
    assert saved_step({}) is None
    assert saved_step({"checkpoint": "runs/a/checkpoints/step_00000012"}) == 12
    assert saved_step({"generated_only": {"step": 7, "consumed_below": 30}}) == 7
