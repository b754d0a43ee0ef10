"""How far training has got, and what happens to the position when the data changes."""

from __future__ import annotations

from miles.services.trainer.checkpoint.state import METRICS_KEPT, TrainerState


def test_consumed_groups_are_counted_off_without_gaps() -> None:
    state = TrainerState()
    state.consume([0, 1, 4])
    assert (state.consumed_below, state.consumed_group_ids) == (2, {4})
    assert [i for i in range(6) if state.is_consumed(i)] == [0, 1, 4]
    state.consume([1, 2, 3])
    assert (state.consumed_below, state.consumed_group_ids) == (5, set())


def test_the_state_survives_json_and_keeps_the_metrics_of_the_last_steps() -> None:
    state = TrainerState()
    for step in range(METRICS_KEPT + 3):
        state.consume([2 * step])
        state.finish_step({"train/loss": 0.5 * step})
    assert min(state.metrics) == 3
    assert TrainerState.from_json(state.to_json()) == state


def identity(**changes: object) -> dict[str, object]:
    return {
        "source": "a.jsonl", "rows": 20, "prompts": 20, "digest": "d", "answers": "a", "rollout_seed": 1,
        "rollout_shuffle": False, **changes,
    }  # fmt: skip


def after(groups: list[int], **data: object) -> TrainerState:
    state = TrainerState()
    assert state.take_data(identity(**data), 0) is None
    state.consume(groups)
    return state


def test_other_prompts_start_at_their_first_row_after_every_group_that_was_begun() -> None:
    state = after([0, 1, 4])
    words = state.take_data(identity(source="b.jsonl", prompts=12, digest="e"), groups_begun=8)
    assert words is not None
    assert "a.jsonl with 20 prompts, is b.jsonl with 12 prompts" in words
    assert "first row" in words
    assert (state.data_begins_at, state.consumed_below, state.consumed_group_ids) == (8, 8, set())
    assert state.take_data(identity(source="b.jsonl", prompts=12, digest="e"), groups_begun=9) is None
    assert state.data_begins_at == 8


def test_a_changed_order_starts_at_its_beginning() -> None:
    for change, word in (({"rollout_seed": 2}, "rollout_seed was 1, is 2"), ({"rollout_shuffle": False}, "shuffle")):
        state = after([0, 1], rollout_shuffle=True)
        words = state.take_data(identity(**{"rollout_shuffle": True, **change}), groups_begun=0)
        assert word in str(words)
        assert state.data_begins_at == 2


def test_the_same_prompts_go_on_at_their_position() -> None:
    moved = after([0, 1])
    assert moved.take_data(identity(source="elsewhere/a.jsonl", rollout_seed=7), 5) is None, "without shuffle, no seed"
    assert moved.data_begins_at == 0
    corrected = after([0, 1])
    assert "other labels" in str(corrected.take_data(identity(answers="b"), 5))
    assert (corrected.data_begins_at, corrected.consumed_below) == (0, 2)


def test_a_state_that_does_not_know_its_data_goes_on_at_its_position() -> None:
    old = TrainerState.from_json({"step": 3, "consumed_below": 6, "consumed_group_ids": [], "metrics": {}})
    assert old.take_data(identity(), 9) is None
    assert (old.data_begins_at, old.consumed_below) == (0, 6)
    assert TrainerState.from_json(old.to_json()) == old
